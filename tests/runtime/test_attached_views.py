"""penalties="attach" where outputs share storage: each penalty's gradient is there once, from whichever outputs a backward pass runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphreg
from graphreg.errors import RegularizerError
from graphreg.runtime import attach
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.torch_internals.dynamo import traces_objects
from lacking import NO_OBJECTS

Make = Callable[[Tensor, Tensor, Tensor], Any]  # of the value of a layer, its weight, and the input


class Net(nn.Module):
    """Whatever a function makes of its first layer; no output reads ``other``, which a penalty alone trains."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.layer, self.other, self.make = nn.Linear(4, 4), nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x), self.layer.weight, x)


class Kept(nn.Module):
    """An opaque module, because it branches on a value."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, h: Tensor) -> Any:
        return self.make(h if h.abs().sum() > -1 else -h)


@dataclass
class Both:
    flat: Tensor
    rest: Any


class Strange:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def in_place(h: Tensor, weight: Tensor, x: Tensor) -> Any:
    """One tensor by two names."""
    h = h * 2
    k = h.add_(1.0)
    return h, k


def written(h: Tensor, weight: Tensor, x: Tensor) -> Any:
    h = h * 2
    view = h.view(12)
    view.mul_(3.0)
    return h, view


CASES: dict[str, Make] = {
    "a value and a view": lambda h, weight, x: (h.view(12), h),
    "two views": lambda h, weight, x: (h.view(12), h[0], h.t()),
    "a view": lambda h, weight, x: h.view(12),
    "detached": lambda h, weight, x: (h, h.detach(), h.argmax(1)),
    "an input": lambda h, weight, x: (h, x, x.view(12)),
    "a parameter": lambda h, weight, x: (h, weight, weight.view(16)),
    "one value twice": lambda h, weight, x: (h, h),
    "in place": in_place,
    "written through a view": written,
    "nested": lambda h, weight, x: {"a": Both(h.view(12), [h]), "b": OrderedDict(c=h.t())},
    "an ordered dict": lambda h, weight, x: OrderedDict(b=h.t(), a=h.view(12)),
    "a tuple from one node": lambda h, weight, x: h.chunk(2, 1),
}


def regularized(make: Make, penalties: Any) -> RewrittenModule:
    torch.manual_seed(0)
    options = {"scale": 2.0} if penalties == "attach" else {}
    return graphreg.regularize(Net(make), weight_l2=1.0, input_noise=0.0, penalties=penalties, rng=1, **options)


def gradients(module: RewrittenModule, chosen: list[int] | None) -> tuple[list[Tensor], list[Tensor], int]:
    """Of a loss on the chosen outputs among those that need a gradient (None: all), the outputs, and how many there are."""
    x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    given = module(x)
    output, extra = given, torch.zeros(())
    if isinstance(given, graphreg.Regularized):
        output, extra = given.output, 2 * torch.stack(list(given.penalties.values())).sum()
    leaves = [leaf for leaf in pytree.tree_leaves(flat(output)) if isinstance(leaf, Tensor)]
    live = [leaf for leaf in leaves if leaf.requires_grad]
    loss = sum(((i + 1) * live[i].sin().sum() for i in (range(len(live)) if chosen is None else chosen)), extra)
    found = torch.autograd.grad(loss, [*module.parameters(), x], allow_unused=True, materialize_grads=True)
    return list(found), [leaf.detach() for leaf in leaves], len(live)


def flat(value: Any) -> Any:
    """Dataclasses, which pytree does not know, as dicts."""
    if isinstance(value, Both):
        return {"flat": value.flat, "rest": flat(value.rest)}
    return {k: flat(v) for k, v in value.items()} if isinstance(value, dict) else value


def sharing(values: list[Tensor]) -> list[list[bool]]:
    return [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in values] for a in values]


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, None) for case in CASES), *((case, "aot_eager") for case in CASES if case != "an ordered dict")],  # which "nested" has
)
def test_the_penalty_is_there_once_from_each_output_and_from_all(case: str, backend: str | None) -> None:
    torch._dynamo.reset()
    if backend and case == "nested" and not traces_objects():
        pytest.skip(NO_OBJECTS)
    returned, attached = (regularized(CASES[case], penalties) for penalties in ("return", "attach"))
    if backend:
        attached.compile(backend=backend, fullgraph=True)
    count = gradients(returned, None)[2]
    for chosen in [None, *([i] for i in range(count) if count > 1)]:
        expected, outputs, _ = gradients(returned, chosen)
        ours, values, live = gradients(attached, chosen)
        assert live == count
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(values, outputs, check_stride=False)
        assert expected[2].abs().sum() > 0.1  # of ``other``
        if "input" not in case and "parameter" not in case:  # an input comes back as a view of it, compiled as another tensor
            assert sharing(values) == sharing(outputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.10, where it goes on after a break
def test_where_torch_does_not_compile_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch 2.12: with fullgraph=True an error says so, without it the call runs in eager."""
    monkeypatch.setattr(attach, "traces_objects", lambda: False)
    returned, attached = (regularized(CASES["nested"], penalties) for penalties in ("return", "attach"))
    attached.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"the model returns a Both\. penalties='attach' .* from torch 2\.12 on\. Leave fullgraph=True out"):
        attached(torch.ones(3, 4))
    attached.compile(backend="eager")
    torch.testing.assert_close(gradients(attached, None)[0], gradients(returned, None)[0])


