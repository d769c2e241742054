"""A formula draws from its noise alone, writes into nothing that it was given and keeps nothing: else it is refused at first use."""

from __future__ import annotations

import random
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import Noise, Penalty, Splice, Vjp
from graphreg.errors import RegularizerError
from graphreg.passes import HiddenL1
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.purity import unproven

CALLS: list[int] = []


class Dropout(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.dropout(z, 0.5) * weight


class DropoutOfImages(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.dropout2d(z, 0.5) if z.dim() == 4 else z * weight


class Swallowing(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        try:
            return torch.bernoulli(z.sigmoid()) * weight
        except Exception:
            return z


class RandomRows(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return z.flatten(1)[torch.randperm(len(z))].diff(dim=0).square().mean()


class RandomVjp(Penalty):
    wrt: Any = "*"

    def __call__(self, vjp: Vjp) -> Tensor:
        found = vjp({name: torch.randn_like(z) for name, z in vjp.sites.items()})
        return torch.stack([g.square().sum() for g in found.values()]).sum()


class PythonsRandom(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return z * weight if random.random() < 0.5 else z


class NumpysRandom(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return z * weight * float(np.random.rand())


class InPlace(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return z.mul_(weight)


class ThroughAView(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        z.detach().view(-1)[0] = 0
        return z.square().mean()


class Clamped(Penalty, on="parameters"):
    def __call__(self, w: Tensor) -> Tensor:
        with torch.no_grad():
            w.clamp_(-1, 1)
        return w.square().mean()


class IntoTheWeight(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        return z * weight.mul_(0.5)


class Growing(Splice):
    seen: ClassVar[list[int]] = []

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        self.seen.append(len(z))
        return z * weight


class Counting(Splice):
    calls: ClassVar[int] = 0

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        type(self).calls += 1
        return z * weight


class Outside(Splice):
    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        CALLS.append(1)
        return z * weight * len(CALLS)


IMPURE: dict[type[Regularizer], str] = {
    Dropout: r"Dropout.__call__ draws random numbers itself, by \w+ in line \d+: return F.dropout\(z, 0.5\) \* weight\..*noise.keep",
    DropoutOfImages: r"draws random numbers itself, by \w+ in line \d+: return F.dropout2d.*noise.keep",
    Swallowing: "draws random numbers itself, by bernoulli.*noise.keep",
    RandomRows: "draws random numbers itself, by randperm.*fixed numbers",
    RandomVjp: "draws random numbers itself, by randn_like.*vjp.noise",
    PythonsRandom: "draws random numbers itself, by Python's random",
    NumpysRandom: "draws random numbers itself, by Python's random or numpy.random",
    InPlace: r"InPlace.__call__ writes into a tensor that it did not make, by mul_ in line \d+: return z.mul_\(weight\).*clone",
    ThroughAView: r"writes into a tensor that it did not make, by \w+_ in line \d+: z.detach",
    Clamped: "writes into a tensor that it did not make, by clamp_",
    IntoTheWeight: "writes into a tensor that it did not make, by mul_",
    Growing: "it changes Growing.seen",
    Counting: "it changes Counting.calls",
    Outside: "called twice with the same arguments, it gives two results",
}


class Careful(Splice):
    """All of it its own: tensors that it makes, and a stream."""

    table: ClassVar[dict[Any, Tensor]] = {}

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        if z.shape not in self.table:  # computed once, and the same whenever
            self.table[z.shape] = torch.ones(z.shape)
        y = z.clone().mul_(weight)
        keep = noise.keep(z, weight).to(z.dtype).mul_(2.0)
        ramp = torch.zeros_like(z)
        ramp[..., 0] = 1
        offset = torch.tensor([1.0, 2.0]).add_(1).sum()
        offset += torch.from_numpy(np.ones(3)).add_(1).sum().to(offset.dtype)
        return y + keep + ramp * noise.normal(z) + offset + self.table[z.shape] * noise.uniform(z)


class Switched(Splice):
    """What torch marks as drawing, and does not draw."""

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        h = F.dropout(z, 0.5, training=False)
        return h * weight + F.scaled_dot_product_attention(z, z, z, dropout_p=0.0) * 0


class Projection(Penalty):
    """A fixed one."""

    def __call__(self, z: Tensor) -> Tensor:
        return (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))).square().mean()


class Deciding(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().mean() if z.abs().max().item() > 0 else z.sum()


PURE: tuple[type[Regularizer], ...] = (Careful, Switched, Projection, Deciding)


def regularized(regularizer: Regularizer, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    state, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    try:
        return graphreg.regularize(model, regularizer, rng=1, **options)
    finally:  # nobody's generator has moved
        assert torch.equal(state, torch.get_rng_state()) and pythons == random.getstate()
        assert numpys == np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]


@pytest.mark.parametrize("cls", IMPURE)
def test_what_is_no_function_of_its_arguments_is_refused(cls: type[Regularizer]) -> None:
    for _ in range(2):  # each time
        with pytest.raises(RegularizerError, match=IMPURE[cls]):
            regularized(cls("*", 0.5))


@pytest.mark.parametrize("cls", PURE)
def test_what_is_one_passes(cls: type[Regularizer]) -> None:
    module = regularized(cls("*", 0.5))
    given = module(torch.linspace(-1, 1, 12).view(3, 4))
    assert given.output.shape == (3, 2) and cls not in unproven


@pytest.mark.parametrize("key", ["hidden_dropout", "hidden_noise", "hidden_l1", "weight_l1", "weight_l2", "contractive"])
def test_the_built_ins_pass_unwatched(key: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regularized(HiddenL1("*", 0.0, name="first"), **{key: 0.1})
    assert not [cls for cls in unproven if cls.__module__.startswith("graphreg")]


class Wide(Penalty):
    """It asks for a width that no small tensor has."""

    def __call__(self, z: Tensor) -> Tensor:
        if z.shape[-1] != 77:
            raise ValueError("77")
        return F.dropout(z, 0.5).mean()


class WideAndPure(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        if z.shape[-1] != 77:
            raise ValueError("77")
        return z.square().mean()


def test_what_cannot_be_tried_is_watched_in_its_first_call() -> None:
    for cls in (Wide, WideAndPure):
        module = graphreg.regularize(nn.Sequential(nn.Linear(4, 77), nn.ReLU(), nn.Linear(77, 2)), cls("*", 0.5), rng=1)
        assert cls in unproven
        if cls is Wide:
            with pytest.raises(RegularizerError, match="Wide.__call__ draws random numbers itself"):
                module(torch.ones(3, 4))
            assert cls in unproven
        else:
            module(torch.ones(3, 4))
            assert cls not in unproven


def test_a_known_shape_is_tried() -> None:
    model = nn.Sequential(nn.Linear(4, 77), nn.ReLU(), nn.Linear(77, 2))
    with pytest.raises(RegularizerError, match="WideToo.__call__ draws random numbers itself"):
        graphreg.regularize(model, WideToo("*", 0.5), example_inputs=torch.ones(3, 4))


class WideToo(Wide):
    def __call__(self, z: Tensor) -> Tensor:
        return super().__call__(z)


spied: list[tuple[int, ...]] = []


class Spied(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        spied.append(tuple(z.shape))
        return z.abs().mean()


def test_a_class_is_tried_once() -> None:
    regularized(Spied("*", 0.5))
    tried = len(spied)
    regularized(Spied("*", 0.25, name="again"))
    assert tried == len(spied) > 0


def test_a_backend_refuses_too() -> None:
    torch._dynamo.reset()
    backend = graphreg.backend(Dropout("*", 0.5), inner="eager")
    module = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), backend=backend)
    with pytest.raises(RegularizerError, match="Dropout.__call__ draws random numbers itself"):
        module(torch.ones(3, 4))
