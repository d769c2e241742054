"""The join: an identity on the output's tensors, through which a penalty's gradient enters a backward pass."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphreg.errors import GraphRegError
from graphreg.regularizer import recorded
from graphreg.torch_internals import (
    base_of,
    is_forward_mode,
    is_functionalized,
    is_plain_view,
    level_of,
    one_level_below,
    same_view,
    storage_number,
    transform_level,
)

TWICE = (
    "penalties='attach': this backward pass is itself to be differentiated (create_graph=True), as for a gradient penalty. Its gradient "
    "contains that of the attached penalties, and going back through it would add theirs once more. Regularize with penalties='return' "
    "and add the penalties to the loss."
)
_FORWARD_MODE = (
    "penalties='attach': penalties join in a backward pass, and forward-mode differentiation (torch.func.jvp, jacfwd) has none, so they "
    "would be missing. Regularize with penalties='return', or use reverse mode (torch.func.vjp, jacrev)."
)


Way = Literal["alias", "copy", "view"]  # of what joins: see ``_Attached``
Apply = Callable[[Sequence[Way], Sequence[Tensor]], tuple[Tensor, ...]]


class _Call(threading.local):
    """``storages``: the storages that the arguments of the call have which runs in this thread; None where they are not known."""

    storages: frozenset[int] | None = None


_call = _Call()


def know(tensors: Iterable[Tensor] | None) -> frozenset[int] | None:
    """A call begins whose arguments these are (None: they are not known); gives what is to be put back by ``forget`` behind it."""
    before, _call.storages = _call.storages, None if tensors is None else frozenset(map(storage_of, tensors))
    return before


def forget(before: frozenset[int] | None) -> None:
    """The call has ended."""
    _call.storages = before


def join(total: Tensor, scale: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors with the same values; a backward pass from any that needs a gradient gives ``total`` [] the gradient ``scale`` []."""
    live = list({id(tensor): tensor for tensor in tensors if recorded(tensor)}.values())
    if _has_tangent(total):
        raise GraphRegError(_FORWARD_MODE)
    if not live or not recorded(total):
        return tuple(tensors)

    def apply(ways: Sequence[Way], entering: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Attached.apply(total, scale, tuple(ways), *entering)  # type: ignore[no-any-return,no-untyped-call]

    if transform_level() is not None:  # torch.func's tensors have no storage
        joined = dict(zip(map(id, live), apply(["view"] * len(live), live), strict=True))
        return tuple(joined.get(id(tensor), tensor) for tensor in tensors)
    if is_functionalized():
        return _apart(apply, tensors, live)
    return in_place(apply, tensors, live, _call.storages)


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
    return is_forward_mode() and forward_ad.unpack_dual(total).tangent is not None  # type: ignore[no-untyped-call]


def in_place(apply: Apply, tensors: Sequence[Tensor], live: Sequence[Tensor], known: frozenset[int] | None) -> tuple[Tensor, ...]:
    """The join for eager: outputs stay in the storage that they have, and may be written into as the model's own.

    What a custom function returns as a view torch lets nobody write into. So it returns the common base of the outputs that share
    storage, as an alias that is no view, and the outputs are views of that. What shares storage with an argument of the call
    (``known``) or with a parameter is returned as a view all the same: of a write into it the caller's own tensor would not know.
    """
    outside = {id(t) for t in live if known is None or storage_of(t) in known or base_of(t).is_leaf}
    groups = _groups([t for t in live if id(t) not in outside])
    entering, ways, sources = list[Tensor](), list[Way](), dict[int, Tensor]()
    for tensor in live:
        group = groups.get(storage_of(tensor), []) if id(tensor) not in outside else []
        base = tensor if len(group) == 1 else _base(group)
        source = sources[id(tensor)] = tensor if base is None else base
        if all(source is not other for other in entering):
            entering.append(source)
            ways.append("alias" if base is not None and group else "view")
    joined = dict(zip(map(id, entering), apply(ways, entering), strict=True))
    made = {id(tensor): _like(tensor, sources[id(tensor)], joined[id(sources[id(tensor)])]) for tensor in live}
    return tuple(made.get(id(tensor), tensor) for tensor in tensors)


def _apart(apply: Apply, tensors: Sequence[Tensor], live: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The join for AOTAutograd, of values with storage of their own.

    Outputs that share storage with each other AOTAutograd makes anew at run time, as views of their common base, which would be the
    model's, before the join: the penalty's gradient was lost. So the base itself is copied behind the join, and the outputs are views of
    the copy. Of a lone output the copy is no waste either: an alias has a version counter of its own at run time, so that a user's write
    into it would go unseen into what is saved for backward. What shares storage with an input or a parameter stays a view of that:
    AOTAutograd leaves a view that a custom function made alone.
    """
    groups = _groups(tensors)
    entering, sources = list[Tensor](), dict[int, Tensor]()  # by the tensor's id: what joins for it
    for tensor in live:
        group = groups[storage_of(tensor)]
        base = tensor if len(group) == 1 else _base(group)
        if base is not None and (base.is_leaf or torch.empty_like(base).stride() != base.stride()):
            base = None  # a copy cannot stand for it
        source = sources[id(tensor)] = tensor if base is None else base
        if all(source is not other for other in entering):
            entering.append(source)
    ways: list[Way] = ["view" if base_of(source).is_leaf else "copy" for source in entering]
    joined = dict(zip(map(id, entering), apply(ways, entering), strict=True))
    made = {id(tensor): _like(tensor, sources[id(tensor)], joined[id(sources[id(tensor)])]) for tensor in live}
    for tensor in tensors:
        others = [other for other in live if storage_of(other) == storage_of(tensor)]
        if id(tensor) not in made:  # detached: it shares the copy's storage as it shared the original's, or none
            same = next((made[id(other)] for other in others if _geometry(other) == _geometry(tensor)), None)
            made[id(tensor)] = same.detach() if same is not None else tensor.clone() if others else tensor
    return tuple(made[id(tensor)] for tensor in tensors)


def storage_of(tensor: Tensor) -> int:
    """What tells its storage from others; a tensor without one (sparse, or torch.func's) stands for itself."""
    try:
        return storage_number(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _groups(tensors: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """The tensors by storage, each once."""
    by_storage: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
    return {key: list(group.values()) for key, group in by_storage.items()}


def _base(group: Sequence[Tensor]) -> Tensor | None:
    """What all of a group are views of, and can be made views of again."""
    bases = list({id(base): base for base in map(base_of, (t for t in group if t.requires_grad))}.values())
    if len(bases) == 1 and bases[0].requires_grad and all(is_plain_view(t) for t in group if t.requires_grad and t is not bases[0]):
        return bases[0]
    return None


def _like(tensor: Tensor, source: Tensor, joined: Tensor) -> Tensor:
    """The view of ``joined`` that ``tensor`` is of ``source``."""
    if tensor is source or _geometry(tensor) == _geometry(source):
        return joined
    return same_view(tensor, joined)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def identity(ways: Sequence[Way], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, as a custom function may return them: each in the storage that it has, and no view, or as a copy, or as a view."""
    by_way: dict[Way, Callable[[Tensor], Tensor]] = {"alias": Tensor.detach, "copy": Tensor.clone, "view": lambda out: out.view_as(out)}
    return tuple(by_way[way](out) for way, out in zip(ways, outputs, strict=True))


class _Attached(torch.autograd.Function):
    """The identity on the outputs; in backward the penalty gets the gradient ``scale``, once a pass."""

    @staticmethod
    def forward(total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        return identity(ways, outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        total, scale = inputs[:2]
        ctx.save_for_backward(scale)
        level = transform_level()
        ctx.below = None if level is None else one_level_below(total) if level_of(total) == level else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice(ctx.below)
        (scale,) = ctx.saved_tensors
        return (scale, None, None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Any, ...]:
        """Each of the batch is a call of its own, whose penalty joins: their sum."""
        if in_dims[1] is not None:
            raise GraphRegError("penalties='attach' under torch.vmap: the scale differs from call to call. Scale the loss outside.")
        summed = total * info.batch_size if in_dims[0] is None else total.sum()
        return _Attached.apply(summed, scale, ways, *outputs), tuple(in_dims[3:])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GraphRegError(_FORWARD_MODE)
