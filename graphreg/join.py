"""The join: an identity on the output's tensors, through which a penalty's gradient enters a backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, maybe_current_level, maybe_get_level
from torch.autograd import forward_ad

from graphreg.errors import GraphRegError
from graphreg.pull import recorded

TWICE = (
    "penalties='attach': this backward pass is itself to be differentiated (create_graph=True), as for a gradient penalty. Its gradient "
    "contains that of the attached penalties, and going back through it would add theirs once more. Regularize with penalties='return' "
    "and add the penalties to the loss."
)
_FORWARD_MODE = (
    "penalties='attach': penalties join in a backward pass, and forward-mode differentiation (torch.func.jvp, jacfwd) has none, so they "
    "would be missing. Regularize with penalties='return', or use reverse mode (torch.func.vjp, jacrev)."
)


def join(total: Tensor, scale: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors with the same values; a backward pass from any that needs a gradient gives ``total`` [] the gradient ``scale`` []."""
    live = list({id(tensor): tensor for tensor in tensors if recorded(tensor)}.values())
    if _has_tangent(total):
        raise GraphRegError(_FORWARD_MODE)
    if not live or not recorded(total):
        return tuple(tensors)
    if maybe_current_level() is None and _functionalized():
        return _apart(total, scale, tensors, live)
    joined = dict(zip(map(id, live), _Join.apply(total, scale, False, *live), strict=True))  # type: ignore[no-untyped-call]
    return tuple(joined.get(id(tensor), tensor) for tensor in tensors)


@cache
def known_to_dynamo() -> None:
    """Make Dynamo keep ``join`` whole: it compares storages, which Dynamo does not, and takes the same tensor twice."""
    torch.compiler.allow_in_graph(join)  # type: ignore[no-untyped-call]


def refuse_twice(below: Tensor | None = None) -> None:
    """Raise GraphRegError in a backward pass that autograd records.

    ``below``: under a transform of torch.func, the penalty as it is one level below. The transform always records its own backward
    pass; whether anybody differentiates that, the level below tells.
    """
    if torch.is_grad_enabled() and (below is None or recorded(below)):
        hint = "" if below is None else " If the gradient is not differentiated again, give torch.func the parameters detached."
        raise GraphRegError(TWICE + hint)


def _has_tangent(total: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(total).tangent is not None  # type: ignore[no-untyped-call]


def _functionalized() -> bool:
    """Whether AOTAutograd traces: then what shares storage is made anew outside of its graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def _apart(total: Tensor, scale: Tensor, tensors: Sequence[Tensor], live: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The join for AOTAutograd, of values with storage of their own.

    Outputs that share storage with each other AOTAutograd makes anew at run time, as views of their common base, which would be the
    model's, before the join: the penalty's gradient was lost. So the base itself is copied behind the join, and the outputs are views of
    the copy. Of a lone output the copy is no waste either: an alias has a version counter of its own at run time, so that a user's write
    into it would go unseen into what is saved for backward. What shares storage with an input or a parameter stays a view of that:
    AOTAutograd leaves a view that a custom function made alone.
    """
    storages = {id(tensor): tensor.untyped_storage()._cdata for tensor in tensors}
    groups: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(storages[id(tensor)], {})[id(tensor)] = tensor
    entering: list[Tensor] = []
    sources: dict[int, Tensor] = {}  # by the tensor's id: what joins for it
    for tensor in live:
        group = list(groups[storages[id(tensor)]].values())
        source = tensor if len(group) == 1 else _base(group)
        sources[id(tensor)] = source if source is not None else tensor
        if all(sources[id(tensor)] is not other for other in entering):
            entering.append(sources[id(tensor)])
    joined = dict(zip(map(id, entering), _Join.apply(total, scale, True, *entering), strict=True))  # type: ignore[no-untyped-call]
    made = {id(tensor): _like(tensor, sources[id(tensor)], joined[id(sources[id(tensor)])]) for tensor in live}
    for tensor in tensors:
        others = [other for other in live if storages[id(other)] == storages[id(tensor)]]
        if id(tensor) not in made:  # detached: it shares the copy's storage as it shared the original's, or none
            same = next((made[id(other)] for other in others if _geometry(other) == _geometry(tensor)), None)
            made[id(tensor)] = same.detach() if same is not None else tensor.clone() if others else tensor
    return tuple(made[id(tensor)] for tensor in tensors)


def _base(group: Sequence[Tensor]) -> Tensor | None:
    """What all of a group are views of, if a copy of it can stand for it."""
    bases = list({id(base): base for base in (t if t._base is None else t._base for t in group if t.requires_grad)}.values())
    if len(bases) == 1 and bases[0].requires_grad and not bases[0].is_leaf and torch.empty_like(bases[0]).stride() == bases[0].stride():
        return bases[0]
    return None


def _like(tensor: Tensor, source: Tensor, joined: Tensor) -> Tensor:
    """The view of ``joined`` that ``tensor`` is of ``source``."""
    if tensor is source or _geometry(tensor) == _geometry(source):
        return joined
    view: Tensor = tensor._view_func(joined)  # type: ignore[attr-defined]
    return view


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


class _Join(torch.autograd.Function):
    """The identity on the outputs; in backward the penalty gets the gradient ``scale``, once a pass.

    ``apart``: outputs that the graph makes have storage of their own.
    """

    @staticmethod
    def forward(total: Tensor, scale: Tensor, apart: bool, *outputs: Tensor) -> tuple[Tensor, ...]:
        inputs = [(out if out._base is None else out._base).is_leaf for out in outputs]
        return tuple(out.clone() if apart and not given else out.view_as(out) for out, given in zip(outputs, inputs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        total, scale = inputs[:2]
        ctx.save_for_backward(scale)
        level = maybe_current_level()
        ctx.below = None if level is None else get_unwrapped(total) if maybe_get_level(total) == level else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice(ctx.below)
        (scale,) = ctx.saved_tensors
        return (scale, None, None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], total: Tensor, scale: Tensor, apart: bool, *outputs: Tensor) -> tuple[Any, ...]:
        """Each of the batch is a call of its own, whose penalty joins: their sum."""
        if in_dims[1] is not None:
            raise GraphRegError("penalties='attach' under torch.vmap: the scale differs from call to call. Scale the loss outside.")
        summed = total * info.batch_size if in_dims[0] is None else total.sum()
        return _Join.apply(summed, scale, apart, *outputs), tuple(in_dims[3:])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GraphRegError(_FORWARD_MODE)
