"""Splices on parameters in the graphs that Dynamo captures: the values of ``regularize``, over graph breaks, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, RegularizerError
from graphreg.passes import EmbeddingDropout, WeightL2, WeightNoise

# Dynamo's own, behind a break
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
IDS = torch.tensor([[1, 2, 0], [3, 4, 1]])


class Broken(nn.Module):
    """The head shares the table; between them the graph breaks."""

    def __init__(self, breaks: bool = True) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight, self.breaks = self.emb.weight, breaks

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mid(self.emb(ids))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(h) + F.linear(h, self.emb.weight)  # type: ignore[no-any-return]


@pytest.mark.parametrize("breaks, selector", [(False, "*"), (True, "**emb.weight"), (True, "emb.weight"), (True, "head.weight")])
def test_it_is_regularize(breaks: bool, selector: str) -> None:
    """Two calls, their outputs and gradients; the penalty measures the parameter itself."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Broken(breaks)
    splices = [WeightNoise(selector, 0.1), WeightL2("emb.weight", 0.1)]
    backend = graphreg.backend(*splices, rng=3, inner="aot_eager")
    module, results = graphreg.regularize(Broken(False), *splices, rng=3), list[Any]()
    module.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend=backend)
    for run in (compiled, lambda ids: module(ids).output):
        owner = model if run is compiled else module
        outputs = [run(IDS) for _ in range(2)]
        torch.stack(outputs).square().sum().backward()
        results.append([*outputs, *(p.grad for p in owner.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backend.penalties()["weight_l2"], module(IDS).penalties["weight_l2"])
    assert not torch.equal(results[0][0], results[0][1])


def test_a_parameter_is_drawn_once_in_a_call_of_two_graphs() -> None:
    torch._dynamo.reset()
    model, backend = Broken(), graphreg.backend(WeightNoise("*", 0.1), rng=3, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        compiled(IDS)
    assert graphreg.rng_state(backend)["calls"] == {"emb.weight|WeightNoise|0": 2, "mid.weight|WeightNoise|0": 2}
    report = graphreg.report(backend)
    assert [(site.graph, site.name) for site in report.sites] == [(1, "emb.weight"), (1, "mid.weight"), (2, "emb.weight")]
    with graphreg.frozen_noise(backend):
        assert torch.equal(compiled(IDS), compiled(IDS))
    model.eval()
    assert torch.equal(compiled(IDS), Broken.forward(model, IDS))


class Alone(Broken):
    """Its head is never called."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.mid(self.emb(ids))  # type: ignore[no-any-return]


def test_selectors_are_checked_over_all_graphs() -> None:
    for selector, error, said in (
        ("head.weight", RegularizerError, r"WeightNoise at emb\.weight: the module that has the parameter does not read it; 'emb' does"),
        ("mid.bias", NoMatchError, r"'mid\.bias' matches no parameter of 2 dims or more"),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(Alone(), backend=graphreg.backend(WeightNoise(selector, 0.1), rng=3, inner="aot_eager"))
        with pytest.raises(error, match=said):
            compiled(IDS)


def test_the_table_of_an_embedding() -> None:
    torch._dynamo.reset()
    model = Broken(breaks=False)
    compiled = torch.compile(model, backend=graphreg.backend(EmbeddingDropout("*", 0.5), rng=3, inner="aot_eager"))
    module = graphreg.regularize(model, EmbeddingDropout("*", 0.5), rng=3)
    torch.testing.assert_close(compiled(IDS), module(IDS).output)
