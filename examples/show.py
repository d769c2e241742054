"""How the demos speak: the same lines in a pipe and on a terminal; while they wait, a bar on a terminal, or a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WIDTH = 100
QUIET = 15.0  # seconds after which a pipe gets a line
Advance = Callable[[], None]


class Screen:
    """Writes lines, and shows progress where somebody watches."""

    def __init__(self) -> None:
        # Asked of stdout itself: rich also counts FORCE_COLOR and notebooks as terminals, and would write escapes to a log.
        self.console = Console(highlight=False) if sys.stdout.isatty() else None
        self.spoke = time.monotonic()

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line or several, never wrapped; ``style`` is rich's, for terminals only."""
        self.spoke = time.monotonic()
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
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A bar of ``total`` steps under the lines, with the time that is left."""
        done, start = [0], time.monotonic()
        if self.console is None:
            with self._now_and_then(lambda: f"{what}: {done[0]} of {total}, {time.monotonic() - start:.0f} s"):
                yield lambda: done.__setitem__(0, done[0] + 1)
            return
        shape = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*shape, TimeRemainingColumn(), console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def expected(self, what: str, seconds: float) -> Iterator[None]:
        """For one long step: a bar that the clock fills, up to the time that the step usually takes."""
        start = time.monotonic()
        if self.console is None:
            with self._now_and_then(lambda: f"{what}: {time.monotonic() - start:.0f} s of about {seconds:.0f}"):
                yield
            return
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self.console,
                      transient=True) as bar:  # fmt: skip
            task = bar.add_task(f"{what}, about {seconds:.0f} s", total=seconds)
            with every(0.5, lambda: bar.update(task, completed=min(time.monotonic() - start, 0.97 * seconds))):
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
