"""Canaries of autograd, and activation checkpointing.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes
from graphreg.torch_internals.canaries.canary import canary, raising


@canary("a running backward pass is numbered", "the refusal to draw in backward", "NO_BACKWARD", "backward_task", "in_backward")
def backward_task() -> None:
    seen = list[tuple[int, bool]]()
    x = torch.ones(1, requires_grad=True)
    x.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: seen.append((door.backward_task(), door.in_backward()))
    )
    for _ in range(2):
        x.sum().backward()  # type: ignore[no-untyped-call]
    assert (door.backward_task(), door.in_backward()) == (door.NO_BACKWARD, False)
    assert all(inside and task != door.NO_BACKWARD for task, inside in seen) and seen[0] != seen[1]


@canary("a backward pass knows which nodes it runs, and nodes are numbered", "attached penalties of models with several outputs",
        "will_run", "number_of_node", "has_hook")  # fmt: skip
def nodes_of_a_pass() -> None:
    x, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    h = x * other
    y = h.exp()
    leaves: list[Any] = [edge[0] for edge in h.grad_fn.next_functions]  # type: ignore[union-attr]
    seen = list[list[bool]]()
    y.register_hook(lambda gradient: seen.append([door.will_run(leaf) for leaf in leaves]))  # type: ignore[no-untyped-call]
    z = y * y
    assert door.has_hook(y) and not door.has_hook(h) and not door.has_hook(z)
    z.retain_grad()
    assert door.has_hook(z)
    z.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    torch.autograd.grad(z, h)
    assert seen == [[True, True], [False, False]]
    assert door.number_of_node(h.grad_fn) < door.number_of_node(y.grad_fn) < door.number_of_node(leaves[0])  # type: ignore[arg-type]


@canary("zeros without memory are recognized", "the compiled penalty contractive at sites before an absolute value", "materialized")
def materialized() -> None:
    x = torch.ones(2, requires_grad=True)
    (slope,) = torch.autograd.grad(x.abs().sum(), x, create_graph=True)
    lazy = torch.autograd.grad(slope.sum(), x)[0]
    plain = door.materialized(lazy)
    assert torch._is_zerotensor(lazy) and not torch._is_zerotensor(plain) and torch.equal(plain, torch.zeros(2))
    assert door.materialized(x) is x


@canary("the engine of autograd is called", "graphreg.doctor", "wrap_engine")
def wrap_engine() -> None:
    runs = list[int]()

    def around(run: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return run(*args, **kwargs)

        return counted

    x = torch.ones(1, requires_grad=True)
    with Changes() as changes, changes:
        door.wrap_engine(changes, around)
        x.sum().backward()  # type: ignore[no-untyped-call]
        torch.autograd.grad(x.sum(), x)
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert len(runs) == 2


@torch.library.custom_op("graphreg_canary::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    with torch.enable_grad():
        outside = (x.detach().requires_grad_() * 2).grad_fn
        with door.recorded_in_operator():
            inside = (x.detach().requires_grad_() * 2).grad_fn
    recorded.append((outside is not None, inside is not None))
    return x * 2


@torch.library.custom_op("graphreg_canary::derived", mutates_args=())
def derived(x: Tensor) -> Tensor:
    return x * 2


derived.register_autograd(lambda ctx, gradient: gradient * 2)
recorded = list[tuple[bool, bool]]()


@canary("a custom operator excludes autograd", "the recurrent operator", "recorded_in_operator")
def recorded_in_operator() -> None:
    recorded.clear()
    plain(torch.ones(1, requires_grad=True))
    assert recorded == [(False, True)]


@canary(
    "autograd names an operator and keeps its formula", "the error of a penalty without a gradient", "custom_operators", "has_no_formula"
)
def custom_operators() -> None:
    x = torch.ones(1, requires_grad=True)
    assert {"graphreg_canary::plain", "graphreg_canary::derived"} <= set(door.custom_operators())
    without, formula = plain(x), derived(x)  # keep the outputs: up to torch 2.10, a node's name is lost with its output
    assert door.has_no_formula(without.grad_fn) and not door.has_no_formula(formula.grad_fn)
    assert str(without.grad_fn.name()).endswith("GeneratedBackwardFor_graphreg_canary_plain_defaultBackward")


@canary("a level of forward-mode differentiation is entered", "the refusal to attach penalties at such a level", "is_forward_mode")
def is_forward_mode() -> None:
    with forward_ad.dual_level():
        assert door.is_forward_mode()
    assert not door.is_forward_mode()


@canary("a storage is identified", "the tape of the symbolic front end", "storage_number", "number_of_storage")
def storage_number() -> None:
    for x in (torch.ones(4), torch.ones(4, device="meta"), torch.ones(0)):
        assert door.storage_number(x) == door.storage_number(x[1:]) == door.number_of_storage(x.untyped_storage())
        assert door.storage_number(x) != door.storage_number(other := torch.empty_like(x)), other
    with raising(NotImplementedError, RuntimeError):
        door.storage_number(torch.ones(2, 2).to_sparse())


@canary("writes into a tensor are counted", "the front ends", "version_of")
def version_of() -> None:
    x = torch.ones(4)
    before = door.version_of(x)
    x[:2].add_(1)
    assert door.version_of(x) == before + 1
    with torch.inference_mode():
        assert door.version_of(torch.ones(1).add_(1)) == -1


@canary("autograd records the base of a view", "attached penalties", "base_of", "same_view")
def base_of() -> None:
    base, other = (torch.arange(4.0, requires_grad=True) * n for n in (1, 10))
    view = base.view(2, 2)[1]
    assert door.base_of(view) is base and door.base_of(base) is base
    assert torch.equal(door.same_view(view, other), other.view(2, 2)[1]) and door.base_of(door.same_view(view, other)) is other


class Reversed(torch.autograd.Function):
    """Returns a view that has another derivative than torch's views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@canary("autograd records which operation made a view", "attached penalties of outputs that share storage", "is_plain_view")
