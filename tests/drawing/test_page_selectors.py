"""The rule of matching in the page, beside that of the library: a shared table, globs, random selectors, and five real models."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn

import graphreg
from browser import BROWSER, DRIVER, Page, needs_chromium
from drawn_nets import GPT, Half
from graphreg import GraphRegError, NoMatchError, Traced
from graphreg.drawing import html
from graphreg.ir.selector import select
from graphreg.ir.site import MARKS, Label, Site

# what is selected here is selected to be counted, insides and all
pytestmark = pytest.mark.filterwarnings("ignore:.* (in a row|one after another) on one value:UserWarning")
TABLE = json.loads((Path(__file__).parents[1] / "data" / "selectors.json").read_text())
IDS = torch.zeros(2, 7, dtype=torch.long)
IMAGE = torch.zeros(1, 3, 64, 64)


@cache
def small(folder: Path) -> Path:
    return graphreg.draw(Half(), folder / "small.html")


@cache
def normed(folder: Path) -> Path:
    return graphreg.draw(Normed(), folder / "normed.html", example_inputs=torch.zeros(1, 2))


def of_table(kind: str) -> list[Site]:
    made = []
    for row in TABLE["sites"]:
        labels = tuple(Label(**(label | {"ports": tuple(label["ports"])})) for label in row["labels"])
        facts = {"why_not": row.get("why_not", ""), **{mark: row[mark] for mark in MARKS if mark in row}}
        made.append(Site(labels, row["kind"], row["role"], row["selectable"], shape=(1, 1), **facts))
    return [site for site in made if site.kind == kind]


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: " ".join(case["selector"]))
def test_the_table_in_python(case: dict[str, Any]) -> None:
    sites = of_table(case["kind"])
    default = [site for site in sites if site.selectable and (site.role == "hidden" or site.kind == "parameter")]
    other, what = ("parameter", "value") if case["kind"] == "value" else ("value", "parameter of 2 dims or more")
    if case["names"] is None:
        with pytest.raises(GraphRegError, match=f"^{re.escape(case.get('error', ''))}"):
            select(case["selector"], sites, default, what=what, elsewhere=of_table(other))
    else:
        assert [site.name for site in select(case["selector"], sites, default, elsewhere=of_table(other))] == case["names"]


IN_BROWSER = """
const [sites, cases] = arguments;
const name = ({labels: [{name, ports, default: usual}]}) => usual ? name : `${name}:${ports[0]}`;
sites.forEach((site, id) => Object.assign(site, {id, name: name(site), why_not: site.why_not ?? "", used: true, dims: 2}));
const told = {model: "the model", cls: "the regularizer", usual: "the default sites", needs: ""};
const rule = (kind) => ({...told, on: kind + "s", splice: false, min_dims: 2, default: sites.filter((site) =>
    site.kind === kind && site.selectable && (site.role === "hidden" || kind === "parameter")).map((site) => site.id)});
return cases.map(({kind, selector}) => {
  try {
    const found = graphreg.select(selector, sites, rule(kind));
    return [found.errors.length ? null : found.chosen.map((site) => site.name), found.errors.join(" ")];
  } catch (error) { return [error instanceof TypeError ? String(error) : null, error.message]; }
});
"""


@needs_chromium
def test_the_table_in_the_browser(folder: Path) -> None:
    found = Page(small(folder)).run(IN_BROWSER, TABLE["sites"], TABLE["cases"])
    assert [names for names, _ in found] == [case["names"] for case in TABLE["cases"]]
    told = [(case["error"], error) for case, (_, error) in zip(TABLE["cases"], found, strict=True) if "error" in case]
    assert [pair for pair in told if pair[0] != pair[1]] == [] and len(told) > 11


class Normed(nn.Sequential):
    """Nothing hidden but a norm's output."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))


