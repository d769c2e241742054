"""The command line: what each command prints, and one clear line with status 2 for whatever is wrong."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cli_page
import graphreg
from graphreg import schedules
from graphreg.cli import demos as cli_demo
from graphreg.cli import main as cli
from graphreg.cli import parser as cli_parser
from graphreg.cli import regularizer_names as cli_keys
from graphreg.cli.keywords import own_dropout, regularizers
from graphreg.cli.load import example_inputs
from graphreg.ir.selector import Missing
from graphreg.regularizer import registry
from graphreg.regularizer.registry import FAMILIES, PREFIXED
from graphreg.rewriting.rewrite import rewrite
from graphreg.tracing.trace import FRONT_ENDS

NETS = """
import os
import sys
import warnings

import torch
from beside_the_nets import WIDTH
from torch import nn

SEEN = list(sys.path)


class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.hid, self.drop, self.out = nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.drop(self.hid(x).relu()))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(100, 3), nn.Linear(3, 2)

    def forward(self, words, weights=None):
        return self.out(self.table(words) * weights[..., None])


class BeforeNorm(Net):
    def __init__(self):
        super().__init__()
        self.out = nn.Sequential(nn.BatchNorm1d(WIDTH), self.out)


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Nested:
    made = Net()


def speaks():
    print("a word of the model's own")
    return Net()


def raises():
    raise ValueError("no weights\\nare here")


def exits():
    sys.exit(3)


def interrupted():
    raise KeyboardInterrupt


def warns():
    warnings.warn("old weights")
    return Net()


def gives_text():
    return "resnet18"


number = 3
"""
RAISED = NETS[: NETS.index("raise ValueError")].count("\n") + 1
COMMANDS = ("names", "plan", "report", "diff", "draw")
Said = tuple[int, str, str]
Say = Callable[..., Said]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("nets")
    (made / "cli_nets.py").write_text(NETS)
    (made / "beside_the_nets.py").write_text("WIDTH = 3\n")
    (made / "cli_broken.py").write_text("import a_package_that_is_not_there\n")
    (made / "cli_syntax.py").write_text("def net(:\n")
    (made / "pytest.py").write_text("")
    torch.save(torch.ones(5, 4), made / "one.pt")
    torch.save([torch.ones(5, 4)], made / "list.pt")
    torch.save({"x": torch.ones(5, 4)}, made / "named.pt")
    torch.save({3: torch.ones(5, 4)}, made / "numbered.pt")
    torch.save(nn.Linear(1, 1), made / "module.pt")
    (made / "text.pt").write_text("no tensors")
    yield made
    for name in ("cli_nets", "beside_the_nets"):
        sys.modules.pop(name, None)


READ_ONCE = functools.cache(cli_keys.written_keys)


@pytest.fixture
def keys_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are read in the sources once for all tests: each command line would read them four times."""
    monkeypatch.setattr(cli_parser, "written_keys", READ_ONCE)


@pytest.fixture
def say(folder: Path, keys_read_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line where the nets are: its status, stdout and stderr."""
    monkeypatch.chdir(folder)

    def run(*argv: str) -> Said:
        status = cli.main(argv)
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


# What is right


def test_the_pages(keys_read_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/cli.md and docs/start.md show is what the commands print: ``python tests/cli/cli_page.py`` writes it anew."""
    monkeypatch.delenv("COLUMNS", raising=False)
    for name in cli_page.PAGES:
        page = (cli_page.TOP / name).read_text()
        assert "```console\n$ graphreg" in page
        assert cli_page.filled(page) == page


def test_names_are_those_of_the_library(say: Say) -> None:
    status, out, err = say("names", "cli_nets.py:speaks", "--input", "5x4")
    model = sys.modules["cli_nets"].Net()
    assert (status, out) == (0, f"{graphreg.names(model, torch.ones(5, 4))}\n")
    assert err == "a word of the model's own\n"


def test_a_model_however_it_is_named(say: Say) -> None:
    outs = [say("names", text)[1] for text in ("cli_nets.py:Net", "cli_nets:Net", "./cli_nets.py:Nested.made", "cli_nets.py:Nested.made")]
    assert len(set(outs)) == 1 and outs[0].startswith("Net: 9 sites")
    assert "Linear   7x4" in say("names", "cli_nets.py:Net", "--kwargs", '{"width": 7}')[1]


def test_a_file_leaves_nothing_on_the_path(say: Say, folder: Path) -> None:
    before = list(sys.path)
    say("names", f"{folder}/cli_nets.py:Net")
    assert sys.path == before and str(folder) not in before
    assert str(folder) in sys.modules["cli_nets"].SEEN


def test_names_as_json(say: Say) -> None:
    told = json.loads(say("names", "cli_nets.py:Net", "--input", "5x4", "--json")[1])
    assert told["sites"][2] == {
        "name": "relu", "also": [], "kind": "value", "op": "relu", "module": "", "role": "hidden", "shape": [5, 3], "dtype": "float32",
        "selectable": True, "why_not": "", "branch": False, "trunk": False, "normed": False,
    }  # fmt: skip
    assert (told["title"], told["notes"]) == ("Net", ["native dropout: drop (Dropout 0.5)"])


def test_names_beside_the_code(say: Say) -> None:
    told = json.loads(say("names", "cli_nets.py:Net", "--source", "--select", "**@relu", "--json")[1])
    (function,) = told["source"]
    assert (function["name"], function["file"]) == ("Net.forward", "cli_nets.py")
    assert [line["sites"] for line in function["lines"]] == [[], ["relu"]]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--select", "hid*"], ["hid", "hid.weight", "hid.bias"]),
        (["--select", "hid*", "--on", "values"], ["hid"]),
        (["--select", "hid*", "--select", "!*.bias", "--on", "parameters"], ["hid.weight"]),
        (["--select", "*"], ["relu"]),
        (["--select", "*", "--on", "parameters"], ["hid.weight", "hid.bias", "out.weight", "out.bias"]),
        (["--select", "**@Linear", "--on", "values"], ["hid", "out"]),
    ],
)
def test_select(say: Say, options: list[str], found: list[str]) -> None:
    told = json.loads(say("names", "cli_nets.py:Net", *options, "--json")[1])
    assert [site["name"] for site in told["sites"]] == found


