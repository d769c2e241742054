"""Two plans or two modules on one drawing, and a drawing for a notebook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import graphreg
from browser import Page, needs_chromium
from drawn_nets import Half
from graphreg import GraphRegError
from graphreg.drawing.scene import picture
from graphreg.drawing.view import viewed
from page_states import opened


def net(**keywords: object) -> nn.Module:
    return graphreg.regularize(Half(), rng=0, **keywords)  # type: ignore[arg-type]


def test_what_is_more_less_and_otherwise(tmp_path: Path) -> None:
    first = net(dropout={"relu*": 0.1}, weight_l2=0.1, hidden_l1={"weight": 0.3, "pattern": "relu"})
    second = net(dropout={"relu": 0.2}, weight_l2=0.1, noise={"a": 0.5}, hidden_l1={"weight": 0.3, "pattern": "relu"})
    made = picture(replace(viewed(second), against=viewed(first)))
    assert {key: [(badge.text, badge.state) for badge in badges] for key, badges in made.badges.items()} == {
        "relu": [("dropout 0.1 → 0.2", "changed"), ("hidden_l1 0.3", "")], "relu_1": [("− dropout 0.1", "removed")],
        "a": [("+ noise 0.5", "added"), ("weight: weight_l2 0.1", "")], "b": [("weight: weight_l2 0.1", "")],
    }  # fmt: skip
    assert made.title == "Half, compared"
    assert made.regularizers["noise"] == "none → GaussianNoise 0.5 on 'a', 1 site" and "→" not in made.regularizers["weight_l2"]
    text = graphreg.draw(second, tmp_path / "x.svg", against=first).read_text()
    assert "dropout 0.1 → 0.2" in text and "badge removed" in text
    same = picture(replace(viewed(first), against=viewed(first)))
    assert all(badge.state == "" for badges in same.badges.values() for badge in badges)


def test_strengths_that_were_set_are_compared() -> None:
    first, second = net(dropout={"relu": 0.1}), net(dropout={"relu": 0.1})
    graphreg.set_strength(second, "dropout", 0.4)
    made = picture(replace(viewed(second), against=viewed(first)))
    assert {badge.text for badges in made.badges.values() for badge in badges} == {"dropout 0.1 → 0.4"}


def test_the_legend_names_other_options_and_other_native_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    one, two = {"weight_l2": 0.1, "dropout": {"0": 0.1}}, {"weight_l2": {"strength": 0.1, "reduction": "sum"}, "dropout": {"0": 0.1}}
    first = graphreg.regularize(model, rng=0, **one)  # type: ignore[arg-type]
    second = graphreg.regularize(model, rng=0, own_dropout={"2": "off"}, **two)  # type: ignore[arg-type]
    legend = picture(replace(viewed(second), against=viewed(first))).regularizers
    assert legend == {
        "weight_l2": "WeightL2 0.1 on '*', 2 sites, reduction='mean' → WeightL2 0.1 on '*', 2 sites, reduction='sum'",
        "dropout": "BernoulliDropout 0.1 on '0', 1 site", "own_dropout": "none → off at 2",
    }  # fmt: skip
    assert "own_dropout" not in picture(replace(viewed(second), against=viewed(second))).regularizers


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphRegError, match="against= is for another plan or module of the same model, and these differ in"):
        graphreg.draw(net(weight_l2=0.1), tmp_path / "x.html", against=nn.Sequential(nn.Linear(4, 4)))


def test_a_notebook_gets_the_page(tmp_path: Path) -> None:
    drawing = graphreg.draw(net(dropout={"relu": 0.1}))
    shown = drawing._repr_html_()
    assert shown.startswith('<iframe title="Half"') and "&lt;!doctype html&gt;" in shown and "<script" not in shown
    other = graphreg.draw(net(dropout={"relu": 0.1}), tmp_path / "y.html")
    assert drawing.save(tmp_path / "x.html").read_text() == drawing.page == other.read_text()
    assert repr(drawing) == "Drawing(title='Half')"
    with pytest.raises(GraphRegError, match=r"ends in '.svg'; drawings end in .html"):
        drawing.save(tmp_path / "x.svg")


@needs_chromium
def test_the_page_lists_the_differences(folder: Path) -> None:
    page = opened(folder, "compared", "light")
    assert page.text("differing") == "+ 3 added, − 3 removed, → 15 changed"
    assert page.run("return document.querySelectorAll('#changed button').length") == 21
    assert "added: + noise 0.1" in page.text("panel") and "removed: − dropout 0.1" in page.text("panel")
    badges = "return [...document.querySelectorAll('[data-key=\"h.0.ln1\"] .badge')].map((one) => [one.textContent, one.classList[1]])"
    assert page.run(badges) == [["+ noise 0.1", "added"], ["− dropout 0.1", "removed"]]


@needs_chromium
def test_values_of_a_monitor(folder: Path, tmp_path: Path) -> None:
    page = opened(folder, "values", "light")
    under = "return document.querySelector(`[data-key='relu'] .second`).textContent"
    last = page.run("return graphreg.data.values.at(-1).values['relu/mean']")
    assert float(page.run(under)) == pytest.approx(last, rel=0.01)
    assert page.text("stepname") == "step 2" and "penalty/hidden_l1" in page.text("others")
    page.run("const step = document.getElementById('step'); step.value = 0; step.dispatchEvent(new Event('input'))")
    assert float(page.run(under)) == pytest.approx(page.run("return graphreg.data.values[0].values['relu/mean']"), rel=0.01)
    captions = "return [...document.querySelectorAll('figure figcaption')].map((one) => one.firstChild.textContent.trim())"
    assert page.run(captions) == [
        "mean", "std", "near_zero", "norm", "kept/hidden_dropout"
    ]  # fmt: skip
    (tmp_path / "other.jsonl").write_text("no readings\n")
    page.driver.find_element("id", "readings").send_keys(str(tmp_path / "other.jsonl"))
    page.driver.execute_async_script("setTimeout(arguments[0], 100)")
    assert page.text("unread") == "other.jsonl is no file that graphreg.monitor(module, file=...) wrote."


def test_files_that_are_no_monitors(tmp_path: Path) -> None:
    module, file = net(dropout={"relu": 0.1}), tmp_path / "values.jsonl"
    with pytest.raises(GraphRegError, match="cannot be read"):
        graphreg.draw(module, tmp_path / "x.html", values=file)
    file.write_text("")
    with pytest.raises(GraphRegError, match="has no readings yet"):
        graphreg.draw(module, tmp_path / "x.html", values=file)
    for line in ("{", "3", '{"step": 1}', '{"step": "x", "values": {}}', '{"step": 1, "values": {"a": [1]}}'):
        file.write_text(f'{{"step": 0, "values": {{"relu/mean": 1.0}}}}\n{line}\n')
        with pytest.raises(GraphRegError, match="line 2, is no reading of a monitor"):
            graphreg.draw(module, tmp_path / "x.html", values=file)
    with pytest.raises(GraphRegError, match=r"values= is for an \.html page"):
        graphreg.draw(module, tmp_path / "x.svg", values=file)
    file.write_text("".join(f'{{"step": {i}, "values": {{"relu/mean": {i}}}}}\n' for i in range(1000)))
    from graphreg.drawing.values import MOST, read_values  # noqa: PLC0415

    readings = read_values(file)
    assert (
        len(readings) <= MOST
        and readings[-1]["step"] == 999
        and torch.tensor([r["step"] for r in readings]).diff().unique().tolist() == [5]
    )


@needs_chromium
def test_the_page_works_within_a_notebook(tmp_path: Path) -> None:
    """Its frame has no address of its own, so that no state can be kept there; everything else works."""
    shown = graphreg.draw(net(dropout={"relu": 0.1}))._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>notebook</title>{shown}")
    page = Page(tmp_path / "notebook.html")
    page.driver.switch_to.frame(page.driver.find_element("css selector", "iframe"))
    page.type("selector", "relu*")
    assert page.text("count") == "2 sites" and page.things(".lit") == ["relu", "relu_1"]
    page.driver.execute_async_script("setTimeout(arguments[0], 400)")
    assert page.driver.get_log("browser") == []
    page.driver.switch_to.default_content()