def in_place_and_views(h: Tensor, weight: Tensor, x: Tensor) -> Any:
    h, k = in_place(h, weight, x)
    return h, k, h.view(12)


def test_so_under_inductor() -> None:
    torch._dynamo.reset()
    returned, attached = (regularized(in_place_and_views, penalties) for penalties in ("return", "attach"))
    attached.compile(fullgraph=True)
    for chosen in ([0], [2], None):
        torch.testing.assert_close(gradients(attached, chosen)[0], gradients(returned, chosen)[0])


def test_a_write_into_a_compiled_output_is_not_seen_by_backward() -> None:
    """An alias of what is saved for backward has a version counter of its own: the gradient was wrong, without a word."""
    torch._dynamo.reset()
    x = torch.linspace(-1, 1, 12).view(3, 4)
    attached, reference = (regularized(lambda h, weight, x: torch.sigmoid(h), "attach") for _ in range(2))
    attached.compile(backend="aot_eager", fullgraph=True)
    output = attached(x)
    loss = output.sum()
    with torch.no_grad():
        output.mul_(2.0)
    loss.backward()
    reference(x).sum().backward()
    torch.testing.assert_close([p.grad for p in attached.parameters()], [p.grad for p in reference.parameters()])


@pytest.mark.parametrize("make", [lambda h: (h, 1), lambda h: {"h": [h]}, lambda h: Both(h, None), lambda h: h.max(1)])
def test_what_an_opaque_module_returns_is_looked_into(make: Callable[[Tensor], Any]) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = nn.Linear(4, 4), Kept(make)

        def forward(self, x: Tensor) -> Any:
            return self.kept(self.layer(x))

    model = Whole()
    module = graphreg.regularize(model, weight_l2=1.0, penalties="attach", scale=1)
    x = torch.ones(3, 4)
    output = module(x)
    assert type(output) is type(model(x))
    first = next(leaf for leaf in pytree.tree_leaves(flat(output)) if isinstance(leaf, Tensor))
    (first * 0).sum().backward()
    torch.testing.assert_close(model.layer.weight.grad, 2 * model.layer.weight.detach() / 16)


def test_a_recurrent_layers_output_carries_the_penalty() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 2)

        def forward(self, x: Tensor) -> Any:
            return self.lstm(x)

    module = graphreg.regularize(Recurrent(), weight_l2=1.0, penalties="attach", scale=1)
    _, (hidden, _) = module(torch.ones(4, 2, 3))
    (hidden * 0).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters() if p.dim() > 1)


def test_an_output_in_which_no_tensor_is_found_is_refused() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = nn.Linear(4, 4), Kept(Strange)

        def forward(self, x: Tensor) -> Any:
            return self.kept(self.layer(x))

    module = graphreg.regularize(Opaque(), weight_l2=1.0, penalties="attach", scale=1)
    with pytest.raises(RegularizerError, match="returns a Strange, and no tensor is found in it"):
        module(torch.ones(3, 4))
    with torch.no_grad():
        assert isinstance(module(torch.ones(3, 4)), Strange)


def test_outputs_that_need_no_gradient_stay_as_they_are() -> None:
    module = regularized(lambda h, weight, x: (h.argmax(1), x), "attach")
    x = torch.ones(3, 4)
    classes, given = module(x)
    assert given is x and not classes.requires_grad
