"""Words an error as one line of the command line, with what to type in the place of Python code."""

from __future__ import annotations

import traceback
from pathlib import Path

from graphreg.errors import GraphRegError

LONGEST = 300
COMMANDS_FOR_CODE = {"graphreg.names(model)": "graphreg names {model}", "graphreg.registered()": "graphreg plan --help"}


class UsageError(GraphRegError):
    """The command line is wrong."""


def sentence(error: BaseException, model: str = "MODEL", inputs: bool = True) -> str:
    """Return an error as one line that names commands in the place of Python calls. ``inputs``: whether inputs were given."""
    text = " ".join(str(error).split())
    for code, command in COMMANDS_FOR_CODE.items():
        text = text.replace(code, command.format(model=model))
    if "example_inputs" in text and not inputs:
        text += " --input 1x3x224x224 (a shape) gives example_inputs."
    return text


def raised(error: BaseException, file: str | None = None) -> str:
    """Summarize an error of the user's code, with the last line of ``file`` it went through: ``ValueError: message (net.py, line 3)``."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if file is not None and frame.filename == file]
    return f"{text} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else text
