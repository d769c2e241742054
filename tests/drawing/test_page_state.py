"""The page's address, its search, copying, fingers, and that only what is in view is in the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphreg
from browser import Page, chromium, needs_chromium
from drawn_pages import drawn

pytestmark = needs_chromium

SEEN = """
const {scene} = graphreg;
return {opened: [...scene.opened].sort(), view: scene.view, lit: scene.shown, chosen: scene.chosen, rule: scene.rule,
  selector: document.getElementById("selector").value, search: document.getElementById("search").value,
  theme: document.documentElement.dataset.theme};
"""


def test_the_address_has_the_state(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    assert page.run("return graphreg.stateText()") == ""
    page.run("graphreg.toggle('h/'); graphreg.toggle('h.3/')")
    page.type("search", "ln1")
    page.type("selector", "h.3.**@Linear")
    page.press("t")
    page.run("graphreg.choose('h.3.qkv'); graphreg.scene.zoom(1.3)")
    seen = page.run(SEEN)
    address = page.run("return location.href.replace(/#.*/, '') + '#' + graphreg.stateText()")
    page.driver.execute_async_script("setTimeout(arguments[0], 400)")
    assert page.driver.current_url == address and "s=h.3" in address
    page.driver.get("about:blank")
    page.driver.get(address)
    again = page.run(SEEN)
    assert {**again, "view": 0} == {**seen, "view": 0}
    assert all(abs(again["view"][name] - seen["view"][name]) <= 1 for name in ("x", "y", "zoom"))
    page.driver.get(address.split("#")[0] + "#open=zz.!&c=nothing&at=1,2&rule=no&value=mean,3")  # unknown to the page: passed over
    page.driver.refresh()
    assert page.run(SEEN)["opened"] == ["/"]


def test_the_pressed_regularizer_is_in_the_address(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))
    page.click("[data-rule='1']")
    assert "rule=recurrent_norm" in page.run("return graphreg.stateText()")


def test_names_come_first_and_the_rest_is_counted(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    found = "return [...document.querySelectorAll('#hits button')].map((one) => one.firstChild.textContent.trim())"
    page.type("search", "h")
    hits = page.run(found)
    assert hits[:2] == ["h", "head"] and hits[-1].endswith(" more") and len(hits) == 13
    count = int(page.text("hitcount").split()[0])
    assert hits[-1] == f"{count - 12} more"
    page.click("#more")
    assert len(page.run(found)) == count


def test_copy_answers(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))
    page.type("selector", "embed")
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click("#copy")
    assert page.text("copy") == "copied" and page.run("return window.copied") == page.text("paste")
    page.run("navigator.clipboard.writeText = async () => { throw new Error('not allowed'); }; document.execCommand = () => false")
    page.click("#copy")
    assert page.text("copy") == "press Ctrl+C" and page.run("return getSelection().toString()") == page.text("paste")


def touch(kind: str, *points: tuple[int, int]) -> None:
    places = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    chromium().execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})


def test_fingers_move_and_zoom(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    before = page.run("return {...graphreg.scene.view}")
    touch("touchStart", (300, 300))
    touch("touchMove", (340, 320))
    touch("touchEnd")
    moved = page.run("return {...graphreg.scene.view}")
    assert (round(moved["x"] - before["x"]), round(moved["y"] - before["y"]), moved["zoom"]) == (40, 20, before["zoom"])
    touch("touchStart", (300, 300), (400, 300))
    touch("touchMove", (250, 300), (450, 300))
    touch("touchEnd")
    assert abs(page.run("return graphreg.scene.view.zoom") / moved["zoom"] - 2) < 0.05
    page.press("0")
    x, y = page.run(
        "const [x, y] = graphreg.scene.spot(graphreg.scene.places['h/']), at = graphreg.scene.svg.getBoundingClientRect();"
        "return [Math.round(x + at.left), Math.round(y + at.top)]"
    )
    touch("touchStart", (x, y))
    touch("touchEnd")
    assert "h/" in page.things(".open") and page.things(".chosen") == ["h/"]


class Deep(nn.Module):
    """Two thousand layers in forty equal stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) if i % 2 else nn.Tanh() for i in range(50))) for _ in range(40)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.stages(x)
        return made


def test_only_what_is_in_view_is_in_the_document(folder: Path) -> None:
    page = Page(graphreg.draw(graphreg.regularize(Deep(), hidden_dropout=0.1, rng=0), folder / "deep.html"))
    page.press("u")
    inside = "return document.querySelectorAll('#graph [data-key]').length"
    assert len(page.things()) > 2000 and 5 < page.run(inside) < 150
    texts: set[Any] = set()
    for _ in range(3):
        page.run("graphreg.scene.pan(0, -2000)")
        texts.add(json.dumps(page.run("return [...document.querySelectorAll('#graph [data-key]')].map((one) => one.dataset.key)")))
        assert page.run(inside) < 150
    assert len(texts) == 3
    page.press("w")
    assert page.run(inside) < 2500 and page.run("return document.querySelectorAll('#graph text').length") == 0  # too small to be read
    page.run("graphreg.go('stages.39.49')")
    assert page.run("return document.getElementById('chosen').dataset.key") == "stages.39.49"
