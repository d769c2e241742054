"""penalties="attach" and a caller that writes into what the model returned: as with the model itself, gradients and all."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.runtime.rewritten_module import RewrittenModule
from lacking import needs_result

Make = Callable[[Tensor, Tensor, Tensor], Any]  # of the value of a layer, its weight, and the input
X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    """Whatever a function makes of its first layer; no output reads ``other``, which a penalty alone trains."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.layer, self.other, self.make = nn.Linear(4, 4), nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.layer(x), self.layer.weight, x)


class Reversed(torch.autograd.Function):
    """A view whose derivative is no view's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -3 * grad


@torch.fx.wrap
def reverse(x: Tensor) -> Tensor:
    return Reversed.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def divide(outputs: list[Tensor], i: int = 0) -> None:
    outputs[i] /= 2


def set_a_row(outputs: list[Tensor], i: int = 0) -> None:
    outputs[i][0] = 0


def several(outputs: list[Tensor]) -> None:
    outputs[0].mul_(3)
    outputs[-1].add_(1).sin_()


def through_a_view(outputs: list[Tensor]) -> None:
    outputs[0].view(-1)[1:3].fill_(2.0)


def by_data_of_another(outputs: list[Tensor]) -> None:
    outputs[0].copy_(outputs[-1].flatten()[: outputs[0].numel()].view(outputs[0].shape) * 2)


def without_recording(outputs: list[Tensor]) -> None:
    with torch.no_grad():
        outputs[0].mul_(2)


MAKES: dict[str, Make] = {
    "one": lambda h, weight, x: h,
    "a value twice": lambda h, weight, x: (h, h),
    "two": lambda h, weight, x: (h.sin(), h.cos()),
    "saved for backward": lambda h, weight, x: (h.sin(), h.exp()),
    "a view": lambda h, weight, x: h.view(12),
    "a value and a view": lambda h, weight, x: (h, h.view(12)),
    "a view and its value": lambda h, weight, x: (h.view(12), h),
    "views": lambda h, weight, x: (h.t(), h[0], h.view(2, 6)),
    "detached": lambda h, weight, x: (h, h.detach()),
    "an input without gradient": lambda h, weight, x: (h, x),
    "gaps": lambda h, weight, x: (h.repeat(1, 2)[:, ::2], h[0]),
}
WRITES: list[Callable[[list[Tensor]], None]] = [
    divide, set_a_row, several, through_a_view, by_data_of_another, without_recording,
    lambda outputs: divide(outputs, -1), lambda outputs: set_a_row(outputs, -1),
]  # fmt: skip


def regularized(make: Make, penalties: Any) -> RewrittenModule:
    torch.manual_seed(0)
    options = {"scale": 2.0} if penalties == "attach" else {}
    return graphreg.regularize(Net(make), weight_l2=1.0, penalties=penalties, rng=1, **options)


def after(module: nn.Module, write: Callable[[list[Tensor]], None], x: Tensor, call: Any = None) -> Any:
    """Gradients and outputs of a loss on all outputs, written into before; or the kind of the error."""
    given = (module if call is None else call)(x)
    output, extra = given, torch.zeros(())
    if isinstance(given, graphreg.Regularized):
        output, extra = given.output, 2 * given.penalties["weight_l2"]
    outputs = list(output) if isinstance(output, tuple) else [output]
    try:
        write(outputs)
        loss = sum(((i + 1) * each.cos().sum() for i, each in enumerate(outputs)), extra)
        found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
    except RuntimeError as error:  # the model's own: what is written into is saved for backward
        return type(error)
    return [*found, *(each.detach() for each in outputs)]


@pytest.mark.parametrize("case", MAKES)
def test_writes_are_those_into_the_models_own_outputs(case: str) -> None:
    compared, returned, attached = 0, regularized(MAKES[case], "return"), regularized(MAKES[case], "attach")
    for write in WRITES:
        x, theirs = X.clone(), X.clone()
        expected = after(returned, write, theirs)
        found = after(attached, write, x)
        if expected is RuntimeError:
            assert found is RuntimeError
        else:
            torch.testing.assert_close(found, expected)
            compared += 1
        assert torch.equal(x, theirs)
    assert compared >= len(WRITES) / 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["one", "two", "a value and a view", "views"])
def test_writes_into_compiled_outputs(case: str, backend: str) -> None:
    torch._dynamo.reset()
    module = regularized(MAKES[case], "attach")
    call = torch.compile(module, backend=backend, fullgraph=True)
    returned = regularized(MAKES[case], "return")
    for write in (divide, set_a_row, several):
        torch.testing.assert_close(after(module, write, X, call), after(returned, write, X))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_custom_functions_view_keeps_its_own_derivative(backend: str | None) -> None:
    """It shares storage with another output, and is a view of it for autograd; made anew as one it would lose what it reverses."""
    torch._dynamo.reset()

    def make(h: Tensor, weight: Tensor, x: Tensor) -> Any:
        return h, reverse(h), reverse(h).view(12)

    module = regularized(make, "attach")
    call = torch.compile(module, backend=backend) if backend else None
    torch.testing.assert_close(after(module, lambda outputs: None, X, call), after(regularized(make, "return"), lambda outputs: None, X))


def test_a_write_into_an_argument_or_a_parameter_that_is_returned_is_refused() -> None:
    """A write into what is returned would not reach the history of the caller's own tensor: torch refuses the view."""
    for make in (lambda h, weight, x: (x, h), lambda h, weight, x: (x.view(12), h), lambda h, weight, x: (weight, h)):
        module = regularized(make, "attach")
        x = X.clone().requires_grad_() * 2
        before = module.layer.weight.detach().clone()  # type: ignore[union-attr,operator]
        output, hidden = module(x)
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            output.mul_(3)
        assert torch.equal(x, X * 2) and torch.equal(module.layer.weight, before)  # type: ignore[arg-type,union-attr]
        hidden.mul_(3)
        torch.autograd.grad(hidden.sum(), list(module.parameters()), allow_unused=True)


