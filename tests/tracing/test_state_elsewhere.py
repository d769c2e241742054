"""State that a forward changes outside of module attributes, or in an opaque module: followed, or refused."""

# ruff: noqa: PLW0603
from __future__ import annotations

import array
import collections
import contextvars
import copy
import functools
import itertools
import queue
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError, TraceError

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
FRONT_ENDS = [None, "symbolic", "export"]

COUNT = 0
LOG: list[Any] = []
TABLE: dict[str, Any] = {"n": 1}
SEEN: set[int] = set()
TENSOR = torch.ones(4)
STEPS = iter([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0])
TURNS = itertools.count(2)
BYTES = bytearray(1)
ARRAY = array.array("d", [1.0])
NUMBERS = np.zeros(4, dtype=np.float32)
RANDOM = random.Random(0)
QUEUE: queue.Queue[float] = queue.Queue()
LOCAL = threading.local()
LOCAL.n = 1
SPACE = types.SimpleNamespace(n=1)
VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE")
VARIABLE.set(1)
WARNED = False
CACHE: dict[Any, Any] = {}


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 1


class Holder:
    made = 0

    def __init__(self) -> None:
        self.n = 1

    def step(self) -> int:
        self.n += 1
        return self.n


SLOTTED, HOLDER = Slotted(), Holder()


def cleared() -> None:
    global COUNT, WARNED
    COUNT, Holder.made, WARNED = 0, 0, False
    LOG.clear()
    CACHE.clear()


def regularized(model: nn.Module, front_end: str | None) -> nn.Module:
    if front_end is None:
        return graphreg.regularize(model, weight_l2=0.1)
    return graphreg.regularize(model, weight_l2=0.1, example_inputs=X, front_end=front_end)  # type: ignore[arg-type]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(4, 4)


