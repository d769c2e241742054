# PYTHON_ARGCOMPLETE_OK
"""The entry point of the command line: runs a command, prints its result, and turns errors into one line and an exit status."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graphreg.cli.errors import UsageError, raised, sentence
from graphreg.cli.parser import on_the_path, parser
from graphreg.errors import GraphRegError

WRONG, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        0 on success; 2 for a GraphRegError or an OSError, such as a wrong command line, with one
        line on stderr; 1 for any other error, and if ``doctor`` or ``audit`` finds a fault; 130
        when interrupted; 141 when stdout is closed.
    """
    args = Namespace()
    try:
        grammar = parser()
        if "_ARGCOMPLETE" in os.environ:
            _argcomplete().autocomplete(grammar)
        args = grammar.parse_args(argv)
        # importing torch takes a third less time without garbage collection
        with _collector_at_rest(), _short_warnings():
            return _run(args)
    except BrokenPipeError:
        # Python flushes stdout at exit, and would report the closed pipe again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (GraphRegError, OSError) as error:
        has_inputs = bool(getattr(args, "input", None) or getattr(args, "inputs", None))
        return _print_error(error, args, WRONG, sentence(error, getattr(args, "model", "MODEL"), has_inputs))
    except SystemExit as end:  # --help and --version raise it
        return int(end.code or 0)
    except Exception as error:
        text = f"{raised(error)} (graphreg does not expect this error; --traceback shows where it comes from)"
        return _print_error(error, args, FAILED, text)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Switch off Python's garbage collector for a block. ``torch_internals`` has the same function, but importing it imports torch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(args: Namespace) -> int:
    # From here on, torch or an optional package is imported; --help and --version end before this
    # line. At exit, gc.freeze excludes all objects from Python's last garbage collection, which
    # would walk through all of torch and take a quarter of the whole time.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    if args.command == "demo":
        status: int = importlib.import_module("graphreg.cli.demos").demo(args.demo)
        return status
    if args.command == "completion":
        text = _argcomplete().shellcode(["graphreg"], shell=args.shell)
    else:
        # stdout is for the result alone
        with contextlib.redirect_stdout(sys.stderr), on_the_path(Path.cwd()):
            result = importlib.import_module("graphreg.cli.commands").run(args)
        # str() has colours if stdout is a terminal
        text = json.dumps(result.to_dict(), indent=2) if args.json else str(result)
    print(text, flush=True)
    return FAILED if args.command in ("doctor", "audit") and not result.ok else 0


def _argcomplete() -> Any:
    try:
        return importlib.import_module("argcomplete")
    except ModuleNotFoundError:
        raise UsageError("completion needs argcomplete, which is not installed: pip install 'graphreg[completion]'.") from None


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Within a block, print each warning as one line on stderr."""
    with warnings.catch_warnings():

        def show(message: Warning | str, *place: Any, **more: Any) -> None:
            text = " ".join(str(message).split()).removeprefix("graphreg: ")
            print(f"graphreg: warning: {text}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _print_error(error: Exception, args: Namespace, status: int, text: str) -> int:
    if getattr(args, "traceback", False):
        traceback.print_exception(error)
    print(f"graphreg: {text}", file=sys.stderr)
    return status