SPELLINGS: list[tuple[list[str], dict[str, object]]] = [
    (["--hidden-dropout", "0.1"], {"hidden_dropout": 0.1}),
    (["--hidden_dropout=.1", "--HiddenL1", "2"], {"hidden_dropout": 0.1, "hiddenl1": 2}),
    (["--weight-l2", "1e-4", "--dropout", "0.2"], {"weight_l2": 1e-4, "dropout": 0.2}),
    (["--dropout", "hid*=0.2", "--dropout", "*=0.1", "--noise", "0.3"], {"dropout": {"hid*": 0.2, "*": 0.1}, "noise": 0.3}),
    (["--input-noise", "1", "--hidden-dropout", "0.1", "--input-dropout", "0.2"],
     {"input_noise": 1, "hidden_dropout": 0.1, "input_dropout": 0.2}),
    (["--hidden-l1", "hid*=1e-3"], {"hidden_l1": {"pattern": "hid*", "weight": 1e-3}}),
    (["--hidden-l1=hid*=0"], {"hidden_l1": {"pattern": "hid*", "weight": 0}}),
    (["--hidden-l1", "0", "--weight-l1", "1"], {"weight_l1": 1}),
    (["--weight-l2", '{"0.*": 1e-3, "2.*": 0}'], {"weight_l2": {"0.*": 1e-3, "2.*": 0}}),
    (["--dropout", '{"1": 0.0, "**#output": 0.5}'], {"dropout": {"1": 0.0, "**#output": 0.5}}),
    (["--hidden-dropout", "linear(0, 0.5, 10)", "--weight-l2", "0*=cosine(1, 0, 10, every=4)"],
     {"hidden_dropout": schedules.linear(0, 0.5, 10), "weight_l2": {"pattern": "0*", "weight": schedules.cosine(1, 0, 10, every=4)}}),
    (["--hidden-l1", "piecewise({0: 0.0, 5: 1})", "--dropout", '{"1": {"linear": [0, 0.5, 10]}}'],
     {"hidden_l1": schedules.piecewise({0: 0.0, 5: 1}), "dropout": {"1": schedules.linear(0, 0.5, 10)}}),
    (["--weight-l1", '{"weight": {"piecewise": [[0, 1], [5, 2]], "every": 2}, "pattern": "0*"}'],
     {"weight_l1": {"weight": schedules.piecewise({0: 1, 5: 2}, every=2), "pattern": "0*"}}),
    (["--drop-path", '{"weight": {"by_depth": [0, 0.2]}}'], {"drop_path": graphreg.by_depth(0, 0.2)}),
    (["--drop-path", "by_depth(0, linear(0, 0.2, 10))"], {"drop_path": graphreg.by_depth(0, schedules.linear(0, 0.2, 10))}),
    (["--hidden-dropout", '{"linear": [0, 0.5, 10], "every": 2}'], {"hidden_dropout": schedules.linear(0, 0.5, 10, every=2)}),
    (["--weight-l2", '{"0*": {"by_depth": [1, {"linear": [0, 1, 5]}]}}'],
     {"weight_l2": {"0*": graphreg.by_depth(1, schedules.linear(0, 1, 5))}}),
    (["--dropout", r"a\@b\:c=0.2"], {"dropout": {r"a\@b\:c": 0.2}}),
    (["--weight-decay", '{"weight": 2, "pattern": ["hid.*", "out.*"], "reduction": "sum"}'],
     {"weight_decay": {"weight": 2, "pattern": ["hid.*", "out.*"], "reduction": "sum"}}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "keywords"), SPELLINGS)
def test_options_are_the_keywords(keys_read_once: None, options: list[str], keywords: dict[str, object]) -> None:
    args = cli_parser.parser().parse_args(["plan", "net.py:Net", *options])
    traced = graphreg.trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    assert regularizers(traced, args.keywords) == graphreg.from_kwargs(traced, **keywords)


