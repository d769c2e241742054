"""Formats tables as text with aligned columns, as wide as their cells or narrowed to fit a width."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# a line ends at a blank; never within a name, so that names can be copied
_BREAK = re.compile(r"(?<= )(?=[^ %])")


@dataclass(frozen=True)
class Table:
    """A table: a head and rows of cells. Columns without text in any row are left out."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def full(self) -> list[tuple[str, ...]]:
        """The head and the rows, without empty columns."""
        filled = [i for i in range(len(self.head)) if any(row[i] for row in self.rows)]
        return [tuple(row[i] for i in filled) for row in (self.head, *self.rows)]

    def aligned(self, width: int | None = None) -> list[list[str]] | None:
        """Return the lines of the head and of each row, with columns two blanks apart; None if the table does not fit ``width``."""
        widths = _widths(self.full, width)
        return None if widths is None else [_row(row, widths) for row in self.full]


def _widths(rows: Sequence[Sequence[str]], width: int | None) -> list[int] | None:
    """Return the widths of the columns, which are two blanks apart.

    While the table is wider than ``width``, narrow the column in which the fewest cells need the
    full width. Return None if the table stays too wide, because no column can be narrower than its
    longest unbreakable piece.
    """
    cells = [[row[i] for row in rows] for i in range(len(rows[0]))]
    widths = [max(map(len, column)) for column in cells]
    if width is None:
        return widths
    narrowest = [max(len(piece.rstrip()) for cell in column for piece in _BREAK.split(cell)) for column in cells]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        open_ones = [i for i, now in enumerate(widths) if now > narrowest[i]]
        if not open_ones:
            return None
        chosen = min(open_ones, key=lambda i: (sum(len(cell) == widths[i] for cell in cells[i]), -widths[i]))
        widths[chosen] -= 1
    return widths


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the lines of a row, as many as its longest cell needs."""
    wrapped = [_broken(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, wrapped))
    lines = zip(*([*cell, *[""] * (height - len(cell))] for cell in wrapped), strict=True)
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _broken(cell: str, width: int) -> list[str]:
    """Return the lines of a cell, broken at blanks."""
    lines = [""]
    for piece in _BREAK.split(cell):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
