"""Canaries of autograd, and activation checkpointing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from graphreg.torch_internals import autograd, checkpointing
from graphreg.torch_internals.fake_tensors import FakeTensorMode
from graphreg.torch_internals.patching import Changes


def test_backward_task() -> None:
    """How a running backward pass is numbered. It concerns the refusal to draw in backward."""
    seen = list[tuple[int, bool]]()
    x = torch.ones(1, requires_grad=True)
    x.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: seen.append((autograd.backward_task(), autograd.in_backward()))
    )
    for _ in range(2):
        x.sum().backward()  # type: ignore[no-untyped-call]
    assert (autograd.backward_task(), autograd.in_backward()) == (autograd.NO_BACKWARD, False)
    assert all(inside and task != autograd.NO_BACKWARD for task, inside in seen) and seen[0] != seen[1]


def test_nodes_of_a_pass() -> None:
    """How a backward pass knows which nodes it runs, and nodes are numbered. It concerns attached penalties of several outputs."""
    x, other = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    h = x * other
    y = h.exp()
    leaves: list[Any] = [edge[0] for edge in h.grad_fn.next_functions]  # type: ignore[union-attr]
    seen = list[list[bool]]()
    y.register_hook(lambda gradient: seen.append([autograd.will_run(leaf) for leaf in leaves]))  # type: ignore[no-untyped-call]
    z = y * y
    assert autograd.has_hook(y) and not autograd.has_hook(h) and not autograd.has_hook(z)
    z.retain_grad()
    assert autograd.has_hook(z)
    z.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    torch.autograd.grad(z, h)
    assert seen == [[True, True], [False, False]]
    assert autograd.number_of_node(h.grad_fn) < autograd.number_of_node(y.grad_fn) < autograd.number_of_node(leaves[0])  # type: ignore[arg-type]


def test_materialized() -> None:
    """How zeros without memory are recognized. It concerns the compiled penalty contractive at sites before an absolute value."""
    x = torch.ones(2, requires_grad=True)
    (slope,) = torch.autograd.grad(x.abs().sum(), x, create_graph=True)
    lazy = torch.autograd.grad(slope.sum(), x)[0]
    plain = autograd.materialized(lazy)
    assert torch._is_zerotensor(lazy) and not torch._is_zerotensor(plain) and torch.equal(plain, torch.zeros(2))
    assert autograd.materialized(x) is x


def test_wrap_engine() -> None:
    """How the engine of autograd is called. It concerns graphreg.doctor."""
    runs = list[int]()

    def around(run: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return run(*args, **kwargs)

        return counted

    x = torch.ones(1, requires_grad=True)
    with Changes() as changes, changes:
        autograd.wrap_engine(changes, around)
        x.sum().backward()  # type: ignore[no-untyped-call]
        torch.autograd.grad(x.sum(), x)
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert len(runs) == 2


@torch.library.custom_op("graphreg_canary::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    with torch.enable_grad():
        outside = (x.detach().requires_grad_() * 2).grad_fn
        with autograd.recorded_in_operator():
            inside = (x.detach().requires_grad_() * 2).grad_fn
    recorded.append((outside is not None, inside is not None))
    return x * 2


@torch.library.custom_op("graphreg_canary::derived", mutates_args=())
def derived(x: Tensor) -> Tensor:
    return x * 2


derived.register_autograd(lambda ctx, gradient: gradient * 2)
recorded = list[tuple[bool, bool]]()


def test_recorded_in_operator() -> None:
    """How a custom operator excludes autograd. It concerns the recurrent operator."""
    recorded.clear()
    plain(torch.ones(1, requires_grad=True))
    assert recorded == [(False, True)]


def test_custom_operators() -> None:
    """How autograd names an operator and keeps its formula. It concerns the error of a penalty without a gradient."""
    x = torch.ones(1, requires_grad=True)
    assert {"graphreg_canary::plain", "graphreg_canary::derived"} <= set(autograd.custom_operators())
    without, formula = plain(x), derived(x)  # keep the outputs: up to torch 2.10, a node's name is lost with its output
    assert autograd.has_no_formula(without.grad_fn) and not autograd.has_no_formula(formula.grad_fn)
    assert str(without.grad_fn.name()).endswith("GeneratedBackwardFor_graphreg_canary_plain_defaultBackward")


def test_is_forward_mode() -> None:
    """How a level of forward-mode differentiation is entered. It concerns the refusal to attach penalties at such a level."""
    with forward_ad.dual_level():
        assert autograd.is_forward_mode()
    assert not autograd.is_forward_mode()


def test_storage_number() -> None:
    """How a storage is identified. It concerns the tape of the symbolic front end."""
    for x in (torch.ones(4), torch.ones(4, device="meta"), torch.ones(0)):
        assert autograd.storage_number(x) == autograd.storage_number(x[1:]) == autograd.storage_number(x.untyped_storage())
        assert autograd.storage_number(x) != autograd.storage_number(other := torch.empty_like(x)), other
    with pytest.raises((NotImplementedError, RuntimeError)):
        autograd.storage_number(torch.ones(2, 2).to_sparse())
    assert autograd.storage_of(sparse := torch.ones(2, 2).to_sparse()) == id(sparse)


def test_version_of() -> None:
    """How writes into a tensor are counted. It concerns the front ends."""
    x = torch.ones(4)
    before = autograd.version_of(x)
    x[:2].add_(1)
    assert autograd.version_of(x) == before + 1
    with torch.inference_mode():
        assert autograd.version_of(torch.ones(1).add_(1)) == -1


def test_base_of() -> None:
    """How autograd records the base of a view. It concerns attached penalties."""
    base, other = (torch.arange(4.0, requires_grad=True) * n for n in (1, 10))
    view = base.view(2, 2)[1]
    assert autograd.base_of(view) is base and autograd.base_of(base) is base
    assert torch.equal(autograd.same_view(view, other), other.view(2, 2)[1]) and autograd.base_of(autograd.same_view(view, other)) is other


class Reversed(torch.autograd.Function):
    """Returns a view that has another derivative than torch's views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def test_gradient_hooks() -> None:
    """How the hooks of a leaf are read and replaced. It concerns what a trace and a proof put back of parameters."""
    x, seen = torch.ones(1, requires_grad=True), list[str]()
    never = autograd.gradient_hooks(x)
    assert never == [None, None]
    x.register_hook(lambda gradient: seen.append("before"))  # type: ignore[no-untyped-call]
    x.register_post_accumulate_grad_hook(lambda leaf: seen.append("after"))
    hooks = autograd.gradient_hooks(x)
    contents = [dict(each or ()) for each in hooks]
    assert list(map(len, contents)) == [1, 1]
    autograd.set_gradient_hooks(x, never, [{}, {}])
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert not seen and autograd.gradient_hooks(x) == never
    autograd.set_gradient_hooks(x, hooks, contents)
    x.sum().backward()  # type: ignore[no-untyped-call]
    assert seen == ["before", "after"]


