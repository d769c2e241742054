"""``graphreg.verify`` of gradients whose sums have another order: what is rounding passes, in every dtype, and what is not is found."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError
from graphreg.session.hosts import rewritten
from graphreg.verification.rounding import is_rounding

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
EVERYWHERE = {"weight": 0.1, "pattern": "**"}


class FansOut(nn.Module):
    """Values with many readers, some of them behind modules that return their input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.drop, self.same = nn.Dropout(0.3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        d = self.drop(h)
        s = self.same(d)
        return h * 1.7 + d.tanh() * h.sigmoid() + s.exp() * 0.3 + d * s.cos() + h.relu() * 3.3


class Random(nn.Module):
    """A random program: values that are read many times, in place writes among them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance, self.steps = random.Random(seed), list[tuple[str, int, int, int]]()
        self.layers = nn.ModuleList()
        for count in range(1, 12):
            kind = chance.choice(["layer", "drop", "tanh", "add", "times", "view", "cat", "written", "added"])
            a, b = chance.randrange(count), chance.randrange(count)
            if kind in ("layer", "drop"):
                self.layers.append(nn.Linear(5, 5) if kind == "layer" else nn.Dropout(0.3))
            self.steps.append((kind, a, b, len(self.layers) - 1))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, a, b, layer in self.steps:
            one, other = values[a], values[b]
            if kind in ("layer", "drop"):
                made = self.layers[layer](one)
            elif kind == "tanh":
                made = torch.tanh(one)
            elif kind == "add":
                made = one + other
            elif kind == "times":
                made = one * other * 0.5
            elif kind == "view":
                made = one.view(-1, 5, 1).transpose(1, 2).reshape(-1, 5)
            elif kind == "cat":
                made = torch.cat([one[:, :2], other[:, 2:]], 1)
            elif kind == "written":
                made = F.relu(one * 1.5, inplace=True)
            else:
                made = one.clone()
                made += other
            values.append(made)
        return torch.stack(values[1:]).sum(0)


def verified(model: nn.Module, x: Tensor, **options: Any) -> None:
    graphreg.verify(model, graphreg.regularize(model, **options, rng=0), x)


@pytest.mark.filterwarnings("ignore:dropout .*act")
@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float32, (1, 5)), (torch.float64, (1,)), (torch.bfloat16, (5,))])
def test_another_order_of_a_sum_is_no_difference(dtype: torch.dtype, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted(monkeypatch)
    for seed in seeds:
        torch.manual_seed(seed)
        verified(FansOut().to(dtype), X.to(dtype), dropout=EVERYWHERE)
        verified(Random(seed).to(dtype), X.to(dtype), dropout=EVERYWHERE)
    assert len(asked) > 3 and all(asked)  # the sums did differ


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The answers that ``verify`` gets, one for each gradient that is not bit for bit the model's."""
    asked: list[bool] = []

    def counting(*given: Any) -> bool:
        asked.append(is_rounding(*given))
        return asked[-1]

    monkeypatch.setattr(importlib.import_module("graphreg.verification.verify"), "is_rounding", counting)
    return asked


@pytest.mark.filterwarnings("ignore:dropout .*act")
def test_what_splices_replace_and_what_export_traces() -> None:
    """The gradient of a bias before a batch norm is nothing but rounding, so that no difference is small beside it."""
    torch.manual_seed(0)
    verified(FansOut(), X, drop_connect=0.1)
    verified(FansOut(), X, dropout=EVERYWHERE, front_end="export", example_inputs=X)


class Scaled(torch.autograd.Function):
    """The value itself, with a gradient that is a little too large."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (1 + Scaled.by)

    by = 0.0


def scaled(value: Tensor) -> Tensor:
    made: Tensor = Scaled.apply(value)  # type: ignore[no-untyped-call]
    return made


@pytest.mark.filterwarnings("ignore:dropout .*act")
@pytest.mark.parametrize(("dtype", "small"), [(torch.float32, 3e-7), (torch.float64, 1e-9)])
def test_a_gradient_that_is_a_little_wrong_is_found(dtype: torch.dtype, small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is as small as rounding."""
    torch.manual_seed(0)
    model = FansOut().to(dtype)
    module: Any = graphreg.regularize(model, dropout=EVERYWHERE, rng=0)
    for graph in module.graphs.values():
        node = next(node for node in graph.nodes if node.name == "tanh")
        with graph.inserting_after(node):
            after = graph.call_function(scaled, (node,))
        node.replace_all_uses_with(after, delete_user_cb=lambda user, after=after: user is not after)
    module.recompile()
    graphreg.verify(model, module, X.to(dtype))
    for by in (small, 1e-3):
        monkeypatch.setattr(Scaled, "by", by)
        with pytest.raises(GraphRegError, match=r"the gradient of .* differs in"):
            graphreg.verify(model, module, X.to(dtype))


class Fixed(FansOut):
    """A model that runs in float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:dropout .*act")
def test_a_model_of_one_precision_is_compared_by_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    asked = counted(monkeypatch)
    model = Fixed()
    model.norm = nn.Identity()  # type: ignore[assignment]
    verified(model, X, dropout=EVERYWHERE, example_inputs=X)
    assert asked and all(asked)


def test_the_rule() -> None:
    one = torch.tensor([1.0, 2.0])
    off = one + torch.tensor([0.0, 2.4e-7])
    wide = one.double()
    assert is_rounding((one, off), (wide, wide)) and is_rounding((one, off), (wide, wide + 4e-16))
    assert not is_rounding((one, off), (wide, off.double()))  # the same in both precisions
    assert is_rounding((wide, wide + 4e-16), (one, off))
    assert not is_rounding((wide, wide + 2.4e-7), (one, off))
    assert is_rounding((one, off), None) and not is_rounding((one, one * 1.001), None)
    assert is_rounding((one, off), (wide, None)) and not is_rounding((one, one * 1.001), (None, wide))
    broken = torch.tensor([torch.nan, 2.0])
    assert not is_rounding((one, broken), (wide, wide)) and not is_rounding((one, broken), (wide, broken.double()))
    assert is_rounding((broken, broken + 2.4e-7), (broken.double(), broken.double()))


# models in place


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(5, 5)) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        return x if more is None else x * more


WAYS: dict[str, dict[str, Any]] = {
    "returned": {"penalties": "return", "scale": None}, "attached": {}, "in eval, too": {"eval_penalties": True},
    "with native dropout": {"own_dropout": "seeded"}, "with blocks": {"blocks": "blocks.*"},
}  # fmt: skip


def in_place(**options: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize_(Net(), rng=0, **{"hidden_dropout": 0.1, "weight_l2": 0.01, "scale": 1, **options})


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_place_is_compared_with_its_own_forward(way: str) -> None:
    model = in_place(**WAYS[way])
    model(X)
    model.register_forward_hook(lambda *a: None)
    state = graphreg.rng_state(model)
    graphreg.verify(model, model, X)
    assert graphreg.rng_state(model) == state and model.training and type(model).__name__ == "Net"
    graphreg.verify(model.eval(), model, X)
    model.train()
    module = rewritten(model)
    for graph in module.graphs.values():
        for node in [n for n in graph.nodes if n.target == "blocks.1.1"]:
            node.target = "blocks.1.0"
    module.recompile()
    with pytest.raises(GraphRegError, match="the rewritten Net is not the model: in train mode, at call 1 of 2 with equal inputs"):
        graphreg.verify(model, model, X)


def test_each_structure_has_its_graph() -> None:
    model, more = in_place(), torch.full((5,), 2.0)
    with pytest.raises(GraphRegError, match="has no graph yet"):
        graphreg.verify(model, model, X)
    model(X)
    with pytest.raises(GraphRegError, match=r"Net has no graph for arguments of the structure \(x=float32\[2\], more=float32\[1\]\), or"):
        graphreg.verify(model, model, X, more)
    model(X, more=more)
    graphreg.verify(model, model, X)
    graphreg.verify(model, model, X, more)
    model.norm = nn.Identity()
    with pytest.raises(GraphRegError, match="or only one from before a change of the model. Call it with them once in train mode"):
        graphreg.verify(model, model, X)
    model(X)
    graphreg.verify(model, model, X)
