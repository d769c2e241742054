"""What of the page is in view: fitting, what lights up, lines at the borders of modules, and the room of lists and panel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import graphreg
from browser import Page, chromium, needs_chromium
from drawn_pages import drawn

pytestmark = needs_chromium


@pytest.fixture
def window() -> Iterator[Any]:
    """The window, which has its size back afterwards."""
    driver = chromium()
    before = driver.get_window_size()
    yield driver
    driver.set_window_size(before["width"], before["height"])


IN_VIEW = """
const [x, y] = [graphreg.scene.svg.getBoundingClientRect(), document.getElementById("scene").getBoundingClientRect()];
return y.left >= x.left - 1 && y.right <= x.right + 1 && y.top >= x.top - 1 && y.bottom <= x.bottom + 1;
"""
ZOOM = "return graphreg.scene.view.zoom"


def test_the_whole_is_in_view_however_high_it_is(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.press("u")
    assert not page.run(IN_VIEW)
    page.run("graphreg.scene.svg.style.height = '120px'")
    page.press("w")
    least = page.run(ZOOM)
    assert page.run(IN_VIEW) and least < 0.03
    page.press("-")
    assert page.run(ZOOM) == least
    page.press("+", "+")
    assert page.run(ZOOM) == pytest.approx(least * 1.25**2)


RESIZED = """
const [width, done] = arguments;
document.body.style.width = width;
requestAnimationFrame(() => requestAnimationFrame(() => done({...graphreg.scene.view})));
"""


def test_it_fits_again_until_it_is_moved(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.press("w")
    first = page.run("return {...graphreg.scene.view}")
    narrow = page.driver.execute_async_script(RESIZED, "800px")
    assert narrow["x"] < first["x"] and page.run(IN_VIEW)
    assert page.driver.execute_async_script(RESIZED, "") == first
    page.press("+")
    moved = page.run("return {...graphreg.scene.view}")
    assert page.driver.execute_async_script(RESIZED, "800px") == moved != first


LIT = """
const { scene } = graphreg, inside = (x, y) => x >= 0 && y >= 0 && x <= scene.svg.clientWidth && y <= scene.svg.clientHeight;
return Object.keys(scene.shown).filter((key) => inside(...scene.spot(scene.places[key])));
"""


def test_the_view_goes_to_what_lights_up(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.press("u")
    zoom = page.run(ZOOM)
    page.type("selector", "h.[5,9].mlp.1")
    assert page.run(LIT) == ["h.5.mlp.1"] and page.run(ZOOM) == zoom
    before = page.run("return {...graphreg.scene.view}")
    page.type("selector", "h.[59].mlp.1 h.5.mlp.0")  # one of them is in view: it stays
    assert page.run("return {...graphreg.scene.view}") == before
    page.press("0")
    page.run("graphreg.scene.pan(0, 9000)")
    page.click("[data-rule='0']")
    assert len(page.run(LIT)) > 0


def test_the_chosen_thing_does_not_fade(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))
    page.run("graphreg.choose('embed')")
    page.type("selector", "rnn")
    opacity = (
        "const frame = (key) => document.querySelector(`[data-key='${key}'] rect`);"
        "return ['embed', 'rnn', 'head'].map((key) => getComputedStyle(frame(key)).strokeOpacity)"
    )
    assert page.run(opacity) == ["1", "1", "0.35"]


LINES = """
const ends = (chain) => ({from: chain?.[0] ?? "", to: chain?.at(-1) ?? ""});
return graphreg.scene.laid.lines.map(({chain, points}) => ({stub: !chain, first: points[0], last: points.at(-1), ...ends(chain)}));
"""


@pytest.mark.parametrize("name", ["again", "gpt"])
def test_a_line_goes_on_at_the_border_of_a_module(name: str, folder: Path) -> None:
    """Each piece within a border meets those that it continues, and nothing is left between the pieces."""
    page = Page(drawn(folder, name))
    page.press("u")
    lines = page.run(LINES)
    stubs = [line for line in lines if line["stub"]]
    for stub in stubs:
        into = [line for line in lines if line["from"] == "<" and near(line["first"], stub["last"])]
        out = [line for line in lines if line["to"] == ">" and near(line["last"], stub["first"])]
        assert bool(into) != bool(out)
        assert all(line["first"][1] < stub["last"][1] for line in into) and all(line["last"][1] > stub["first"][1] for line in out)
    assert len(stubs) >= 2


def near(one: list[float], other: list[float]) -> bool:
    return abs(one[0] - other[0]) + abs(one[1] - other[1]) < 1


class ATitleThatIsLongerThanThereIsRoomForInTheBarOfTools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(30) for layer in (nn.Linear(2, 2), nn.ReLU())))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


LAYOUT = """
const of = (part) => part.getBoundingClientRect();
const box = (selector) => of(document.querySelector(selector));
const tops = [...document.querySelectorAll("header input, header select, header button")].map((part) => Math.round(of(part).top / 8));
const graph = box("#graph"), style = getComputedStyle(document.getElementById("graph"));
return {
  rows: new Set(tops).size, wide: document.documentElement.scrollWidth - innerWidth,
  head: box("#panel h2").bottom < Math.min(box("#panel").bottom, innerHeight),
  panel: box("#panel").height / innerHeight, found: box("#found").height / innerHeight, hits: box("#hits").height / innerHeight,
  frame: parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth), drawn: style.outlineStyle,
  inside: graph.right <= innerWidth && graph.bottom <= innerHeight,
};
"""


@pytest.mark.parametrize(("size", "rows"), [((1400, 900), 1), ((1000, 700), 1), ((600, 800), 2)])
def test_nothing_is_pushed_out_of_sight(size: tuple[int, int], rows: int, folder: Path, window: Any) -> None:
    window.set_window_size(*size)
    page = Page(long(folder))
    page.type("selector", "**")
    page.type("search", "layers")
    page.run("graphreg.go('layers.3')")
    page.press("+")
    told = page.run(LAYOUT)
    assert told["rows"] == rows and told["wide"] <= 0 and told["head"] and told["panel"] > 0.25, told
    assert 0.1 < told["found"] < 0.2 and 0.1 < told["hits"] < 0.2
    assert told["frame"] <= 0 and told["drawn"] != "none" and told["inside"]  # a frame outside would be cut


def long(folder: Path) -> Path:
    model = ATitleThatIsLongerThanThereIsRoomForInTheBarOfTools()
    return graphreg.draw(graphreg.regularize(model, hidden_dropout=0.1), folder / "long.html")
