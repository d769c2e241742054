"""graphreg in a minute, offline: python examples/demo.py

Part 1 compares regularizers on scikit-learn's digits; part 2 regularizes, compiles, trains and strips resnet18.
Ends with status 0 only if every proof holds. With ``--study``, part 1 has twice as many seeds, and chooses the strengths: two minutes more.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from types import ModuleType

EXTRA = ("matplotlib", "pygraphviz", "rich", "scipy", "sklearn", "torchvision")
NEEDED = "The demo needs {}, which is not installed: pip install 'graphreg[demo]'"
TOP = Path(__file__).resolve().parents[1]
FOLDER = TOP / "build" / "demo" if (TOP / "Makefile").exists() else Path("graphreg-demo").resolve()
IMPORTING = "importing torch"
# Seconds of each part on two idle cores of a new server, by the names that the parts give to Screen.
SECONDS = {IMPORTING: 6.0, "training many networks": 26.0, "compiling": 16.0, "training resnet18": 7.0, "drawing": 3.0}
STUDY = SECONDS | {"training many networks": 130.0}
try:
    from show import Screen
except ModuleNotFoundError as error:
    raise SystemExit(NEEDED.format(error.name)) from None


def main() -> None:
    """Both parts, then what came out of them."""
    options = argparse.ArgumentParser(prog="demo.py")
    options.add_argument("--study", action="store_true", help="choose the strengths, and use twice as many seeds")
    whole = options.parse_args().study
    start, screen = time.perf_counter(), Screen()
    minutes = "Three minutes" if whole else "A minute"
    screen.line("graphreg: dropout, noise and penalties by name in a PyTorch model", style="bold")
    screen.line(f"{minutes} on two cores, no network.")
    with screen.course(STUDY if whole else SECONDS):
        digits, network = imported("digits_verdict"), imported("digits_resnet")
        lines = [*digits.study(screen, whole), *network.resnet(screen, FOLDER)]
    screen.title("Summary")
    for line in lines:
        screen.line(f"- {line}")
    screen.line(f"- all of this took {time.perf_counter() - start:.0f} s")


def imported(name: str) -> ModuleType:
    """Import one of the parts, which import torch: that takes seconds, so the bar is shown first."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise SystemExit(NEEDED.format(error.name)) from None


if __name__ == "__main__":  # the study's worker processes import this file
    main()
