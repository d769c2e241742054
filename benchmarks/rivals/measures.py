"""Measurements on torch that three of the columns share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from rivals.rows import yes

Function = Callable[[Tensor], Tensor]
ONES = torch.ones(64, 64)
IMAGES = torch.ones(4, 8, 6, 6)


def afresh() -> None:
    """Forget what was compiled before: Dynamo gives up at eight compilations of one code object."""
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    run: Callable[..., Any] = torch.compile(function)
    return run


def same_mask(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a != 0, b != 0)


def backward_is_forward(function: Function) -> bool:
    """Whether the elements that have a gradient are those that were kept; the function is dropout, then exp."""
    x = torch.ones(64, 64, requires_grad=True)
    y = function(x)
    y.sum().backward()
    assert x.grad is not None
    return torch.equal(y.detach() != 1, x.grad != 0)


def under_a_budget(function: Function) -> str:
    """Whether a partitioner that may keep nothing for backward draws the forward's masks again."""
    afresh()
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        return yes(backward_is_forward(compiled(function)))


def checkpointed(function: Function) -> str:
    def run(x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    afresh()
    return yes(backward_is_forward(run) and backward_is_forward(compiled(run)))


def kept(function: Function, plain: Function) -> str:
    """Bytes an element that autograd keeps beyond what it keeps without dropout: eager / compiled."""
    afresh()
    return " / ".join(f"{kept_by(f) - kept_by(p):g}" for f, p in ((function, plain), (compiled(function), compiled(plain))))


def kept_by(function: Function) -> float:
    storages: dict[int, int] = {}
    x = torch.randn(256, 256, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() if t.numel() > 1000 else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
        total = sum(storages.values())
    del y
    return total / x.numel()


def passes(function: Function) -> int:
    """How many loops over the elements Inductor's code has; the cache would keep it from making any."""
    afresh()
    uncached = torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), uncached[0], uncached[1]:
        _, sources = run_and_get_code(compiled(function), torch.randn(64, 64))
    return sum(len(re.findall(r"x\d+<static_cast<int64_t>\(4096L\)", source)) for source in sources)


def compilations(function: Callable[[Tensor], Any], change: Callable[[float], None]) -> int:
    """How many graphs are compiled for three rates."""
    afresh()
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(function, backend=counter)
    for rate in (0.1, 0.2, 0.3):
        change(rate)
        run(ONES)
    return counter.frame_count