def test_an_option_given_twice_is_two_regularizers(say: Say) -> None:
    told = json.loads(say("plan", "cli_nets.py:Net", "--hidden-l1", "1", "--hidden-l1", "hid*=2", "--json")[1])
    assert {name: (each["class"], each["weight"], each["pattern"]) for name, each in told["regularizers"].items()} == {
        "hidden_l1": ("HiddenL1", 1, "*"), "hidden_l1_1": ("HiddenL1", 2, "hid*"),
    }  # fmt: skip
    assert [(edit["regularizer"], edit["matched"], edit["sites"][0]["name"]) for edit in told["edits"]] == [
        ("hidden_l1", "*", "relu"), ("hidden_l1_1", "hid*", "hid"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "meant"),
    [
        (None, "keep"), (["seeded"], "seeded"), (["0.3"], 0.3), (["drop=off"], {"drop": "off"}), (["*=off"], {"*": "off"}),
        (["seeded", "drop=0.2"], {"*": "seeded", "drop": 0.2}),
        (["linear(0, 0.5, 10, every=2)"], schedules.linear(0, 0.5, 10, every=2)),
        (["drop=cosine(0, 0.5, 10)"], {"drop": schedules.cosine(0, 0.5, 10)}),
        (['{"linear": [0, 0.5, 10]}'], schedules.linear(0, 0.5, 10)),
        (["0.1", '{"drop": {"linear": [0, 0.5, 10]}, "a": "off"}'], {"*": 0.1, "drop": schedules.linear(0, 0.5, 10), "a": "off"}),
    ],
)  # fmt: skip
def test_own_dropout(texts: list[str] | None, meant: object) -> None:
    assert own_dropout(texts) == meant


def test_own_dropout_alone_is_a_plan(say: Say) -> None:
    status, out, _ = say("plan", "cli_nets.py:Net", "--own-dropout", "drop=0.2", "--json")
    assert status == 0 and json.loads(out)["own_dropout"] == [{"site": "drop", "becomes": "seeded at 0.2", "matched": "drop"}]


def test_a_selector_may_find_nothing(say: Say) -> None:
    line = ["plan", "cli_nets.py:Net", "--hidden-dropout", "0.1", "--hidden-l1", "layer*=1"]
    assert say(*line)[0] == 2
    status, out, err = say(*line, "--missing", "ignore")
    assert status == 0 and "1 edit by" in out and "'layer*' matches nothing" in out and "layer" not in err


def test_a_report_is_the_librarys(say: Say) -> None:
    torch.manual_seed(0)
    status, out, _ = say("report", "cli_nets.py:Net", "--input", "5x4", "--hidden-dropout", "0.1", "--rng", "3")
    module = graphreg.regularize(sys.modules["cli_nets"].Net(), hidden_dropout=0.1, example_inputs=torch.ones(5, 4), rng=3)
    assert (status, out) == (0, f"{graphreg.report(module)}\n")


