"""Estimates the time that is left: from the seconds that each part usually takes, and from how fast the parts so far went.

It needs the standard library alone, because ``.ci/install`` uses it before anything is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

STEADY = 10.0  # seconds of usual pace that are assumed at first, so that one quick or slow step decides nothing
ALMOST = 0.97  # of a part, while nothing has said that it ended


class Course:
    """Several parts, one after the other, and the time that they still take.

    Args:
        parts: The seconds that each part usually takes, by name, in order.
        then: Seconds that something else takes afterwards, whose pace is its own.
        clock: Gives the present time in seconds.
    """

    def __init__(self, parts: Mapping[str, float], then: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.parts, self.then, self._clock = dict(parts), then, clock
        self.part = next(iter(self.parts))
        self._started = self._known_at = clock()
        self._before = self._within = 0.0  # usual seconds: of the parts that have ended, and of the present one as far as it is known

    def begin(self, part: str) -> None:
        """Go on to a part; those before it have ended. Nothing happens if it is the present one."""
        if part == self.part:
            return
        names = list(self.parts)
        self._before, self._within = sum(self.parts[name] for name in names[: names.index(part)]), 0.0
        self.part, self._known_at = part, self._clock()

    def reached(self, share: float) -> None:
        """Note how much of the present part is done, from 0 to 1."""
        if share * self.parts[self.part] > self._within:
            self._within, self._known_at = share * self.parts[self.part], self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._started

    @property
    def pace(self) -> float:
        """How many seconds a usual second takes."""
        return (self._known_at - self._started + STEADY) / (self._before + self._within + STEADY)

    @property
    def done(self) -> float:
        """Usual seconds' worth of what is done. Between two steps, the clock counts."""
        guessed = self._within + (self._clock() - self._known_at) / self.pace
        return self._before + max(self._within, min(guessed, ALMOST * self.parts[self.part]))

    @property
    def total(self) -> float:
        """The usual seconds of all parts, and of what follows."""
        return sum(self.parts.values()) + self.then

    @property
    def left(self) -> float:
        """Seconds that are left, of the parts and of what follows."""
        return self.pace * (self.total - self.then - self.done) + self.then


def about(seconds: float) -> str:
    """Seconds as one says them: in steps of five, or in minutes."""
    if seconds > 150:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(5, 5 * round(seconds / 5))} s"


def bar(share: float, width: int = 24) -> str:
    """A bar of plain letters."""
    full = round(width * min(share, 1.0))
    return f"[{'#' * full}{'-' * (width - full)}]"
