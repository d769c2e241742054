"""The recurrent and the contractive penalties on real data, offline: python examples/demo_penalties.py

Part 1 reads longer sequences than were trained on; part 2 is a contractive autoencoder.
"""

from __future__ import annotations

import time

EXTRA = ("rich", "scipy", "sklearn")
try:
    from contractive_study import contractive
    from recurrent_study import recurrent
    from show import Screen
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in EXTRA:
        raise
    raise SystemExit(f"The demo needs {error.name}, which is not installed: pip install 'graphreg[demo]'") from None


def main() -> None:
    """Both parts, then what came out of them."""
    start = time.perf_counter()
    screen = Screen()
    screen.line("graphreg: recurrent and contractive penalties by name", style="bold")
    screen.line("Two to three minutes, no network.")
    lines = [*recurrent(screen), *contractive(screen)]
    screen.title("Summary")
    for line in lines:
        screen.line(f"- {line}")
    screen.line(f"- all of this took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":  # the studies' worker processes import this file
    main()
