"""The model's code beside the graph: a site shows its lines, a line its sites, and the address holds both."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import graphreg
from browser import Page, needs_chromium
from drawn_nets import GPT
from drawn_pages import IDS, drawn

pytestmark = needs_chromium
MARKED = "return [...document.querySelectorAll('#code .here code')].map((one) => one.textContent.trim())"
PRESSED = "return [...document.querySelectorAll('#code [aria-pressed=true] code')].map((one) => one.textContent.trim())"
PRESS = "[...document.querySelectorAll('#code button')].find((one) => one.textContent.includes(arguments[0])).click()"
LISTED = "return [...document.querySelectorAll('#panel [data-go]')].map((one) => one.textContent)"


def test_the_page_has_the_listing(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    listed = json.loads(json.dumps(graphreg.names(GPT(12), IDS, source=True).to_dict()))["source"]
    shown = page.run("return graphreg.data.source")
    assert [[of["name"], of["file"], of["lines"]] for of in shown] == [[of["name"], of["file"], of["lines"]] for of in listed]


def test_a_site_shows_its_lines(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    assert not page.driver.find_element("id", "code").is_displayed()
    page.press("c")
    assert page.driver.find_element("id", "code").is_displayed()
    page.run("graphreg.go('h.3.ln1')")
    (marked,) = page.run(MARKED)
    assert "self.ln1(x)" in marked
    page.run("graphreg.go('h.3.mlp/')")
    assert [text for text in page.run(MARKED) if "self.mlp(" in text] != []
    page.press("c")
    assert not page.driver.find_element("id", "code").is_displayed()


def test_a_line_shows_its_sites(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.press("c", "u")
    page.run(PRESS, "self.ln1(x)")
    names = page.run(LISTED)
    assert {f"h.{i}.ln1" for i in range(12)} <= set(names) and set(page.things(".lit")) == set(names)
    assert "self.ln1(x)" in page.text("panel") and len(page.run(PRESSED)) == 1

    state = page.run("return graphreg.stateText()")
    page.run("location.hash = ''")
    page.driver.get(f"{drawn(folder, 'gpt').as_uri()}?again#{state}")
    assert page.run(LISTED) == names and page.driver.find_element("id", "code").is_displayed()
    assert set(page.things(".lit")) == set(names)

    page.run(PRESS, "self.ln1(x)")  # again lets go
    assert page.run(PRESSED) == page.things(".lit") == page.run(LISTED) == []
    page.run(PRESS, "self.ln1(x)")
    page.press("\ue00c")
    assert page.run(PRESSED) == page.things(".lit") == page.run(LISTED) == []


def test_a_selector_takes_the_light_from_a_line(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.press("c")
    page.run(PRESS, "self.ln1(x)")
    page.type("selector", "wte")
    assert page.run(PRESSED) == [] and page.things(".lit") == ["wte"] and page.run(LISTED) == []


def test_a_model_without_code_of_its_own_has_no_panel(folder: Path) -> None:
    page = Page(graphreg.draw(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), folder / "plain.html", example_inputs=torch.zeros(1, 2)))
    assert not page.driver.find_element("css selector", "nav [data-key=c]").is_displayed()
    page.press("c")
    assert not page.driver.find_element("id", "code").is_displayed()
