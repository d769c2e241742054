"""What a call leaves behind may decide the next one, also if it comes from sizes or from a draw. The proof compares the next call, too."""

from __future__ import annotations

import array
import collections
import copy
import enum
import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError, OtherInputs
from graphreg.tracing.proof.other_sizes import other_sizes

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
XS = [X, X[:, :2], torch.cat([X, X], 1), X[:1], X]
VARIABLE: ContextVar[int] = ContextVar("VARIABLE", default=0)
Step = Callable[[Any, Tensor], Any]


class Shared:
    n = 0


class Member(enum.Enum):
    A = 1


class Net(nn.Module):
    shared = Shared()

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l, self.step = nn.Linear(4, 4), step
        self.kept: Any = None
        self.n: Any = 0
        self.mean = torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.table: dict[Any, Any] = {}
        self.sizes: list[int] = []
        self.bytes, self.array = bytearray(1), array.array("i", [0])
        self.mapping, self.chain = collections.UserDict[str, int](), collections.ChainMap[str, int]({})

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * self.step(self, x)


def counts(m: Any, x: Tensor) -> Any:
    m.n += x.shape[0]
    return min(1.0, m.n / 8)


def counts_for_later(m: Any, x: Tensor) -> Any:
    m.n += x.shape[0]
    return 2 if m.n > 7 else 1


def counts_in_the_layer(m: Any, x: Tensor) -> Any:
    m.l.n = getattr(m.l, "n", 0) + x.shape[0]
    return m.l.n


def longest(m: Any, x: Tensor) -> Any:
    m.n = max(m.n, x.shape[1])
    return m.n


def shortest(m: Any, x: Tensor) -> Any:
    m.kept = x.shape[1] if m.kept is None else min(m.kept, x.shape[1])
    return m.kept


def previous(m: Any, x: Tensor) -> Any:
    before, m.n = m.n or x.shape[1], x.shape[1]
    return before


def offset(m: Any, x: Tensor) -> Any:
    start, m.n = m.n, m.n + x.shape[1]
    return torch.arange(x.shape[1])[:, None] + start


def noise(m: Any, x: Tensor) -> Any:
    if m.kept is None:
        m.kept = torch.randn_like(x[0, 0])
    return m.kept


def running(m: Any, x: Tensor) -> Any:
    m.kept = (x.new_zeros(4) if m.kept is None else m.kept) + 1
    return m.kept


def in_a_dict(m: Any, x: Tensor) -> Any:
    m.table["n"] = m.table.get("n", 0) + x.shape[0]
    return m.table["n"]


def first_with(note: Callable[[Tensor], Any]) -> Step:
    def step(m: Any, x: Tensor) -> Any:
        is_first, m.kept = m.kept is None, note(x)
        return 1 if is_first else 2

    return step


def doubled(m: Any, x: Tensor) -> Any:
    m.mean = (2 * m.mean).type_as(x)
    return m.mean


def averaged(m: Any, x: Tensor) -> Any:
    """Which gives the same until the weights change."""
    weight = m.l.weight.detach().clone()
    m.kept = weight if m.kept is None else 0.9 * m.kept + 0.1 * weight
    return m.kept[0]


def pruned(m: Any, x: Tensor) -> Any:
    """By a mask of the first weights."""
    if m.kept is None:
        m.kept = (m.l.weight.abs() > 0.2).float()
    return (m.l.weight * m.kept)[0]


