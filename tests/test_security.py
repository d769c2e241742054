"""docs/SECURITY.md: names that look like markup or code are text in pages, pictures, reports and emitted code; recipes run nothing."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import graphreg
from browser import Page, needs_chromium

ATTACK = "<img src=x onerror=globalThis[`taken`]=1>"  # without dots, which a module's name cannot have
CLOSING = "</script></svg></title></text><script>globalThis[`taken`]=1</script>"


def net(name: str) -> nn.Module:
    block = nn.Sequential()
    block.add_module(name, nn.Linear(4, 4))
    block.add_module("act", nn.ReLU())
    model: nn.Module = type(f"Net{name}", (nn.Sequential,), {})()
    model.add_module(name, block)
    model.add_module("out", nn.Linear(4, 2))
    return model


def regularized(name: str) -> graphreg.types.RewrittenModule:
    """A selector may have any text as well; the name of a regularizer must be an identifier."""
    with pytest.raises(graphreg.RegularizerError):
        graphreg.build("weight_l2", weight=0.1, name=f"{name}!")
    penalty = {"weight": 0.1, "pattern": ["out.*", name]}
    return graphreg.regularize(net(name), example_inputs=torch.ones(2, 4), missing="ignore", dropout={"*": 0.1}, weight_l2=penalty, rng=0)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen, self.handlers = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.parametrize("name", [ATTACK, CLOSING, '"><b onclick=f()>'])
def test_names_are_text_in_html(name: str) -> None:
    module = regularized(name)
    for shown in (graphreg.report(module), graphreg.diff(module)):
        tags = Tags(shown._repr_html_())
        assert tags.seen and not {"img", "script", "svg", "b"} & set(tags.seen) and tags.handlers == []


@pytest.mark.parametrize("name", [ATTACK, CLOSING, '"><b onclick=f()>'])
def test_names_are_text_in_drawings(name: str, tmp_path: Path) -> None:
    """The page and the picture have the tags that they have for a harmless name, and no others."""
    found = {}
    for each in (name, "harmless"):
        module = regularized(each)
        graphreg.draw(module, tmp_path / "x.svg")
        elements = [element.tag for element in ElementTree.parse(tmp_path / "x.svg").iter()]
        graphreg.draw(module, tmp_path / "x.html")
        tags = Tags((tmp_path / "x.html").read_text())
        found[each] = set(elements), tags.seen, tags.handlers
    assert found[name] == found["harmless"]


@needs_chromium
def test_a_page_runs_no_name(tmp_path: Path) -> None:
    """Also where its script writes names: boxes, the panel, the search, the selector, the legend."""
    graphreg.draw(regularized(ATTACK), tmp_path / "x.html")
    page = Page(tmp_path / "x.html")
    fields = "input[type=search], input[type=text], input:not([type])"
    for field in page.run("return [...document.querySelectorAll(arguments[0])].map(each => each.id)", fields):
        page.type(field, "*")
    click = "each.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    page.run(f"for (const each of document.querySelectorAll('button, [data-key]')) {click}")
    assert page.run("return [...document.querySelectorAll('svg [data-key]')].some(each => each.textContent.includes('onerror'))")
    assert page.run("return globalThis.taken") is None
    assert page.run("return document.querySelectorAll('img').length") == 0


@pytest.mark.parametrize("name", ["a'); open('taken', 'w') #", 'a"\nopen("taken", "w")\n"', "a}); open('taken', 'w'); ({"])
def test_names_are_no_code(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emitted Python has names of submodules and regularizers in it."""
    monkeypatch.chdir(tmp_path)
    try:
        module = regularized(name.replace(".", ""))
        module(torch.ones(2, 4))
        graphreg.strip(module)(torch.ones(2, 4))
        print(graphreg.report(module), graphreg.diff(module))
    except graphreg.GraphRegError:  # refused
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.yaml", "hidden_dropout: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [taken]]\n"),
        ("a.yaml", "!!python/object/new:os.system [touch taken]\n"),
        ("a.json", "{\"hidden_dropout\": \"__import__('os').system('touch taken')\"}"),
        ("a.json", '{"regularizers": [{"key": "os:system", "weight": 0.1, "pattern": "*"}]}'),
        ("a.json", '{"regularizers": [{"key": "../../passes/dropout", "weight": 0.1, "pattern": "*"}]}'),
        ("a.toml", "hidden_dropout = {linear = [\"open('taken', 'w')\", 1, 2]}\n"),
    ],
)
def test_a_recipe_runs_nothing(file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).write_text(text)
    with pytest.raises(graphreg.GraphRegError):
        graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), recipe=file)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_checkpoints_need_no_code(tmp_path: Path) -> None:
    """What graphreg saves beside a checkpoint is plain data, which torch.load reads with ``weights_only=True``, and JSON has."""
    module = regularized("hid")
    torch.save({"model": module.state_dict(), "noise": graphreg.rng_state(module)}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    graphreg.set_rng_state(module, saved["noise"])
    assert json.loads(json.dumps(graphreg.recipe(module)))["rng"] == 0
