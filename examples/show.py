"""How the demo speaks: plain flushed lines in a pipe, the same lines over a progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

WIDTH = 100
Advance = Callable[[], None]


class Screen:
    """Writes lines, and shows progress where somebody watches."""

    def __init__(self) -> None:
        # Asked of stdout itself: rich also counts FORCE_COLOR and notebooks as terminals, and would write escapes to a log.
        self.console = Console(highlight=False) if sys.stdout.isatty() else None

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line or several, never wrapped; ``style`` is rich's, for terminals only."""
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
        """A bar of ``total`` steps under the lines; in a pipe nothing, since the lines themselves tell."""
        if self.console is None:
            yield lambda: None
            return
        shape = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*shape, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)


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
