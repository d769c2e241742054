"""``check_regularizer``: all built-in regularizers pass it, and what is wrong with a class it finds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Noise, Penalty, RegularizerError, Splice
from graphreg.testing import check_regularizer
from graphreg.testing.models import examples

GIVEN: dict[str, dict[str, Any]] = {
    "LayerDrop": {"pattern": "act"},
    "MaxNorm": {"limit": 0.1, "wrong": {"limit": [0, -1.0, "one"]}},
    "RecurrentNorm": {"pattern": "rnn", "wrong": {"norm": ["l3"]}},
    "RecurrentState": {"pattern": "rnn"},
    "SpectralPenalty": {"gradients": False, "wrong": {"iterations": [0, 1.5], "reduction": ["max"]}},  # it keeps its estimate of u and v
    "BernoulliDropout": {"wrong": {"weight": [1.0, -0.1]}},
    "L0Gates": {"wrong": {"start": [0, 1, "half"], "reduction": ["max"], "weight": [-1]}},
    "ConcreteDropout": {"wrong": {"start": [0, 1], "reduction": ["max"]}},
}
BUILT_IN = sorted({cls for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.")}, key=str)
COMPILED = ("HiddenL1", "DropConnect", "L0Gates")  # make sweep compiles all


@pytest.mark.filterwarnings("ignore:.*several times in a row")  # dropout on each of a model's hidden values
@pytest.mark.parametrize(  # what is checked of the compiled module is checked in eager first
    ("cls", "compiled"),
    [
        pytest.param(cls, compiled, id=f"{cls.__name__}-{'compiled' if compiled else 'eager'}")
        for cls in BUILT_IN
        for compiled in (False, True)
        if compiled or cls.__name__ not in COMPILED
    ],
)
def test_built_in(cls: type[Any], compiled: bool) -> None:
    check_regularizer(cls, backend="aot_eager" if compiled else None, **GIVEN.get(cls.__name__, {}))


def test_the_models_are_the_same_each_time() -> None:
    before = torch.get_rng_state()
    one, other = list(examples()), list(examples())
    assert len(one) == 7 and torch.equal(before, torch.get_rng_state())
    for first, second in zip(one, other, strict=True):
        assert all(map(torch.equal, *([each.inputs] if isinstance(each.inputs, Tensor) else each.inputs for each in (first, second))))
        assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))


# What is found


class Scaled(Splice):
    """A splice in which a class of the cases below has a fault."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (1 + weight * noise.normal(z)).to(z.dtype)


class Idle(Scaled):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * 1


class Stays(Scaled):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (2 + weight)


class Detaches(Scaled):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (1 + z.detach() * weight)


class AsksForTheCompiler(Scaled):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (1 + weight * (2 if torch.compiler.is_compiling() else 1))


class Draws(Scaled):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + weight * torch.rand_like(z)


class DrawsInSecret(Penalty):
    """The trial of formulas on small tensors does not find it, because some of their numbers are below 0."""

    def __call__(self, z: Tensor) -> Tensor:
        return z.square().mean() * (random.random() if bool((z > 0).all()) else 1)


