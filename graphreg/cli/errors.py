"""What the command line says on one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import traceback
from pathlib import Path

from graphreg.errors import GraphRegError

LONGEST = 300
IN_WORDS_OF_THE_COMMAND = {"graphreg.names(model)": "graphreg names {model}", "graphreg.registered()": "graphreg plan --help"}


class UsageError(GraphRegError):
    """A command line that cannot be carried out."""


def sentence(error: BaseException, model: str = "MODEL", inputs: bool = True) -> str:
    """The error as one line, its code in the words of the command line. ``inputs``: whether inputs were given."""
    text = " ".join(str(error).split())
    for code, command in IN_WORDS_OF_THE_COMMAND.items():
        text = text.replace(code, command.format(model=model))
    if "example_inputs" in text and not inputs:
        text += " --input 1x3x224x224 (a shape) gives example_inputs."
    return text


def raised(error: BaseException, file: str | None = None) -> str:
    """``ValueError: its first line (net.py, line 3)``: of a user's own code, with the last line of ``file`` that it went through."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if file is not None and frame.filename == file]
    return f"{text} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else text
