"""Helpers of the tests of splices on parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphreg
from graphreg import Splice


def of_weight(splice: Splice, w: Tensor, calls: int = 1) -> list[Tensor]:
    """What a module reads instead of w: the module returns the transpose of ``F.linear(eye, w)``, one result for each call."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    module: Any = graphreg.regularize(nn.Sequential(layer), splice, rng=1)
    return [module(torch.eye(w.shape[1])).output.detach().T for _ in range(calls)]


def acts_on_the_weight_alone(splice: Splice) -> None:
    """It acts in train mode; parameters, keys and what eval mode gives are the model's; strength 0 changes nothing."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.linspace(-1, 1, 12).view(3, 4)
    parameters, keys, values = list(model.parameters()), list(model.state_dict()), [p.detach().clone() for p in model.parameters()]
    module: Any = graphreg.regularize(model, splice, rng=0)
    assert not torch.equal(module(x).output, model(x))
    assert list(module.state_dict()) == keys and all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    assert torch.equal(module.eval()(x).output, model(x))
    graphreg.set_strength(module, graphreg.report(module, cost=False).regularizers[0].name, 0.0)
    assert torch.equal(module.train()(x).output, model(x))


def same_compiled_weights(splice: Splice, layer: nn.Module, x: Tensor) -> None:
    """Value and gradients of eager and of a graph, at two calls."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        layer.zero_grad()
        module: Any = graphreg.regularize(nn.Sequential(layer), splice, rng=3)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        outputs = [out[0] if isinstance(out := run(x).output, tuple) else out for _ in range(2)]
        torch.stack(outputs).square().sum().backward()
        results.append([*outputs, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
