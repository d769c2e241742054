"""What drawings fold (repeats, arithmetic, long sequences), and how a high drawing is wrapped into columns."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from drawn_nets import GPT
from graphreg import GraphRegError
from graphreg.drawing.columns import in_columns
from graphreg.drawing.fold import CROWDED, runs
from graphreg.drawing.layout import WIDEST, arrange
from graphreg.drawing.scene import Picture, label_lines, picture, unfolded
from graphreg.drawing.view import viewed
from graphreg.passes import BernoulliDropout

IDS = torch.zeros(2, 7, dtype=torch.long)


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ([], []),
        ([1, 2, 3], [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ([1, 1], [(0, 1, 1), (1, 1, 1)]),  # two are no repeats
        ([1, 1, 1], [(0, 1, 3)]),
        ([9, 1, 2, 1, 2, 1, 2, 9], [(0, 1, 1), (1, 2, 3), (7, 1, 1)]),
        ([1, 1, 2, 1, 1, 2, 1, 1, 2], [(0, 3, 3)]),
    ],
)
def test_runs(numbers: list[int], found: list[tuple[int, int, int]]) -> None:
    assert runs(numbers) == found


def shown(model: nn.Module, inputs: Any = None, **regularizers: Any) -> Picture:
    return picture(viewed(graphreg.regularize(model, example_inputs=inputs, rng=0, **regularizers)))


@functools.cache
def blocks() -> graphreg.Traced:
    return graphreg.trace(GPT(8), IDS)


def dropped(*pattern: str) -> Picture:
    return picture(viewed(graphreg.rewrite(blocks(), graphreg.plan(blocks(), [BernoulliDropout(pattern, 0.1)]), rng=0)))


def test_equal_blocks_are_one_box() -> None:
    made = dropped("h.*.ln1")
    assert unfolded(made) == {"/"} and label_lines(made, "h/")[0] == "h Block × 8" and made.boxes["h/"].acts == {"dropout": 8}
    assert made.boxes["h/"].children == [f"h.{i}/" for i in range(8)]  # unfolded, each is a box of its own


def test_where_a_regularizer_acts_in_some_blocks_only() -> None:
    """Blocks with it and blocks without it are not equal, so that a reader sees which have it."""
    made = dropped("h.[0-2].ln1")
    assert [label_lines(made, key) for key in made.boxes["h/"].children] == [("Block × 3", "0 … 2"), ("Block × 5", "3 … 7")]
    first, second = (made.boxes[key] for key in made.boxes["h/"].children)
    assert first.acts == {"dropout": 3} and not second.acts and first.kind == "repeats" and made.around("h.2.qkv")[-1] == "h.2/"


def test_blocks_that_alternate() -> None:
    made = dropped("h.[0246].ln1")
    assert label_lines(made, "h/")[0] == "h 2 Block × 4" and made.boxes[made.boxes["h/"].children[0]].children == ["h.0/", "h.1/"]


class Masked(nn.Module):
    """Integers and a mask are computed, and a value depends on what is computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        places = torch.cumsum(ids.ne(0).long(), 1) * ids.ne(0)
        mask = (1.0 - (places > 1).float()) * -1e4
        h = self.table(ids) + self.places(places) + x
        return self.out(h + mask.unsqueeze(-1)) * (x > 0).any()  # this mask depends on data


def test_arithmetic_on_integers_and_masks_is_one_box() -> None:
    made = picture(viewed(graphreg.trace(Masked(), (IDS, torch.ones(2, 7, 4)))))
    folded = [box for box in made.boxes.values() if box.kind == "arithmetic"]
    assert [label_lines(made, box.key)[0] for box in folded] == ["integer and mask arithmetic"]
    inside = set(folded[0].children)
    assert {"ne", "long", "cumsum", "gt", "float", "unsqueeze"} <= inside and not {"table", "any", "gt_1", "x"} & inside
    assert not any(link.back for box in made.boxes.values() for link in box.links)
    assert folded[0].key not in unfolded(made) | unfolded(made, 9)


