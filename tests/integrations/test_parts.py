"""The state that integrations put into checkpoints: strengths by depth and by site come back, also in a model that was not called yet."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, RegularizerError, integrations, schedules
from graphreg.integrations.parts import Parts
from graphreg.passes import HiddenL1

X = torch.ones(2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l(x).relu()


def model() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block(), Block())
    return graphreg.regularize_(net, drop_path=graphreg.by_depth(0, 0.5), weight_l2=0.1, hidden_dropout=0.2, rng=0, scale=1.0)


def test_strengths_by_depth_and_by_site_come_back() -> None:
    saved = model()
    saved(X)
    graphreg.set_strength(saved, "weight_l2", {"1.*": 0.7})
    graphreg.set_strength(saved, "hidden_dropout", 0.4)
    state = json.loads(json.dumps(Parts(saved).state()))
    other = model()
    Parts(other).load(state)
    assert torch.equal(other(X), saved(X))
    assert graphreg.site_strengths(other) == graphreg.site_strengths(saved)
    assert graphreg.site_strengths(other)["drop_path"] == {"0.relu": 0.0, "1.relu": 0.25, "2.relu": 0.5}


def test_strengths_that_were_not_changed_go_back_to_those_of_the_plan() -> None:
    state = Parts(model()).state()
    other = model()
    other(X)
    graphreg.set_strength(other, "drop_path", 0.9)
    graphreg.set_strength(other, "weight_l2", {"1.*": 0.7})
    Parts(other).load(state)
    fresh = model()
    fresh(X)
    assert graphreg.site_strengths(other) == graphreg.site_strengths(fresh)


def test_schedules_and_their_clock_come_back() -> None:
    def scheduled() -> Any:
        rising = schedules.linear(0, 0.5, 10)
        return graphreg.regularize_(nn.Sequential(Block()), hidden_l1={"weight": rising, "pattern": "**@relu"}, weight_l2=rising,
                                    weight_l1=rising, scale=1.0)  # fmt: skip

    saved, other = scheduled(), scheduled()
    for _ in range(3):
        saved(X)
    graphreg.set_strength(saved, "weight_l2", 0.7)
    graphreg.set_strength(saved, "weight_l1", {"0.*": schedules.cosine(1, 0, 6)})
    graphreg.set_strength(other, "hidden_l1", 0.9)
    Parts(other).load(json.loads(json.dumps(Parts(saved).state())))
    other(X)
    saved(X)
    assert graphreg.site_strengths(other) == graphreg.site_strengths(saved)
    assert graphreg.strengths(other)["hidden_l1"] == 0.2 and Parts(other).numbers()["strength/weight_l2"] == 0.7


def test_a_state_of_other_regularizers_changes_nothing() -> None:
    net = model()
    state = copy.deepcopy(Parts(net).state())
    state[""]["regularizers"].append("decov")
    with pytest.raises(RegularizerError, match=r"only the model has a regularizer named decov\. Regularize the model as for"):
        Parts(net).load(state)


def test_the_recipe_is_in_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    module = graphreg.regularize(model, hidden_dropout=schedules.linear(0.1, 0.3, 5), hidden_l1=0.1, rng=3)
    graphreg.set_strength(module, "hidden_l1", 0.2)
    outer = nn.ModuleDict({"student": module})
    saved = json.loads(json.dumps(Parts(outer).state()))["student"]["recipe"]
    again = graphreg.regularize(model, recipe=saved)
    assert graphreg.recipe(again) == graphreg.recipe(module) and graphreg.strengths(again)["hidden_l1"] == 0.2
    by_function = graphreg.regularize(model, HiddenL1(lambda site: site.name == "1", 0.1))
    for _ in range(2):
        assert Parts(by_function).state()[""]["recipe"] is None
    assert capsys.readouterr().err.count("checkpoints have no recipe: hidden_l1: pattern is <function") == 1


@pytest.mark.parametrize(("name", "what"), [("transformers", "the Trainer of transformers"), ("lightning", "the Trainer of Lightning")])
def test_without_its_library_an_integration_names_the_extra(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(name, monkeypatch)
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    with pytest.raises(GraphRegError, match=rf"^this callback is for {what}: pip install 'graphreg\[trainers\]'\.$") as raised:
        importlib.import_module(f"graphreg.integrations.{name}")
    assert isinstance(raised.value.__cause__, ImportError)
    assert "trainers" in importlib.metadata.metadata("graphreg").get_all("Provides-Extra", [])


@pytest.mark.parametrize("name", ["accelerate", "distributed_checkpoint"])
def test_without_their_libraries_the_others_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are called by the library, and import nothing of it."""
    forget(name, monkeypatch)
    for library in ("accelerate", "transformers", "lightning"):
        monkeypatch.setitem(sys.modules, library, None)
    assert importlib.import_module(f"graphreg.integrations.{name}").RegularizerState


def forget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the integration imported anew, and what was imported put back at the end of the test."""
    monkeypatch.setattr(integrations, name, None, raising=False)
    monkeypatch.delitem(sys.modules, f"graphreg.integrations.{name}", raising=False)