def is_plain_view() -> None:
    base = torch.arange(4.0, requires_grad=True) * 1
    assert all(map(door.is_plain_view, (base.view(2, 2), base[1:], *torch.split(base, 2), *base.unbind())))
    by_function = Reversed.apply(base)  # type: ignore[no-untyped-call]
    assert door.base_of(by_function) is base and not door.is_plain_view(by_function)


@canary("a GradScaler keeps its scale", "attached penalties", "scale_tensor", "first_scale")
def scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert door.scale_tensor(scaler) is None and door.first_scale(scaler) == (True, 8.0)
    scaler.scale(torch.ones(()))
    assert float(door.scale_tensor(scaler)) == 8.0  # type: ignore[arg-type]
    assert door.first_scale(torch.amp.GradScaler("cpu", enabled=False))[0] is False


@canary("private attributes of a tensor are named", "the front ends", "PRIVATE_FACTS", "PRIVATE_STORAGE", "VERSION")
def private_facts() -> None:
    assert {*door.PRIVATE_FACTS, door.PRIVATE_STORAGE, door.VERSION} <= set(dir(Tensor))
    x = torch.zeros(2)
    before = getattr(x, door.VERSION)
    x.add_(1)
    assert getattr(x, door.VERSION) == before + 1


@canary("hooks on saved tensors are known", "traces in place at a call under such hooks", "has_saved_tensor_hooks")
def saved_tensor_hooks() -> None:
    assert not door.has_saved_tensor_hooks()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert door.has_saved_tensor_hooks()


@canary("activation checkpointing begins", "the front ends, which refuse checkpointing", "before_checkpoints")
def before_checkpoints() -> None:
    for reentrant in (True, False):
        asked = list[int]()
        x = torch.ones(1, requires_grad=True)
        with Changes() as changes, changes:
            door.before_checkpoints(changes, partial(asked.append, 1))
            checkpoint(torch.sin, x, use_reentrant=reentrant)
        checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert asked == [1], f"use_reentrant={reentrant}"


@canary("a checkpoint calls the function itself", "the symbolic front end: what a model checkpoints becomes blocks", "through_checkpoints")
def through_checkpoints() -> None:
    ran, x = list[Any](), torch.ones(1, requires_grad=True)

    def begin(reentrant: bool) -> Any:
        ran.append(reentrant)
        return partial(ran.append, "end")

    for reentrant in (True, False):
        with Changes() as changes, changes:
            door.through_checkpoints(changes, begin)
            y = checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert ran == [reentrant, "end"] and type(y.grad_fn).__name__ == "SinBackward0", ran
        ran.clear()


@canary("Dynamo numbers regions that are recomputed", "masks that are recomputed", "next_region")
def next_region() -> None:
    first, second = door.next_region(), door.next_region()
    assert isinstance(first, int) and first != second


@canary("a wrapper of activation checkpointing keeps its module", "blocks with wrappers around them in a model in place", "WRAPPED_MODULE",
        "checkpoint_wrapped")  # fmt: skip
def checkpoint_wrappers() -> None:
    inner = nn.Linear(1, 1)
    assert door.checkpoint_wrapped(checkpoint_wrapper(inner)) is inner and door.checkpoint_wrapped(inner) is None
    assert door.WRAPPED_MODULE in dict(checkpoint_wrapper(inner).named_children())
