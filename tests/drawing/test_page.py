"""The page in a real browser: it folds, finds, tells; nothing overlaps, and nothing is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import graphreg
from browser import Page, needs_chromium
from drawn_pages import IDS, drawn
from geometry import check_geometry

# What it looks like: nothing overlaps

GEOMETRY = """
const {scene, data} = graphreg, places = {...scene.places}, inside = {}, view = scene.view;
for (const side of ["clientWidth", "clientHeight"]) Object.defineProperty(scene.svg, side, {value: 1e6, configurable: true});
scene.view = {x: 0, y: 0, zoom: 1};
scene.render();  // all of it, not only what is in view
for (const key in places) inside[key] = scene.around[key] ?? null;
const texts = [...document.querySelectorAll('#graph .thing')].map((thing) => {
  const rect = thing.querySelector('rect').getBBox();
  return [thing.dataset.key, rect.width, ...[...thing.querySelectorAll('text.middle')].map((text) => text.getBBox().width)];
});
const titles = [...document.querySelectorAll('#graph .open')].map((box) =>
  [box.dataset.key, box.querySelector('rect').getBBox().width, box.querySelector('text').getBBox().width + 8]);
for (const side of ["clientWidth", "clientHeight"]) delete scene.svg[side];
scene.view = view;
scene.render();
return [places, inside, texts, titles];
"""


@needs_chromium
@pytest.mark.parametrize("name", ["resnet50", "gpt", "lstm", "again"])
def test_nothing_overlaps_and_labels_fit(name: str, folder: Path) -> None:
    page = Page(drawn(folder, name))
    counts = []
    for key in ("", "u", "f"):
        page.press(*key)
        places, inside, texts, titles = page.run(GEOMETRY)
        check_geometry(places, inside)
        assert [row for row in texts if max(row[2:]) > row[1]] == [] and [row for row in titles if row[2] > row[1]] == []
        counts.append(len(texts))
    assert counts[1] >= counts[0] >= counts[2] > 1


@needs_chromium
@pytest.mark.sweep
def test_nothing_overlaps_in_gpt2(folder: Path) -> None:
    """transformers' own, of twelve blocks, through torch.export: half a minute."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (seconds, for this test alone)

    config = GPT2Config(n_layer=12, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False)
    module = graphreg.regularize(GPT2LMHeadModel(config), example_inputs={"input_ids": IDS}, hidden_dropout=0.1, own_dropout="seeded")
    page = Page(graphreg.draw(module, folder / "gpt2.html"))
    for key in ("", "u"):
        page.press(*key)
        places, inside, texts, titles = page.run(GEOMETRY)
        check_geometry(places, inside)
        assert [row for row in texts if max(row[2:]) > row[1]] == [] and [row for row in titles if row[2] > row[1]] == []
    assert len(places) > 600


# What it does


