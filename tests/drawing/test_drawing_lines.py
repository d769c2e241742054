"""Lines at the borders of modules in .svg and .png: the piece within the border has the colour of what it continues, and meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphreg
from drawn_pages import regularized
from graphreg.drawing.layout import Curve, arrange
from graphreg.drawing.render import colour
from graphreg.drawing.scene import IN, picture
from graphreg.drawing.view import viewed


@pytest.mark.parametrize(("name", "expected"), [("again", {""}), ("gpt", {"", "hidden_dropout"})])
def test_a_line_keeps_its_colour_through_the_border_of_a_module(name: str, expected: set[str]) -> None:
    """Grey where the lines that meet there have several colours, as in a block that is called twice."""
    shown = picture(viewed(regularized(name)))
    curves = arrange(shown, frozenset(shown.boxes)).curves
    stubs = [curve for curve in curves if curve.link.start == curve.link.end]
    for stub in stubs:
        at = stub.points[-1] if stub.link.start == IN else stub.points[0]
        met = {curve.link.regularizer for curve in curves if curve not in stubs and meets(curve, stub.link.start, at)}
        assert met and stub.link.regularizer == (met.pop() if len(met) == 1 else "")
    assert {stub.link.regularizer for stub in stubs} == expected


def meets(curve: Curve, pin: str, at: tuple[float, float]) -> bool:
    """Whether a line begins at a module's upper border, or ends at its lower one, where the module's own piece does."""
    point = curve.points[0] if pin == IN else curve.points[-1]
    return pin == (curve.link.start if pin == IN else curve.link.end) and point == pytest.approx(at, abs=1e-6)


def test_it_is_drawn_so(tmp_path: Path) -> None:
    """One linear layer within a module within a model: dropout's line goes on in its colour, from border to layer."""
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), inner)
    text = graphreg.draw(graphreg.regularize(model, hidden_dropout=0.1), tmp_path / "x.svg", level=9).read_text()
    lines = [line for line in text.splitlines() if 'class="line"' in line]
    assert sum(f"stroke: {colour(0)}" in line for line in lines) == 4  # to the dropout, from it, past the border, and on to the layer
