"""Finds the line of the user's code that made a node; ``node.meta["origin"]`` stores it as file and line number."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import fx, nn

Origin = tuple[str, int]
# torch's and graphreg's
LIBRARY_FOLDERS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/")
_FRONT_ENDS = ("graphreg.tracing.symbolic.symbolic", "graphreg.tracing.export.export")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@cache
def is_users(file: str) -> bool:
    return not file.startswith((*LIBRARY_FOLDERS, "<"))


def origin_now() -> Origin | None:
    """Return the innermost running line of code outside torch and graphreg; None if no such line runs within the trace."""
    frame: FrameType | None = sys._getframe(1)
    # the frames beyond it belong to the tracer's caller
    while frame is not None and frame.f_globals.get("__name__") not in _FRONT_ENDS:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def origin_in_trace(stack_trace: str | None) -> Origin | None:
    """Return the innermost line outside torch and graphreg in a stack trace that torch recorded; None if there is none."""
    origins = [(match["file"], int(match["line"])) for match in _FRAME.finditer(stack_trace or "")]
    return next((origin for origin in reversed(origins) if is_users(origin[0])), None)


def forward_line(module: nn.Module) -> Origin | None:
    """Return where the forward of a module begins, if it is the user's code; else None."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code is not None and is_users(code.co_filename) else None


def origin_of(node: fx.Node) -> Origin | None:
    """Return the line that made a node; None if the trace did not record it."""
    known: Origin | None = node.meta.get("origin")
    return known or origin_in_trace(node.stack_trace)


@cache
def short(origin: Origin) -> str:
    """Return an origin as text, with the path relative to the folder the file is imported from: ``torchvision/models/resnet.py:268``."""
    file, line = origin
    folders = sorted((f"{path.rstrip('/')}/" for path in sys.path if path), key=len, reverse=True)
    folder = next((path for path in folders if file.startswith(path)), f"{Path(file).parent}/")
    return f"{file.removeprefix(folder)}:{line}"