_STEPS = (
    counts, counts_for_later, counts_in_the_layer, longest, shortest, previous, offset, noise, running, in_a_dict, doubled, averaged,
    pruned,
)  # fmt: skip
STATEFUL: dict[str, Step] = {
    **{each.__name__: each for each in _STEPS},
    "shape": first_with(lambda x: x.shape),
    "dtype": first_with(lambda x: x.dtype),
    "slice": first_with(lambda x: slice(0, x.shape[0])),
    "function": first_with(lambda x: torch.relu),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_state_from_sizes_and_draws_is_refused(name: str) -> None:
    with pytest.raises(GraphRegError, match=r"Net\.forward changes self\.\w+(\.n)? for its next call, which may then compute"):
        graphreg.regularize(Net(STATEFUL[name]), weight_l2=0.1, example_inputs=X, front_end="symbolic")


@pytest.mark.parametrize("name", ["shape", "noise", "offset"])
def test_it_is_refused_at_the_first_call_that_has_inputs(name: str) -> None:
    module = graphreg.regularize(Net(STATEFUL[name]), weight_l2=0.1)
    with pytest.raises(GraphRegError, match="self.* for its next call"):
        module(X)
    in_place = graphreg.regularize_(Net(STATEFUL[name]), weight_l2=0.1, scale=1)
    for _ in range(2):
        with pytest.raises(GraphRegError, match="self.* for its next call"):
            in_place(X)


class Outer(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.block, self.out = Net(step), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.block(x))


@pytest.mark.parametrize("name", ["counts", "longest", "running", "averaged", "pruned"])
def test_a_submodule_with_such_state_becomes_opaque(name: str) -> None:
    model = Outer(STATEFUL[name])
    plain = copy.deepcopy(model)
    module = graphreg.regularize(model, weight_l2=0.0, example_inputs=X, penalties="attach", scale=1)
    for x in XS:
        assert torch.equal(module(x), plain(x))
    assert {node.target for node in module.graph.nodes if node.op == "call_module"} >= {"block", "out"}  # type: ignore[union-attr]
    module(X).sum().backward()
    plain(X).sum().backward()
    assert torch.equal(module.get_submodule("block.l").weight.grad, plain.block.l.weight.grad)  # type: ignore[arg-type, union-attr]
    for each in (model, plain):
        each.block.l.weight.data.mul_(0.5)
    assert torch.equal(module(X), plain(X))


def mask(m: Any, x: Tensor) -> Any:
    n = x.shape[1]
    if m.kept is None or m.kept.shape[0] < n:
        m.kept = torch.ones(n, n).tril()
    return m.kept[:n, :n].sum(1, keepdim=True)


def positions(m: Any, x: Tensor) -> Any:
    if m.n != x.shape[1]:
        m.n, m.kept = x.shape[1], torch.arange(x.shape[1])[:, None]
    return m.kept


def mask_like(m: Any, x: Tensor) -> Any:
    if m.kept is None or m.kept.shape != x.shape:
        m.kept = torch.ones_like(x)
    return m.kept


def tables(m: Any, x: Tensor) -> Any:
    if x.shape[1] not in m.table:
        m.table[x.shape[1]] = torch.arange(x.shape[1])[:, None]
    return m.table[x.shape[1]]


def logs(m: Any, x: Tensor) -> Any:
    m.kept, m.n = x.shape, m.n + x.shape[0]
    m.sizes.append(x.shape[1])
    return 1


def converted(m: Any, x: Tensor) -> Any:
    m.mean = m.mean.type_as(x)
    return m.mean.sum()


def moved(m: Any, x: Tensor) -> Any:
    m.mean = m.mean.to(x)
    return m.mean.sum()


@pytest.mark.parametrize("step", [mask, positions, mask_like, tables, logs, converted, moved])
def test_caches_by_size_and_logs_go_on_to_work(step: Step) -> None:
    plain = Net(step)
    in_place = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, scale=1)
    module = graphreg.regularize(copy.deepcopy(plain), weight_l2=0.0, example_inputs=X, penalties="attach", scale=1)
    for x in XS:
        expected = plain(x)
        assert torch.equal(in_place(x), expected)
        try:
            assert torch.equal(module(x), expected)
        except OtherInputs:
            assert step is tables and x.shape[1] != X.shape[1]


class Dropped(Net):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("step", [tables, logs])
def test_so_they_do_in_a_forward_that_depends_on_the_mode(step: Step) -> None:
    plain = Dropped(step)
    in_place = graphreg.regularize_(copy.deepcopy(plain), weight_l2=0.0, scale=1)
    front_end: Any = "symbolic" if step is tables else "auto"
    module = graphreg.regularize(copy.deepcopy(plain), weight_l2=0.0, example_inputs=X, penalties="attach", scale=1, front_end=front_end)
    for each, trains in itertools.product((in_place, module), (True, False, True)):
        results = []
        for made in (each, plain):
            torch.manual_seed(0)
            results.append(made.train(trains)(X))
        assert torch.equal(*results)


def in_default(seen: list[int] = []) -> int:  # noqa: B006
    seen.append(1)
    return len(seen)


def in_variable(m: Any) -> int:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def in_member(m: Any) -> int:
    Member.A.n = getattr(Member.A, "n", 0) + 1  # type: ignore[attr-defined]
    return int(Member.A.n)  # type: ignore[attr-defined]


def in_shared(m: Any) -> int:
    m.shared.n += 1
    return int(m.shared.n)


def in_items(name: str) -> Callable[[Any], int]:
    def count(m: Any) -> int:
        getattr(m, name)[0] += 1
        return int(getattr(m, name)[0])

    return count


def in_mapping(name: str) -> Callable[[Any], int]:
    def count(m: Any) -> int:
        getattr(m, name)["n"] = getattr(m, name).get("n", 0) + 1
        return int(getattr(m, name)["n"])

    return count


COUNTERS: dict[str, Callable[[Any], int]] = {
    "default": lambda m: in_default(), "variable": in_variable, "member": in_member, "shared": in_shared, "bytes": in_items("bytes"),
    "array": in_items("array"), "mapping": in_mapping("mapping"), "chain": in_mapping("chain"),
}  # fmt: skip


def state_of(m: Any) -> tuple[Any, ...]:
    default = list(in_default.__defaults__[0])  # type: ignore[index]
    member = getattr(Member.A, "n", 0)
    return default, VARIABLE.get(), member, m.shared.n, bytes(m.bytes), m.array.tolist(), dict(m.mapping), dict(m.chain)


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_that_decide_later_are_refused_and_put_back(name: str) -> None:
    count = COUNTERS[name]
    VARIABLE.set(0)
    model = Net(lambda m, x: 2 if count(m) > 3 else 1)
    before = state_of(model)
    with pytest.raises(GraphRegError, match="for its next call, which may then compute something else"):
        graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end="symbolic")
    assert state_of(model) == before


def test_other_sizes() -> None:
    shapes = [[tuple(each.shape) for each in args] for args, _ in other_sizes(((torch.ones(2, 3), torch.ones(3, 1)), {}))]
    assert shapes == [[(3, 3), (3, 1)], [(2, 4), (4, 1)]]  # the sizes 2 and 3
