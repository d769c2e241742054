"""Canaries of what a trace changes for all threads, and of ``AveragedModel``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.export
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

from graphreg.torch_internals import averaging, dynamo_marks, modules
from graphreg.torch_internals import other_threads as other_threads
from graphreg.torch_internals.patching import Changes


@contextmanager
def _elsewhere(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run ``work`` in another thread. What it returns stands in the list when the block has ended."""
    found = list[Any]()
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    yield found
    thread.join()


def _waits(work: Callable[[], Any]) -> bool:
    """Return whether another thread's ``work`` waits for the trace of this one."""
    with Changes() as changes, changes:
        other_threads.alone(changes)
        with _elsewhere(work) as found:
            while not (waits := bool(other_threads._Now.threads.parked)) and not found:
                pass
            changes.__exit__(None, None, None)
    return waits and len(found) == 1


def test_gates() -> None:
    """How it traces and compiles. It concerns traces beside other threads."""
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    for _ in range(2):  # the first call compiles
        assert _waits(lambda: compiled(torch.ones(1)))
    assert _waits(lambda: fx.symbolic_trace(nn.Identity()))
    assert _waits(lambda: torch.export.export(nn.Linear(1, 1), (torch.ones(1, 1),)))
    assert not _waits(lambda: nn.Linear(1, 1)(torch.ones(1, 1)))
    assert not torch.fx._symbolic_trace.is_fx_symbolic_tracing()


def test_under_way() -> None:
    """How it traces and compiles. It concerns traces beside other threads."""
    kinds = list[bool]()

    def note(*args: Any) -> Any:
        frame = sys._getframe()
        kinds.append(other_threads._compiles_in(frame, other_threads._codes()))
        return args[0]

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            note(x)
            return x + 1

    torch.compile(lambda x: x + 1, backend=note)(torch.ones(1))
    fx.symbolic_trace(Noting())
    torch.export.export(Noting(), (torch.ones(1, 1),))
    assert all(kinds) and len(kinds) >= 3
    calls = list[bool]()

    @dynamo_marks.disable()
    def called(x: Tensor) -> Tensor:
        calls.append(other_threads._is_in(sys._getframe(), other_threads._begins_call))
        return x

    torch.compile(lambda x: called(x + 1), backend="eager")(torch.ones(1))
    called(torch.ones(1))
    assert calls == [True, False]


def test_averages() -> None:
    """How an average is updated. It concerns strengths and noise of averages."""
    found = list[Any]()

    class Noting(nn.BatchNorm1d):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            found.append(averaging.update_that_lists())
            return super().named_modules(*args, **kwargs)

    model = nn.Sequential(Noting(1))
    averaged = AveragedModel(model, use_buffers=True)
    list(model.parameters())
    assert set(found) == {None}
    found.clear()
    averaged.update_parameters(model)
    assert [each.buffers for each in found] == [False, False, True, True]
    assert all(each.averaged is averaged and each.model is model for each in found)
    assert list(modules.modules_by_path(nn.Sequential(Noting(1)))) == ["", "0"]
