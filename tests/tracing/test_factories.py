"""Tensors that a forward makes and writes into: made again at each call, in eager and compiled, with the model's own gradients."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphreg
from graphreg.errors import TraceError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(4, 4)


class Accumulated(Base):
    def forward(self, x: Tensor) -> Tensor:
        loss = torch.zeros(())
        loss += self.l(x).square().sum()
        return loss


class Column(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4, 4)
        t[:, 0] = self.l(x)[:, 0]
        return t * 2


class Multiplied(Base):
    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(4, 4)
        ones.mul_(self.l(x))
        return ones


class Viewed(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(5.0)
        v = t[1:]
        v *= self.l(x)[0]
        return t.sum() + v, t


class Out(Base):
    def forward(self, x: Tensor) -> Any:
        t = torch.empty(4, 4)
        torch.add(x.detach(), 1, out=t)
        return self.l(t)


class Indexed(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(6, 4)
        t.index_add_(0, torch.tensor([0, 2, 4, 1]), self.l(x))
        return t


class Scattered(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.full((4, 4), 2.0)
        t.scatter_(1, torch.zeros(4, 1, dtype=torch.long), self.l(x)[:, :1])
        t.masked_fill_(x > 0, -1.0)
        return t.softmax(-1)


class Copied(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(2, 4, 4)
        t[0].copy_(self.l(x))
        a, b = t.unbind(0)
        return a + b * 2 + t.shape[0]


class WrittenAfter(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.zeros(4)
        y = x + t
        t.add_(1)
        return y, self.l(x) * t


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = Column()
        self.o = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.b(x))


class Rows(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(4, 4)
        for i in range(out.shape[0]):
            out[i] = self.l(x[i])
        total = torch.tensor([1.0, 2.0, 3.0, 4.0])
        for row in out:
            total = total + row
        return total


class Sized(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(x.shape[0], 4)
        t[:, 0] = self.l(x)[:, 0]
        t += 1
        return t


class Mask(Base):  # looked at by Python, then written once more
    def forward(self, x: Tensor) -> Tensor:
        m = torch.triu(torch.ones(4, 4), 1)
        n = int(m.sum())
        m[m == 1] = float("-inf")
        a = (self.l(x) + m).softmax(-1)
        m.zero_()
        return a * n + m


class Moved(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4, 4).to(x.device)
        t[:, 1] = self.l(x)[:, 1]
        return t


class Listed(Base):
    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.zeros(4) for _ in range(2)]
        parts[1] += self.l(x)[1]
        return torch.stack(parts) + torch.cat(parts).sum()


class Detached(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4, 4)
        t.detach()[0] = self.l(x)[0].detach()
        t.data[1] = self.l(x)[1].detach()
        return t + self.l(x)


class FromList(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.as_tensor([1.0, 2.0, 3.0, 4.0])
        t += self.l(x)[0]
        u = torch.linspace(0, 1, 4)
        u -= t
        return t.unsqueeze(0).mT.sum() + u


class FromBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4)
        t += self.n
        self.n.add_(1)
        t *= self.l(x)[0]
        return t


class Shut(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        t.add_(1)
        return x * 2


class KeptWriter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.k = Shut()

    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4)
        return self.k(self.l(x), t) + t  # type: ignore[no-any-return]


class UnderNoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.zeros(4, 4)
            t[0] = 1
        t[:, 0] = self.l(x)[:, 0]
        return t


class OfState(Base):  # a tensor of the model's that is no buffer, written by its forward
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.zeros(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.plain * 2
        self.plain[0] += 1
        return self.l(x) * self.plain[0] + a[0]


CASES = [
    Accumulated, Column, Multiplied, Viewed, Out, Indexed, Scattered, Copied, WrittenAfter, Inside, Rows, Sized, Mask, Moved, Listed,
    Detached, FromList, FromBuffer, KeptWriter, UnderNoGrad, OfState,
]  # fmt: skip
NOT_EXPORTED = (Mask, KeptWriter, UnderNoGrad, OfState)  # refused by torch.export, or by us of it


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def answers(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What three calls give, and the gradients of the last."""
    x = x.clone().requires_grad_()
    for _ in range(3):
        value = module(x)
        value = value.output if isinstance(value, graphreg.Regularized) else value
        yield from tensors(value)
    loss = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in tensors(value))
    assert isinstance(loss, Tensor)
    parameters = list(module.parameters())
    yield from torch.autograd.grad(loss, [x, *parameters], allow_unused=True, materialize_grads=True)