@needs_chromium
@pytest.mark.parametrize(("key", "text"), [
    ("hidden_l1", "*"), ("dropout", "2.weight"), ("dropout", "1@Linear"), ("weight_l2", "#hidden"), ("weight_l2", "*.bias"),
    ("weight_l2", "0"), ("recurrent_norm", "*"), ("recurrent_state", "*"),
])  # fmt: skip
def test_why_nothing_is_found_is_told_as_by_the_library(key: str, text: str, folder: Path) -> None:
    page = Page(normed(folder))
    answer = page.run(TRIED, [key], [text])[0][0]
    weight = page.run("return graphreg.data.rules.find((rule) => rule.key === arguments[0]).weight", key)
    with pytest.raises(GraphRegError) as refused:
        graphreg.plan(graphreg.trace(Normed(), torch.zeros(1, 2)), graphreg.build(key, weight=weight, pattern=text))
    assert len(answer["wrong"]) > 60 and str(refused.value).startswith(answer["wrong"]) and answer["paste"] == ""


@needs_chromium
def test_commas_and_spaces_stand_between_strings(folder: Path) -> None:
    texts = ["a,b", "a, b", " a  b,", "a[1,2].*,!b", "a[],]b", "a[!],]b,c", "a[1, 2]", "a[b,c", ","]
    texts += [r"a\,b,c", r"a\ b c", r"a\[b,c]", r"a\\,b"]
    assert Page(small(folder)).run("return arguments[0].map((text) => apart(text))", texts) == [
        ["a", "b"], ["a", "b"], ["a", "b"], ["a[1,2].*", "!b"], ["a[],]b"], ["a[!],]b", "c"], ["a[1", "2]"], ["a[b", "c"], [],
        [r"a\,b", "c"], [r"a\ b", "c"], [r"a\[b", "c]"], ["a\\\\", "b"],
    ]  # fmt: skip


@needs_chromium
def test_globs_are_fnmatchs(folder: Path) -> None:
    """Any text is a glob: brackets that do not close, ranges that run backwards, letters that mean something to a regular expression."""
    choose = random.Random(0)
    letters = "ab.-]![*?^\\$()+|{}/,é"
    pairs = [["".join(choose.choices(letters, k=choose.randint(0, 7))), "".join(choose.choices(letters, k=choose.randint(0, 3)))]
             for _ in range(4000)]  # fmt: skip
    pairs += [[text, text] for text, _ in pairs[:500]]
    found = Page(small(folder)).run("return arguments[0].map(([glob, text]) => graphreg.glob(glob)(text))", pairs)
    expected = [fnmatchcase(text, glob) for glob, text in pairs]
    assert [pair for pair, one, other in zip(pairs, found, expected, strict=True) if one != other] == []
    assert 100 < sum(expected) < 4400


# Random selectors on the sites of random models, in node or in the browser, and in Python

NODE = shutil.which("node")
PATHS = ("a", "a.b", "a.b.c", "a.c", "b", "b.0", "b.0.é", "b.1", "layer1", "layer1.0", "layer10", "x", "c:d", "c@d", "[ab]", "!b", "a.b#2")
OPS, PORTS = ("ReLU", "relu", "add", "Conv2d", "LSTM"), (("out",), ("0",), ("1", "last"), ("hidden", "1"))


def random_sites(choose: random.Random) -> list[Site]:
    """A handful of values and parameters, each with a name of its own; some cannot be regularized, some have several names."""
    sites, paths = list[Site](), choose.sample(PATHS, choose.randint(1, 8))
    for path in paths:
        module = choose.random() < 0.5
        name = path if module else f"{path}.{choose.choice(('add', 'relu_1', 'weight'))}"
        ports = choose.choice(PORTS) if choose.random() < 0.4 else ("out",)
        labels = [Label(name, choose.choice(OPS), ports, ports == ("out",) or choose.random() < 0.5, path if module else None)]
        if choose.random() < 0.3:
            other = choose.choice((path.rpartition(".")[0] or "x", "b.0", f"{path}.tail"))
            labels.append(Label(other, choose.choice(OPS), ("out",), True, choose.choice((other, None))))
        selectable, kind = choose.random() < 0.8, "value" if choose.random() < 0.7 else "parameter"
        role = choose.choice(("input", "hidden", "hidden", "output", "")) if kind == "value" else ""
        norm = kind == "value" and choose.random() < 0.2
        facts = {"why_not": "" if selectable else "integers", "branch": kind == "value" and choose.random() < 0.2}
        facts |= {mark: "a" * (kind == "value" and choose.random() < 0.2) for mark in ("trunk", "normed")}
        sites.append(Site(tuple(labels), kind, role, selectable, norm, shape=(1, 1), **facts))  # type: ignore[arg-type]
    return sites


