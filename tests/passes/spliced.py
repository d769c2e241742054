"""Helpers of the splices' tests: draws that are given, and what every splice must do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Noise, Splice


class Given(Noise):
    """Noise whose only draw is given, in the shape of z with 1 along shared axes."""

    def __init__(self, draw: Tensor) -> None:
        super().__init__(torch.zeros(2, dtype=torch.int32))
        self.draw = draw

    def keep(self, z: Tensor, p: Tensor | float, shared: Iterable[int] = ()) -> Tensor:
        assert self.draw.shape == super()._drawn_for(z, shared)[0].shape
        return self.draw

    def uniform(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self.keep(z, 0, shared)

    def normal(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        return self.keep(z, 0, shared)


def formula(splice: Splice, z: Tensor, draw: Tensor, **more: Any) -> Tensor:
    """The splice's formula on z, with its own strength and this draw."""
    return splice(z=z, weight=torch.tensor(splice.weight, dtype=torch.float64), noise=Given(draw), **more)


def module_of(splice: Splice, seed: int = 0) -> Any:
    """A module whose output is its input with the splice acting on it."""
    assert splice.pattern == "0"
    return graphreg.regularize(nn.Sequential(nn.Identity(), nn.Identity()), splice, rng=seed)


def spliced(splice: Splice, z: Tensor, seed: int = 0) -> Tensor:
    """The value after the splice, at the first call."""
    return module_of(splice, seed)(z).output


def acts_in_train_mode_alone(splice: Splice, z: Tensor) -> None:
    """Another draw at each call in train mode; in eval mode and at strength 0 the value itself, and no call is counted in eval."""
    module = module_of(splice)
    first, second = module(z).output, module(z).output
    assert first.shape == z.shape and not torch.equal(first, z) and not torch.equal(first, second)
    assert torch.equal(spliced(splice, z), first)
    assert torch.equal(module.eval()(z).output, z) and graphreg.rng_state(module)["call"] == 2
    graphreg.set_strength(module, graphreg.report(module).regularizers[0].name, 0.0)
    assert torch.equal(module.train()(z).output, z)


def same_compiled(splice: Splice, z: Tensor) -> None:
    """Value and gradient are those of eager at two calls, after an activation whose splice backward recomputes, too."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Sigmoid(), nn.Softplus(), nn.Tanh())
        module = graphreg.regularize(model, [splice, dataclasses.replace(splice, pattern="1")], rng=3)
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        x = z.clone().requires_grad_()
        outputs = [run(x).output for _ in range(2)]
        torch.stack(outputs).square().sum().backward()
        results.append([*outputs, x.grad])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def refuses(message: str, splice: type[Splice], *args: Any, **options: Any) -> None:
    with pytest.raises(graphreg.RegularizerError, match=message):
        splice(*args, **options)


def refuses_value(message: str, splice: Splice, z: Tensor) -> None:
    """The splice refuses the value when it is called, and, where the shape is known, when it is planned."""
    with pytest.raises(graphreg.RegularizerError, match=message):
        spliced(splice, z)
    with pytest.raises(graphreg.RegularizerError, match=message):
        graphreg.regularize(nn.Sequential(nn.Identity(), nn.Identity()), splice, example_inputs=z)


RATES = (1.0, -0.1, 1.5)


def needs_a_rate(splice: type[Splice]) -> None:
    for rate in RATES:
        refuses(rf"{splice.__name__}: weight={rate} is not allowed; weight must be in \[0, 1\)\.", splice, "0", rate)


def same_along(y: Tensor, axes: Iterable[int]) -> bool:
    """Whether y does not vary along these axes."""
    first = y
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return torch.equal(y, first.expand_as(y))
