"""graphreg in a minute, offline: python examples/demo.py

Part 1 compares regularizers on scikit-learn's digits; part 2 regularizes, compiles, trains and strips resnet18.
Ends with status 0 only if every proof holds. With ``--study``, part 1 has twice as many seeds, and chooses the strengths: two minutes more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

EXTRA = ("matplotlib", "pygraphviz", "rich", "scipy", "sklearn", "torchvision")
TOP = Path(__file__).resolve().parents[1]
FOLDER = TOP / "build" / "demo" if (TOP / "Makefile").exists() else Path("graphreg-demo").resolve()
try:
    import pygraphviz  # noqa: F401
    from digits_resnet import resnet
    from digits_verdict import study
    from show import Screen
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise
    raise SystemExit(f"The demo needs {error.name}, which is not installed: pip install 'graphreg[demo]'") from None


def main() -> None:
    """Both parts, then what came out of them."""
    options = argparse.ArgumentParser(prog="demo.py")
    options.add_argument("--study", action="store_true", help="choose the strengths, and use twice as many seeds")
    whole = options.parse_args().study
    start, screen = time.perf_counter(), Screen()
    minutes = "Three minutes" if whole else "A minute"
    screen.line(f"graphreg: dropout, noise and penalties by name in a PyTorch model. {minutes} on two cores, no network.", style="bold")
    lines = [*study(screen, whole), *resnet(screen, FOLDER)]
    screen.title("Summary")
    for line in lines:
        screen.line(f"- {line}")
    screen.line(f"- all of this took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":  # the study's worker processes import this file
    main()