def test_arguments_are_those_of_the_threads_own_call() -> None:
    """Also of a call that another call runs within."""
    module = regularized(lambda h, weight, x: (x, h), "attach")
    inner = copy.deepcopy(module)
    x = X.clone().requires_grad_() * 2

    def run(errors: list[type]) -> None:
        for _ in range(20):
            output, hidden = module(x)
            hidden.mul_(2)
            try:
                output.mul_(2)
            except RuntimeError as error:
                errors.append(type(error))

    found: list[list[type]] = [[], []]
    threads = [threading.Thread(target=run, args=(each,)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in found] == [20, 20]
    handle = module.get_submodule("layer").register_forward_hook(lambda *args: inner(X) and None)
    try:
        with pytest.raises(RuntimeError, match="is a view"):
            module(x)[0].mul_(2)
    finally:
        handle.remove()


def test_forward_alone_does_not_know_its_arguments() -> None:
    """Then a write is refused, whatever is returned: it was not called by the module's __call__, which looks at them."""
    module = regularized(lambda h, weight, x: h, "attach")
    with pytest.raises(RuntimeError, match="is a view"):
        module.forward(X).mul_(2)


def broken(h: Tensor, weight: Tensor, x: Tensor) -> Any:
    """Behind a break the model writes into what it made before, by another name."""
    h = h.sin()
    flat = h.view(12)
    torch._dynamo.graph_break()
    flat.mul_(3)
    return h, flat


@needs_result
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks, behind a break
@pytest.mark.parametrize("case", ["one", "two", "a value and a view", "views", "broken"])
def test_writes_into_the_outputs_of_a_backend(case: str, inner: str) -> None:
    make = broken if case == "broken" else MAKES[case]
    torch.manual_seed(0)
    model = Net(make)
    call = torch.compile(model, backend=graphreg.backend(inner=inner, weight_l2=1.0, penalties="attach", scale=2.0, rng=1))

    def plain(x: Tensor) -> Any:
        penalty = (model.layer.weight.square().mean() + model.other.weight.square().mean()) / 2
        return graphreg.Regularized(model(x), {"weight_l2": penalty})

    for write in (divide, set_a_row, several):
        x, theirs = X.clone(), X.clone()
        torch.testing.assert_close(after(model, write, x, call), after(model, write, theirs, plain))
        assert torch.equal(x, theirs)
