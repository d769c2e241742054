"""A trace that is interrupted leaves nothing of what was patched for it, wherever the interrupt comes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import math
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.export._trace
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor

import graphreg
from graphreg.torch_internals import patching as changes
from graphreg.torch_internals.other_threads import alone
from graphreg.torch_internals.patching import Changes

ENGINE = Path(graphreg.__file__).parent
HERE = {contextlib.__file__, _symbolic_trace.__file__, *(str(ENGINE / f"{name}.py") for name in (
    "torch_internals/patching", "torch_internals/interpreter", "torch_internals/trace_state", "torch_internals/random_state",
    "tracing/isinstance_patch", "tracing/type_inference", "tracing/train_eval_graphs", "tracing/symbolic/symbolic",
    "tracing/trace"))}  # fmt: skip
MORE = HERE | {str(ENGINE / "tracing" / "export" / f"{name}.py") for name in ("export", "recorder", "patches")}
assert all(Path(file).is_file() for file in MORE)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.more = nn.Linear(4, 4), nn.Dropout(0.1), [1]
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.more.append(2)
        self.extra = x
        self.seen.add_(1)
        if isinstance(x, Tensor):
            x = F.relu(self.fc(x)) * math.sqrt(x.shape[0])
        return self.drop(x) + torch.zeros(4)


def around(model: nn.Module) -> dict[str, Any]:
    """What a trace changes for a while, by name; equal before and after."""
    free: list[bool] = []

    def trace() -> None:
        with Changes() as changes, changes:
            alone(changes)
            free.append(True)

    other = threading.Thread(target=trace)
    other.start()
    other.join()
    names = {
        **{f"torch.{k}": id(v) for k, v in vars(torch).items()},
        **{f"math.{k}": id(v) for k, v in vars(math).items()},
        **{f"here.{k}": id(v) for k, v in globals().items()},
        **{f"checkpoint.{k}": id(v) for k, v in vars(checkpointing).items()},
        **{f"packing.{k}": id(v) for k, v in vars(torch.nn.utils.rnn).items()},
        **{f"Module.{k}": id(v) for k, v in vars(nn.Module).items()},
        **{f"Tracer.{k}": id(v) for k, v in vars(proxy_tensor._ModuleStackTracer).items()},
        **{f"fx.{k}": id(v) for k, v in vars(torch.fx.Tracer).items()},
        **{f"Function.{k}": id(v) for k, v in vars(torch.autograd.Function).items()},
    }
    return names | {
        "lock": free, "collector": gc.isenabled(), "limit": sys.getrecursionlimit(), "patcher": _symbolic_trace.CURRENT_PATCHER,
        "flag": _symbolic_trace.is_fx_symbolic_tracing(), "functions": torch._C._len_torch_function_stack(),
        "operators": torch._C._len_torch_dispatch_stack(), "grad": torch.is_grad_enabled(), "filters": list(warnings.filters),
        "compiling": torch.compiler.is_compiling(), "exporting": torch.compiler.is_exporting(), "outermost": changes._thread.outermost,
        "modes": [m.training for m in model.modules()], "attributes": {k: id(v) for k, v in vars(model).items()},
        "lists": [list(v) for v in vars(model).values() if isinstance(v, list)], "seen": float(model.get_buffer("seen")),
        "random": (random.getstate(), torch.get_rng_state().tolist()), "fast": torch.backends.mha.get_fastpath_enabled,
        "print": "print" in vars(torch.export._trace), "level": list(logging.getLogger("torch.fx.experimental.symbolic_shapes").filters),
    }  # fmt: skip


class Interrupts:
    """Interrupts at the n-th step, a call or a line, of the code that ``watches`` picks; counts them where n is 0."""

    def __init__(self, watches: Callable[[CodeType], bool], n: int = 0) -> None:
        self.watches, self.n, self.places = watches, n, list[tuple[str, int, str]]()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not self.watches(frame.f_code) or event not in ("call", "line"):
            return None if event == "call" else self
        self.places.append((frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name, frame.f_lineno, event))
        if len(self.places) == self.n:
            raise KeyboardInterrupt
        return self

    def run(self, function: Callable[[], object]) -> bool:
        """Whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def in_a_thread(test: Callable[..., None]) -> Callable[..., None]:
    """Of its own: what Python handles is left wrong where a trace function raises within an ``except`` (Python 3.11), for the thread."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(test, *args, **kwargs).result()

    return run


def ours(code: CodeType) -> bool:
    return code.co_filename in HERE


def chosen(places: list[tuple[str, int, str]], most: int) -> list[int]:
    """Each place where it is met first and last; no more than so many of them, over all."""
    first = {place: i for i, place in reversed(list(enumerate(places, 1)))}
    last = {place: i for i, place in enumerate(places, 1)}
    steps = sorted({*first.values(), *last.values()})
    return steps[:: max(1, math.ceil(len(steps) / most))]


def interrupted(model: nn.Module, function: Callable[[], object], most: int, watches: Callable[[CodeType], bool] = ours) -> int:
    function()  # what is imported and cached at the first time is not what is looked at
    counter = Interrupts(watches)
    counter.run(function)
    before, count = around(model), 0
    for n in chosen(counter.places, most):
        one = Interrupts(watches, n)
        count += one.run(function)
        after = around(model)
        assert after == before, (one.places[-1], {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)})
    function()
    return count


# Python drops an interrupt that comes while it closes a generator, and reports it as an exception that it ignores.
dropped = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dropped
@pytest.mark.parametrize("most", [6, pytest.param(10_000, marks=pytest.mark.sweep)])
@in_a_thread
def test_symbolic(most: int) -> None:
    model = Net().eval()
    model.drop.train()
    assert interrupted(model, lambda: graphreg.trace(model), most) >= min(most, 400) // 2


@dropped
@pytest.mark.parametrize("most", [3, pytest.param(300, marks=pytest.mark.sweep)])
@in_a_thread
def test_export(most: int) -> None:
    model, x = Net(), torch.randn(2, 4)
    assert interrupted(model, lambda: graphreg.trace(model, x, "export"), most, lambda code: code.co_filename in MORE) >= most // 2


@in_a_thread
def test_where_torch_fx_and_the_changes_begin_and_end() -> None:
    """Each line of theirs, in the first trace of the two."""
    model, met = Net(), set[CodeType]()

    def watches(code: CodeType) -> bool:
        if code.co_name in ("_new_patcher", "__enter__", "__exit__", "outermost", "_unpatched", "_put_back", "undo"):
            met.add(code)
        return code in met and code.co_filename in HERE

    assert interrupted(model, lambda: graphreg.trace(model), 150, watches) > 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops one that comes in a callback of its collector
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_by_a_timer() -> None:
    """Real signals, later and later: a handler that raises, as Ctrl-C's does."""
    model, count = Net(), 0
    graphreg.trace(model)
    start, before = time.perf_counter(), around(model)
    graphreg.trace(model)
    whole = time.perf_counter() - start

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    theirs = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1, 21):
            try:
                signal.setitimer(signal.ITIMER_REAL, whole * i / 20)
                graphreg.trace(model)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                count += 1
            assert around(model) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, theirs)
    graphreg.trace(model)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops one that comes in a callback of its collector
