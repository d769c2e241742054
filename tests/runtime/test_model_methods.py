"""Methods of nn.Module that the model's class overrides: those that act on all modules are the model's, and the others are named."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.runtime import rewritten_module
from graphreg.runtime.rewritten_module import RewrittenModule

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.n(self.a(x)).to(self.a.weight.dtype))  # type: ignore[no-any-return]


class Frozen(Plain):
    """A backbone whose norm stays in eval mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.n.eval()
        return self


class Adaptive(Plain):
    """Whose norm adapts in eval mode, too."""

    def eval(self) -> Adaptive:
        super().eval()
        self.n.train()
        return self


class Partly(Plain):
    """Sets the mode of its head alone."""

    def train(self, mode: bool = True) -> Partly:
        self.training = mode
        self.head.train(mode)
        return self


class Precise(Plain):
    """Whose norm stays in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Precise:
        norm = self._modules.pop("n")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._modules["n"] = norm
        return self


class Fixed(Plain):
    def requires_grad_(self, requires_grad: bool = True) -> Fixed:
        super().requires_grad_(requires_grad)
        self.n.requires_grad_(False)
        return self


class Quantized(Plain):
    def half(self) -> Quantized:
        raise ValueError("its weights are quantized")


def copies() -> dict[str, Callable[[Any], Any]]:
    return {"itself": lambda module: module, "a copy": copy.deepcopy, "a pickle": lambda module: pickle.loads(pickle.dumps(module))}


def modes(module: nn.Module) -> list[bool]:
    return [module.training, *(module.get_submodule(name).training for name in ("a", "n", "head"))]


@pytest.mark.parametrize("blocks", [None, "head"])
@pytest.mark.parametrize("kind", [Plain, Frozen, Adaptive, Partly])
def test_train_and_eval_are_the_models(kind: type[Plain], blocks: str | None) -> None:
    made = graphreg.regularize(kind(), weight_l2={"a.weight": 1e-3}, blocks=blocks)
    for module in [copied(made) for copied in copies().values()]:
        model = kind()
        for step in (lambda m: m.eval(), lambda m: m.train(), lambda m: m.train(False), lambda m: m.train()):
            assert step(module) is module
            assert modes(module) == modes(step(model))


@pytest.mark.parametrize("kind", [Frozen, Adaptive, Partly])
def test_layers_that_were_replaced_or_added_follow(kind: type[Plain]) -> None:
    model = kind()
    module = graphreg.regularize(model, weight_l2={"a.weight": 1e-3})
    module.head, module.n, module.extra = nn.Sequential(nn.Dropout(), nn.Linear(4, 2)), nn.BatchNorm1d(4), nn.Dropout()
    for mode in (False, True):
        module.train(mode)
        model = kind().train(mode)
        assert modes(module) == modes(model) and module.extra.training == mode
        assert all(inner.training == module.head.training for inner in module.head.modules())
    module.eval()
    torch.testing.assert_close(module(X).output, module(X).output)


class Wrapper(nn.Module):
    """What an adapter does: it wraps a layer of the model, and has parameters of its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.drop, self.scale = base, nn.Dropout(), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.drop(x)) * self.scale  # type: ignore[no-any-return]


def test_a_layer_around_one_of_the_models_follows() -> None:
    model = Precise()
    module = graphreg.regularize(model, weight_l2={"a.weight": 1e-3})
    module.head = Wrapper(model.head)
    module.half()
    assert model.head.weight.dtype is module.head.scale.dtype is torch.half
    model = Frozen()
    module = graphreg.regularize(model, weight_l2={"a.weight": 1e-3})
    module.head = Wrapper(model.head)
    for mode in (False, True):
        assert [inner.training for inner in module.train(mode).head.modules()] == [mode] * 3


@pytest.mark.parametrize("blocks", [None, "n"])
@pytest.mark.parametrize("how", copies())
def test_a_conversion_is_the_models(how: str, blocks: str | None) -> None:
    module = copies()[how](graphreg.regularize(Precise(), weight_l2={"a.weight": 1e-3}, blocks=blocks))
    with torch.no_grad():
        module.n.weight.fill_(1 / 3)
    assert module.half() is module
    assert module.a.weight.dtype is module.head.weight.dtype is torch.half
    assert module.n.weight.dtype is torch.float32 and bool((module.n.weight == torch.tensor(1 / 3)).all())  # never rounded
    assert module.to(torch.float64).a.weight.dtype is torch.float64 and module.n.weight.dtype is torch.float32
    module.float()
    assert module(X).output.isfinite().all()


