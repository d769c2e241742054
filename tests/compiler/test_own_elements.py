"""Elements of small tensors get buffers of their own, so that Inductor compiles one kernel for sites that are alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import graphreg
from graphreg.compiler.own_elements import FEW, give_buffers

ELEMENT = torch.ops.graphreg.element.default


def graph_of(function: Any, *inputs: Tensor, tracing_mode: str = "fake") -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode=tracing_mode)(*inputs)


def test_the_elements_that_are_read_come_first_and_side_by_side() -> None:
    """Inputs of the graph are read after the last input, and a computed tensor's elements behind it."""

    def function(strengths: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        y = x * strengths[0] + keys[1].sum() + strengths[-1]
        rates = strengths * 2
        return y * rates[1] + keys[0, 1] + rates[2]

    inputs = torch.tensor([2.0, 3.0, 5.0]), torch.arange(6).view(3, 2), torch.randn(4)
    module = graph_of(function, *inputs)
    expected = module(*inputs)
    assert give_buffers(module.graph) == 6
    module.graph.lint()
    module.recompile()
    assert torch.equal(module(*inputs), expected)
    targets = [node.target for node in module.graph.nodes]
    first = targets.index(ELEMENT)
    assert targets[first : first + 4] == [ELEMENT] * 4
    assert targets.index(torch.ops.aten.mul.Tensor) > first + 3
    twice = next(node for node in module.graph.nodes if node.target is torch.ops.aten.mul.Tensor and node.args[1] == 2)
    assert [node.target for node in (twice.next, twice.next.next)] == [ELEMENT] * 2
    # the element of the row keys[0] is read from a row that is in a buffer of its own already
    assert all(isinstance(node.meta["val"], Tensor) for node in module.graph.nodes if node.target is ELEMENT)


@pytest.mark.parametrize(
    "case",
    [
        (lambda s: s[1] * s[1], torch.ones(3), "fake"),  # one element, which all read
        (lambda s: s[0] + s[1], torch.ones(FEW + 1), "fake"),
        (lambda s: s[0] + s[1], torch.ones(2, 3), "fake"),
        (lambda s: s[0] + s[1], torch.ones(2, 2, 2), "fake"),
        (lambda s: s[0] + s[1], torch.ones(3), "symbolic"),
        (lambda s: s[0] + s[1], torch.ones(3, device="meta"), "fake"),
    ],
    ids=["one element", "large", "the steps of a sequence", "three axes", "sizes are symbols", "another device"],
)
def test_what_stays(case: tuple[Any, Tensor, str]) -> None:
    function, tensor, mode = case
    module = graph_of(function, tensor, tracing_mode=mode)
    before = str(module.graph)
    assert give_buffers(module.graph) == 0
    assert str(module.graph) == before


@pytest.mark.parametrize("given", [{}, {"hidden_l1": 0.1}], ids=["dropout alone", "and a penalty"])
def test_equal_blocks_give_equal_kernels(given: dict[str, Any]) -> None:
    """Not each of the nine blocks has a kernel of its own for its mask. Some kernels contain a small loop of something else, too."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(32, 32), nn.Sigmoid())), nn.Linear(32, 3))
    module = graphreg.regularize(model, hidden_dropout=0.5, rng=1, **given)
    x, grads = torch.randn(64, 32), []
    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False), graphreg.frozen_noise(module):
        compiled = torch.compile(module, fullgraph=True)
        for run in (module, compiled):
            module.zero_grad()
            (output, penalties), code = run_and_get_code(lambda run=run: run(x))
            (output.square().sum() + sum(penalties.values())).backward()
            grads.append([output, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    for eager, same in zip(*grads, strict=True):
        torch.testing.assert_close(eager, same)
    kernels = [source for source in re.findall(r"r'''(.*?)'''", "".join(code), re.DOTALL) if ">> " in source]
    assert 1 <= len(set(kernels)) <= 5