def test_verified(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["cli_nets.py:Net", "--hidden-dropout", "0.1", "--verify"]
    for command in ("report", "diff"):
        status, out, err = say(command, *line, "--input", "3x4")
        assert (status, err) == (0, "")
        assert out == say(command, *line[:-1], "--input", "3x4")[1]
    assert say("diff", *line) == (2, "", "graphreg: --verify runs the model, so it needs --input or --inputs.\n")
    monkeypatch.setattr(graphreg, "rewrite", another)
    status, out, err = say("diff", *line, "--input", "3x4")
    assert (status, out) == (2, "")
    assert err.startswith("graphreg: the rewritten Net is not the model: in train mode, at call 1 of 2 with equal inputs, output differs")


def another(*given: Any) -> Any:
    """A rewrite that errs."""
    module: Any = rewrite(*given)
    for node in module.graph.nodes:
        if node.target == "relu":
            node.target = "tanh"
    module.recompile()
    return module


def test_colours_are_a_terminals(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """stderr, to which the model's own words go, may be one where stdout is a pipe."""
    line = ["diff", "cli_nets.py:Net", "--hidden-dropout", "0.1"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "\x1b[" not in say(*line)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[" in say(*line)[1]


def test_a_drawing(say: Say, folder: Path) -> None:
    assert say("draw", "cli_nets.py:Net", "plain.dot") == (0, "Net is drawn in plain.dot\n", "")
    told = json.loads(say("draw", "cli_nets.py:Net", "more.dot", "--hidden-dropout", "0.1", "--level", "1", "--mode", "eval", "--json")[1])
    assert told == {"title": "Net", "path": "more.dot"}
    plain, more = ((folder / name).read_text() for name in ("plain.dot", "more.dot"))
    assert "hidden_dropout" not in plain and "hidden_dropout" in more


def test_a_drawing_compared_with_a_recipe(say: Say, folder: Path) -> None:
    """Of the plan of the command line, with what the recipe does as the first; and of the model alone, where all of it is gone."""
    say("plan", "cli_nets.py:Net", "--hidden-dropout", "0.1", "--hidden-l1", "0.1", "--save", "first.json")
    assert say("draw", "cli_nets.py:Net", "compared.svg", "--hidden-dropout", "0.3", "--against", "first.json")[0] == 0
    text = (folder / "compared.svg").read_text()
    assert "hidden_dropout 0.1 → 0.3" in text and "− hidden_l1" in text
    assert say("draw", "cli_nets.py:Net", "gone.svg", "--against", "first.json")[0] == 0
    assert (folder / "gone.svg").read_text().count("− hidden_") == 2 * text.count("− hidden_")
    status, _, told = say("draw", "cli_nets.py:Net", "none.svg", "--against", "none.json")
    assert status != 0 and "none.json" in told and not (folder / "none.svg").exists()


def test_each_as_json(say: Say) -> None:
    for command in ("report", "diff"):
        told = json.loads(say(command, "cli_nets.py:Net", "--hidden-dropout", "0.1", "--json")[1])
        assert "hidden_dropout" in json.dumps(told)


# Inputs


def test_inputs() -> None:
    (x,) = example_inputs(["2x3"], None)
    assert (x.shape, x.dtype) == ((2, 3), torch.float32) and torch.equal(x, example_inputs(["2x3"], None)[0])
    (x, y) = example_inputs(["7:float64", "50:int32<5"], None)
    assert (x.dtype, y.dtype, int(y.min()), int(y.max())) == (torch.float64, torch.int32, 0, 4)
    named = example_inputs(["ids=64:int64", "mask=64:bool"], None)
    assert (
        sorted(named) == ["ids", "mask"] and named["ids"].unique().tolist() == [0, 1] and named["mask"].unique().tolist() == [False, True]
    )
    assert example_inputs(None, None) is None


def test_inputs_by_name(say: Say) -> None:
    status, out, _ = say("names", "cli_nets.py:Words", "--input", "words=2x5:int64<100", "--input", "weights=2x5")
    assert status == 0 and "2x5x3" in out and "int64" in out


@pytest.mark.parametrize("file", ["one.pt", "list.pt", "named.pt"])
def test_inputs_of_a_file(say: Say, file: str) -> None:
    status, out, _ = say("names", "cli_nets.py:Net", "--inputs", file, "--front-end", "export")
    assert status == 0 and "5x3" in out


def test_a_saved_plan_keeps_what_was_asked(say: Say, folder: Path) -> None:
    net = ("cli_nets.py:Net", "--input", "5x4")
    assert say("plan", *net, "--hidden-dropout", "0.1", "--rng", "7", "--save", "seeded.toml", "--front-end", "export")[0] == 0
    seeded = graphreg.load_recipe(folder / "seeded.toml")
    assert (seeded["rng"], seeded["front_end"]) == (7, "export")
    more = {"penalties": "attach", "scale": 2.0, "rng": 3}
    strengths = {"hidden_dropout": 0.3, "weight_l2": {"**": 4, "out.*": 2}}
    asked = {"hidden_dropout": 0.1, "hidden_l1": 0.1, "weight_l2": 0.1, "strengths": {**strengths, "hidden_l1": 0.5}}
    (folder / "asked.json").write_text(json.dumps({**more, **asked}))
    own_dropout = {"drop": {"linear": [0, 0.5, 9]}}
    options = ["--hidden-l1", "0.2", "--own-dropout", json.dumps(own_dropout)]
    assert say("plan", *net, "--recipe", "asked.json", *options, "--save", "saved.yaml")[0] == 0
    saved = graphreg.load_recipe(folder / "saved.yaml")
    weights = {entry["name"]: entry["weight"] for entry in saved.pop("regularizers")}
    assert weights == {"hidden_dropout": 0.1, "hidden_l1": 0.2, "weight_l2": 0.1}
    assert saved == {"recipe": 1, **more, "strengths": strengths, "own_dropout": own_dropout}  # the strength that was replaced is gone


# What is wrong

NET = "cli_nets.py:Net"
ANYWHERE: list[tuple[str, list[str], str]] = [  # the model, options, what is said of it
    ("torchvison.models:resnet18", [], "there is no module torchvison. Near modules: torchvision"),
    ("graphreg.plans:plan", [], "there is no module graphreg.plans. Near modules: graphreg.plan"),
    ("graphreg.passes.inner.more:x", [], "there is no module graphreg.passes.inner."),
    ("cli_nets.py:Nett", [], "cli_nets.py has no Nett. Near names: Net"),
    ("cli_nets:Nested.mode", [], "cli_nets has no Nested.mode. Near names: made"),
    ("cli_net.py:Net", [], "there is no file cli_net.py. Near files: cli_nets.py"),
    ("cli_nets.Net", [], "'cli_nets.Net' names no model; write module:callable or file.py:callable, e.g. cli_nets:Net."),
    ("cli_nets.py", [], "e.g. cli_nets.py:build."),
    (":Net", [], "names no model"),
    ("cli_nets.py:", [], "names no model"),
    ("pytest.py:Net", [], "pytest.py has the name of a module that is loaded already, pytest. Rename the file."),
    ("cli_broken.py:net", [], "importing cli_broken.py raised ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
    ("cli_broken:net", [], "importing cli_broken raised ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
    ("cli_syntax.py:net", [], "importing cli_syntax.py raised SyntaxError: invalid syntax"),
    ("cli_syntax:net", [], "importing cli_syntax raised SyntaxError: invalid syntax"),
    ("cli_nets.py:raises", [], f"cli_nets.py:raises called with () raised ValueError: no weights (cli_nets.py, line {RAISED})"),
    ("cli_nets.py:exits", [], "raised SystemExit: 3"),
    ("cli_nets.py:gives_text", [], "cli_nets.py:gives_text gives something of type str; it must give a torch.nn.Module."),
    ("cli_nets.py:number", [], "cli_nets.py:number is of type int; name a torch.nn.Module, or a callable that returns one."),
    ("cli_nets.py:Nested.made", ["--kwargs", '{"width": 2}'], "is a model already, so --kwargs has nothing to call"),
    (NET, ["--kwargs", '{"wide": 2}'], "called with (wide=2) raised TypeError: Net.__init__() got an unexpected keyword argument 'wide'"),
    (NET, ["--kwargs", "wide=2"], "--kwargs 'wide=2' is no JSON"),
    (NET, ["--kwargs", "[2]"], "--kwargs '[2]' is no JSON object; write --kwargs '{\"num_classes\": 10}'."),
    (NET, ["--input", "5x3"], "cli_nets.py:Net cannot run with 5x3: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    (NET, ["--input", "5x4:float64"], "cli_nets.py:Net cannot run with 5x4:float64: RuntimeError: mat1 and mat2 must have the same dtype"),
    (NET, ["--input", "5x4", "--input", "5x4"], "example_inputs do not fit Net.forward(x): too many positional arguments."),
    (NET, ["--input", "y=5x4"], "example_inputs do not fit Net.forward(x)"),
    (NET, ["--input", "5,4"], "--input '5,4' is no shape; write [name=]SHAPE[:dtype][<bound], e.g. 1x3x224x224"),
    (NET, ["--input", "-5x4"], "expected one argument"),
    (NET, ["--input", "5x4:float23"], "there is no dtype float23. Near names: float32"),
    (NET, ["--input", "5x4<3"], "a bound is for integers, and float32 is no integer type. Leave the bound out, or write :int64<3."),
    (NET, ["--input", "5x4:int8<200"], "the bound of int8 is from 1 to 127."),
    (NET, ["--input", "5x4:int64<0"], "the bound of int64 is from 1 to"),
    (NET, ["--input", "99999999999x99999999999"], "--input '99999999999x99999999999' cannot be made: RuntimeError"),
    (NET, ["--input", "x=5x4", "--input", "5x4"], "some inputs have a name and some have none (x=5x4, 5x4)"),
    (NET, ["--input", "x=5x4", "--input", "x=5x4"], "an input is given twice"),
    (NET, ["--input", "5x4", "--inputs", "one.pt"], "--input and --inputs are both given; one is enough."),
    (NET, ["--inputs", "two.pt"], "--inputs: there is no file two.pt."),
    (NET, ["--inputs", "text.pt"], "--inputs text.pt cannot be read; write tensors in a tuple or a dict to it with torch.save"),
    (NET, ["--inputs", "module.pt"], "--inputs module.pt cannot be read; write tensors in a tuple or a dict to it with torch.save"),
    (NET, ["--inputs", "numbered.pt"], "--inputs numbered.pt holds a dict whose keys are not all strings; name the arguments."),
    (NET, ["--front-end", "dynamo"], "argument --front-end: invalid choice: 'dynamo'"),
    (NET, ["--front-end", "export"], "a tuple or a dict of the arguments of forward(x). --input 1x3x224x224 (a shape)"),
    ("cli_nets.py:Decides", [], "--input 1x3x224x224 (a shape) gives example_inputs."),
]  # fmt: skip
REGULARIZERS: list[tuple[list[str], str]] = [
    (["--hiden-dropout", "0.1"], "--hiden-dropout is no option of graphreg {0} and no key of a regularizer. Near options: --hidden-drop"),
    (["--front-ends", "auto"], "--front-ends is no option of graphreg {0} and no key of a regularizer. Near options: --front-end"),
    (["--hidden-dropout", "much"], "--hidden-dropout 'much': 'much' is no number; write STRENGTH or GLOB=STRENGTH, e.g. 'layer4*=1e-3'."),
    (["--hidden-dropout", "linear(0, 1)"], "--hidden-dropout 'linear(0, 1)': 'linear(0, 1)' is no schedule (linear() missing 1 required"),
    (["--hidden-dropout", "linear(0, x, 5)"], "is no schedule (malformed node"),
    (["--hidden-dropout", "by_depth(0, eval(1))"], "is no schedule (there is no eval); write linear(0, 0.5, 1000), cosine(0, 0.5, 1000), "),
    (["--own-dropout", '{"drop": {"linear": [0, 1]}}'], "linear=[0, 1] is not allowed; give a list [start, stop, steps]"),
    (["--own-dropout", '{"drop"'], "is no JSON"),
    (["--hidden-dropout", "linear(0, 0.5, -1)"], "linear: steps=-1 is not allowed; steps is the number of steps"),
    (["--hidden-dropout", "cosine(0, 1, 5)"], "weight=1.0 is not allowed; weight must be in [0, 1). The schedule cos"),
    (["--hidden-dropout", "1.5"], "BernoulliDropout hidden_dropout: weight=1.5 is not allowed; weight must be in [0, 1)."),
    (["--hidden-dropout", "nan"], "BernoulliDropout: weight"),
    (["--hidden-dropout", "-0.1"], "BernoulliDropout hidden_dropout: weight=-0.1 is not allowed"),
    (["--hidden-dropout"], "argument --hidden-dropout: expected one argument. graphreg {0} --help shows what is allowed."),
    (["--hidden-dropout", "hid*=0.1"], "--hidden-dropout names its own sites; write --dropout 'hid*=0.1' to choose others."),
    (["--hidden-l1", "hidd*=1"], "'hidd*' matches no value of Net. Near names: hid. List all: graphreg names cli_nets.py:Net."),
    (["--hidden-l1", "=1"], "'' is no selector."),
    (["--hidden-l1", '{"weight": 1'], "is no JSON"),
    (["--hidden-l1", '{"weight": 1, "weight": 2}'], "is no JSON (the key 'weight' is given twice in one object); write"),
    (["--hidden-l1", '{"pattern": "hid"}'], "has no 'strength'"),
    (["--weight-l2", '{"weight": 1, "reduce": "sum"}'], "WeightL2 has no option 'reduce'. Near options: reduction"),
    (["--own-dropout", "of"], "--own-dropout 'of': 'of' is no choice; it is keep, seeded, off or a rate in [0, 1)."),
    (["--own-dropout", "2"], "own_dropout=2.0"),
    (["--own-dropout", "layer*=off"], "layer*"),
    (["--missing", "no"], "argument --missing: invalid choice: 'no'"),
]  # fmt: skip


def refused(said: Said, words: str) -> None:
    status, out, err = said
    assert (status, out, err.count("\n")) == (2, "", 1), said
    assert err.startswith("graphreg: ") and words in err.replace("addmm: mat1", "mat1"), err  # as torch 2.15 begins that message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_wrong_models_and_inputs(say: Say, command: str) -> None:
    """All by ``names``; the other commands load models and inputs as it does, and have a quarter of them each."""
    regularizer = [] if command == "names" else ["--hidden-dropout", "0.1"]
    file = ["net.dot"] if command == "draw" else []
    for model, options, words in ANYWHERE if command == "names" else ANYWHERE[COMMANDS.index(command) % 4 :: 4]:
        refused(say(command, model, *file, *options, *regularizer), words)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_wrong_regularizers(say: Say, command: str) -> None:
    """All by ``plan``; the other commands read regularizers as it does, and have a third of them each."""
    file = ["net.dot"] if command == "draw" else []
    for options, words in REGULARIZERS if command == "plan" else REGULARIZERS[COMMANDS.index(command) % 3 :: 3]:
        refused(say(command, NET, *file, *options), words.format(command))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: COMMAND. graphreg --help shows what is allowed."),
        (["nmaes", NET], "argument COMMAND: invalid choice: 'nmaes'"),
        (["names"], "the following arguments are required: MODEL. graphreg names --help shows what is allowed."),
        (["names", NET, "more"], "unrecognized arguments: more"),
        (["names", NET, "--hidden-dropout", "0.1"], "graphreg names takes no regularizer (--hidden-dropout); plan, report, diff"),
        (["names", NET, "--jsn"], "unrecognized option --jsn. Near options: --json"),
        (["demo", "--jsn=3"], "unrecognized option --jsn. graphreg demo --help"),
        (["names", NET, "--select", "layer*"], "'layer*' matches no site of Net."),
        (["names", NET, "--select", "hid*@ReLU"], "The name exists, but not with this op, port or role"),
        (["names", NET, "--select", "hid#middle"], "asks for the role 'middle'; roles are input, hidden, output, branch, trunk, normed."),
        (["names", NET, "--on", "values"], "--on limits what --select can select; give --select, too."),
        (["names", NET, "--select", "*", "--on", "both"], "argument --on: invalid choice: 'both'"),
        (["plan", NET], "no regularizer is given; write e.g. graphreg plan cli_nets.py:Net --hidden-dropout 0.1."),
        (["report", NET], "no regularizer is given"),
        (["diff", NET], "no regularizer is given"),
        (["draw", NET, "net.svg", "--rng", "3"], "--rng is no option of graphreg draw"),
        (["report", NET, "--rng", "three", "--hidden-dropout", "0.1"], "argument --rng: invalid int value: 'three'"),
        (["draw", NET], "the following arguments are required: FILE"),
        (["draw", NET, "net.gif"], ".gif"),
        (["draw", NET, "net"], "net"),
        (["draw", NET, "no/such/folder/net.svg"], "no/such/folder"),
        (["draw", NET, "one.pt/net.svg"], "one.pt"),
        (["draw", NET, "folder.svg"], "folder.svg"),
        (["draw", NET, "net.svg", "--level", "0"], "level"),
        (["demo", "all"], "invalid choice: 'all'"),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
        (["completion"], "the following arguments are required: shell"),
    ],
)  # fmt: skip
def test_wrong_commands(say: Say, folder: Path, argv: list[str], words: str) -> None:
    (folder / "folder.svg").mkdir(exist_ok=True)
    refused(say(*argv), words)


def test_a_traceback_when_it_is_asked_for(say: Say) -> None:
    status, _, err = say("names", "cli_nets.py:raises", "--traceback")
    assert status == 2 and "Traceback" in err and 'raise ValueError("no weights' in err
    assert err.splitlines()[-1].startswith("graphreg: cli_nets.py:raises called with () raised ValueError: no weights")


def test_what_nobody_expects(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault of graphreg's own")

    monkeypatch.setattr(graphreg, "plan", broken)
    status, out, err = say("plan", NET, "--hidden-dropout", "0.1")
    assert (status, out) == (1, "") and "graphreg: ZeroDivisionError: a fault of graphreg's own" in err.splitlines()[-1]


def test_interrupted(say: Say) -> None:
    assert say("names", "cli_nets.py:interrupted") == (130, "", "")


@pytest.mark.filterwarnings("default:old weights")
def test_a_warning_is_one_line(say: Say) -> None:
    status, out, err = say("names", "cli_nets.py:warns")
    assert status == 0 and out.startswith("Net") and "graphreg: warning: old weights\n" in err


# The doctor


@pytest.mark.parametrize(("findings", "status"), [((), 0), ((graphreg.Finding("broken", "the backend", "x", (), "y"),), 1)])
def test_the_doctor_of_torch(findings: tuple[graphreg.Finding, ...], status: int, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = graphreg.Diagnosis("torch 9", findings, ("the noise works",))
    monkeypatch.setattr(graphreg, "doctor", lambda: diagnosis)
    assert say("doctor", "--torch") == (status, f"{diagnosis}\n", "")
    assert say("doctor", "--torch", "--json") == (status, json.dumps(diagnosis.to_dict(), indent=2) + "\n", "")


def test_the_doctor_is_told_what_to_test(say: Say) -> None:
    for given in ((), ("cli_nets.py:net", "--torch")):
        refused(say("doctor", *given), "give doctor a model, or --torch: graphreg doctor models.py:make --input 2x3x32x32.")


def test_the_doctor_of_a_model(say: Say) -> None:
    status, out, err = say("doctor", "cli_nets.py:Net", "--input", "2x4", "--json")
    found = json.loads(out)
    assert (status, err, found["chosen"], found["advice"]) == (0, "", "symbolic", [])
    assert [(each["front_end"], each["refusal"], each["proved"]) for each in found["attempts"]] == [
        ("symbolic", "", True), ("export", "", True),
    ]  # fmt: skip
    status, out, err = say("doctor", "cli_nets.py:Net")
    assert status == 0 and out.startswith("front_end='auto' takes Net by symbolic\nsymbolic: yes, in ")
    assert "export: no, after " in out and "to do: give example inputs" in out


# The demo, completion, and what torch is not needed for


def test_the_demo_is_that_of_make(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(cli_demo.subprocess, "run", run)
    assert [say("demo")[0], say("demo", "study")[0], say("demo", "penalties")[0], say("demo", "ranks")[0]] == [7, 7, 7, 7]
    examples = cli_page.TOP / "examples"
    assert [" ".join(command) for command in ran] == [
        f"{sys.executable} {examples / name}" for name in ("demo.py", "demo.py --study", "demo_penalties.py", "demo_ranks.py")
    ]
    made = (cli_page.TOP / "Makefile").read_text()
    assert all(f"$(PY) examples/{Path(path).name} {' '.join(more)}".strip() + "\n" in made for _, path, *more in ran)


def test_the_demo_needs_its_extra(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_demo, "find_spec", lambda name: None if name == "sklearn" else name)  # any other is there
    refused(say("demo"), "the demo needs sklearn, not installed: pip install 'graphreg[demo]'.")


def test_completion_needs_its_extra(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    refused(say("completion", "bash"), "completion needs argcomplete, which is not installed: pip install 'graphreg[completion]'.")


def test_help_has_every_key() -> None:
    """Read in the sources, where they are not imported: the same as the registry's, but for class names."""
    built_in = {key for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.") for key in cls.keys}
    assert built_in | set(PREFIXED) | set(cli_keys.HELP) == set(cli_keys.written_keys())
    assert cli_keys.HELP.keys() == set(FAMILIES)


def test_keys_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module, one in a package, one that is not there, one that cannot be read."""
    code = 'class Theirs(Penalty, keys=("{}",), on="parameters"):\n    """Halves 100 % of it."""\n'
    (tmp_path / "their_alone.py").write_text(code.format("alone_lasso"))
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "their_package" / "inner.py").write_text(code.format("inner_lasso"))
    (tmp_path / "their_fault.py").write_text("class :\n")
    names = ["their_alone", "their_package.inner", "their_absent", "their_fault"]
    entries = [EntryPoint(name, name, registry.GROUP) for name in names]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli_keys, "entry_points", lambda group: entries)
    found = cli_keys.written_keys()
    assert {key: line for key, line in found.items() if key in ("alone_lasso", "inner_lasso")} == {
        "alone_lasso": "Halves 100 % of it.", "inner_lasso": "Halves 100 % of it.",
    }  # fmt: skip
    assert "--alone-lasso STRENGTH" in parsers()["plan"].format_help()


def parsers() -> dict[str, cli_parser.Parser]:
    """Each command's."""
    (commands,) = (action for action in cli_parser.parser()._actions if action.dest == "command")
    return typing.cast(dict[str, cli_parser.Parser], commands.choices)


def test_the_grammars_words_are_the_librarys() -> None:
    own = parsers()
    assert list(own) == list(cli_parser.COMMANDS)
    choices = {action.dest: action.choices for action in own["plan"]._actions}
    assert choices["front_end"] == FRONT_ENDS and choices["missing"] == typing.get_args(Missing)


# Processes

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from graphreg.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("argv", [["--help"], ["draw", "--help"], ["--version"], ["completion", "fish"], ["plan", "--hidden-dropout"]])
def test_without_torch(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if argv[0] == "plan" else 0) and "Error" not in done.stderr
    assert ("expected one argument" in done.stderr) == (argv[0] == "plan") == (not done.stdout)


COMPLETED = {
    "names": {"names "}, "plan m:n --hidden-d": {"--hidden-dropout "}, "plan m:n --front-end s": {"symbolic "}, "completion z": {"zsh "},
    "report m:n --weight-l": {"--weight-l1", "--weight-l2"},
}  # fmt: skip


@pytest.mark.parametrize("words", COMPLETED)
def test_completion(words: str, tmp_path: Path) -> None:
    """What argcomplete hands to bash."""
    line, out = f"graphreg {words}", tmp_path / "completions"
    environment = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\013", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], env=environment, capture_output=True, check=False)
    assert set(out.read_text().split("\013")) == COMPLETED[words]


def test_the_script_and_a_closed_pipe(folder: Path) -> None:
    script = shutil.which("graphreg", path=str(Path(sys.executable).parent))
    assert script is not None
    piped = f"{sys.executable} -m graphreg names cli_nets:speaks | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], cwd=folder, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "Traceback" in line or "Error" in line]
    assert (done.stdout, said) == ("141\n", []) and done.stderr.startswith("a word of the model's own\n")  # Triton's library may say more
    done = subprocess.run([script, "plans"], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("graphreg: argument COMMAND: invalid choice: 'plans'")


# The audit


def test_the_audit(say: Say) -> None:
    """Its exit status tells whether there is something to do."""
    status, out, err = say("audit", "torchvision.models:resnet18")
    assert (status, out, err) == (0, "ResNet: 0 dropouts of its own; nothing to remark\n", "")
    status, out, err = say("audit", "cli_nets.py:BeforeNorm", "--json")
    data = json.loads(out)
    assert (status, err, data["title"], data["remarks"][0]["kind"]) == (1, "", "BeforeNorm", "before batch norm")


def test_the_audit_takes_no_regularizer(say: Say) -> None:
    refused(say("audit", "torchvision.models:resnet18", "--hidden-dropout", "0.1"), "takes no regularizer (--hidden-dropout)")


# The groups of an optimizer


def test_groups(say: Say, folder: Path) -> None:
    """The model is not traced; what was asked is saved as a recipe, which other options come after."""
    asked = ("--group", "hid.*={\"lr\": 0.1}", "--default", '{"lr": 0.01, "weight_decay": 0.1}', "--decay", "standard")
    status, out, err = say("groups", "cli_nets.py:Net", *asked, "--save", "groups.toml")
    assert (status, err) == (0, "")
    assert out.startswith("Net: 4 parameters in 4 groups\ngroup  lr    weight_decay  parameters  elements  names\n")
    again = say("groups", "cli_nets.py:Net", "--recipe", "groups.toml", "--group", "out.*=frozen", "--json")
    assert [group["options"]["lr"] for group in json.loads(again[1])["groups"]] == [0.1, 0.1]
    assert json.loads(again[1])["frozen"] == ["out.weight", "out.bias"]
    planned = ("plan", "cli_nets.py:Net", "--recipe", "groups.toml", "--hidden-dropout", "0.1", "--save", "planned.json")
    assert say(*planned)[0] == 0
    assert graphreg.load_recipe("planned.json")["param_groups"] == graphreg.load_recipe("groups.toml")["param_groups"]
    assert say("groups", "cli_nets.py:Decides", "--group", "*=frozen")[0] == 2
    by_depth = say("groups", "cli_nets.py:Net", "--default", '{"lr": 1}', "--group", '*={"lr": {"by_depth": {"decay": 0.5}}}')
    refused(by_depth, "lr=by_depth(decay=0.5) needs parameters in two blocks or more")


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ("frozen", "--group 'frozen' is no SELECTOR=OPTIONS; write --group 'head.*={\"lr\": 0.01}' or --group 'embed.*=frozen'"),
        ("hid.*=0.1", "--group hid.* '0.1' is no JSON object; write --group hid.* '{\"lr\": 0.01}'"),
        ("hidd.*=frozen", "'hidd.*' matches no parameter of Net. Near names: hid."),
    ],
)
def test_groups_refused(say: Say, folder: Path, group: str, sentence: str) -> None:
    refused(say("groups", "cli_nets.py:Net", "--group", group), sentence)
