"""Lays out tables and paragraphs: as text that fits a width, in colours on a terminal, or as HTML for a notebook. Shows progress."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import ClassVar

from graphreg.errors import RegularizerError, shown
from graphreg.ir.text_table import Table

NARROWEST = 40  # in columns: the smallest width allowed
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


@dataclass(frozen=True)
class Lines:
    """Lines of text. Each line that is too long is wrapped on its own. ``style`` is a key of ``STYLES``, or empty."""

    lines: tuple[str, ...]
    style: str = ""


@dataclass(frozen=True)
class CodeLines:
    """Lines of Python, each with notes beside it. ``rows``: the number of the line, the code, and the notes."""

    rows: tuple[tuple[int, str, tuple[str, ...]], ...]


Paragraph = Table | Lines | CodeLines


def width_now() -> int | None:
    """Return the width to wrap at, 40 or more; None to wrap nothing.

    This is the environment variable COLUMNS if it is a positive number, else the terminal's width,
    else None.
    """
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return max(NARROWEST, int(asked))
    return max(NARROWEST, shutil.get_terminal_size().columns) if is_terminal() else None


def coloured() -> bool:
    """Return whether to print colours: stdout is a terminal, NO_COLOR (https://no-color.org) is not set, and TERM is not ``dumb``."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def is_terminal() -> bool:
    """Return whether stdout is a terminal."""
    return bool(getattr(sys.stdout, "isatty", lambda: False)())


def paint(text: str, style: str, colours: bool) -> str:
    """Wrap a text in the escape codes of a style of ``STYLES``; return it unchanged if ``colours`` is False or ``style`` is empty."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if colours and style else text


def check_width(width: object) -> None:
    """Raise RegularizerError for a width that is neither None nor a whole number of columns, 40 or more."""
    if width is not None and (type(width) is not int or width < NARROWEST):
        raise RegularizerError(
            f"width={shown(width)} is not allowed; give a whole number of columns, {NARROWEST} or more, or None to wrap nothing."
        )


class Printed:
    """The base of what prints as tables: names, plans, reports.

    ``str()`` has colours on a terminal. It is as wide as the terminal or the environment variable
    COLUMNS says; without either, nothing is wrapped. A name is never broken. A notebook shows HTML.
    """

    _gap: ClassVar[str] = "\n"

    def _blocks(self) -> Iterable[Paragraph]:
        raise NotImplementedError

    def text(self, width: int | None = None) -> str:
        """Return the plain text, without colours.

        ``width``: the columns to wrap at, 40 or more, or None to wrap nothing. Raises
        RegularizerError for any other value.
        """
        return text(self._blocks(), width, gap=self._gap)

    def __str__(self) -> str:
        return text(self._blocks(), width_now(), coloured(), self._gap)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return html(self._blocks())


def text(blocks: Iterable[Paragraph], width: int | None, colours: bool = False, gap: str = "\n\n") -> str:
    """Lay out the blocks as text, with ``gap`` between two blocks. Empty blocks are left out.

    ``width``: the columns to wrap at, 40 or more, or None to wrap nothing. Raises RegularizerError
    for any other value.
    """
    check_width(width)
    return gap.join("\n".join(lines) for block in blocks if (lines := _lines(block, width, colours)))


def _lines(block: Paragraph, width: int | None, colours: bool) -> list[str]:
    if isinstance(block, Lines):
        filled = [part for line in block.lines for part in _filled(line, width)]
        return [paint(line, block.style, colours) for line in filled]
    if isinstance(block, CodeLines):
        return _beside(block, width, colours)
    if not block.full[0]:
        return []
    aligned = block.aligned(width)
    if aligned is None:
        return _expanded(block.full, width, colours)
    head, *rows = aligned
    return [*(paint(line, "bold", colours) for line in head), *(line for row in rows for line in row)]


def _beside(block: CodeLines, width: int | None, colours: bool) -> list[str]:
    """Lay out code with the notes in a column to its right. No code is broken: where it is too long, its notes are below it."""
    digits = max(len(str(number)) for number, _, _ in block.rows)
    longest = max((len(code) for _, code, notes in block.rows if notes), default=0)
    room = longest if width is None else min(longest, (width - digits) * 3 // 5)
    start = digits + 2 + room + 2
    lines = []
    for (number, code, notes), painted in zip(block.rows, _highlighted([code for _, code, _ in block.rows], colours), strict=True):
        line = f"{paint(str(number).rjust(digits), 'dim', colours)}  {painted}".rstrip()
        text = ", ".join(notes)
        noted = [paint(piece, "cyan", colours) for piece in _filled(text, width and width - start, "")] if text else []
        if noted and len(code) <= room:
            line += " " * (room - len(code) + 2) + noted.pop(0)
        lines += [line, *(" " * start + piece for piece in noted)]
    return lines


def _highlighted(codes: Sequence[str], colours: bool) -> list[str]:
    """Return lines of Python in colours if there are to be any and rich is installed; else as they are."""
    if not colours:
        return list(codes)
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.syntax import Syntax  # noqa: PLC0415
    except ModuleNotFoundError:
        return list(codes)
    # the colours of the terminal, which are right on light and dark backgrounds
    text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight("\n".join(codes))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False, highlight=False)
    with console.capture() as painted:
        console.print(text, soft_wrap=True, end="")
    return painted.get().split("\n")[: len(codes)]


def _filled(line: str, width: int | None, indent: str = "    ") -> list[str]:
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _expanded(full: Sequence[Sequence[str]], width: int | None, colours: bool) -> list[str]:
    """Lay out a table that is too wide for columns: for each row, the first cell, and below it a line for each other cell."""
    head, *rows = full
    lines = []
    for row in rows:
        lines += [paint(part, "bold", colours) for part in _filled(row[0], width)] if row[0] else []
        cells = [f"  {name}: {cell}" for name, cell in zip(head[1:], row[1:], strict=True) if cell]
        lines += [part for cell in cells for part in _filled(cell, width, "      ")]
    return lines


_CELL = "text-align:left;padding:0.1em 0.8em 0.1em 0;vertical-align:top;font-family:monospace;white-space:pre-wrap"
_BACKGROUNDS = {"+": "rgba(46,160,67,0.18)", "-": "rgba(248,81,73,0.18)", "@": "rgba(56,139,253,0.15)"}


def html(blocks: Iterable[Paragraph]) -> str:
    """Lay out the blocks as HTML tables and paragraphs. Every text is escaped."""
    return "<div>" + "".join(map(_block, blocks)) + "</div>"


def _cells(tag: str, row: Iterable[str]) -> str:
    return "".join(f'<{tag} style="{_CELL}">{escape(cell)}</{tag}>' for cell in row)


def _block(block: Paragraph) -> str:
    if isinstance(block, Lines):
        lines = "<br>".join(map(escape, block.lines))
        return f"<p>{f'<strong>{lines}</strong>' if block.style == 'bold' else lines}</p>" if lines else ""
    if isinstance(block, CodeLines):
        lined = [_cells("td", (str(number), code, ", ".join(notes))) for number, code, notes in block.rows]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in lined)}</table>"
    if not block.full[0]:
        return ""
    head, rows = _cells("th", block.full[0]), [_cells("td", row) for row in block.full[1:]]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def marked(lines: Iterable[tuple[str, str]]) -> str:
    """Lay out a diff as HTML. ``lines``: pairs of a sign and a line; the sign is ``+``, ``-``, ``@``, a blank or empty."""
    shown = []
    for sign, line in lines:
        colour = f";background:{_BACKGROUNDS[sign]}" if sign in _BACKGROUNDS else ""
        shown.append(f'<span style="display:block;min-height:1.2em{colour}">{escape(line)}</span>')
    return f'<pre style="overflow-x:auto;line-height:1.3">{"".join(shown)}</pre>'


class ProgressLine:
    """Shows on one line how many passes are done, and overwrites it at most ten times a second."""

    def __init__(self, title: str, n: int, shown: bool) -> None:
        self.title, self.n, self.shown, self.last = title, n, shown, 0.0

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self.shown and now - self.last > 0.1:
            self.last = now
            sys.stderr.write(f"\r{self.title}: {done} of {self.n} passes")
            sys.stderr.flush()


@contextmanager
def progress_line(title: str, n: int, shown: bool | None = None) -> Iterator[ProgressLine]:
    """Show progress on stderr in the block, and clear the line at its end. ``shown``: None shows it if stderr is a terminal."""
    line = ProgressLine(title, n, sys.stderr.isatty() if shown is None else shown)
    try:
        yield line
    finally:
        if line.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