def random_selector(choose: random.Random, sites: Sequence[Site]) -> str:
    """Most are made of a name that is there, a little changed; some are of letters that mean something, or of none."""
    if choose.random() < 0.1:
        return "".join(choose.choices("ab.*?[]!@:#\\ é01-", k=choose.randint(0, 6)))
    site = choose.choice(sites)
    label = choose.choice(site.labels)
    parts = re.split(r"(\.)", label.name)
    for _ in range(choose.choice((0, 0, 1, 2))):
        parts[choose.randrange(len(parts))] = choose.choice(("*", "**", "?", "[ab]*", "[!a]", "b", ".", "layer1?", ""))
    text = choose.choice(("", "", "", "!")) + choose.choice(("".join(parts), "".join(parts), "*", "**", ""))
    text += choose.choice(("", "", "", "", "", f"@{choose.choice((label.op, label.op, '*', 're*', '[RC]*', 'absent'))}"))
    text += choose.choice(("", "", "", "", "", f":{choose.choice((*label.ports, '*', '[01]', 'out'))}"))
    role = choose.choice((site.role or "hidden", "input", "output", *MARKS, "other"))
    return choose.choice((text, text, text, text, text, text, f"{text}#{role}", f" {text} "))


def random_cases(count: int) -> list[tuple[list[str], str, list[Site]]]:
    """Strings, the kind of site that a regularizer which has them acts on, and the sites."""
    choose, cases = random.Random(15), []
    for _ in range(count):
        sites, kind = random_sites(choose), choose.choice(("value", "value", "parameter"))
        own = [site for site in sites if site.kind == kind] or sites
        texts = [random_selector(choose, own if choose.random() < 0.9 else sites) for _ in range(choose.choice((1, 1, 1, 2, 3)))]
        cases.append((texts, kind, sites))
    return cases


def is_usual(site: Site, kind: str) -> bool:
    """Whether a lone ``*`` means it."""
    return site.kind == kind and site.selectable and (site.role == "hidden" or kind == "parameter")


def in_python(texts: list[str], kind: str, sites: list[Site]) -> tuple[list[int], str]:
    """The places of the sites that are selected by those strings that select any, and the sentence about the first that selects none."""
    own, elsewhere = ([site for site in sites if (site.kind == kind) == same] for same in (True, False))
    usual = [site for site in own if is_usual(site, kind)]
    what, chosen, refusal = "value" if kind == "value" else "parameter of 2 dims or more", dict[Site, str](), ""
    try:
        chosen = select(texts, own, usual, what=what, elsewhere=elsewhere, missing="ignore")
        select(texts, own, usual, what=what, elsewhere=elsewhere)
    except GraphRegError as error:
        refusal = str(error)
    return [place for place, site in enumerate(sites) if site in chosen], refusal


SELECTED = """
return arguments[0].map(([texts, rule, sites]) => {
  try {
    const { chosen, errors } = select(texts, sites, rule);
    return [chosen.map((site) => site.id), errors[0] ?? ""];
  } catch (error) { return [[], error instanceof TypeError ? String(error.stack) : error.message]; }
});
"""