def test_no_arithmetic_where_something_acts() -> None:
    traced = graphreg.trace(Masked(), (IDS, torch.ones(2, 7, 4)))
    made = picture(viewed(graphreg.plan(traced, graphreg.build("dropout", weight=0.1, pattern="float"))))
    assert all("float" not in box.children for box in made.boxes.values() if box.kind == "arithmetic")


class Long(nn.Module):
    """A long sequence without modules and without a period."""

    def __init__(self, steps: int = 400) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.steps):
            x = torch.tanh(x) if bin(i).count("1") % 2 else x + 1
        return x


def test_a_long_sequence_has_parts() -> None:
    made = picture(viewed(Long()))
    assert len(made.boxes["/"].children) <= CROWDED and max(len(box.children) for box in made.boxes.values()) <= CROWDED
    assert len(made.nodes) == 402 and made.boxes["/"].nodes == 402
    first, second = label_lines(made, made.boxes["/"].children[0])
    assert re.fullmatch(r"part 1 of \d+", first) and second.startswith("x … ")
    assert picture(viewed(Long(30))).boxes.keys() == {"/"}  # a small one is shown as it is


# Columns


def test_a_high_drawing_has_columns() -> None:
    kinds = (nn.ReLU, nn.Tanh, nn.GELU)
    made = picture(viewed(nn.Sequential(*(layer for i in range(18) for layer in (nn.Linear(2, 2), kinds[i % 3]())))))
    arranged = arrange(made, unfolded(made, 1))
    assert arranged.width <= WIDEST and arranged.height < 1300 and len({round(place.x) for place in arranged.places.values()}) > 3
    for curve in arranged.curves:
        x, y = curve.points[-1]
        place = arranged.places.get(curve.link.end)
        assert place is None or (abs(y - place.y) < 1.5 and place.x < x < place.x + place.width)


def test_columns_of_a_chain_by_hand() -> None:
    """Four nodes of 20 by 10, one below the other, 30 apart: two columns of two."""
    from graphreg.drawing.scene import BoxLink  # noqa: PLC0415

    spots = {name: (10.0, 5.0 + 30 * i) for i, name in enumerate("abcd")}
    sizes = dict.fromkeys("abcd", (20.0, 10.0))
    heights = [tuple(y + 30 * i for y in (10.0, 16.7, 23.3, 30.0)) for i in range(3)]
    straight = [(BoxLink(a, b), tuple((10.0, y) for y in ys)) for (a, b), ys in zip(("ab", "bc", "cd"), heights, strict=True)]
    width, height, moved, curves = in_columns((20.0, 100.0, spots, straight), sizes, 50.0)
    assert moved["a"] == (10.0, 5.0) and moved["b"] == (10.0, 35.0)
    assert moved["c"][0] == moved["d"][0] > 50 and moved["d"][1] - moved["c"][1] == 30
    assert width == moved["c"][0] + 10 and height > 50
    assert curves[0] == straight[0]
    assert curves[1][1][0] == (10.0, 40.0) and curves[1][1][-1] == pytest.approx((moved["c"][0], moved["c"][1] - 5))
    assert in_columns((20.0, 100.0, spots, straight), sizes, 90.0) == (20.0, 100.0, spots, straight)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2 + i) for i in range(30))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


def test_a_drawing_that_could_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphRegError, match=r"times as wide as a screen of 1920 pixels .* level=1 unfolds less; an \.html page"):
        graphreg.draw(Wide(), tmp_path / "x.svg", level=2)
    text = graphreg.draw(Wide(), tmp_path / "x.svg").read_text()  # without a level, it is folded until it can be read
    sizes = re.search(r'width="(\d+)" height="\d+" viewBox="0 0 ([\d.]+)', text)
    assert sizes is not None and int(sizes[1]) <= 1920 and int(sizes[1]) / float(sizes[2]) == pytest.approx(4 / 3, abs=0.01)
    assert 'data-key="layers/"' in text and "font-size: 9px" in text  # 9 pixels, larger by a third, are 9 points
    assert graphreg.draw(Wide(), tmp_path / "x.html", level=2).exists()