@needs_chromium
def test_folding(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    assert "h/" in page.things(".thing") and "h.3/" not in page.things()
    page.run("graphreg.toggle('h/')")
    assert "h.3/" in page.things(".thing") and "h/" in page.things(".open") and "h.3.qkv" not in page.things()
    page.click("[data-key='h.3/'] text")
    assert "h.3/" in page.things(".open") and {"h.3.qkv", "h.3.mlp/"} <= set(page.things(".thing")) and "h.4.qkv" not in page.things()
    page.click("[data-key='h.3/'] .head")
    assert "h.3/" in page.things(".thing") and "h.3.qkv" not in page.things()
    page.press("u")
    assert {"h.3.qkv", "h.11.mlp.2"} <= set(page.things()) and page.run("return graphreg.scene.opened.size") == 26
    page.press("f")
    assert page.things() == page.things(".thing") and "h/" in page.things()


@needs_chromium
def test_keys_alone(folder: Path) -> None:
    """From the box of the selector to a site inside a folded block, without a mouse."""
    page = Page(drawn(folder, "gpt"))
    page.press("s")
    assert page.run("return document.activeElement.id") == "selector"
    page.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert page.run("return document.activeElement.id") == "graph"
    page.press("\ue015", "\ue015")  # arrow down, twice
    assert page.run("return graphreg.scene.chosen") == "wte" and "Embedding" in page.text("panel")
    page.run("graphreg.choose('h.0/')")
    page.press("\ue007")  # Enter: unfolds what is around it, too
    assert "h.0.ln1" in page.things()
    page.press("\ue015")
    assert page.run("return graphreg.scene.chosen") == "h.0.ln1"
    before = page.run("return graphreg.scene.view.zoom")
    page.press("+")
    assert page.run("return graphreg.scene.view.zoom") > before
    page.press("\ue00c")
    assert page.run("return graphreg.scene.chosen") is None


@needs_chromium
def test_a_click_tells(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))
    page.click("[data-key='rnn'] text")
    told = page.text("panel")
    assert "2x7x6" in told and "drawn_nets.py:" in told and "hidden" in told
    assert (
        "recurrent_norm RecurrentNorm, strength 1, matched by rnn" in told
        and "mean_over_pairs(norms.diff(dim=0).square(), lengths)" in told
    )
    assert "dropout BernoulliDropout, strength 0.2, matched by rnn:*" in told
    page.click("[data-key='$rnn'] text")  # the layer, which has the parameters
    assert "rnn.weight_hh_l0" in page.text("panel") and "return w.abs().sum()" in page.text("panel")
    page.click("[data-key='embed'] text")
    assert "No regularizer acts here." in page.text("panel") and "embed.weight" in page.text("panel")


