"""graphreg in two to three minutes, offline: python examples/demo.py

Part 1 compares regularizers on scikit-learn's digits; part 2 regularizes, compiles, trains and strips resnet18.
Ends with status 0 only if every proof holds.
"""

from __future__ import annotations

import time

EXTRA = ("rich", "scipy", "sklearn", "torchvision")
try:
    from digits_resnet import resnet
    from digits_verdict import study
    from show import Screen
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise
    raise SystemExit(f"The demo needs {error.name}, which is not installed: pip install 'graphreg[demo]'") from None


def main() -> None:
    """Both parts, then what came out of them."""
    start = time.perf_counter()
    screen = Screen()
    screen.line("graphreg: dropout, noise and penalties by name in a PyTorch model. Two to three minutes, no network.", style="bold")
    lines = [*study(screen), *resnet(screen)]
    screen.title("Summary")
    for line in lines:
        screen.line(f"- {line}")
    screen.line(f"- all of this took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":  # the study's worker processes import this file
    main()