def test_a_conversion_that_the_model_refuses() -> None:
    module = graphreg.regularize(Quantized(), weight_l2={"a.weight": 1e-3})
    with pytest.raises(ValueError, match="quantized"):
        module.half()
    assert module.double().a.weight.dtype is torch.float64  # which the class does not override


def test_requires_grad_is_the_models() -> None:
    module = graphreg.regularize(Fixed(), weight_l2={"a.weight": 1e-3})
    module.extra = nn.Linear(1, 1)
    assert module.requires_grad_() is module
    assert {name for name, parameter in module.named_parameters() if not parameter.requires_grad} == {"n.weight", "n.bias"}
    module.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_every_method_that_acts_on_all_modules_is_among_them() -> None:
    functions = {name: value for name, value in vars(nn.Module).items() if inspect.isfunction(value)}
    returns_itself = {name for name, value in functions.items() if "Self" in str(inspect.signature(value).return_annotation)}
    assert returns_itself and returns_itself <= set(rewritten_module._OF_ALL)
    assert all(vars(RewrittenModule)[name].__name__ == name for name in rewritten_module._OF_ALL)


class Others(Plain):
    """Overrides what acts on no other module."""

    def get_extra_state(self) -> Any:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        pass

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name, value) for name, value in super().named_parameters(*args, **kwargs) if not name.startswith("head"))

    def extra_repr(self) -> str:
        return "others"

    def __repr__(self) -> str:
        return "Others()"


def test_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    monkeypatch.setattr(logging.getLogger("graphreg"), "info", lambda text, *args: lines.append(text % args))
    module = graphreg.regularize(Others(), weight_l2={"a.weight": 1e-3})
    names = "get_extra_state, set_extra_state, named_parameters"
    line = f"not the model's methods: {names}. Others overrides them, and this module has those of nn.Module"
    assert lines.count(line) == 1 and line in str(graphreg.report(module))
    assert len(list(module.named_parameters())) == 6


@pytest.mark.parametrize("kind", [Plain, Frozen, Precise, Quantized])
def test_those_that_act_as_the_models_are_not(kind: type[Plain]) -> None:
    assert "not the model's" not in str(graphreg.report(graphreg.regularize(kind(), weight_l2={"a.weight": 1e-3})))


def test_in_place_all_are_the_models() -> None:
    model = graphreg.regularize_(Others(), weight_l2={"a.weight": 1e-3}, scale=1)
    model(X)
    assert "not the model's" not in str(graphreg.report(model)) and len(list(model.named_parameters())) == 4


class Heads(Plain):
    """Whose methods list the head alone, as for an optimizer."""

    def parameters(self, recurse: bool = True) -> Any:
        return self.head.parameters(recurse)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any:  # type: ignore[override]
        return self.head.named_parameters(prefix, recurse)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return iter(())


@pytest.mark.parametrize("way", ["regularize", "in place", "backend"])
def test_all_parameters_are_sites_whatever_the_model_lists(way: str) -> None:
    """And buffers, in the proof and in ``verify``."""
    model, penalty = Heads(), {"strength": 1.0, "reduction": "sum"}
    expected = model.a.weight.square().sum() + model.head.weight.square().sum()
    if way == "regularize":
        module = graphreg.regularize(model, weight_l2=penalty, l2_sp=1.0, example_inputs=X, verify=True)
        penalties = module(X).penalties
    elif way == "in place":
        penalties = graphreg.regularize_(model, weight_l2=penalty, penalties="return")(X).penalties
    else:
        backend = graphreg.backend(weight_l2=penalty, hidden_dropout=0.1, inner="eager")
        torch.compile(model, backend=backend)(X)
        penalties = backend.penalties()
    torch.testing.assert_close(penalties["weight_l2"], expected)
