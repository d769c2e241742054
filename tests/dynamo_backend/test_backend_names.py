"""``names`` and ``plan`` of a compiled model, and of a model whose graphs torch.compile captures for the listing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, NoMatchError, RegularizerError

# torch's own, where a graph's input is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Routed(nn.Module):
    """Branches on a value, so that it can be traced in parts only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.down, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.dropout(self.norm(torch.relu(self.a(x))), 0.5, self.training)
        h = torch.tanh(self.up(h) if h.mean() > 100 else self.down(h))
        out: Tensor = self.out(h)
        return out


X = torch.ones(5, 8)
SITES = ["a", "relu", "norm", "dropout", "mean", "gt", "down", "tanh", "out"]


def compiled(model: nn.Module, **asked: Any) -> tuple[Any, Any]:
    backend = graphreg.backend(inner="eager", rng=0, **asked)
    return torch.compile(model, backend=backend), backend


def test_a_compiled_model_lists_the_sites_of_its_graphs() -> None:
    step, backend = compiled(model := Routed(), hidden_dropout=0.1, weight_l2=0.1)
    for target in (step, backend):
        with pytest.raises(GraphRegError, match="this backend has captured no graph yet.* Call the compiled model once, or give"):
            graphreg.names(target)
    step(X)
    model.compile(backend=backend)
    for target in (step, backend, model):
        listed = graphreg.names(target)
        assert list(listed)[:10] == ["x", *SITES] and "up.weight" in listed and "torch.compile captured 2 graphs" in str(listed)
    assert list(graphreg.names(step, select="tan*")) == ["tanh"]


def test_a_plan_for_the_graphs() -> None:
    """Without regularizers, it is that of the backend's own."""
    step, backend = compiled(Routed(), hidden_dropout=0.1, weight_l2={"down.*": 0.1})
    with pytest.raises(GraphRegError, match="captured no graph yet"):
        graphreg.plan(step)
    step(X)
    own = [("hidden_dropout", "dropout"), ("hidden_dropout", "tanh"), ("weight_l2", "down.weight")]
    for made in (graphreg.plan(step), graphreg.plan(backend), graphreg.plan(step, recipe=graphreg.recipe(step))):
        assert [(edit.name, edit.site.name) for edit in made.edits] == own
    other = graphreg.plan(step, graphreg.build("hidden_l1", weight=0.1, pattern="a"), own_dropout="off")
    assert [edit.site.name for edit in other.edits] == ["a"] and [edit.action for edit in other.native_dropout] == ["off"]
    with pytest.raises(GraphRegError, match="this plan for Routed has no traced model with it"):
        graphreg.report(other)
    for error, sentence, arguments in (
        (NoMatchError, "'rleu' matches no value of Routed. Near names: relu. List all: graphreg.names.compiled_model.",
         {"regularizers": graphreg.build("dropout", weight=0.1, pattern="rleu")}),
        (RegularizerError, "L2SP keeps a state from call to call, and a backend's graphs keep none",
         {"regularizers": graphreg.build("l2_sp", weight=0.1)}),
        (RegularizerError, "blocks= is for graphs of a whole model", {"blocks": "a"}),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            graphreg.plan(step, **arguments)


def test_an_error_names_the_call_that_lists_the_sites() -> None:
    """That call works after the error."""
    step, _ = compiled(Routed(), dropout={"rleu": 0.1})
    with pytest.raises(NoMatchError, match=r"Near names: relu. List all: graphreg.names\(compiled_model\)."):
        step(X)
    assert "relu" in graphreg.names(step)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_listed_as_torch_compile_captures_it(training: bool) -> None:
    """In the mode in which it is; model and random state stay as they were. Of a compiled model, it is the model inside."""
    model, backend = Routed().train(training), graphreg.backend()
    kept, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    for target in (model, compiled(model)[0]):
        assert list(graphreg.names(target, (X,), backend=backend))[:10] == ["x", *SITES]
    assert torch.equal(state, torch.get_rng_state()) and all(torch.equal(kept[name], each) for name, each in model.state_dict().items())
    for target, options, sentence in (
        (model, {"backend": graphreg.backend()}, "backend= needs example_inputs"),
        (model, {"backend": "graphreg", "example_inputs": X}, "graphreg.names.model, backend=graphreg.backend.., "),
    ):
        with pytest.raises(GraphRegError, match=sentence):
            graphreg.names(target, **options)


def test_evaluation() -> None:
    """As the page says: no noise, penalties, one more capture, and the model itself has no regularizers."""
    step, backend = compiled(model := Routed(), hidden_dropout=0.5, hidden_l1=0.1)
    step(X)
    assert torch.equal(step.eval()(X), model(X)) and not model.training and backend.penalties()["hidden_l1"] > 0
    graphs = len(backend.subgraphs)
    assert graphs == 4
    step.train()
    assert step(X).shape == (5, 8) and model.training and len(backend.subgraphs) == graphs