class Constant(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return torch.ones(())


class NoGradient(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype).mean() + z.sum() * 0


class Infinite(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return z.sum() / 0


class LearnsInFloat32(Penalty, on="parameters"):
    """Its state is right, but it is in float32 for a model in float64, too."""

    wide: bool = False

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        dtype = like.dtype if self.wide else torch.float32
        return {"center": nn.Parameter(like.new_ones(like.shape[-1], dtype=dtype)), "seen": torch.zeros(2)}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        return (w - state["center"].exp()).square().mean() + state["seen"].sum()


class MultipliesInFloat32(Penalty):
    def __call__(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ torch.ones(z[0].numel())).square().mean()


class BadlyRefuses(Penalty):
    power: float = 1.0
    how: str = "value"

    def check(self) -> None:
        super().check()
        if self.power < 0 and self.how == "value":
            raise ValueError("no")
        if self.power < 0 and self.how == "nameless":
            raise RegularizerError("that is not allowed.")

    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().pow(self.power).mean()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Idle, {}, r"Idle: the output is that of the model in 50 calls in train mode\. Give another weight or model\."),
        (Stays, {}, r"Stays: at strength 0 it changes the output\. If this is meant, say off_at_zero = False in the class\."),
        (Detaches, {}, r"Detaches: the gradient along a direction is .*, and the difference .*\. If this is meant, give gradients=False\."),
        (
            LearnsInFloat32,
            {"pattern": "0.weight"},
            r"LearnsInFloat32: the gradient along .*\. This check is in float64, and of the state 'center' is float32, 'seen' is float32, "
            r"which rounds: let init_state make it in the dtype of its argument",
        ),
        (MultipliesInFloat32, {}, r"MultipliesInFloat32: for a model in float64 the formula raises RuntimeError: .*Let it make tensors in"),
        (AsksForTheCompiler, {}, r"AsksForTheCompiler: the module compiled with aot_eager has other outputs or penalties: "),
        (Constant, {}, r"Constant: the penalty carries no gradient, so it would train nothing\."),
        (NoGradient, {}, r"NoGradient: all gradients of the penalty are 0 on this model\. Give another model\."),
        (DrawsInSecret, {}, r"DrawsInSecret: a call draws from a global random generator\. Draw from noise\."),
        (Infinite, {}, r"Infinite: the penalty is -?inf\."),
        (BadlyRefuses, {"wrong": {"power": [-1]}}, r"BadlyRefuses: power=-1 raises ValueError: no, and not a RegularizerError\."),
        (
            BadlyRefuses,
            {"how": "nameless", "wrong": {"power": [-1]}},
            r"BadlyRefuses: power=-1 raises an error that does not name the class and the option: that is not allowed\.",
        ),
        (BadlyRefuses, {"how": "not", "wrong": {"power": [-1]}}, r"BadlyRefuses: power=-1 is accepted\. Refuse it in check\(\), by"),
    ],
)
def test_a_fault_is_found(cls: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_regularizer(cls, **{"pattern": "1", **options})


def test_a_state_in_the_dtype_of_its_parameter() -> None:
    """A tensor in float32 that nothing rounds is no fault."""
    check_regularizer(LearnsInFloat32, "0.weight", wide=True, backend=None)


class CenterLoss(Penalty):
    """It needs one label for each row of ``units``, and a value of the example has several rows for an example."""

    labels: graphreg.ModelInput = graphreg.required()

    def __call__(self, units: Tensor, labels: Tensor) -> Tensor:
        same = (labels[:, None] == labels).to(units.dtype)
        return (units - same @ units / same.sum(1, keepdim=True)).square().mean()


def test_an_error_of_the_formula_comes_with_the_shapes() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as met:
        check_regularizer(CenterLoss, labels="labels", backend=None)
    (note,) = met.value.__notes__
    assert note.startswith("check_regularizer ran CenterLoss on ") and "x5x" in note and "give check_regularizer another pattern" in note


def test_what_graphreg_refuses_itself() -> None:
    with pytest.raises(RegularizerError, match=r"Draws.* draws random numbers"):
        check_regularizer(Draws, "1", backend=None)


def test_its_own_arguments() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_regularizer(Scaled, "1", 0.3, model=model, inputs={"input": torch.randn(4, 3)}, backend=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RegularizerError, match=r"check_regularizer takes model and inputs together\. Give both, or neither\."):
        check_regularizer(Scaled, model=model)
    with pytest.raises(RegularizerError, match=r"check_regularizer takes a class of regularizers, not .*Give a subclass of Splice or Pe"):
        check_regularizer(Scaled("*", 0.1))  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match=r"wrong=\{'powr': \.\.\.\} names no option of BadlyRefuses\. Its options: .*power"):
        check_regularizer(BadlyRefuses, wrong={"powr": [1]})
    with pytest.raises(RegularizerError, match=r"Scaled can act on none of the models of graphreg\.testing\. Give check_regularizer mod"):
        check_regularizer(Scaled, "layer9")
