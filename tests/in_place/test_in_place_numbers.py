"""In place, an argument that is a number: its first value is fixed, from the second on it is a number that may change."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphreg
from graphreg.in_place import placed

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
VALUES = (0.1, 0.7, 0.2, 0.9, 0.3)


class Net(nn.Module):
    def __init__(self, kind: str = "times") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid, self.norm, self.out, self.kind = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), kind

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        h = self.norm(torch.relu(self.hid(x)))
        if self.kind == "times":
            h = h * scale
        elif self.kind == "root":
            h = h * math.sqrt(scale) + torch.full((4,), 1 - scale)
        elif self.kind == "dropout":
            h = F.dropout(h, scale, self.training)
        elif self.kind == "compared":
            h = h * 2 if scale > 0.5 else h
        elif self.kind == "counted":
            for _ in range(int(10 * scale)):
                h = h + 1
        elif self.kind == "shifted":  # fixed, the number has no name; as an input, its product is called mul
            h = (scale * 2 * h).exp()
        return self.out(h if mask is None else h * mask)  # type: ignore[no-any-return]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An element for each trace that was tried."""
    tried, original = list[bool](), placed.traced_for  # type: ignore[attr-defined]

    def counting(*args: Any) -> Any:
        tried.append(True)
        return original(*args)

    monkeypatch.setattr(placed, "traced_for", counting)
    yield tried


def made(kind: str, **options: Any) -> tuple[Any, Any]:
    """A model whose dropout of rate 0 changes nothing, and the plain one."""
    plain = Net(kind).train()
    return graphreg.regularize_(copy.deepcopy(plain), **(options or {"hidden_dropout": 0.0}), rng=0), plain


def outputs(model: Any, *calls: Any) -> list[Tensor]:
    results = []
    for call in calls:
        torch.manual_seed(1)
        results.append(model(X, **call).detach())
    return results


@pytest.mark.parametrize(
    ("kind", "options", "counts"),
    [
        ("times", {}, [1, 2, 2, 2, 2]),
        ("root", {}, [1, 2, 2, 2, 2]),
        ("dropout", {}, [1, 2, 2, 2, 2]),
        ("compared", {}, [1, 2, 3, 3, 3]),  # a graph for each answer
        ("counted", {}, [1, 3, 4, 5, 6]),  # one trace in vain
        ("shifted", {"dropout": {"mul": 0.0}}, [1, 3, 4, 5, 6]),
        ("times", {"front_end": "export", "hidden_dropout": 0.0}, [1, 2, 3]),
    ],
)
def test_a_number_that_changes(kind: str, options: dict[str, Any], counts: list[int], traces: list[bool]) -> None:
    """``counts``: how many traces were tried after each call."""
    model, plain = made(kind, **options)
    for value, count in zip(VALUES, counts, strict=False):
        assert torch.equal(*outputs(model, {"scale": value}), *outputs(plain, {"scale": value}))
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
        assert len(traces) == count


def test_the_rate_of_a_native_dropout_stays_seeded(traces: list[bool]) -> None:
    """A graph that takes it as a number could not move the dropout to graphreg's streams."""
    model, plain = made("dropout", own_dropout="seeded")
    for value in VALUES[:3]:
        assert not torch.equal(*outputs(model, {"scale": value}), *outputs(plain, {"scale": value}))
        assert "1 native dropout replaced" in str(graphreg.report(model))


def test_structures(traces: list[bool]) -> None:
    """A default counts as its value, another argument is another structure, and ``1`` is no float."""
    model, plain = made("times")
    calls: list[Any] = [{}, {"scale": 0.5}, {"scale": 0.25}, {}, {"scale": 2}, {"scale": 3}, {"mask": torch.ones(4)}]
    calls += [{"mask": torch.ones(4), "scale": 0.5}, {"scale": True}]
    assert all(map(torch.equal, outputs(model, *calls), outputs(plain, *calls)))
    assert len(traces) == 5
    assert "(x=float32[2], scale=float)" in str(graphreg.report(model))


def test_the_gradient_and_the_buffers_are_right_where_another_graph_runs() -> None:
    """The comparison comes after a batch norm: where it fails, the buffers are put back."""
    model, plain = made("compared")
    for value in (0.1, 0.7, 0.2, 0.9, 0.1, 0.8):
        for each in (model, plain):
            each.zero_grad()
            each(X, value).sum().backward()
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
        assert torch.equal(model.norm.num_batches_tracked, plain.norm.num_batches_tracked)
        assert torch.equal(model.out.bias.grad, plain.out.bias.grad)


@pytest.mark.parametrize(("kind", "count"), [("times", 2), ("compared", 3)])
def test_compiled(kind: str, count: int) -> None:
    """As with the plain model: one graph for the first value, and one for all others. Of a number that is compared, one for each value."""
    torch._dynamo.reset()
    model, plain = made(kind)
    frames: Any = CompileCounterWithBackend("eager")
    run = torch.compile(model, fullgraph=True, backend=frames)
    for value in VALUES[:3]:
        torch.testing.assert_close(run(X, scale=value), plain(X, scale=value))  # type: ignore[no-untyped-call]
    assert frames.frame_count == count


KEYS: dict[str, Callable[[float], object]] = {
    "set": lambda k: k in {3, 6}, "get": lambda k: 2 * {3: 1, 6: 2}.get(k, 0), "caught": lambda k: found_in({3: 1}, k),
    "built": lambda k: len({k, 3}) == 1, "tuple": lambda k: (k, 1) in {(3, 1)}, "counted": lambda k: Counter([k])[3],
    "sum": lambda k: k + 1 in {4},
}  # fmt: skip


def found_in(table: dict[int, int], key: Any) -> int:
    try:
        return table[key]
    except KeyError:
        return 0


class Keyed(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.lin, self.key = nn.Linear(4, 4), key

    def forward(self, x: Tensor, k: float = 0, batch: dict[str, Any] | None = None) -> Tensor:
        h = self.lin(x)
        return h.relu() if KEYS[self.key](k if batch is None else batch["k"]) else h


@pytest.mark.parametrize("kind", [int, float, complex])
@pytest.mark.parametrize("key", KEYS)
def test_a_number_that_is_looked_up_counts_by_its_value(key: str, kind: Any) -> None:
    """A number that may change is a stand-in in the trace, and a set or dict finds it by its hash."""
    plain = Keyed(key)
    numbers, items = (graphreg.regularize_(copy.deepcopy(plain), dropout={"lin": 0.0}) for _ in range(2))
    for k in map(kind, (0, 1, 2, 3, 6, 3, 0)):
        assert torch.equal(numbers(X, k), plain(X, k)) and torch.equal(items(X, batch={"k": k}), plain(X, k))


kind = 0  # a global that has the name of an attribute of ``Net``, and that nothing reads


def test_a_global_of_an_attributes_name_is_not_watched(traces: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = made("times")
    for step in range(4):
        monkeypatch.setitem(globals(), "kind", step)
        torch.testing.assert_close(model(X), plain(X))
    assert len(traces) == 1