class Does(Base):
    """Multiplies by what a function gives, which may look at the model."""

    def __init__(self, function: Callable[[Any], Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * self.function(self)


def global_number(_: Any) -> int:
    global COUNT
    COUNT += 1
    return COUNT


def global_list(_: Any) -> int:
    LOG.append(1)
    return len(LOG)


def global_dict(_: Any) -> Any:
    TABLE["n"] += 1
    return TABLE["n"]


def global_set(_: Any) -> int:
    SEEN.add(len(SEEN))
    return len(SEEN)


def global_tensor(_: Any) -> Tensor:
    return TENSOR.add_(1)


def global_iterator(_: Any) -> float:
    return next(STEPS)


def global_count(_: Any) -> int:
    return next(TURNS)


def global_bytes(_: Any) -> int:
    BYTES[0] += 1
    return BYTES[0]


def global_array(_: Any) -> float:
    ARRAY[0] += 1
    return ARRAY[0]


def global_numpy(_: Any) -> Any:
    NUMBERS[0] += 1
    return float(NUMBERS[0])


def global_random(_: Any) -> float:
    return RANDOM.random()


def global_queue(_: Any) -> float:
    QUEUE.put(1.0)
    return QUEUE.qsize()


def global_local(_: Any) -> Any:
    LOCAL.n += 1
    return LOCAL.n


def global_space(_: Any) -> Any:
    SPACE.n += 1
    return SPACE.n


def global_slots(_: Any) -> int:
    SLOTTED.n += 1
    return SLOTTED.n


def global_object(_: Any) -> int:
    return HOLDER.step()


def of_a_context(_: Any) -> int:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def of_a_class(_: Any) -> int:
    Holder.made += 1
    return Holder.made


def of_a_function(_: Any) -> Any:
    of_a_function.calls = getattr(of_a_function, "calls", 0) + 1  # type: ignore[attr-defined]
    return of_a_function.calls  # type: ignore[attr-defined]


def of_a_default(_: Any, log: list[int] = []) -> int:  # noqa: B006
    log.append(1)
    return len(log)


def around() -> Callable[[Any], int]:
    n = 0

    def step(_: Any) -> int:
        nonlocal n
        n += 1
        return n

    return step


def around_a_list() -> Callable[[Any], int]:
    log: list[int] = []

    def step(_: Any) -> int:
        log.append(1)
        return len(log)

    return step


def of_numpy(_: Any) -> float:
    return np.random.rand()


def on_the_clock(_: Any) -> float:
    return time.perf_counter()


def generated() -> Iterator[float]:
    yield from itertools.count(1.0)


def state() -> str:
    """All of it, as text."""
    plain = (
        COUNT,
        LOG,
        TABLE,
        SEEN,
        TENSOR,
        BYTES,
        ARRAY,
        NUMBERS,
        QUEUE.queue,
        vars(LOCAL),
        SPACE,
        SLOTTED.n,
        vars(HOLDER),
        WARNED,
        CACHE,
    )
    streams = (RANDOM.getstate(), str(np.random.get_state()), STEPS.__reduce__(), repr(TURNS), VARIABLE.get())
    return f"{plain} {streams} {Holder.made} {vars(of_a_function)} {of_a_default.__defaults__}"


FUNCTIONS = [
    global_number, global_list, global_dict, global_set, global_tensor, global_iterator, global_count, global_bytes, global_array,
    global_numpy, global_random, global_queue, global_local, global_space, global_slots, global_object, of_a_context, of_a_class,
    of_a_function, of_a_default, of_numpy,
]  # fmt: skip


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_forward_moves_elsewhere_is_refused_and_put_back(function: Callable[[Any], Any], front_end: str | None) -> None:
    model, before = Does(function), state()
    with pytest.raises(TraceError, match=r"for its next call|writes into"):
        regularized(model, front_end)
    assert state() == before


OWN: list[tuple[str, Callable[[Any], Any], Callable[[], Any]]] = [
    ("iterator", lambda m: next(m.iterator), lambda: iter([2.0, 3.0, 5.0, 7.0])),
    ("cycle", lambda m: next(m.cycle), lambda: itertools.cycle([2.0, 3.0, 5.0])),
    ("zipped", lambda m: next(m.zipped)[1], lambda: zip([1, 2, 3], [2.0, 3.0, 5.0], strict=False)),
    ("bytes", lambda m: _counted(m.bytes), lambda: bytearray(2)),
    ("random", lambda m: m.random.random(), lambda: random.Random(0)),
    ("numpy", lambda m: m.numpy.random(), lambda: np.random.default_rng(0)),
    ("legacy", lambda m: m.legacy.rand(), lambda: np.random.RandomState(0)),
    ("torchs", lambda m: torch.rand((), generator=m.torchs).item(), lambda: torch.Generator().manual_seed(0)),
    ("slots", lambda m: _stepped(m.slots), Slotted),
    ("deque", lambda m: m.deque.rotate(1) or m.deque[0], lambda: collections.deque([1.0, 2.0, 3.0])),
    ("method", lambda m: m.method(), lambda: Holder().step),
    ("partial", lambda m: m.partial(m), lambda: functools.partial(_appended, [])),
    ("listed", lambda m: m.listed[0](m), lambda: [around()]),
    ("nested", lambda m: m.nested.inner.step(), lambda: types.SimpleNamespace(inner=Holder())),
]


def _appended(log: list[int], _: Any) -> int:
    log.append(1)
    return len(log)


def _counted(numbers: bytearray) -> int:
    numbers[0] += 1
    return numbers[0]


def _stepped(slots: Slotted) -> int:
    slots.n += 1
    return slots.n


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(("name", "function", "make"), OWN, ids=[name for name, _, _ in OWN])
def test_so_is_what_it_moves_of_its_own(name: str, function: Callable[[Any], Any], make: Callable[[], Any], front_end: str | None) -> None:
    model, other = Does(function, **{name: make()}), Does(function, **{name: make()})
    told = "cannot be exported" if (name, front_end) == ("torchs", "export") else "for its next call"
    with pytest.raises(TraceError, match=told):
        regularized(model, front_end)
    for _ in range(2):  # the next calls give what they would have given
        torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("make", [around, around_a_list])
def test_so_are_the_variables_of_functions_around(make: Callable[[], Callable[[Any], int]], front_end: str | None) -> None:
    step = make()
    with pytest.raises(TraceError, match=r"(n|log), a variable around .*step.* for its next call"):
        regularized(Does(step), front_end)
    assert step(None) == 1


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_what_only_moves_on_is_refused_before_it_does(front_end: str | None) -> None:
    model = Does(lambda m: next(m.source), source=generated())
    with pytest.raises(TraceError, match=r"self\.source for its next call.*cannot be restored"):
        regularized(model, front_end)
    assert next(model.source) == 1.0  # type: ignore[call-overload, arg-type]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_clock_is_refused(front_end: str | None) -> None:
    with pytest.raises(TraceError, match="a clock"):
        regularized(Does(on_the_clock), front_end)


def test_the_refusal_says_what_differs() -> None:
    with pytest.raises(TraceError, match=r"changes .*test_state_elsewhere\.COUNT for its next call.*\(mul takes 1 and then 2\)"):
        graphreg.trace(Does(global_number))


class Steps(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.s, self.o = make(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.o(self.s(x))


class CountsGlobally(Base):
    def forward(self, x: Tensor) -> Any:
        global COUNT
        COUNT += 1
        return self.l(x) * COUNT


class Draws(Base):
    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * self.rng.random()


class Takes(Base):
    def __init__(self) -> None:
        super().__init__()
        self.source = generated()

    def forward(self, x: Tensor) -> Any:
        return self.l(x) * next(self.source)


@pytest.mark.parametrize("front_end", FRONT_ENDS[:2])
@pytest.mark.parametrize("kind", [CountsGlobally, Draws])
def test_a_submodule_that_does_so_becomes_opaque(kind: Callable[[], nn.Module], front_end: str | None) -> None:
    global COUNT
    COUNT = 0
    model = Steps(kind)
    wanted = copy.deepcopy(model)
    module = regularized(model, front_end)
    assert COUNT == 0
    given = [module(X).output for _ in range(3)]
    COUNT = 0
    for value in given:
        torch.testing.assert_close(value, wanted(X))
    cleared()


def test_one_that_takes_from_a_generator_becomes_opaque_where_it_need_not_run() -> None:
    model = Steps(Takes)
    module = graphreg.regularize(model, weight_l2=0.1)
    inner = model.s.l(X)  # type: ignore[operator, union-attr]
    for number in (1.0, 2.0, 3.0):
        torch.testing.assert_close(module(X).output, model.o(inner * number))
    for front_end in ("symbolic", "export"):
        with pytest.raises(TraceError, match="cannot be restored|cannot be copied"):
            regularized(model, front_end)
    assert next(model.s.source) == 4.0  # type: ignore[call-overload, arg-type, union-attr]


# What is no matter


def warns(_: Any) -> int:
    global WARNED
    if not WARNED:
        WARNED = True
    return 2


def caches(m: Any) -> Any:
    key = (4, "cpu")
    if key not in CACHE:
        CACHE[key] = torch.arange(4.0)
    return CACHE[key]


def times(m: Any) -> int:
    m.took = time.perf_counter()
    return 2


def counts(_: Any) -> int:
    global COUNT
    COUNT += 1
    Holder.made += 1
    LOG.append("called")
    return 2


def reads(_: Any) -> Any:
    return TABLE["n"] + len(SEEN) + Holder.made + SLOTTED.n


def draws_alike(_: Any) -> float:
    return random.Random(3).random() + float(np.random.default_rng(0).random())


def iterates(m: Any) -> float:
    return sum(value for value in iter(m.numbers))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("function", [warns, caches, times, counts, reads, draws_alike, iterates])
def test_what_decides_nothing_is_no_matter(function: Callable[[Any], Any], front_end: str | None) -> None:
    model = Does(function, numbers=[1.0, 2.0])
    before = state()
    module = regularized(model, front_end)
    assert state() == before
    for _ in range(3):
        torch.testing.assert_close(module(X).output, model(X))
    cleared()


# What an opaque module changes


class Shut(Base):
    """An opaque module, because it decides by a value."""

    def __init__(self, last: Any = None) -> None:
        super().__init__()
        self.n, self.seen, self.last, self.log = 0, False, last, list[int]()
        self.plain = torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        global COUNT
        COUNT += 1
        self.n += 1
        setattr(self, "told", getattr(self, "told", 0) + 1)  # noqa: B010
        self.seen, self.last, self.made = True, x.sum(), 3
        self.log.append(1)
        self.count += 1
        Holder.made += 1
        LOG.append(1)
        return self.l(x) if x.sum() < 1e9 else x


class Asks(nn.Module):
    def __init__(self, ask: Callable[[Shut], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inn, self.ask = Shut(), ask

    def forward(self, x: Tensor) -> Any:
        return self.inn(x) * self.ask(self.inn)


ASKED: dict[str, Callable[[Any], Any]] = {
    "n": lambda inn: inn.n,
    "n > 5": lambda inn: 1 if inn.n > 5 else 2,
    "told": lambda inn: getattr(inn, "told", 1),
    "seen": lambda inn: 2 if inn.seen else 1,
    "last": lambda inn: 1 if inn.last is None else inn.last,
    "log": lambda inn: len(inn.log),
    "made": lambda inn: 2 if hasattr(inn, "made") else 1,
    "global": lambda _: COUNT,
    "global list": lambda _: len(LOG),
    "class": lambda _: Holder.made,
}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("ask", list(ASKED.values()), ids=list(ASKED))
def test_what_an_opaque_submodule_counts_is_not_frozen(ask: Callable[[Any], Any], front_end: str | None) -> None:
    model = Asks(ask)
    before = f"{vars(model.inn)} {state()}"
    with pytest.raises(TraceError, match=r"reads what an opaque module changes.*register_buffer"):
        if front_end == "export":
            graphreg.regularize(model, weight_l2=0.1, example_inputs=X)
        else:
            regularized(model, front_end)
    assert f"{vars(model.inn)} {state()}" == before


@pytest.mark.parametrize("front_end", FRONT_ENDS[:2])
def test_its_buffers_and_what_it_does_not_change_are_read(front_end: str | None) -> None:
    model = Asks(lambda inn: inn.count * inn.l.in_features)
    wanted = copy.deepcopy(model)
    module = regularized(model, front_end)
    for _ in range(3):
        torch.testing.assert_close(module(X).output, wanted(X))
    cleared()


class Reader(nn.Module):
    def __init__(self, inn: Shut) -> None:
        super().__init__()
        self.kept = [inn]

    def forward(self, x: Tensor) -> Any:
        return x * self.kept[0].n


class HasReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inn = Shut()
        self.r = Reader(self.inn)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.inn(x))


def test_a_submodule_that_reads_it_becomes_opaque_too() -> None:
    model = HasReader()
    wanted = copy.deepcopy(model)
    module = graphreg.regularize(model, weight_l2=0.1)
    assert set(graphreg.trace(model).opaque_modules) == {"inn", "r"}
    for _ in range(3):
        torch.testing.assert_close(module(X).output, wanted(X))
    cleared()


class Hooked(Base):
    def forward(self, x: Tensor) -> Any:
        return self.l(x) * getattr(self.l, "calls", 1)


def test_what_a_hook_of_a_layer_counts_is_not_frozen() -> None:
    def hook(layer: Any, args: Any, output: Any) -> None:
        layer.calls = getattr(layer, "calls", 0) + 1

    model = Hooked()
    model.l.register_forward_hook(hook)
    with pytest.raises(TraceError, match=r"self\.l\.calls"):
        graphreg.trace(model)
    assert "calls" not in vars(model.l)


class StoresActivation(Base):
    """Its forward uses what a hook of its layer has stored."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.kept: Any = None
        self.all: list[Any] = []
        stored = self.stored = dict[str, Any]()

        def by_closure(layer: Any, args: Any, output: Any) -> None:
            self.kept = output

        def into_dict(layer: Any, args: Any, output: Any) -> None:
            stored["kept"] = output

        ways: Any = {"method": self.keep, "partial": partial(StoresActivation.keep, self), "closure": by_closure, "dict": into_dict}
        self.l.register_forward_hook(ways.get(way, self.append))

    def keep(self, layer: Any, args: Any, output: Any) -> None:
        self.kept = output

    def append(self, layer: Any, args: Any, output: Any) -> None:
        self.all.append(output)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.l(x))
        for each in (self.kept, self.stored.get("kept"), *self.all[-1:]):
            h = h if each is None else h * each
        return h


class Tells(nn.Module):
    """Opaque, because it decides something on values; it hands a tensor to the model of which it is a part."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.l, self.tell = nn.Linear(4, 4), tell

    def forward(self, x: Tensor) -> Tensor:
        self.tell(x.detach().sum())
        return self.l(x) if x.sum() < 100 else x


class IsTold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.part = torch.zeros(()), Tells(self.put)

    def put(self, value: Tensor) -> None:
        self.last = value

    def forward(self, x: Tensor) -> Any:
        return self.part(x) * self.last


class Stats:
    """A hook that is an object."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, layer: Any, args: Any, output: Tensor) -> None:
        self.scale = output.abs().max().item()


class ReadsStats(Base):
    def __init__(self) -> None:
        super().__init__()
        self.stats = Stats()
        self.l.register_forward_hook(self.stats)

    def forward(self, x: Tensor) -> Any:
        return self.l(x) / self.stats.scale


class Empties(Base):
    """As timm's FeatureHookNet with layers that the graph calls: it empties what the hook fills, and then reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.out: dict[str, Any] = {}
        self.l.register_forward_hook(partial(self.collect, "l"))

    def collect(self, name: str, layer: Any, args: Any, output: Any) -> None:
        self.out[name] = output

    def forward(self, x: Tensor) -> Any:
        self.out.clear()
        self.l(x)
        return [x * 2, *self.out.values()]


@pytest.mark.parametrize("kind", [ReadsStats, Empties])
def test_nor_is_what_an_object_stores_or_what_was_emptied_before(kind: type[nn.Module]) -> None:
    with pytest.raises(TraceError, match="reads what an opaque module changes"):
        graphreg.trace(kind())


def test_what_a_hook_stores_for_others_stays_as_it_was() -> None:
    layer, seen, last = nn.Linear(4, 4), list[Tensor](), dict[str, Tensor]()

    def hook(called: Any, args: Any, output: Tensor) -> None:
        seen.append(output)
        last["output"] = output

    layer.register_forward_hook(hook)
    module = graphreg.regularize(nn.Sequential(layer), hidden_dropout=0.0, missing="ignore")
    assert not seen and not last
    module(X)
    assert len(seen) == 1 and last["output"] is seen[0]


def test_what_a_submodule_tells_the_model_is_not_frozen() -> None:
    model = IsTold()
    with pytest.raises(TraceError, match=r"reads what an opaque module changes .*self\.last"):
        graphreg.trace(model)
    assert model.last == 0


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("way", ["method", "partial", "closure", "dict", "list"])
def test_what_a_hook_stores_is_not_frozen(way: str, before: bool) -> None:
    model = StoresActivation(way)
    if before:
        model(X)
    with pytest.raises(TraceError, match="reads what an opaque module changes"):
        graphreg.trace(model)


# The mode of a submodule, asked by another


class AsksMode(Base):
    def __init__(self, ask: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.d, self.ask = nn.Dropout(0.5), ask

    def forward(self, x: Tensor) -> Any:
        return self.ask(self, self.l(x))


FOLLOWED: dict[str, Callable[[Any, Tensor], Any]] = {
    "flag": lambda m, h: nn.functional.dropout(h, 0.5, m.d.training),
    "number": lambda m, h: h * (2 if m.d.training else 3),
    "rate": lambda m, h: nn.functional.dropout(h, m.d.p if m.d.training else 0.0),
}
ASSERTED: dict[str, Callable[[Any, Tensor], Any]] = {
    "branch": lambda m, h: h.relu() if m.d.training else h,
    "both": lambda m, h: h * (2 if m.d.training and m.training else 3),
}


def modes(module: nn.Module) -> Iterator[None]:
    for whole, child in itertools.product((True, False), repeat=2):
        module.train(whole)
        module.d.train(child)  # type: ignore[operator, union-attr]
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("ask", list(FOLLOWED.values()), ids=list(FOLLOWED))
def test_the_mode_of_a_submodule_is_followed(ask: Callable[[Any, Tensor], Any], front_end: str | None) -> None:
    model = AsksMode(ask)
    wanted = copy.deepcopy(model)
    module = regularized(model, front_end)
    for _ in modes(module):
        given = module(X)
        wanted.train(module.training).d.train(module.d.training)  # type: ignore[operator, union-attr, arg-type]
        torch.manual_seed(0)
        torch.testing.assert_close(given.output, wanted(X))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("ask", list(ASSERTED.values()), ids=list(ASSERTED))
def test_where_it_decides_more_it_is_asserted(ask: Callable[[Any, Tensor], Any], front_end: str | None) -> None:
    model = AsksMode(ask)
    wanted = copy.deepcopy(model)
    module = regularized(model, front_end)
    for _ in modes(module):
        if module.training == module.d.training:  # type: ignore[union-attr]
            torch.testing.assert_close(module(X).output, wanted.train(module.training)(X))
        else:
            with pytest.raises(GraphRegError, match=r"branches on self\.d\.training, which is"):
                module(X)
    assert "training" not in vars(nn.Module)


def test_the_assertions_compile() -> None:
    """Of a mode, and of whether gradients are recorded."""
    model = AsksMode(lambda m, h: h * (2 if m.d.training and m.training else 3) * (5 if torch.is_grad_enabled() else 7))
    torch._dynamo.reset()
    compiled = torch.compile(graphreg.regularize(model, weight_l2=0.1), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X).output, model(X))
    with torch.no_grad(), pytest.raises(Exception, match=r"is_grad_enabled.* branches on"):
        compiled(X)
    compiled.d.eval()
    with pytest.raises(Exception, match=r"branches on self\.d\.training"):
        compiled(X)


class SetsMode(Base):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        was = self.d.training
        self.d.eval()
        h = self.d(self.l(x))
        self.d.train(was)
        return h


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_forward_that_sets_a_mode_is_refused_and_opaque_in_a_submodule(front_end: str | None) -> None:
    with pytest.raises(TraceError, match="sets the mode of d"):
        regularized(SetsMode(), front_end)
    if front_end == "export":
        return  # all that are opaque to it are in one model, below
    model = Steps(SetsMode)
    module = regularized(model, front_end)
    torch.testing.assert_close(module(X).output, model(X))
    assert model.s.d.training  # type: ignore[union-attr]


def test_a_mode_that_decides_nothing_is_not_asserted() -> None:
    (graph,) = graphreg.trace(AsksMode(lambda m, h: h * len([m.d.training]))).graphs.values()
    assert [node.name for node in graph.nodes] == ["x", "l", "mul", "output"]


# Seeds, and names given to values


class Seeds(Base):
    def forward(self, x: Tensor) -> Any:
        torch.manual_seed(3)
        return nn.functional.dropout(self.l(x))


class Names(Base):
    def forward(self, x: Tensor) -> Any:
        v: Any = self.l(x)
        v.foo = 1
        return v


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("beside", [False, True])
def test_a_seed_is_refused_and_kept_in_a_submodule(beside: bool, front_end: str | None) -> None:
    done = threading.Event()
    if beside:
        threading.Thread(target=done.wait, daemon=True).start()
    try:
        model: nn.Module = Seeds()
        torch.manual_seed(3)  # as the forward leaves it
        with pytest.raises(TraceError, match="draws random numbers itself|seeds torch's generator"):
            regularized(model, front_end)
        if front_end == "export":
            return  # as above
        model = Steps(Seeds)
        torch.manual_seed(3)
        module = regularized(model, front_end)
    finally:
        done.set()
    torch.testing.assert_close(module(X).output, model(X))
    assert vars(torch.random)["default_generator"] is torch.default_generator


class Forks(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            fixed = torch.randn(4)
        return self.l(x) * fixed


def test_a_seed_that_is_taken_back_is_no_matter() -> None:
    model = Forks()
    assert not graphreg.trace(Steps(Forks)).opaque_modules
    torch.testing.assert_close(graphreg.regularize(model, weight_l2=0.1)(X).output, model(X))


class DrawsApart(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.random.fork_rng():
            noise = torch.rand_like(x)
        return self.l(x) * noise


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_draws_that_do_not_advance_the_callers_generator_are_refused(front_end: str | None, within: bool) -> None:
    """A graph would advance it, and so change all masks and shuffles that come later."""
    with pytest.raises(TraceError, match=r"random generator after the call differs.*draws within torch\.random\.fork_rng"):
        regularized(Steps(DrawsApart) if within else DrawsApart(), front_end)(X)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_name_that_a_value_is_given_is_refused_and_kept_in_a_submodule(front_end: str | None) -> None:
    with pytest.raises(TraceError, match=r"assigns \.foo"):
        regularized(Names(), front_end)
    if front_end != "export":
        model = Steps(Names)
        torch.testing.assert_close(regularized(model, front_end)(X).output, model(X))


def test_submodules_that_are_opaque_to_torch_export() -> None:
    """Each is refused by itself, above."""
    global COUNT
    COUNT = 0
    model = nn.Sequential(CountsGlobally(), SetsMode(), Names(), Seeds(), nn.Linear(4, 4))
    torch.manual_seed(3)  # as the forward leaves it
    module, wanted = regularized(model, "export"), copy.deepcopy(model)
    opaque = [note for note in graphreg.report(module, cost=False).notes if note.startswith("opaque module: ")]
    assert COUNT == 0 and {note.split()[2] for note in opaque} == {"0", "1", "2", "3"}
    given = [module(X).output for _ in range(3)]
    COUNT = 0
    for value in given:
        torch.testing.assert_close(value, wanted(X))
    assert model[1].d.training
    cleared()


class SetsMany(nn.Module):
    """It may assign forty attributes, and decides by a value, so that it is opaque."""

    exec("def forward(self, x):\n" + "".join(f"    setattr(self, 'a{i}', 2)\n" for i in range(40)) + "    return x if x.sum() > 0 else x\n")


class ReadsOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = SetsMany()
        for i in range(40):
            setattr(self.inner, f"a{i}", 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.inner.a7  # type: ignore[operator]


def test_of_many_attributes_the_error_names_the_module() -> None:
    """A list of all that its code may set says nothing."""
    with pytest.raises(TraceError, match=r"reads what an opaque module changes .*: self\.inner \(TraceError: .*\)\. A graph"):
        graphreg.trace(ReadsOne(), front_end="symbolic")


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        TABLE["n"] += 1
        return x * TABLE["n"]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OfNumpy(Counting):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


@torch.library.custom_op("graphreg_tests::counting", mutates_args=())
def counting(x: Tensor) -> Tensor:
    TABLE["n"] += 1
    return x * TABLE["n"]


counting.register_fake(torch.empty_like)
CALLED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function of autograd": lambda self, x: Counting.apply(x),
    "one in an attribute": lambda self, x: self.kept.apply(x),
    "a bound one": lambda self, x: self.bound(x),
    "one that draws": lambda self, x: OfNumpy.apply(x),
    "an operator": lambda self, x: counting(x),
    "an operator by name": lambda self, x: torch.ops.graphreg_tests.counting(x),
}


class Calling(nn.Module):
    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.kept, self.bound, self.call = nn.Parameter(torch.ones(())), Counting, Counting.apply, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x * self.scale)


@pytest.mark.parametrize("how", ["bare", "inputs", "in place"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("name", CALLED)
def test_what_python_code_below_torchs_dispatcher_changes_is_put_back(name: str, within: bool, how: str) -> None:
    """Traces, probes and proofs call it; what it changes is as if they had not. Or the model is refused, and it is the same."""

    def made() -> nn.Module:
        TABLE["n"] = 1
        np.random.seed(0)
        model: nn.Module = Calling(CALLED[name])
        return nn.Sequential(model, nn.Identity()) if within else model

    model = made()
    expected = [model(X) for _ in range(3)]
    model = made()
    try:
        if how == "in place":
            module = graphreg.regularize_(model, weight_l2=0.0, penalties="attach", scale=1)
            found = [module(X) for _ in range(3)]
        else:
            module = graphreg.regularize(model, weight_l2=0.0, example_inputs=X if how == "inputs" else None)
            found = [module(X).output for _ in range(3)]
    except TraceError:
        assert TABLE["n"] == 1
        assert np.random.rand() == np.random.RandomState(0).rand()
    else:
        assert all(map(torch.equal, found, expected))


class Clamps(nn.Module):
    """Becomes opaque after an attempt that made a tensor on fake ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(4))

    @property
    def limit(self) -> Tensor:
        return (5 / 20 * self.n - 1.25).clamp_(0.0, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean([0])
        x = x + (mean.detach() - self.mean.view_as(mean)).clamp_(-self.limit, self.limit)
        self.mean += 0.1 * (mean.detach() - self.mean)
        return x.transpose(1, -1) if x.dim() > 2 else x  # asks for a fake tensor


def test_what_an_attempt_left_is_no_constant() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Clamps())
    module = graphreg.regularize(copy.deepcopy(model), weight_l2=0.1, example_inputs=X)
    torch.testing.assert_close(module(X).output, model(X))


def halves() -> Callable[[], Tensor]:
    kept = torch.ones(4)

    def update() -> Tensor:
        nonlocal kept
        kept = kept * 0.5
        return kept

    return update


def test_a_tensor_that_a_trace_left_where_no_name_leads_is_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(sys, "".join(["_graphreg", "_halves"]))()  # type: ignore[no-any-return]

    sys._graphreg_halves = halves()  # type: ignore[attr-defined]
    try:
        for _ in range(2):
            with pytest.raises(TraceError, match="no name in its code leads"):
                graphreg.regularize(nn.Sequential(nn.Linear(4, 4), Halves()), weight_l2=0.1, example_inputs=X)
    finally:
        del sys._graphreg_halves  # type: ignore[attr-defined]
