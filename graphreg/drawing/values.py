"""Reads the file that ``monitor(..., file=...)`` writes, for the page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from graphreg.errors import GraphRegError, first_line

MOST = 200  # readings that a page holds; of more, evenly spaced ones are taken


def read_values(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the readings, the last one included.

    Raises:
        GraphRegError: The file cannot be read, or is no file of a monitor.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GraphRegError(f"values={str(path)!r} cannot be read ({first_line(error)}).") from error
    readings = [_reading(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not readings:
        raise GraphRegError(f"values={str(path)!r} has no readings yet. Call the module in train mode while it is monitored.")
    step = max(1, -(-len(readings) // MOST))
    # Counted from the end, so that the last reading is among them.
    return readings[::-1][::step][::-1]


def _reading(path: object, number: int, line: str) -> dict[str, Any]:
    try:
        reading = json.loads(line)
        if isinstance(reading["step"], int) and all(isinstance(value, (int, float, str)) for value in reading["values"].values()):
            return {"step": reading["step"], "values": reading["values"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise GraphRegError(
        f"values={str(path)!r}, line {number}, is no reading of a monitor; give the file that graphreg.monitor(module, file=...) wrote."
    )