def assert_same(module: nn.Module, model: nn.Module, x: Tensor) -> None:
    for mode in (True, False):
        twin, ours = copy.deepcopy(model).train(mode), copy.deepcopy(module).train(mode)
        for given, wanted in zip(answers(ours, x), answers(twin, x), strict=True):
            torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("kind", CASES)
def test_each_call_is_the_models(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(4, 4)
    module = graphreg.regularize(model, weight_l2=0.1)
    assert_same(module, model, x)
    assert_same(graphreg.strip(pickle.loads(pickle.dumps(module))), model, x)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in NOT_EXPORTED])
def test_by_torch_export_too(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(4, 4)
    assert_same(graphreg.regularize(model, weight_l2=0.1, example_inputs=x, front_end="export"), model, x)


@pytest.mark.parametrize("kind", [Accumulated, Column, Viewed, Scattered, WrittenAfter, Inside, OfState])
def test_compiled(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(4, 4)
    module = graphreg.regularize(model, weight_l2=0.1)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for given, wanted in zip(answers(compiled, x), answers(twin, x), strict=True):
        torch.testing.assert_close(given, wanted)


def test_a_factory_follows_the_default_dtype() -> None:
    model = Column()
    module = graphreg.regularize(model, weight_l2=0.1).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        assert module(x).output.dtype is torch.float64
        torch.testing.assert_close(module(x).output, model.double()(x))
    finally:
        torch.set_default_dtype(torch.float32)


class Position(Base):
    """The usual table: written while it is made, and by nobody after."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(4, 4)
        place = torch.arange(0, 4, dtype=torch.float).unsqueeze(1)
        rate = torch.exp(torch.arange(0, 4, 2).float() * (-math.log(1e4) / 4))
        table[:, 0::2] = torch.sin(place * rate)
        table[:, 1::2] = torch.cos(place * rate)
        return F.relu(self.l(x) + table)


def test_what_nobody_writes_into_stays_a_constant() -> None:
    traced = graphreg.trace(Position())
    assert [site.name for site in traced.values] == ["x", "l", "add", "relu"]
    (graph,) = traced.graphs.values()
    assert [node.name for node in graph.nodes] == ["x", "l", "_tensor_constant0", "add", "relu", "output"]
    assert list(traced.constants) == ["_tensor_constant0"]


def test_what_is_made_again_has_no_names_and_takes_none() -> None:
    traced = graphreg.trace(Inside())
    assert [site.name for site in traced.values] == ["x", "b.l", "b.getitem", "b.written", "b.mul", "o"]
    assert not traced.constants
    (graph,) = traced.graphs.values()
    assert "zeros" in [node.name for node in graph.nodes]


class Returned(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.zeros(3)
        return self.l(x), t, torch.ones(2).expand(4, 2)


def test_the_caller_may_write_into_what_is_returned() -> None:
    module = graphreg.regularize(Returned(), weight_l2=0.1)
    x = torch.randn(4, 4)
    _, zeros, ones = module(x).output
    zeros.add_(1)
    ones[0].add_(1)
    _, zeros, ones = module(x).output
    assert zeros.tolist() == [0, 0, 0] and ones[0].tolist() == [1, 1]


class Filled(nn.Module):
    """The value that the second layer reads has no name of its own: it was written into a tensor part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        t = torch.zeros(4, 4)
        t[0] = self.a(x)[0]
        h = torch.relu(t)
        return self.o(h)


def test_what_is_read_of_a_filled_tensor_has_its_role() -> None:
    assert [(site.name, site.role) for site in graphreg.trace(Filled()).values if site.role == "hidden"] == [("relu", "hidden")]


TABLE = torch.zeros(4)


class WritesGlobal(Base):
    def forward(self, x: Tensor) -> Tensor:
        TABLE.add_(1)
        return self.l(x) + TABLE  # type: ignore[no-any-return]


class WritesGlobalTraced(Base):
    def forward(self, x: Tensor) -> Any:
        TABLE.add_(self.l(x)[0].detach())
        return self.l(x)


class WritesDefault(Base):
    def forward(self, x: Tensor, t: Tensor = torch.zeros(4)) -> Tensor:  # noqa: B008
        t.add_(1)
        return self.l(x) * t  # type: ignore[no-any-return]


class WritesListed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ts = [torch.zeros(4)]

    def forward(self, x: Tensor) -> Tensor:
        self.ts[0].add_(1)
        return self.l(x) * self.ts[0]  # type: ignore[no-any-return]


class WritesNumpys(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.from_numpy(torch.zeros(4, 4).numpy())
        t[:, 0] = self.l(x)[:, 0]
        return t


class ShownToNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4, 4)
        t.numpy()[1] = 3.0
        t[:, 0] = self.l(x)[:, 0]
        return t


class Decides(Base):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        if self.plain > 2:
            return self.l(x)
        self.plain += 1
        return self.l(x) * 2


class ListedParameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.ws = [nn.Parameter(torch.ones(4))]

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * (self.ws[0] * 2)


REFUSED = [WritesGlobal, WritesGlobalTraced, WritesDefault, WritesListed, WritesNumpys, ShownToNumpy, Decides, ListedParameter]


def assert_written_as_by_the_model(front_end: str | None) -> None:
    """The default is the same tensor at each call, of the model and of the graph, and tracing leaves it alone."""
    (default,) = WritesDefault.forward.__defaults__ or ()
    model, x, was = WritesDefault(), torch.randn(4, 4), default.clone()
    given: Any = {} if front_end is None else {"example_inputs": torch.randn(4, 4), "front_end": front_end}
    module = graphreg.strip(graphreg.regularize(model, weight_l2=0.1, **given))
    assert torch.equal(default, was)
    for call in (1, 2):
        assert torch.equal(module(x), model.l(x) * (was + call)) and torch.equal(default, was + call)
    default.copy_(was)


@pytest.mark.parametrize("given", [None, "symbolic", "export"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_the_graphs_to_make_is_refused_and_left_alone(kind: type[nn.Module], given: str | None) -> None:
    if kind is WritesDefault:  # it is an input: the caller's to be written into
        assert_written_as_by_the_model(given)
        return
    model, x = kind(), None if given is None else torch.randn(4, 4)
    held = [t.clone() for t in (TABLE, *(kind.forward.__defaults__ or ()), *getattr(model, "ts", ()), getattr(model, "plain", TABLE))]
    with pytest.raises(TraceError):
        graphreg.trace(model, x, front_end=given or "auto")  # type: ignore[arg-type]
    now = [TABLE, *(kind.forward.__defaults__ or ()), *getattr(model, "ts", ()), getattr(model, "plain", TABLE)]
    assert all(map(torch.equal, held, now))


def test_the_refusal_names_the_line_and_the_cure() -> None:
    with pytest.raises(TraceError, match=r"TABLE\.add_\(1\).*Register it as a buffer, or write into a clone"):
        graphreg.trace(WritesGlobal())


class WritesAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.zeros(4)
        torch._foreach_add_([t], 1.0)
        t[0] = self.l(x)[0, 0]
        return t * self.l(x)


def test_a_write_into_a_list_is_followed_beside_another_thread() -> None:
    """Which has the trace watch its own draws by a mode, under which torch counts no version of these."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        model, x = WritesAList(), torch.randn(3, 4)
        module = graphreg.regularize(model, weight_l2={"weight": 0.0})
    finally:
        end.set()
        thread.join()
    assert all(torch.equal(module(x).output, model(x)) for _ in range(3))