def in_javascript(cases: list[tuple[list[str], str, list[Site]]], folder: Path) -> list[tuple[list[int], str]]:
    """The same by the page's file, as it is."""
    rule = {"model": "the model", "cls": "the regularizer", "usual": "the default sites", "needs": "", "splice": False, "min_dims": 2}
    values = [
        (texts, rule | {"on": f"{kind}s", "default": [i for i, site in enumerate(sites) if is_usual(site, kind)]},
         [{"id": i, **html.site_metadata(site)} for i, site in enumerate(sites)])
        for texts, kind, sites in cases
    ]  # fmt: skip
    body = (Path(html.__file__).parent / "page" / "selector.js").read_text() + SELECTED
    if NODE is None:
        return list(Page(small(folder)).run(body, values))
    script = f"const answer = function () {{ {body} }}; console.log(JSON.stringify(answer(JSON.parse(require('fs').readFileSync(0)))));"
    done = subprocess.run([NODE, "--eval", script], input=json.dumps(values), capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def in_order(sentence: str) -> str:
    """With operations in one order: the library begins with those like the one that was asked for."""
    return re.sub("(?<=It has: ops )[^;]+", lambda found: ", ".join(sorted(found[0].split(", "))), sentence)


MORE = re.compile(r"( Near names: .*)?( List all: graphreg\.names\(model\)\.)?", re.DOTALL)  # what the library alone knows


@pytest.mark.skipif(NODE is None and not (BROWSER and DRIVER), reason="neither node nor Chromium here")
@pytest.mark.parametrize("count", [1000, 10_000])
def test_random_selectors_are_understood_as_by_the_library(count: int, folder: Path) -> None:
    cases = random_cases(count)
    expected = [in_python(*case) for case in cases]
    for case, (places, error), (chosen, told) in zip(cases, expected, in_javascript(cases, folder), strict=True):
        assert chosen == places and bool(told) == bool(error), (case, error, told)
        assert in_order(error).startswith(in_order(told)) and MORE.fullmatch(error[len(told) :]), (case, error, told)
    assert sum(bool(places) for places, _ in expected) > count / 4 and sum(not error for _, error in expected) > count / 6


def vit() -> nn.Module:
    return tv.VisionTransformer(image_size=64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)


REAL: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str]]] = {
    "resnet18": (tv.resnet18, IMAGE, [
        "layer[34].*@ReLU", "layer4*", "layer4.*", "layer4.**", "@BasicBlock", "**#hidden", "*", "* !layer1.*", "fc", "layer?.1.conv*",
    ]),
    "mobilenet": (tv.mobilenet_v3_small, IMAGE, [
        "features.*", "features.*.block.*", "**@Hardswish", "*.mul", "**#hidden !@mul", "classifier.*", "features.1?", "@Conv2d", "*", "**",
    ]),
    "shufflenet": (tv.shufflenet_v2_x0_5, IMAGE, [
        "stage3.*", "stage?.0.branch1.*", "**:0", "**@chunk:*", "stage2.1.chunk:1", "@cat", "*", "!stage4**", "conv5*",
        "stage*@InvertedResidual",
    ]),
    "vit": (vit, IMAGE, [
        "encoder.layers.*", "**@LayerNorm", "**.self_attention*", "**.mlp.*", "*@MultiheadAttention", "**#hidden", "heads*", "*", "#input",
        "encoder.layers.encoder_layer_[02].**@GELU",
    ]),
    "gpt": (lambda: GPT(12), IDS, [
        "h.*", "h.[0-3].mlp.*", "h.1?", "**@scaled_dot_product_attention", "h.*.add_1", "**.unbind:[01]", "* !ln_f", "#output", "*", "h.**",
    ]),
}  # fmt: skip


def of_library(traced: Traced, key: str, texts: Sequence[str]) -> list[str] | str:
    """What ``plan`` makes of it, or why it refuses."""
    try:
        return [edit.site.name for edit in graphreg.plan(traced, graphreg.build(key, weight=0.1, pattern=list(texts))).edits]
    except NoMatchError as error:
        return str(error)


def layer(path: str, visible: set[str]) -> str:
    """What is shown of a layer: it is no site where it returns several values; and the one around it may be whole."""
    found = [key for key in (f"${path.replace('.', '_')}", path) if key in visible]
    return found[0] if found else layer(path.rpartition(".")[0], visible)


TRIED = """
const [keys, texts] = arguments, field = document.getElementById("selector"), kind = document.getElementById("kind");
const text = (id) => document.getElementById(id).textContent;
return keys.map((key) => {
  kind.value = graphreg.data.rules.findIndex((rule) => rule.key === key);
  return texts.map((typed) => {
    field.value = typed;
    field.dispatchEvent(new Event("input"));
    const lit = Object.keys(graphreg.scene.shown);
    const { chosen, errors } = graphreg.selected(typed), sites = chosen.map((site) => site.name);
    return {errors, count: text("count"), wrong: text("wrong"), paste: text("paste"), lit, sites};
  });
});
"""


