"""What torch shows to no mode of functions (``Tensor.set_``, ``swap_tensors``, ``t.real = ...``, ``as_subclass``), in a forward that is
traced: refused where a graph would have to do it at each call, and of no consequence elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import TraceError

X = torch.linspace(-1, 1, 12).view(3, 4)


class Net(nn.Module):
    def __init__(self, make: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 4), make
        self.register_buffer("state", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self, self.layer(x))


def zeros(dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(3, 4, dtype=dtype)


def set_before_a_write(net: Net, h: Tensor) -> Tensor:
    a, b = zeros(), zeros()
    a.set_(b)  # type: ignore[call-overload]
    b[:, 0] = h[:, 0]
    return a * 2


def set_behind_a_write(net: Net, h: Tensor) -> Tensor:
    a, b = zeros(), zeros()
    b[:, 0] = h[:, 0]
    a.set_(b)  # type: ignore[call-overload]
    return a * 2


def set_and_returned(net: Net, h: Tensor) -> Tensor:
    a, b = zeros(), zeros()
    a.set_(b)  # type: ignore[call-overload]
    b[:, 0] = h[:, 0]
    return a


def set_when_it_was_read(net: Net, h: Tensor) -> Tensor:
    a = zeros()
    h = h + a
    a.set_(torch.ones(3, 4))  # type: ignore[call-overload]
    return h + a


def set_to_a_part_of_itself(net: Net, h: Tensor) -> Tensor:
    a = zeros()
    a.set_(a[1:])  # type: ignore[call-overload]
    a[:, 0] = h[1:, 0]
    return a * 2


def swapped(net: Net, h: Tensor) -> Tensor:
    a, b = zeros(), torch.ones(3, 4)
    torch.utils.swap_tensors(a, b)
    b[:, 0] = h[:, 0]
    return a * 2 + b


def real_part(net: Net, h: Tensor) -> Tensor:
    c = zeros(torch.complex64)
    c.real = torch.ones(3, 4)
    c[:, 0] += h[:, 0]
    return torch.view_as_real(c)


def imaginary_part_when_it_was_read(net: Net, h: Tensor) -> Tensor:
    c = zeros(torch.complex64)
    h = torch.view_as_real(c + h)
    c.imag = torch.ones(3, 4)
    return torch.view_as_real(c) + h


def as_a_subclass(net: Net, h: Tensor) -> Tensor:
    b = zeros()
    c = b.as_subclass(torch.Tensor)
    b[:, 0] = h[:, 0]
    return c * 2


def written_as_a_subclass(net: Net, h: Tensor) -> Tensor:
    b = zeros()
    c = b.as_subclass(torch.Tensor)
    c[:, 1] = 1
    b[:, 0] = h[:, 0]
    return b * 2


def copied(net: Net, h: Tensor) -> Tensor:
    b = zeros()
    c = copy.copy(b)
    b[:, 0] = h[:, 0]
    return c * 2


def a_buffer_set(net: Net, h: Tensor) -> Tensor:
    b = zeros()
    net.state.set_(b)  # type: ignore[operator]
    b[:, 0] = h[:, 0].detach()
    return net.state * 2 + h  # type: ignore[no-any-return,operator]


REFUSED = [
    set_before_a_write, set_behind_a_write, set_and_returned, set_when_it_was_read, set_to_a_part_of_itself, swapped, real_part,
    imaginary_part_when_it_was_read, as_a_subclass, written_as_a_subclass, copied,
]  # fmt: skip


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_refused(make: Callable[[Net, Tensor], Tensor]) -> None:
    model = Net(make)
    model(X)  # it is a model that runs
    with pytest.raises(TraceError, match=r"^the forward (gives a tensor|makes a Tensor).* in a way that a trace cannot see.*: "):
        graphreg.trace(model)


def set_and_never_written(net: Net, h: Tensor) -> Tensor:
    a = zeros()
    a.set_(torch.ones(3, 4))  # type: ignore[call-overload]
    return h + a


def a_subclass_never_written(net: Net, h: Tensor) -> Tensor:
    return h + torch.arange(4.0).as_subclass(torch.Tensor)


def seen(net: Net, h: Tensor) -> Tensor:
    """Shapes change by what a mode sees."""
    a = zeros()
    a.unsqueeze_(0).resize_(3, 4)
    a.t_()
    a[0] = h[:, 0]
    return a * 2


@pytest.mark.parametrize("make", [set_and_never_written, a_subclass_never_written, seen, a_buffer_set], ids=lambda make: make.__name__)
def test_followed(make: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(make)
    twin = copy.deepcopy(model)
    module = graphreg.regularize(model, weight_l2=0.5)
    for _ in range(2):
        ours, theirs = module(X).output, twin(X)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        found = torch.autograd.grad(ours.square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, torch.autograd.grad(theirs.square().sum(), list(twin.parameters())))
