"""A derivative by the rate of a random mask is refused, for the mask has none; derivatives by what has one are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import graphreg
from graphreg import Noise, Splice
from graphreg.errors import RandomnessError
from graphreg.regularizer.purity import called
from graphreg.regularizer.registry import registered

X = torch.linspace(-1, 1, 24).view(6, 4)
REFUSED = r"the rate of a random mask \(noise\.keep\) is differentiated"
SPLICES = {kind.__name__: kind for kind in registered().values() if issubclass(kind, Splice) and kind.__module__.startswith("graphreg.")}
BY_WEIGHT = {name: kind for name, kind in SPLICES.items() if "weight" in kind.takes and "noise" in kind.takes}


def noise() -> Noise:
    return Noise(torch.tensor([5, 7], dtype=torch.int32))


def replaced(kind: type[Splice], weight: Tensor) -> Tensor:
    """Return a loss of what the splice makes of values that are all 1."""
    z = torch.ones(256, 8, 12, 12, dtype=torch.float64)
    options: dict[str, Any] = {"block_size": 3} if kind.__name__ == "DropBlock" else {}
    given = {"z": z, "w": z, "units": z, "weight": weight, "noise": noise(), "previous": z * 0.5, "module_input": z * 0.5, "lengths": None}
    if kind.__name__ == "NEFTune":  # the embeddings of sequences
        given["z"] = z.flatten(2)
    if kind.__name__ == "LayerDrop":  # one draw for the whole value
        given |= {"z": z[:1, :1, :1, :1].clone(), "module_input": z[:1, :1, :1, :1] * 0.5}
    return (called(kind(**options, weight=0.3), {name: given[name] for name in kind.takes}) - 0.25).square().mean()


def test_there_are_splices_of_both_kinds() -> None:
    assert {"BernoulliDropout", "Zoneout", "LayerDrop", "DropBlock", "EmbeddingDropout", "GaussianDropout"} <= BY_WEIGHT.keys()


@pytest.mark.parametrize("name", sorted(BY_WEIGHT))
def test_the_gradient_by_a_strength_is_right_or_refused(name: str) -> None:
    """By differences of the mean over many draws, with equal noise on both sides."""
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    try:
        (ours,) = torch.autograd.grad(replaced(BY_WEIGHT[name], weight), weight)
    except RandomnessError:
        assert name not in ("GaussianDropout", "GaussianNoise", "NEFTune", "WeightNoise")
        return
    with torch.no_grad():
        step = 0.02
        theirs = (replaced(BY_WEIGHT[name], weight + step) - replaced(BY_WEIGHT[name], weight - step)) / (2 * step)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


class HalfKept(Splice, keys=("test_half_kept",)):
    """A third party's splice, whose rate is computed from the strength."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * noise.keep(z, weight / 2) / (1 - weight / 2)


def module(**options: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    return graphreg.regularize(layers, **options, weight_l2=0.5, rng=0)


def lent(ours: Any) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in ours.named_buffers() if name.endswith(".strength")}


def dual(loss: Callable[[Any], Any], strengths: dict[str, Tensor]) -> Any:
    with forward_ad.dual_level():
        return loss({name: forward_ad.make_dual(each, torch.ones_like(each)) for name, each in strengths.items()})


def below(loss: Callable[[Any], Any], strengths: dict[str, Tensor]) -> Any:
    """Differentiate by something else inside the transform."""
    one = torch.ones(())
    return jvp(lambda s: grad(lambda factor: factor * loss(s))(one), (strengths,), (strengths,))