@needs_chromium
@pytest.mark.parametrize("name", REAL)
def test_ten_selectors_on_a_real_model(name: str, folder: Path) -> None:
    """Site for site: what the box counts, what lights up, and what the library plans; for values that are replaced, and parameters."""
    make, inputs, selectors = REAL[name]
    traced = graphreg.trace(make(), inputs)
    page = Page(graphreg.draw(traced, folder / f"{name}-bare.html"))
    page.press("u")
    nodes = [node for node in next(iter(traced.graphs.values())).nodes if node.op == "get_attr" and node.meta["site"][1]]
    reads = {str(node.target): node.meta["site"][1][0].text for node in nodes}
    visible, some, keys = set(page.things()), 0, ("dropout", "hidden_l1", "weight_l2")
    for key, answers in zip(keys, page.run(TRIED, keys, selectors), strict=True):
        for text, told in zip(selectors, answers, strict=True):
            wanted = of_library(traced, key, text.split())
            if isinstance(wanted, str):
                first = told["errors"][0]
                assert len(first) > 30 and wanted.startswith(first) and told["wrong"].startswith(first) and told["paste"] == "", (key, text)
                continue
            some += len(wanted) > 0
            assert told["wrong"] == "" and told["sites"] == wanted, (key, text)
            assert told["count"] == f"{len(wanted)} site{'s' * (len(wanted) != 1)}" and told["paste"], (key, text)
            owners = set(wanted)
            if key == "weight_l2":  # a parameter is shown where the model reads it, or at its layer
                owners = {reads.get(site) or layer(site.rpartition(".")[0], visible) for site in wanted}
            assert set(told["lit"]) == owners and owners <= visible, (key, text)
    assert len(selectors) == 10 and some > 18


@needs_chromium
def test_the_recipe_does_what_was_kept_and_is_shown(folder: Path, tmp_path: Path) -> None:
    model, file = GPT(5), tmp_path / "recipe.toml"
    page = Page(graphreg.draw(model, folder / "recipe.html", example_inputs=IDS))
    hidden = "return [...document.querySelectorAll('#asrecipe, #asrecipe *')].filter((one) => one.hidden).map((one) => one.id)"
    assert page.run(hidden) == ["asrecipe", "keep", "drop"]
    expected = []
    for key, text in (("dropout", "h.[34].**@Linear"), ("weight_l2", "h.[3,4].** !h.3.**"), ("hidden_l1", r"h.0.\**@GELU")):
        page.driver.find_element("css selector", f"#kind option[title='{graphreg.registered()[key].__name__}']").click()
        page.type("selector", text)
        if not page.text("paste"):
            assert key == "hidden_l1" and page.run(hidden) == ["keep"]  # an escaped star matches nothing; what was kept stays
            break
        expected.append((graphreg.registered()[key], text.split(" ")))
        page.run("document.getElementById('asrecipe').open = true")
        if key == "dropout":
            page.driver.find_element("css selector", "#keep").click()
            assert page.text("paste") == "" and page.run("return document.activeElement.id") == "selector"
        file.write_text(page.text("recipe"))
        made = graphreg.regularize(model, recipe=file, example_inputs=IDS).graphreg_rules.build_record.plan
        patterns = [[each.pattern] if isinstance(each.pattern, str) else list(each.pattern) for each in made.regularizers.values()]
        assert [(type(each), pattern) for each, pattern in zip(made.regularizers.values(), patterns, strict=True)] == expected
    page.driver.find_element("css selector", "#drop").click()
    assert page.text("recipe") == ""


@needs_chromium
def test_the_line_to_paste_does_what_is_shown(folder: Path) -> None:
    model = GPT(12)
    page = Page(graphreg.draw(model, folder / "paste.html", example_inputs=IDS))
    for key, text in (("dropout", "h.[34].**@Linear"), ("dropout", "h.*,!h.1?"), ("weight_l2", "h.[3,4].**")):
        page.driver.find_element("css selector", f"#kind option[title='{graphreg.registered()[key].__name__}']").click()
        page.type("selector", text)
        assert f"weight={'0.1' if key == 'dropout' else '0.0001'}," in page.text("paste")
        space: dict[str, Any] = {"graphreg": graphreg, "model": model}
        exec(page.text("paste"), space)
        sites = [edit.site.name for edit in space["module"].graphreg_rules.build_record.plan.edits]
        assert sites and sites == page.run("return graphreg.selected(arguments[0]).chosen.map((site) => site.name)", text)
