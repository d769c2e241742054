"""The model's own code, function by function and line by line, with the names of the sites that each line makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graphreg.ir.terminal import CodeLines, Lines, Paragraph


@dataclass(frozen=True)
class SourceLine:
    """A line of code. ``sites``: the names of the sites that it makes, in the order in which it makes them."""

    number: int
    code: str
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceFunction:
    """A function of the model's own code, such as ``Block.forward``.

    Attributes:
        name: The name of the function, with that of its class.
        file: The file, relative to the folder from which Python imports it.
        modules: The paths of the modules whose forward it is or takes part in; ``""`` is the model itself.
        lines: Its lines, without the indentation that all have in common.
    """

    name: str
    file: str
    modules: tuple[str, ...]
    lines: tuple[SourceLine, ...]

    def paragraphs(self) -> Iterator[Paragraph]:
        """Yield what prints: a title, and the lines with the sites beside them."""
        where = joined_names(path for path in self.modules if path)
        title = f"{self.name}, {self.file}:{self.lines[0].number}"
        yield Lines(("",))
        yield Lines((f"{title}, of {', '.join(where)}" if where else title,), "bold")
        yield CodeLines(tuple((line.number, line.code, joined_names(line.sites)) for line in self.lines))

    def to_dict(self) -> dict[str, Any]:
        """Return the function as plain data, fit for JSON."""
        return asdict(self)


def joined_names(names: Iterable[str]) -> tuple[str, ...]:
    """Write names that differ in one number as one: ``layers.0.fc`` and ``layers.1.fc`` as ``layers.{0-1}.fc``."""
    rows = [tuple(name.split(".")) for name in names]
    for place in reversed(range(max(map(len, rows), default=0))):
        groups = dict[tuple[str, ...], list[int]]()  # a row without the number at this place -> the numbers; a row without one -> none
        for row in rows:
            numbered = place < len(row) and row[place].isdecimal()
            groups.setdefault((*row[:place], "", *row[place + 1 :]) if numbered else row, []).extend([int(row[place])] if numbered else [])
        rows = [(*row[:place], _runs(numbers), *row[place + 1 :]) if numbers else row for row, numbers in groups.items()]
    return tuple(map(".".join, rows))


def _runs(numbers: Iterable[int]) -> str:
    """Write numbers as ``{0-2,5}``; a single one as itself."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return texts[0] if texts == [str(runs[0][0])] else f"{{{','.join(texts)}}}"
