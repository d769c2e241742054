"""What the page knows of regularizers besides names: the sites that they refuse, strengths that act; and the rates of native dropout."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import graphreg
from browser import Page, needs_chromium
from drawn_nets import GPT, Tagger
from graphreg.drawing.rules import tried
from graphreg.errors import GraphRegError

IDS = torch.zeros(2, 7, dtype=torch.long)
WEAK = {"weight_l2", "weight_l1", "elastic_net", "l2_sp"}  # as means over all elements


def choose(page: Page, key: str, text: str) -> None:
    page.driver.find_element("css selector", f"#kind option[title='{graphreg.registered()[key].__name__}']").click()
    page.type("selector", text)


@pytest.mark.parametrize("traced", [graphreg.trace(GPT(2), IDS), graphreg.trace(Tagger(), IDS)], ids=["gpt", "lstm"])
def test_a_site_is_refused_exactly_where_plan_refuses_it(traced: graphreg.Traced) -> None:
    """Each site alone, for regularizers of all kinds that need not know whether a value is a sequence or a state."""
    rules, profiles = tried(traced)
    refused = 0
    for key in ("head_dropout", "channel_dropout", "drop_block", "covariance", "dropout", "weight_l2"):
        number, rule = next((i, rule) for i, rule in enumerate(rules) if rule["key"] == key)
        assert not rule["unsure"]
        for site in traced.parameters if rule["on"] == "parameters" else traced.values:
            text = profiles.texts[profiles.of[site.name]].get(number, "") if site.name in profiles.of else ""
            if not site.selectable or not site.used or len(site.shape or ()) < rule["min_dims"]:
                continue
            refused += bool(text)
            try:
                graphreg.plan(traced, graphreg.build(key, weight=rule["weight"], pattern=site.labels[0].text))
            except GraphRegError as error:
                assert text.replace("{}", site.name) == str(error), (key, site.name)
            else:
                assert text == "", (key, site.name)
    assert refused > 20
    assert {rule["key"] for rule in rules if rule["unsure"]} >= {"recurrent_norm", "zoneout", "locked_dropout"}


@needs_chromium
def test_the_page_gives_no_line_that_plan_refuses(folder: Path) -> None:
    model = GPT(4)
    page = Page(graphreg.draw(model, folder / "refusals.html", example_inputs=IDS))
    choose(page, "head_dropout", "h.3.*")
    count = int(page.text("count").split()[0])
    with pytest.raises(GraphRegError) as error:
        graphreg.plan(graphreg.trace(model, IDS), graphreg.build("head_dropout", weight=0.1, pattern="h.3.*"))
    wrong = page.text("wrong")
    assert wrong.startswith("plan refuses ") and f" of {count}. " in wrong and wrong.endswith(str(error.value))
    assert page.text("paste") == page.text("recipe") == ""
    page.type("selector", "h.3.scaled_dot_product_attention")
    assert page.text("wrong") == "" and "head_dropout" in page.text("paste")
    shown = "return document.getElementById('unsure').hidden"
    assert page.run(shown)
    choose(page, "locked_dropout", "h.3.ln1")
    assert page.text("paste") and not page.run(shown)


@needs_chromium
def test_the_strength_of_a_line_acts(folder: Path, tmp_path: Path) -> None:
    """A weight of 1e-4 is practically off where a penalty is the mean over all elements of a large parameter, and acts as a sum."""
    model = torchvision.models.resnet18(num_classes=10)
    page = Page(graphreg.draw(model, folder / "acts.html"))
    traced = graphreg.trace(model)
    for key in sorted(WEAK):
        choose(page, key, "layer4.*.weight")
        (tmp_path / "recipe.toml").write_text(page.text("recipe"))
        (table,) = tomllib.loads(page.text("recipe"))["regularizers"]
        assert (table["key"], table["weight"], table["reduction"]) == (key, 1e-4, "sum") and ', reduction="sum"' in page.text("paste")
        table.pop("key")
        assert "practically off" not in str(graphreg.plan(traced, graphreg.build(key, **table)))
        assert "practically off" in str(graphreg.plan(traced, graphreg.build(key, **table | {"reduction": "mean"})))
        space: dict[str, Any] = {"graphreg": graphreg, "model": model}
        exec(page.text("paste"), space)
        assert space["module"].graphreg_rules.build_record.plan.regularizers[key].reduction == "sum"
    assert {rule["key"] for rule in tried(traced)[0] if rule["options"]} == WEAK


@needs_chromium
def test_native_dropout_shows_its_rate(folder: Path) -> None:
    model = GPT(4)
    model.h[0].drop.p = 0.25  # type: ignore[union-attr, assignment]
    module = graphreg.regularize(model, example_inputs=IDS, rng=0, own_dropout={"h.1.drop": 0.2})
    page = Page(graphreg.draw(module, folder / "rates.html"))
    told = {}
    for key in ("h.0.drop", "h.1.drop", "h.0.ln1"):
        page.run("graphreg.choose(arguments[0])", key)
        told[key] = page.run("return [...document.querySelectorAll('#panel dt')].filter((one) => one.textContent === 'native dropout')"
                             ".map((one) => one.nextSibling.textContent)")  # fmt: skip
    assert told["h.0.drop"] == ["0.25, in train mode"] and told["h.1.drop"] == ["0.1, in train mode, seeded at 0.2"]
    assert told["h.0.ln1"] == []
    assert page.run("return graphreg.data.nodes['h.0.drop'].lines") == ["drop", "Dropout 2x7x16 rate 0.25"]
    assert page.run("return graphreg.data.nodes['h.1.drop'].lines") == ["drop", "Dropout 2x7x16 rate 0.1 native: seeded at 0.2"]
