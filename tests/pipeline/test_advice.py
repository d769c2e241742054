"""What an error tells one to write is taken: the code in its sentence runs, on the same model."""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, Penalty, regularize
from graphreg.cli.keywords import regularizers
from graphreg.ir.selector import Pattern
from graphreg.passes import BernoulliDropout, HiddenL1, RecurrentNorm, RecurrentState, WeightL2


class Net(nn.Module):
    """Some of everything that a sentence may name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(OrderedDict(fc=nn.Linear(3, 6), drop=nn.Dropout()))
        self.rnn, self.cell, self.norm = nn.GRU(6, 6, batch_first=True), nn.GRUCell(6, 6), nn.LayerNorm(6)
        self.conv, self.odd = nn.Conv1d(5, 5, 1), nn.ModuleDict({"a@1": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.rnn(torch.relu(self.layer4(x)))
        left, _ = out.chunk(2, -1)
        h = self.cell(out[:, 0], last[0])
        h = self.cell(self.conv(out)[:, 1], h)
        return self.odd["a@1"](self.norm(h)) + left.sum()


X = torch.randn(2, 5, 3)
NAMES = {
    "graphreg": graphreg,
    "WeightL2": WeightL2,
    "RecurrentState": RecurrentState,
    "selector": "layer4.drop",
    "rate": 0.1,
    "weight": 0.1,
    "strength": 0.1,
}


def sentence(call: Callable[[nn.Module], object]) -> str:
    with pytest.raises(GraphRegError) as refused:
        call(Net())
    return str(refused.value)


def keyword(text: str, **more: Any) -> None:
    """A keyword with its value, as it stands in the sentence."""
    regularize(Net(), **eval(f"dict({text.replace(', ...', '')})", NAMES), **more)


def instance(text: str) -> None:
    regularize(Net(), eval(text, NAMES))


def splice(text: str) -> None:
    regularize(Net(), BernoulliDropout(text, 0.1))(X)


def steps(text: Any) -> None:
    regularize(Net(), RecurrentState(text, 1.0))(X)


def weights(text: str) -> None:
    regularize(Net(), WeightL2(["*.weight", text] if text.startswith("!") else text, 1.0))(X)


def axis(text: str) -> None:
    regularize(Net(), RecurrentNorm("conv", 1.0, time_axis=int(text)))(X)


def parsed(text: str) -> None:
    Pattern.parse(text)


def defined(text: str) -> None:
    exec(f"class Advised(Penalty, {text}, on='parameters'):\n    def __call__(self, w): return w.sum()", {"Penalty": Penalty})


def key_as_text(model: nn.Module) -> None:
    class Keyed(Penalty, keys="advised_key", on="parameters"):
        def __call__(self, w: Tensor) -> Tensor:
            return w.sum()


def given(**keywords: Any) -> Callable[[nn.Module], object]:
    return lambda model: regularize(model, **keywords)


@pytest.mark.parametrize(("call", "advice", "use"), [
    (lambda m: WeightL2("*", "x"), r"Write (WeightL2\(.*?\)):", instance),
    (given(hidden_dropout="x"), r"Write (hidden_dropout=0\.1)\.", keyword),
    (given(weight_l2="1e-4"), r"Write (weight_l2=0\.1)\.", keyword),
    (given(weight_l2={"layer4.**": "x"}), r"Write (weight_l2=\{.*?\})\.", keyword),
    (given(dropout={"weight": "x"}), r"Write (dropout=\{.*?\})\.", keyword),
    (given(weight_l2={"pattern": "*"}), r"write (weight_l2=\{'strength'.*?\}) or", keyword),
    (given(weight_l2={"pattern": "layer4.drop"}), r" or (weight_l2=\{selector: strength\})\.", lambda text: Pattern.parse("layer4.drop")),
    (given(dropout={"pattern": "*"}), r" or (dropout=\{selector: strength\})\.", keyword),
    (given(hidden_dropout={"layer4.drop": 0.1}), r"write (hidden_dropout=\{'strength'.*?\}) for", keyword),
    (given(hidden_dropout={"layer4.drop": 0.1}), r" or (dropout=\{selector: rate\})\.", keyword),
    (given(hidden_dropout={"weight": 0.1, "pattern": "fc"}), r"write (dropout=\{selector: rate\}) to", keyword),
    (given(recurrent_state=0.1), r"Give (recurrent_state=\{.*?\}) or", keyword),
    (given(recurrent_state=0.1), r"\} or (RecurrentState\(.*?\)), with", instance),
    (given(recurrent_norm={"norm": 0.1}), r"for the site write (\{.*?\})\.", lambda text: keyword(f"hidden_l1={text}")),
    (lambda m: regularize(m, WeightL2), r"make an instance: (WeightL2\(.*?\))\.", instance),
    (lambda m: regularize(m, "weight_l2"), r"instances, e\.g\. (WeightL2\(.*?\)),", instance),
    (lambda m: regularize(m, "weight_l2"), r"keywords, e\.g\. (weight_l2=.*)\.$", keyword),
    (given(own_dropout="of"), r"by selector: (own_dropout=.*?)\. Near", keyword),
    (given(own_dropout="of"), r"Near words: (\w+)\.", lambda text: regularize(Net(), own_dropout=text)),
    (lambda m: regularize(nn.Linear(2, 2), own_dropout="off"), r"add dropout: (.*)\.$", keyword),
    (lambda m: splice("#nothing"), r"roles are (\w+), (\w+), (\w+), .*\.", lambda *roles: [splice(f"**#{role}") for role in roles]),
    (lambda m: splice("fc@"), r"e\.g\. '(.*?)', '(.*?)', '(.*?)'\.", lambda *texts: [parsed(text) for text in texts]),
    (lambda m: splice("odd.a@1"), r"write (\S+) \(in Python r'(.*?)'\)", lambda *texts: [splice(text) for text in texts]),
    (lambda m: splice("od.a@1"), r"Near names: (.*?)\. List", lambda texts: [splice(text) for text in texts.split(", ")]),
    (lambda m: splice(r"odd.a\@2"), r"Near names: .*?(odd\S*?)[.,] ", splice),
    (lambda m: splice("layer4.fd"), r"Near names: (\S+?), (\S+?), ", lambda *texts: [splice(text) for text in texts]),
    (lambda m: splice("chunk"), r"Write a part of it: (\S+?)[,.] ", splice),
    (lambda m: weights("layer4.fd.weight"), r"Near names: (\S+?), ", weights),
    (lambda m: weights("!layer4.fc.bia"), r"Near names: (\S+?), ", lambda text: weights(f"!{text}")),
    (lambda m: regularize(Normed(), HiddenL1("*", 1.0)), r"which '(.*?)' selects", lambda text: regularize(Normed(), HiddenL1(text, 1.0))),
    (lambda m: steps("rnn:h_n"), r"Select '(.*?)'; ", steps),
    (lambda m: regularize(m, RecurrentState("rnn:*", 1.0)), r"add '(.*?)'\.", lambda text: steps(["rnn:*", text])),
    (lambda m: regularize(m, RecurrentState("cell_1", 1.0))(X), r"the selector '(.*?)' takes", steps),
    (lambda m: regularize(m, RecurrentNorm("conv", 1.0)), r"Give time_axis=(-?\d+);", axis),
    (lambda m: regularize(m, RecurrentNorm("conv", 1.0)), r"nevertheless, give time_axis=(-?\d+)\.", axis),
    (key_as_text, r"write (keys=\(.*?\))\.", defined),
])  # fmt: skip
def test_what_a_sentence_advises_is_taken(call: Any, advice: str, use: Any) -> None:
    said = sentence(call)
    found = re.search(advice, said)
    assert found, said
    use(*found.groups())


class Normed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))


def test_what_the_warning_advises_is_taken() -> None:
    with pytest.warns(UserWarning, match="in a row") as told:
        regularize(Net(), dropout={("cell_1", "norm"): 0.1})
    (advice,) = re.findall(r"select '(.*?)'\.$", str(told[0].message))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splice(advice)


@pytest.mark.parametrize(("option", "text", "advice"), [
    ("--weight-l2", "{1}", r"write '(\{.*\})'\."), ("--hidden-l1", "a=b", r"e\.g\. '(.*?)'\."),
    ("--hidden-dropout", "a=1", r"write --dropout '(.*?)' to"),
])  # fmt: skip
def test_what_the_command_advises_is_taken(option: str, text: str, advice: str) -> None:
    traced = graphreg.trace(Net())
    found = re.search(advice, sentence(lambda m: regularizers(traced, [(option, text)])))
    assert found
    (made,) = regularizers(traced, [("--hidden-noise" if "dropout" in option and "=" not in found[1] else "--noise", found[1])])
    assert made.weight in (0.1, 1e-4, 1e-3, 1.0) and (not text.startswith("{") or json.loads(found[1])["strength"] == made.weight)


METHODS = {
    "gradient_checkpointing_enable": "Call it on the model before graphreg.regularize",
    "set_grad_checkpointing": "Call it on the model before graphreg.regularize",
    "reset_classifier": "If reset_classifier changes what the model's forward does, or which modules it has, this graph does not follow",
    "generate": "Call it on the model itself, which shares its layers with this module",
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_model(name: str) -> None:
    model = type("Named", (Net,), {name: lambda self: None})()
    with pytest.raises(AttributeError, match=f"^'{name}' belongs to Named, and a graph has no method but its forward"):
        getattr(regularize(model, weight_l2=0.1), name)
    with pytest.raises(AttributeError, match=re.escape(METHODS[name])):
        getattr(regularize(model, weight_l2=0.1), name)
