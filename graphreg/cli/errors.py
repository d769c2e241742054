"""Formats an error as one line, with commands to type where the error's text has Python calls."""

from __future__ import annotations

import traceback
from pathlib import Path

from graphreg.errors import GraphRegError

LONGEST = 300
COMMANDS_FOR_CODE = {"graphreg.names(model)": "graphreg names {model}", "graphreg.registered()": "graphreg plan --help"}


class UsageError(GraphRegError):
    """The command line is wrong."""


def sentence(error: BaseException, model: str = "MODEL", inputs: bool = True) -> str:
    """Return an error's text on one line, with commands in place of Python calls.

    ``model``: the model as it was given on the command line. ``inputs``: whether example inputs
    were given; if not, and the text asks for ``example_inputs``, the line says which option gives
    them.
    """
    text = " ".join(str(error).split())
    for code, command in COMMANDS_FOR_CODE.items():
        text = text.replace(code, command.format(model=model))
    if "example_inputs" in text and not inputs:
        text += " --input 1x3x224x224 (a shape) gives example_inputs."
    return text


def raised(error: BaseException, file: str | None = None) -> str:
    """Summarize an error that the user's code raised: ``ValueError: message (net.py, line 3)``.

    The place in parentheses is the last entry for ``file`` in the traceback. It is left out if
    there is no such entry, or ``file`` is None.
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if file is not None and frame.filename == file]
    return f"{text} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else text
