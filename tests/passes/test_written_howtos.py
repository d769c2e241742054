"""The classes and functions that how-tos define, against values by hand. ``tests/test_guides.py`` runs the pages themselves."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.testing import check_regularizer
from pages import DOCS, FENCE, registry_restored

WAYS = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@contextmanager
def defined_by(page: str) -> Iterator[dict[str, Any]]:
    """What a page imports and defines, without what it runs."""
    code = "\n".join(found[2] for found in FENCE.finditer((DOCS / page).read_text()) if found[1] == "python")
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    kept: list[ast.stmt] = [each for each in ast.parse(code).body if isinstance(each, kinds)]
    kept = [each for each in kept if not (isinstance(each, ast.ImportFrom) and str(each.module).startswith(("transformers", "peft")))]
    module = ModuleType("page_of_howto")
    with registry_restored(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(ast.Module(kept, []), f"<{page}>", "exec", dont_inherit=True), vars(module))
        yield vars(module)


def called(module: Any, compiled: bool) -> Any:
    return torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module


def linear(*weights: float) -> nn.Linear:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return layer


def test_product_decay_by_hand() -> None:
    """B A is [[3, 6], [4, 8]], whose squares sum to 125; with a scaling of 2 that is 500."""
    a, b = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0], [4.0]], requires_grad=True)
    with defined_by("howto/lora.md") as page:
        penalty = page["ProductDecay"]("*", 1.0, scaling=2.0)(values={"0.lora_A.default.weight": a, "0.lora_B.default.weight": b})
    found, by_hand = (torch.autograd.grad(y, (a, b), retain_graph=True) for y in (penalty, (2 * b @ a).square().sum()))
    assert penalty.item() == 500 and all(torch.equal(x, y) for x, y in zip(found, by_hand, strict=True))


@WAYS
def test_gradient_penalties_by_hand(compiled: bool) -> None:
    """The slope of (3, 4) · x is (3, 4), of length 5. R1 is 5 · 25; WGAN-GP is 10 · 4², its gradient 10 · 2 · 4 · (0.6, 0.8)."""
    with defined_by("howto/gradient_penalty.md") as page:
        cases: list[tuple[dict[str, Any], float, tuple[float, float]]] = [
            ({"contractive": {"weight": 10 / 2, "pattern": "**#output"}}, 125.0, (30.0, 40.0)),
            ({"regularizers": page["GradientPenalty"]("**#output", 10.0)}, 160.0, (48.0, 64.0)),
        ]
        for regularizers, value, gradient in cases[compiled:]:  # the page compiles R1
            layer = linear(3.0, 4.0)
            module = graphreg.regularize(nn.Sequential(layer), **regularizers, rng=0)
            (penalty,) = called(module, compiled)(torch.randn(5, 2)).penalties.values()
            penalty.backward()
            torch.testing.assert_close(penalty.detach(), torch.tensor(value))
            torch.testing.assert_close(layer.weight.grad, torch.tensor([gradient]))


def test_gradient_penalties_reach_each_parameter() -> None:
    """Their gradients by the parameters are those of a penalty that is written by hand."""
    torch.manual_seed(0)
    critic, x = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(36, 1)), torch.randn(6, 1, 8, 8)
    weights = list(critic.parameters())
    with defined_by("howto/gradient_penalty.md") as page:
        page["critic"] = critic
        length = page["slopes"](x).norm(dim=1)
        r1 = {"weight": 5.0, "pattern": "**#output"}
        module = graphreg.regularize(critic, page["GradientPenalty"]("**#output", 10.0), contractive=r1)
        found = dict(module(x).penalties)
    for name, by_hand in (("gradient_penalty", 10 * (length - 1).square().mean()), ("contractive", 5 * length.square().mean())):
        ours, theirs = (torch.autograd.grad(y, weights, retain_graph=True, materialize_grads=True) for y in (found[name], by_hand))
        torch.testing.assert_close(ours, theirs)


def test_r_drop_by_hand() -> None:
    torch.manual_seed(0)
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), hidden_dropout=0.3, weight_l2=0.1, rng=0)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    with defined_by("howto/r_drop.md") as page, graphreg.frozen_noise(module):
        page["module"] = module
        loss = page["r_drop"](x, y, alpha=2.0)
        output, penalties = module(torch.cat([x, x]))
        with graphreg.noise_off(module):
            nothing = page["r_drop"](x, y, alpha=2.0)
            plain = F.cross_entropy(module(x).output, y) + module(x).penalties["weight_l2"]
    p, q = output[:16].softmax(1), output[16:].softmax(1)
    divergence = ((p - q) * (p.log() - q.log())).sum(1).mean() / 2  # KL(p, q) + KL(q, p) is Σ (p - q) log(p / q)
    assert divergence > 0
    cross = (F.cross_entropy(output[:16], y) + F.cross_entropy(output[16:], y)) / 2
    torch.testing.assert_close(loss, cross + 2 * divergence + penalties["weight_l2"])
    torch.testing.assert_close(nothing, plain)


def test_balance_by_hand() -> None:
    """Two tokens with the probabilities ¾ and ¼: one expert gets both, 2 · (1 · ¾); of two experts a token each gets both, 2 · (¾ + ¼)."""
    z = torch.tensor([[[3.0, 1.0], [3.0, 1.0]]], dtype=torch.float64).log().requires_grad_()
    with defined_by("howto/moe_balance.md") as page:
        one, two = (page["MoEBalance"]("*", 1.0, k=k)(z=z) for k in (1, 2))
        check_regularizer(page["MoEBalance"], backend="eager")
    torch.testing.assert_close((one.detach(), two.detach()), (torch.tensor(1.5).double(), torch.tensor(2.0).double()))
    (gradient,) = torch.autograd.grad(one, z)
    torch.testing.assert_close(gradient, torch.tensor([[[1.0, -1.0]] * 2]).double() * 0.75 * 0.25)  # 2 · ½ · p (1 - p) each


@WAYS
def test_max_logit_by_hand(compiled: bool) -> None:
    first, second = torch.zeros(2, 3, 4, 5), torch.full((2, 3, 4, 5), -9.0)
    first[1, 0, 2, 3], first[0, 2, 0, 0], second[0, 1, 3, 4] = 7.0, 5.0, 2.0
    with defined_by("howto/max_logit.md") as page:
        layer = nn.Linear(5, 5, bias=False)
        nn.init.eye_(layer.weight)
        model = nn.Sequential(layer)
        module = graphreg.regularize(model, page["MaxLogit"]("0", 1.0), example_inputs=first)

        def largest() -> list[float]:
            numbers: Tensor = graphreg.rng_state(module)["state"]["max_logit"]["0"]["largest"]
            return numbers.tolist()

        assert largest() == [-torch.inf] * 3
        call = called(module, compiled)
        assert all(call(z).penalties["max_logit"].item() == 0 for z in (first, second))
        assert largest() == [7, 2, 5]
        call.eval()(first + 1)
        assert largest() == [7, 2, 5]
        graphreg.reset_state(module, "max_logit")
        assert largest() == [-torch.inf] * 3 and module.state_dict().keys() >= model.state_dict().keys()


def test_dropouts_that_act() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.attention = nn.Dropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.drop(x), 0.1, self.training)
            attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return attended + F.dropout(x, 0.3, training=False)

    net, x = Net(), torch.randn(2, 3, 4)
    with defined_by("howto/dropout_off.md") as page:
        assert page["acting"](net, x) == "3 of 4"
        page["disable_dropout_in_model"](net)
        assert page["acting"](net, x) == "2 of 4"
        graphreg.regularize_(net, own_dropout="off", example_inputs=x)
    assert torch.equal(net(x), net(x)) and torch.equal(net(x), net.eval()(x))


def test_fisher_information_is_that_of_gradients_by_sample() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.randint(2, (5,))

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))({k: v.detach() for k, v in net.named_parameters()}, x, y)
    with defined_by("examples/ewc.md") as page:
        module = graphreg.regularize(net, page["EWC"]("*", 1.0))
        page["consolidate"](module, list(zip(x, y, strict=True)))
        found = graphreg.rng_state(module)["state"]["ewc"]
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name]["fisher"], gradient.square().mean(0))
