"""Blocks that fit a width, and colours on terminals alone."""

from __future__ import annotations

import io
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphreg import GraphRegError, RegularizerError
from graphreg.ir.terminal import Lines, coloured, html, marked, paint, text, width_now
from graphreg.ir.text_table import Table

TABLE = Table(
    ("site", "op", "shape", "empty"),
    (("features.0.relu_1", "AdaptiveAvgPool2d", "2x512x1x1", ""), ("fc", "Linear", "2x10", "")),
)


def test_a_table_at_three_widths() -> None:
    assert text([TABLE], None) == text([TABLE], 48) == (
        "site               op                 shape\n"
        "features.0.relu_1  AdaptiveAvgPool2d  2x512x1x1\n"
        "fc                 Linear             2x10"
    )  # fmt: skip
    assert text([TABLE], 41) == (
        "features.0.relu_1\n"
        "  op: AdaptiveAvgPool2d\n"
        "  shape: 2x512x1x1\n"
        "fc\n"
        "  op: Linear\n"
        "  shape: 2x10"
    )  # fmt: skip
    broken = Table(("site", "matched by"), (("features.0.relu_1", "features.*, !features.3, layer4.**@ReLU, classifier.*.weight"),))
    assert text([broken], 48) == (
        "site               matched by\n"
        "features.0.relu_1  features.*, !features.3,\n"
        "                   layer4.**@ReLU,\n"
        "                   classifier.*.weight"
    )  # fmt: skip
    long = Table(("name", "what"), (("a" * 30, "b" * 30), ("", "more")))
    assert text([long], 40) == f"{'a' * 30}\n  what: {'b' * 30}\n  what: more"  # no column can be broken: no columns


def test_lines_are_filled_and_empty_blocks_left_out() -> None:
    line = "one: " + "word " * 12
    assert text([Lines(()), Lines((line.strip(), "two"))], 40) == f"one: {'word ' * 7}".rstrip() + f"\n    {'word ' * 5}".rstrip() + "\ntwo"
    assert text([Lines(("a",)), Lines(()), Lines(("b",))], None) == "a\n\nb"


CELLS = st.lists(st.lists(st.text("ab.x_, %AB=", max_size=30).map(str.strip), min_size=3, max_size=3).map(tuple), min_size=1, max_size=4)


@given(CELLS, st.integers(40, 100))
def test_nothing_is_wider_and_nothing_lost(rows: list[tuple[str, ...]], width: int) -> None:
    shown = text([Table(("head one", "head_two", "HeadThree"), tuple(rows))], width)
    pieces = {piece for row in (("head one", "head_two", "HeadThree"), *rows) for cell in row for piece in cell.split()}
    lines = [line for line in shown.splitlines() if len(line) > width]
    assert all(len(line.split()) == 1 or line.split()[-1] in pieces for line in lines)  # one name, too long
    kept = {piece.rstrip(":") for piece in shown.split()}
    assert kept >= {piece.rstrip(":") for row in rows for cell in row[1:] for piece in cell.split()}
    assert not Counter("".join("".join(row) for row in rows).replace(" ", "")) - Counter(shown)


@pytest.mark.parametrize("width", [39, 0, -1, 80.0, "80", True])
def test_no_width(width: object) -> None:
    with pytest.raises(RegularizerError, match="give a whole number of columns, 40 or more, or None") as caught:
        text([TABLE], width)  # type: ignore[arg-type]
    assert isinstance(caught.value, GraphRegError) and repr(width) in str(caught.value)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "123")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not coloured() and width_now() == 123  # COLUMNS holds in a pipe, too
    monkeypatch.delenv("COLUMNS")
    assert width_now() is None
    monkeypatch.setattr(sys, "stdout", None)  # a program without a console
    assert not coloured() and width_now() is None
    monkeypatch.setenv("COLUMNS", "123")
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert coloured() and width_now() == 123
    monkeypatch.setenv("COLUMNS", "20")
    assert width_now() == 40
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not coloured()
    monkeypatch.setenv("NO_COLOR", "")  # as if it were not set: no-color.org
    assert coloured()
    assert paint("x", "red", True) == "\x1b[31mx\x1b[0m" and paint("x", "red", False) == paint("x", "", True) == "x"
    assert text([TABLE], None, True).splitlines()[0].startswith("\x1b[1msite")


def test_html_is_escaped() -> None:
    shown = html([Lines(("<a> & b",), "bold"), Lines(()), Table(("<h>",), (("<c>",),))])
    assert "<p><strong>&lt;a&gt; &amp; b</strong></p>" in shown and "&lt;h&gt;</th>" in shown and "&lt;c&gt;</td>" in shown
    lines = marked([("+", "+<x>"), ("", "--- a")])
    assert "background:rgba(46,160,67" in lines and "+&lt;x&gt;</span>" in lines and ">--- a</span>" in lines
