"""How the demos speak: the same lines in a pipe and on a terminal; while they wait, a bar on a terminal, or a line now and then."""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from course import Course, about
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

WIDTH = 80  # that of a terminal, and of what is written to a pipe
QUIET = 10.0  # seconds after which a pipe gets a line
USUAL = 1.0  # seconds of a step, before one was timed
Advance = Callable[[], None]


class Screen:
    """Writes lines, and shows progress where somebody watches."""

    def __init__(self) -> None:
        # Asked of stdout itself: rich also counts FORCE_COLOR and notebooks as terminals, and would write escapes to a log.
        self.console = Console(highlight=False) if sys.stdout.isatty() else None
        self.spoke = time.monotonic()
        self._course: Course | None = None

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line or several, each filled to the width; ``style`` is rich's, for terminals only."""
        self.spoke = time.monotonic()
        text = "\n".join(part for line in text.split("\n") for part in filled(line))
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def title(self, text: str) -> None:
        """A heading with room above."""
        self.line(f"\n{text}\n{'-' * len(text)}", style="bold")

    def block(self, text: str) -> None:
        """Somebody else's text, indented by two, cut at the width of the page."""
        for line in text.splitlines():
            shown = f"  {line}"
            self.line(shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}...", style="cyan")

    @contextmanager
    def course(self, parts: Mapping[str, float]) -> Iterator[None]:
        """One bar for all that the block does, with the time that is left.

        ``parts``: the seconds that each part usually takes, by the name that ``progress`` and ``expected`` call it.
        """
        course = self._course = Course(parts)
        try:
            if self.console is None:
                with self._now_and_then(lambda: f"{course.part}: {course.elapsed:.0f} s so far, {about(course.left)} left"):
                    yield
                return
            what, left = TextColumn("{task.description}"), TextColumn("{task.fields[left]}")
            shape = (SpinnerColumn(), what, BarColumn(20), TimeElapsedColumn(), left)
            with Progress(*shape, console=self.console, transient=True) as shown:
                task = shown.add_task(course.part, total=course.total, left="")

                def refresh() -> None:
                    shown.update(task, description=course.part, completed=course.done, left=f"{about(course.left)} left")

                refresh()
                with every(0.5, refresh):
                    yield
        finally:
            self._course = None

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A part of ``total`` steps: of the course if there is one, or else with a bar of its own."""
        if self._course is None:
            with self.course({what: USUAL * total}), self.progress(what, total) as advance:
                yield advance
            return
        course, done = self._course, [0]
        course.begin(what)

        def advance() -> None:
            done[0] += 1
            course.reached(done[0] / total)

        yield advance

    @contextmanager
    def expected(self, what: str, seconds: float) -> Iterator[None]:
        """A long step, of which only the clock tells how far it is: a part of the course if there is one, or else with a bar of its own."""
        if self._course is None:
            with self.course({what: seconds}):
                yield
            return
        self._course.begin(what)
        yield

    @contextmanager
    def _now_and_then(self, text: Callable[[], str]) -> Iterator[None]:
        """In the block, write ``text()`` whenever nothing was written for a while."""

        def speak() -> None:
            if time.monotonic() - self.spoke >= QUIET:
                self.line(f"  ... {text()}")

        with every(min(QUIET, 0.5), speak):
            yield


@contextmanager
def every(seconds: float, function: Callable[[], object]) -> Iterator[None]:
    """Call a function again and again in the block, from a thread of its own."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def filled(line: str) -> list[str]:
    """The line, or several lines if it is too long; those behind the first of an item or of an indented line are indented."""
    indent = " " * (len(line) - len(line.lstrip(" -")))
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [line]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns two apart, the first to the left and the others, which are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )


def prove(holds: bool, claim: str) -> str:
    """The claim, if it holds; otherwise the demo ends here with status 1."""
    if not holds:
        raise SystemExit(f"FAILED: {claim}")
    return claim