@needs_chromium
def test_search_opens_what_it_finds(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.type("search", "h.7.mlp.1")
    assert page.text("hitcount") == "1 found" and "h.7.mlp.1" not in page.things()
    page.driver.switch_to.active_element.send_keys("\ue007")
    assert "h.7.mlp.1" in page.things(".chosen") and "GELU" in page.text("panel")
    page.type("search", "gelu")
    assert page.text("hitcount") == "12 found"


@needs_chromium
def test_a_folded_module_counts_what_is_lit_in_it(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    page.run("graphreg.toggle('h/')")
    page.type("selector", "h.[34].**@Linear")
    assert page.things(".lit") == ["h.3/", "h.4/"] and page.text("count") == "8 sites"
    assert page.run("return [...document.querySelectorAll('.count')].map((e) => e.textContent)") == ["4 selected", "4 selected"]
    page.click("[data-key='h.3/'] text")
    page.press("u")
    assert len(page.things(".lit")) == 8
    page.type("selector", "**")
    _, _, texts, _ = page.run(GEOMETRY)
    assert [row for row in texts if max(row[2:]) > row[1]] == []  # the counts fit into their boxes
    page.type("selector", "h.[34")
    assert page.things(".lit") == [] and page.text("wrong") == "'h.[34' matches no value of GPT." and page.text("paste") == ""
    page.type("selector", "#hiden")
    role = "'#hiden' asks for the role 'hiden'; roles are input, hidden, output, branch, trunk, normed."
    assert page.text("wrong") == f"{role} Where # is a part of the name, write \\#."


@needs_chromium
def test_the_legend_shows_where_each_acts(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))
    page.click("[data-rule='0']")
    assert page.things(".lit") == ["rnn", "rnn:h_n", "rnn:c_n"]
    assert page.run("return [...document.querySelectorAll('.badge.on text')].map((text) => text.textContent)") == ["dropout 0.2"] * 3
    page.click("[data-rule='1']")
    assert page.things(".lit") == ["rnn"] and "recurrent_norm" in page.text("legend")
    pressed = "return [...document.querySelectorAll('[data-rule]')].map((entry) => entry.getAttribute('aria-pressed'))"
    assert page.run(pressed) == ["false", "true", "false"]
    page.click("[data-rule='1']")
    assert page.things(".lit") == [] and page.run(pressed) == ["false", "false", "false"]
    page.type("selector", "embed")
    page.click("[data-rule='1']")
    page.click("[data-rule='1']")
    assert page.things(".lit") == ["embed"]  # what is typed, again


EMPTY = """
const seen = ["count", "wrong", "paste", "found", "hitcount", "hits"].filter((id) => document.getElementById(id).textContent);
const marked = [...document.querySelectorAll(".lit, .chosen, [aria-pressed=true]")];
const lit = marked.map((part) => part.dataset.key ?? part.dataset.rule).sort();
return [seen, lit, document.getElementById("selector").value, document.getElementById("search").value, document.activeElement.id];
"""


@needs_chromium
def test_escape_lets_go_of_everything(folder: Path) -> None:
    page = Page(drawn(folder, "lstm"))

    def escape() -> list[object]:
        page.driver.switch_to.active_element.send_keys("\ue00c")
        return list(page.run(EMPTY))

    page.click("[data-key='embed'] text")
    page.type("selector", "rnn nothing")
    page.type("search", "rnn")
    assert page.run(EMPTY)[0] == ["count", "wrong", "found", "hitcount", "hits"]
    assert escape() == [["count", "wrong", "found"], ["embed", "rnn"], "rnn nothing", "", "graph"]  # the first: its box
    page.press("s")
    assert escape() == [[], ["embed"], "", "", "graph"]
    page.type("search", "rnn")
    page.type("selector", "rnn")
    page.click("[data-rule='0']")
    assert escape() == [[], [], "", "", "graph"]  # from the button that was pressed
    page.type("selector", "rnn")
    page.click("[data-key='embed'] text")
    page.press()
    assert page.run(EMPTY)[:2] == [["count", "paste", "found"], ["embed", "rnn"]]
    assert escape() == [[], [], "", "", "graph"]


@needs_chromium
def test_light_and_dark(folder: Path) -> None:
    page = Page(drawn(folder, "again"))
    back = "return getComputedStyle(document.body).backgroundColor"
    first = page.run(back)
    page.press("t")
    second = page.run(back)
    page.press("t")
    assert first != second and page.run(back) == first
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
    page.run("delete document.documentElement.dataset.theme")
    dark = page.run(back)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
    assert {first, second} == {dark, page.run(back)} and dark == "rgb(13, 17, 23)"


@needs_chromium
def test_it_loads_nothing_else(folder: Path) -> None:
    page = Page(drawn(folder, "gpt"))
    assert page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    text = drawn(folder, "gpt").read_text()
    assert "://" not in text.replace("http://www.w3.org", "") and "@import" not in text and "</script" in text


class Odd(nn.Module):
    """Names that mean something to JavaScript and to HTML."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("constructor", "__proto__", "toString", "<b>", "0", "größe"):
            self.add_module(name, nn.Sequential(nn.Linear(2, 2), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


@needs_chromium
def test_odd_names(folder: Path) -> None:
    page = Page(graphreg.draw(graphreg.regularize(Odd(), hidden_dropout=0.1), folder / "odd.html"))
    page.press("u")
    page.type("selector", "*.1@ReLU")
    assert page.things(".lit") == ["constructor.1", "__proto__.1", "toString.1", "<b>.1", "0.1", "größe.1"]
    page.run("graphreg.go('<b>.1')")
    assert page.text("panel").startswith("<b>.1")


class Tied(nn.Module):
    """The words go in and out through one table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.words(tokens)))  # type: ignore[no-any-return]


@needs_chromium
def test_a_tied_parameter_is_told_at_each_layer_that_has_it(folder: Path) -> None:
    module = graphreg.regularize(Tied(), rng=0, weight_l2={"weight": 0.1, "reduction": "sum"})
    page = Page(graphreg.draw(module, folder / "tied.html"))
    for layer in ("words", "head"):
        page.click(f"[data-key='{layer}'] text")
        told = page.text("panel")
        assert "words.weight" in told and re.search(r"also called\s*head\.weight", told) and "weight_l2" in told, told
