"""Attached penalties leave the relations of a model's outputs: the gradients of one by another, their hooks, what they retain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError
from lacking import needs_result

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Net(nn.Module):
    """Two hidden values, of which the second is computed from the first, and an output; ``made`` says what a call returns of them."""

    def __init__(self, made: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.made = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2), made

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        k = self.b(h).tanh()
        return self.made(self.c(k), k, h)


FORMS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Tensor, Tensor, Tensor]]]] = {
    "tuple": (lambda y, k, h: (y, k, h), lambda out: out),
    "other order": (lambda y, k, h: (h, y, k), lambda out: (out[1], out[2], out[0])),
    "twice": (lambda y, k, h: (h, y, k, h), lambda out: (out[1], out[2], out[3])),
    "dict": (lambda y, k, h: {"y": y, "hidden": [k, h]}, lambda out: (out["y"], *out["hidden"])),
    "a view": (lambda y, k, h: (y.view(-1), k, h), lambda out: out),
    "dataclass": (lambda y, k, h: (Answer(y, k), h), lambda out: (out[0].logits, out[0].features, out[1])),
}


def made(form: str, in_place: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net(FORMS[form][0])
    arguments = {"hidden_l1": 0.3, "weight_l2": 0.2, "scale": 1, "rng": 0} | options
    if in_place:
        graphreg.regularize_(model, **arguments)
        return model, model
    return model, graphreg.regularize(model, penalties="attach", **arguments)


def plain(form: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(FORMS[form][0])


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]


def expected(form: str, loss: Callable[[Any], Tensor]) -> list[Tensor]:
    """The gradients of the loss and the penalties, from the module that returns its penalties."""
    torch.manual_seed(0)
    model = Net(FORMS[form][0])
    output, penalties = graphreg.regularize(model, hidden_l1=0.3, weight_l2=0.2, rng=0)(X)
    (loss(FORMS[form][1](output)) + sum(penalties.values())).backward()
    return gradients(model)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_output_has_the_models_gradients_by_another(form: str, in_place: bool) -> None:
    model, module = made(form, in_place)
    y, k, h = FORMS[form][1](module(X))
    y_, k_, h_ = FORMS[form][1](plain(form)(X))
    for of, by, of_, by_ in ((y, h, y_, h_), (y, k, y_, k_), (k, h, k_, h_)):
        (found,) = torch.autograd.grad(of.exp().sum(), by, retain_graph=True)
        assert torch.equal(found, torch.autograd.grad(of_.exp().sum(), by_, retain_graph=True)[0])
    both = torch.autograd.grad(y.sum() + h.pow(2).sum(), (h, k), retain_graph=True)
    both_ = torch.autograd.grad(y_.sum() + h_.pow(2).sum(), (h_, k_), retain_graph=True)
    assert all(map(torch.allclose, both, both_))
    with pytest.raises(RuntimeError, match="have been used in the graph"):
        torch.autograd.grad(h.sum(), k, retain_graph=True)
    y.exp().sum().backward()  # after all of that, the penalties are there once
    assert all(map(torch.allclose, gradients(model), expected(form, lambda out: out[0].exp().sum())))


@pytest.mark.parametrize("form", ["tuple", "other order"])
def test_retained_gradients_and_hooks_are_the_models(form: str) -> None:
    model, module = made(form)
    loss: Callable[[Any], Tensor] = lambda out: out[0].exp().sum() + out[2].pow(2).sum()  # noqa: E731
    seen: dict[str, list[Tensor]] = {"": [], "plain": []}
    values = {"": FORMS[form][1](module(X)), "plain": FORMS[form][1](plain(form)(X))}
    for name, (_, k, h) in values.items():
        h.retain_grad()
        k.register_hook(seen[name].append)
        del k
    for out in values.values():
        loss(out).backward()
    assert torch.allclose(values[""][2].grad, values["plain"][2].grad)  # type: ignore[arg-type]
    assert len(seen[""]) == len(seen["plain"]) == 1 and torch.equal(seen[""][0], seen["plain"][0])
    assert all(map(torch.allclose, gradients(model), expected(form, loss)))


def test_what_a_hook_changes_arrives_upstream_as_with_the_model() -> None:
    found = []
    for model, module in (made("tuple", weight_l2=0.0, hidden_l1=0.0), (plain("tuple"), None)):
        y, k, h = (module or model)(X)
        k.register_hook(lambda grad: 2 * grad)
        h.register_hook(lambda grad: 3 * grad)
        (y.sum() + k.pow(2).sum()).backward()
        found.append(gradients(model))
    assert all(map(torch.allclose, *found))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("form", ["tuple", "twice"])
def test_the_penalties_are_there_once_from_wherever_the_pass_starts(form: str, backend: str | None) -> None:
    model, module = made(form)
    call = torch.compile(module, backend=backend, fullgraph=True) if backend else module
    for chosen in ([0], [1], [2], [0, 1, 2]):
        loss: Callable[[Any], Tensor] = lambda out, chosen=chosen: sum(out[i].exp().sum() for i in chosen)  # type: ignore[misc]  # noqa: E731
        model.zero_grad()
        loss(FORMS[form][1](call(X))).backward()
        assert all(map(torch.allclose, gradients(model), expected(form, loss)))


def test_gradients_by_parameters_and_inputs_have_the_penalties_once() -> None:
    model, module = made("tuple")
    y, k, h = module(X)
    found = torch.autograd.grad(y.exp().sum() + h.sum(), list(model.parameters()), retain_graph=True)
    assert all(map(torch.allclose, found, expected("tuple", lambda out: out[0].exp().sum() + out[2].sum())))
    with pytest.raises(GraphRegError, match="create_graph"):
        torch.autograd.grad(y.sum(), h, create_graph=True)


class Autoencoder(nn.Module):
    """Returns what it computed from parts of one value, and these parts, which share storage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, spread = self.a(x).tanh().chunk(2, dim=1)
        return self.b(mean + spread.exp()), mean, spread