def test_by_another_thread() -> None:
    """An exception that is raised in a thread from outside, as libraries for timeouts do."""
    model = Net()
    graphreg.trace(model)
    before, raised = around(model), ctypes.pythonapi.PyThreadState_SetAsyncExc
    for i in range(20):
        ended = threading.Event()

        def run(ended: threading.Event = ended) -> None:
            with contextlib.suppress(KeyboardInterrupt):
                for _ in range(3):
                    graphreg.trace(model)
            ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.001 * i)
        raised(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))
        thread.join()
        assert around(model) == before


@in_a_thread
def test_the_interrupt_is_what_is_raised() -> None:
    """Also where torch.fx fails as it ends, and one that was being handled before is none."""
    model = Net()

    def watches(code: CodeType) -> bool:
        return code.co_name == "_new_patcher"

    counter = Interrupts(watches)
    counter.run(lambda: graphreg.trace(model))
    for n in chosen(counter.places, 10):
        assert Interrupts(watches, n).run(lambda: graphreg.trace(model, torch.ones(1, 4)))
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(graphreg.errors.TraceError):  # type: ignore[attr-defined]
            graphreg.trace(nn.Module())
        graphreg.trace(model)


@pytest.mark.parametrize("block", ["frozen_noise", "noise_on", "sample"])
@in_a_thread
def test_blocks_of_ours(block: str) -> None:
    """Contexts that hold noise or modes: an interrupt as they begin or end."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module, x = graphreg.regularize(net, hidden_dropout=0.5, rng=0).eval(), torch.ones(2, 4)

    def use() -> None:
        if block == "sample":
            graphreg.sample(module, x, n=2)
            return
        with getattr(graphreg, block)(module):
            module(x)

    def state() -> Any:
        leaves = [(getattr(leaf, "forced", None), getattr(leaf, "frozen_call", None)) for leaf in module.graphreg_rules.children()]
        return leaves, [m.training for m in module.modules()]

    def watches(code: CodeType) -> bool:
        return code.co_filename == str(ENGINE / "runtime" / ("sampling.py" if block == "sample" else "controls.py"))

    use()
    counter, before = Interrupts(watches), state()
    counter.run(use)
    for n in chosen(counter.places, 60):
        assert Interrupts(watches, n).run(use)
        assert state() == before, counter.places[n - 1]