def members(loss: Callable[[Any], Any], strengths: dict[str, Tensor]) -> Any:
    stacked = {name: torch.stack([each, each]) for name, each in strengths.items()}
    return grad(lambda all_of_them: vmap(loss, randomness="same")(all_of_them).sum())(stacked)


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "backward": lambda loss, s: loss({name: each.requires_grad_() for name, each in s.items()}).backward(),
    "grad": lambda loss, s: grad(loss)(s),
    "vjp": vjp,
    "jvp": lambda loss, s: jvp(loss, (s,), (s,)),
    "jacrev": lambda loss, s: jacrev(loss)(s),
    "jacfwd": lambda loss, s: jacfwd(loss, randomness="same")(s),
    "grad of grad": lambda loss, s: grad(lambda outer: grad(lambda factor: factor * loss(outer))(torch.ones(())))(s),
}
COMPILED = ("jvp", "jacrev", "grad of grad")  # a vjp within a vmap, and a grad within a grad


@pytest.mark.parametrize("way", [*WAYS, "dual", "jvp of grad", "grad of vmap"])
@pytest.mark.parametrize("key", ["hidden_dropout", "test_half_kept"])
def test_a_rate_lent_to_a_module_is_refused_by_every_way_to_differentiate(key: str, way: str) -> None:
    ours = module(**{key: 0.3})
    for _ in range(3):  # masks are drawn ahead from the second call on
        ours(X)
    ways = {**WAYS, "dual": dual, "jvp of grad": below, "grad of vmap": members}

    def loss(strengths: dict[str, Tensor]) -> Any:
        output, penalties = functional_call(ours, strengths, (X,))
        return output.square().sum() + sum(penalties.values())

    before = graphreg.rng_state(ours)
    with pytest.raises(RandomnessError, match=REFUSED):
        ways[way](loss, lent(ours))
    assert torch._C._functorch.maybe_current_level() is None
    graphreg.set_rng_state(ours, before)
    with torch.no_grad():  # nothing is differentiated
        expected = loss(lent(ours))
        graphreg.set_rng_state(ours, before)
        assert torch.equal(loss({name: each.requires_grad_() for name, each in lent(ours).items()}), expected)


def test_compiled_as_well() -> None:
    ours = module(hidden_dropout=0.3)

    def loss(strengths: dict[str, Tensor]) -> Any:
        return functional_call(ours, strengths, (X,)).output.square().sum()

    for way in COMPILED:
        with pytest.raises(Exception, match=REFUSED):
            torch.compile(lambda s, way=way: WAYS[way](loss, s), backend="eager", fullgraph=True)(lent(ours))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert not compiled(lent(ours)).isnan()
    with pytest.raises(Exception, match=REFUSED):
        compiled({name: each.requires_grad_() for name, each in lent(ours).items()})


@pytest.mark.parametrize("way", ["backward", "grad", "vjp", "jvp", "jacrev"])
def test_a_gradient_by_parameters_draws_as_before(way: str) -> None:
    """The strengths are constants of it, also under several transforms."""
    ours, twin = module(hidden_dropout=0.3, gaussian_dropout=0.2), module(hidden_dropout=0.3, gaussian_dropout=0.2)
    expected = twin(X).output.square().sum()
    parameters = {name: each.detach().clone() for name, each in ours.named_parameters()}
    seen: list[Tensor] = []

    def loss(parameters: dict[str, Tensor]) -> Any:
        total = functional_call(ours, parameters, (X,)).output.square().sum()
        seen.append(total)
        return total

    WAYS[way](loss, parameters)
    value = seen[0]
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    torch.testing.assert_close(value.detach(), expected.detach())


def test_a_detached_rate_and_a_relaxed_mask_stay_allowed() -> None:
    rate = torch.tensor(0.3, requires_grad=True)
    assert torch.equal(noise().keep(X, rate.detach()), noise().keep(X, 0.3))
    with pytest.raises(RandomnessError, match=REFUSED):
        noise().keep(X, rate)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ours = graphreg.regularize(layers, concrete_dropout=0.1, example_inputs=X, rng=0)
    ours(X).output.square().sum().backward()
    (logit,) = [parameter for name, parameter in ours.named_parameters() if name.endswith("logit")]
    assert logit.grad is not None and logit.grad.abs().sum() > 0
