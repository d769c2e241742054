"""A trace beside other threads: what they compile and trace waits, what they call is torch's own, and nothing stays changed."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.export
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.torch_internals import other_threads
from graphreg.torch_internals.other_threads import alone as begin_alone
from graphreg.torch_internals.patching import Changes

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
FRONT_ENDS = ("symbolic", "export")


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Net(nn.Module):
    """Asks what a trace answers: grad mode, classes, its mode, whether it is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(4, 6), nn.Linear(6, 2), nn.Dropout(0.1)

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        x = self.a(x) if callable(self.a) and hasattr(self, "b") else x
        if isinstance(x, Tensor) and torch.is_grad_enabled():
            x = torch.tanh(x)
        if torch.get_default_dtype() is torch.float32 and not torch.compiler.is_compiling():
            x = x + 0
        x = self.b(self.drop(x)) if self.training else self.b(x)
        return x if scale is None else x * scale


class Events(tuple[threading.Event, threading.Event]):
    def __deepcopy__(self, memo: Any) -> Events:
        return self


class Waiting(nn.Module):
    """Its forward lets another thread work, once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 6), nn.Dropout(0.1)
        self.__dict__["waits"] = Events((threading.Event(), threading.Event()))

    def forward(self, x: Tensor) -> Tensor:
        entered, done = self.__dict__["waits"]
        entered.set()
        done.wait(60)
        x = self.a(x)
        return self.drop(x.relu()) if isinstance(x, Tensor) and self.training else x


class Other(threading.Thread):
    """A thread that works once, when it is let. ``waited``: whether it waited for another one to trace."""

    def __init__(self, work: Callable[[], Any], entered: threading.Event, done: threading.Event) -> None:
        super().__init__()
        self.work, self.entered, self.done, self.waited = work, entered, done, False
        self.found: list[Any] = []
        self.start()
        self.watch = threading.Thread(target=self._watch)
        self.watch.start()

    def run(self) -> None:
        self.entered.wait(60)
        try:
            self.found.append(self.work())
        except BaseException as error:
            self.found.append(error)

    def _watch(self) -> None:
        self.entered.wait(60)
        while self.is_alive() and not self.waited:
            self.waited = self.ident in other_threads._Now.threads.parked
            time.sleep(0.001)
        self.done.set()

    def result(self) -> Any:
        self.join(60)
        self.watch.join(60)
        (found,) = self.found
        if isinstance(found, BaseException):
            raise found
        return found


def meanwhile(work: Callable[[], Any], front_end: Any) -> tuple[graphreg.Traced, Any, bool]:
    """A trace; what another thread makes of ``work`` in the midst of it; and whether that had to wait."""
    model = Waiting()
    other = Other(work, *model.__dict__["waits"])
    traced = graphreg.trace(model, X, front_end=front_end)
    return traced, other.result(), other.waited


def values(traced: graphreg.Traced) -> list[str]:
    return [site.name for site in traced.values]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    return {front_end: values(meanwhile(lambda: None, front_end)[0]) for front_end in FRONT_ENDS}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_what_another_thread_compiles_and_traces_waits(front_end: str, alone: dict[str, list[str]]) -> None:
    """And does then what it does without a trace; code that is compiled already is not compiled again."""
    torch.compiler.reset()
    graphs = list[fx.GraphModule]()

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = Net().eval()
    compiled, new = torch.compile(net, backend=backend, fullgraph=True), torch.compile(Net(), backend=backend, fullgraph=True)
    compiled(X)
    expected = net(X)
    for work, count in ((lambda: compiled(X), 1), (lambda: new(X), 2)):
        traced, _, waited = meanwhile(work, front_end)
        assert waited and len(graphs) == count and values(traced) == alone[front_end]
    works: list[Callable[[], Any]] = [
        lambda: torch.export.export(net, (X,)).module()(X),
        lambda: torch.export.export(net, (X,), strict=True).module()(X),
        lambda: fx.symbolic_trace(nn.Sequential(net.a, nn.Tanh(), net.b))(X),
        lambda: make_fx(net)(X)(X),
    ]
    for plain in works if front_end == "symbolic" else works[:1]:
        traced, found, waited = meanwhile(plain, front_end)
        assert waited and values(traced) == alone[front_end]
        torch.testing.assert_close(found, expected)


@contextmanager
def _hook_of_all(calls: list[str]) -> Iterator[None]:
    def hook(module: nn.Module, *args: Any) -> None:
        calls.append(type(module).__name__)

    hook.__module__ = "torch.utils.flop_counter"  # as torch's own tools, beside which graphreg traces
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_what_another_thread_calls_is_as_without_a_trace(front_end: str, alone: dict[str, list[str]]) -> None:
    """Also in code of the model that is traced. None of it waits."""
    net, encoder = Net(), nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1, enable_nested_tensor=False).eval()
    apply: Any = Doubled.apply
    calls, records, logger = list[str](), list[str](), logging.getLogger("torch.fx.experimental.symbolic_shapes")
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]

    def work() -> list[Any]:
        x = X.clone().requires_grad_()
        checkpointed = checkpoint(net.a, x, use_reentrant=False)
        reentrant = checkpoint(net.a, x, use_reentrant=True)
        with torch.no_grad():
            fast, unasked = encoder(X[None]), net.eval()(X)
        with torch.inference_mode():
            inferred = net.train().a(X)
        generator = torch.random.default_generator  # type: ignore[attr-defined]
        torch.manual_seed(generator.initial_seed())
        drawn = net.drop(X)
        logger.warning("seen")
        del net.training
        gone = hasattr(net, "training")
        net.training = True
        return [
            apply(x), checkpointed, reentrant, fast, unasked, inferred, torch.autograd.grad(checkpointed.sum(), x), drawn, gone,
            torch.backends.mha.get_fastpath_enabled(), isinstance(x, Tensor), type(net) is Net, net(X).shape, encoder.train().training,
        ]  # fmt: skip

    logger.addHandler(handler)
    try:
        with _hook_of_all(calls):
            expected, counted = work(), list(calls)
            calls.clear()
            encoder.eval()
            traced, found, waited = meanwhile(work, front_end)
    finally:
        logger.removeHandler(handler)
    assert not waited and calls == counted and records == ["seen", "seen"] and values(traced) == alone[front_end]
    assert not traced.opaque_modules
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_call_in_eager_beside_a_compiler_is_one_in_eager() -> None:
    """torch's flags are of all threads: while one exports, the calls of another count, attach their penalties, and trace new structures."""
    options: dict[str, Any] = {"hidden_dropout": 0.5, "own_dropout": "off", "weight_l2": 0.1, "rng": 1}
    module = graphreg.regularize(Net(), example_inputs=X, penalties="attach", scale=1, **options)
    twin, model = copy.deepcopy(module), graphreg.regularize_(Net(), hidden_dropout=0.5, rng=1)
    expected = [torch.autograd.grad(twin(X).sum(), twin.a.weight)[0] for _ in range(2)]
    entered, done = threading.Event(), threading.Event()

    def work() -> Any:
        found = [torch.autograd.grad(module(X).sum(), module.a.weight)[0] for _ in range(2)]
        return found, model(X).shape, model(X, torch.ones(())).shape

    with torch._export.utils._compiling_state_context():  # what torch.export does; that it replaces calls of modules is another matter
        other = Other(work, entered, done)
        entered.set()
        found, *shapes = other.result()
    assert shapes == [(5, 2), (5, 2)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_another_thread_begins_before_and_ends_within_a_trace_has_ended() -> None:
    """What torch notes for all threads is not restored from before the trace."""
    begun, ended = threading.Event(), threading.Event()

    def filters() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            begun.set()
            ended.wait(60)

    before = warnings.filters
    thread = threading.Thread(target=filters)
    thread.start()
    begun.wait(60)

    def end() -> None:
        ended.set()
        thread.join(60)

    meanwhile(end, "symbolic")
    assert warnings.filters is before


def test_threads_that_wait_for_one_another_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that regularizes beside a thread that does; and a forward that waits for a worker, which compiles."""
    started, errors = threading.Barrier(2), list[BaseException]()

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        started.wait(30)
        graphreg.regularize(Net(), example_inputs=X, hidden_dropout=0.5)
        return graph.forward

    def traces() -> None:
        started.wait(30)
        graphreg.regularize(Net(), example_inputs=X, hidden_dropout=0.5)

    def caught(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(work,)) for work in (traces, lambda: torch.compile(nn.Tanh(), backend=backend)(X))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)

    monkeypatch.setattr(other_threads, "STILL", 100)

    class Working(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            worker = threading.Thread(target=caught, args=(lambda: torch.compile(torch.sin, backend="eager")(torch.ones(2)),))
            worker.start()
            worker.join()
            return x + 1

    traced = graphreg.trace(Working(), X)
    assert values(traced) == ["x", "add"] and not other_threads._Now.threads.parked


# The stress


def _regularize(model: nn.Module) -> None:
    graphreg.regularize(model, example_inputs=X, hidden_dropout=0.5)


def _in_place(model: nn.Module) -> None:
    """With new structures of the call. A model that is shared is regularized in place before."""
    own = graphreg.regularize_(copy.deepcopy(model), hidden_dropout=0.5)
    own(X).sum().backward()
    own(X, torch.ones(()))


def _compile(model: nn.Module) -> None:
    torch.compile(model, backend="aot_eager")(X).sum().backward()


def _export(model: nn.Module) -> None:
    torch.export.export(model, (X,))


def _train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()


WORKS: dict[str, Callable[[nn.Module], None]] = {
    "regularize": _regularize, "regularize_": _in_place, "compile": _compile, "export": _export, "train": _train,
}  # fmt: skip
PAIRS = [(a, b) for i, a in enumerate(WORKS) for b in list(WORKS)[i:] if "regularize" in a or "regularize" in b]


def _places() -> dict[Any, Any]:
    """Everything in torch and in the model's code that a trace may replace, by place and name."""
    torchs: list[Any] = [torch, torch.compiler, torch.random, torch.fx._symbolic_trace, sys.modules["torch.export._trace"]]
    torchs += [torch.utils.checkpoint, torch.backends.mha, torch._dynamo.convert_frame, nn.modules.module, nn.modules.transformer]
    kinds: list[Any] = [nn.Module, fx.Tracer, Function, torch.inference_mode, torch.SymBool, torch.utils.checkpoint.CheckpointFunction, Net]
    torchs.append(proxy_tensor)
    kinds += [proxy_tensor._ModuleStackTracer, torch._subclasses.fake_tensor.FakeTensor]
    places = [(place, name) for place in (*torchs, *kinds) for name in vars(place)]
    found = {(place.__name__, name): vars(place)[name] for place, name in places}
    return found | {("here", name): globals().get(name) for name in ("isinstance", "type", "callable", "hasattr")}


def stress(works: tuple[str, str], shared: bool, seconds: float) -> None:
    """Let two threads do their works for some time, each at least once: nothing is raised."""
    models = [Net()] * 2 if shared else [Net(), Net()]
    errors, until = list[BaseException](), time.monotonic() + seconds

    def run(name: str, model: nn.Module) -> None:
        count = 0
        while not errors and (not count or time.monotonic() < until):
            count += 1
            try:
                WORKS[name](model)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in zip(works, models, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def _stressed(shared: bool, seconds: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: warnings are errors here, and their filters are of all threads
        for work in WORKS.values():  # torch replaces functions of its own for good at their first use
            work(Net())
        before = _places()
        # Over a longer time, draws of a thread that trains disturb a proof (docs/limits.md). And torch.export puts fake tensors into its
        # model for the time of its trace, also without graphreg: nobody else can run or copy that model meanwhile.
        fails = ({"train"} if seconds else set()) | ({"export"} if shared else set())
        # At once, each pair has models of its own, and each work has met another one on a model that both use.
        met = PAIRS if seconds or not shared else [("regularize", "regularize_"), ("regularize", "compile"), ("regularize_", "train")]
        for works in [pair for pair in met if fails.isdisjoint(pair)]:
            torch.compiler.reset()
            stress(works, shared, seconds)
        now = _places()  # what one pair leaves changed stays so
        assert [place for place in {**before, **now} if now.get(place) is not before.get(place) and _counts(before.get(place))] == []


def _counts(value: Any) -> bool:
    """Return whether a value is no count or cache of torch's own."""
    return value is None or callable(value) or isinstance(value, (bool, property, classmethod, staticmethod))


@pytest.mark.parametrize("shared", [False, True], ids=["distinct", "shared"])
@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_two_threads(shared: bool, seconds: float) -> None:
    _stressed(shared, seconds)


def _gates_are_open() -> bool:
    is_torchs = fx.Tracer.trace.__code__.co_filename != other_threads.__file__
    return torch.fx._symbolic_trace._is_fx_tracing_flag is False and is_torchs and other_threads._Now.gates is None


@pytest.mark.skipif(hasattr(torch.fx._symbolic_trace, "_is_fx_tracing_tls"), reason="torch has a flag for each thread")
def test_an_interrupt_while_it_waits_and_a_fork_open_the_gates() -> None:
    """A fork within the trace of another thread has no such thread."""
    begun, ended, errors = threading.Event(), threading.Event(), list[BaseException]()

    def traces() -> None:
        with Changes() as changes, changes:
            begin_alone(changes)
            begun.set()
            ended.wait(60)

    def waits() -> None:
        try:
            with Changes() as changes, changes:
                begin_alone(changes)
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=traces)
    first.start()
    begun.wait(60)
    assert not _gates_are_open()
    if (child := os.fork()) == 0:
        os._exit(0 if _gates_are_open() and graphreg.trace(nn.Tanh(), front_end="symbolic").values else 1)
    second = threading.Thread(target=waits)
    second.start()
    while second.ident not in other_threads._Now.threads.waiting:
        time.sleep(0.001)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(second.ident or 0), ctypes.py_object(KeyboardInterrupt))
    second.join(60)
    assert [type(error) for error in errors] == [KeyboardInterrupt] and not other_threads._Now.threads.waiting
    assert os.waitpid(child, 0)[1] == 0 and not _gates_are_open()
    ended.set()
    first.join(60)
    assert _gates_are_open()