def test_outputs_that_share_storage_have_their_relations() -> None:
    found = []
    for attached in (True, False):
        torch.manual_seed(0)
        model = Autoencoder()
        y, mean, spread = (graphreg.regularize(model, weight_l2=0.0, penalties="attach", scale=1) if attached else model)(X)
        by = torch.autograd.grad(y.pow(2).sum(), (mean, spread), retain_graph=True)
        mean.retain_grad()
        spread.register_hook(lambda grad: 2 * grad)
        (y.pow(2).sum() + mean.sum()).backward()
        found.append([*by, mean.grad, *gradients(model)])
    assert all(map(torch.allclose, *found))


@needs_result
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks, behind a break
def test_outputs_of_a_backends_graph_have_their_relations() -> None:
    torch.manual_seed(0)
    model = Net(FORMS["tuple"][0])
    backend = graphreg.backend(inner="eager", hidden_l1=0.3, weight_l2=0.2, rng=0, penalties="attach", scale=1)
    y, k, h = torch.compile(model, backend=backend)(X)
    y_, _, h_ = plain("tuple")(X)
    assert torch.allclose(torch.autograd.grad(y.exp().sum(), h, retain_graph=True)[0], torch.autograd.grad(y_.exp().sum(), h_)[0])
    (y.exp().sum() + k.sum()).backward()
    assert all(map(torch.allclose, gradients(model), expected("tuple", lambda out: out[0].exp().sum() + out[1].sum())))


@pytest.mark.parametrize("heads", [lambda h, b: (b(h.detach()), h), lambda h, b: (b(h), h.tanh())], ids=["detached", "two heads"])
def test_a_hook_of_an_output_that_a_pass_does_not_reach_does_not_run(heads: Callable[..., Any]) -> None:
    """It ran, with None for a gradient."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return heads(self.a(x), self.b)

    module, seen = graphreg.regularize(Heads(), weight_l2=0.1, penalties="attach", scale=1), list[Tensor]()
    y, other = module(X)
    other.register_hook(seen.append)
    y.sum().backward()
    assert seen == []