def test_is_plain_data() -> None:
    """Which tensors have data that no code of a subclass gives. It concerns what a trace and a proof put back of parameters."""
    assert autograd.is_plain_data(nn.Parameter(torch.ones(1))) and autograd.is_plain_data(torch.ones(1))
    assert not autograd.is_plain_data(FakeTensorMode().from_tensor(torch.ones(1)))


def test_is_plain_view() -> None:
    """How autograd records which operation made a view. It concerns attached penalties of outputs that share storage."""
    base = torch.arange(4.0, requires_grad=True) * 1
    assert all(map(autograd.is_plain_view, (base.view(2, 2), base[1:], *torch.split(base, 2), *base.unbind())))
    by_function = Reversed.apply(base)  # type: ignore[no-untyped-call]
    assert autograd.base_of(by_function) is base and not autograd.is_plain_view(by_function)


def test_scaler() -> None:
    """How a GradScaler keeps its scale. It concerns attached penalties."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert autograd.scale_tensor(scaler) is None and autograd.first_scale(scaler) == (True, 8.0)
    scaler.scale(torch.ones(()))
    assert float(autograd.scale_tensor(scaler)) == 8.0  # type: ignore[arg-type]
    assert autograd.first_scale(torch.amp.GradScaler("cpu", enabled=False))[0] is False


def test_private_facts() -> None:
    """How private attributes of a tensor are named. It concerns the front ends."""
    assert {*autograd.PRIVATE_FACTS, autograd.PRIVATE_STORAGE, autograd.VERSION} <= set(dir(Tensor))
    assert {autograd.VERSION, "_base", "_grad"} <= autograd.PRIVATE_ATTRIBUTES
    x = torch.zeros(2)
    before = getattr(x, autograd.VERSION)
    x.add_(1)
    assert getattr(x, autograd.VERSION) == before + 1


def test_saved_tensor_hooks() -> None:
    """How hooks on saved tensors are known. It concerns traces in place at a call under such hooks."""
    assert not autograd.has_saved_tensor_hooks()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert autograd.has_saved_tensor_hooks()


def test_before_checkpoints() -> None:
    """How activation checkpointing begins. It concerns the front ends, which refuse checkpointing."""
    for reentrant in (True, False):
        asked = list[int]()
        x = torch.ones(1, requires_grad=True)
        with Changes() as changes, changes:
            checkpointing.before_checkpoints(changes, partial(asked.append, 1))
            checkpoint(torch.sin, x, use_reentrant=reentrant)
        checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert asked == [1], f"use_reentrant={reentrant}"


def test_through_checkpoints() -> None:
    """How a checkpoint calls the function itself. It concerns the symbolic front end: what a model checkpoints becomes blocks."""
    ran, x = list[Any](), torch.ones(1, requires_grad=True)

    def begin(reentrant: bool) -> Any:
        ran.append(reentrant)
        return partial(ran.append, "end")

    for reentrant in (True, False):
        with Changes() as changes, changes:
            checkpointing.through_checkpoints(changes, begin)
            y = checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert ran == [reentrant, "end"] and type(y.grad_fn).__name__ == "SinBackward0", ran
        ran.clear()


def test_next_region() -> None:
    """How Dynamo numbers regions that are recomputed. It concerns masks that are recomputed."""
    first, second = checkpointing.next_region(), checkpointing.next_region()
    assert isinstance(first, int) and first != second


def test_checkpoint_wrappers() -> None:
    """How a wrapper of activation checkpointing keeps its module. It concerns blocks with wrappers around them in a model in place."""
    inner = nn.Linear(1, 1)
    assert checkpointing.checkpoint_wrapped(checkpoint_wrapper(inner)) is inner and checkpointing.checkpoint_wrapped(inner) is None
    assert checkpointing.WRAPPED_MODULE in dict(checkpoint_wrapper(inner).named_children())


def test_write_uncounted() -> None:
    x, weight = torch.ones(2), torch.ones(2, requires_grad=True)
    product = (weight * x).sum()  # keeps x for backward
    autograd.write_uncounted(x, torch.full((2,), 3.0))
    product.backward()
    assert x.tolist() == [3.0, 3.0] and weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]
