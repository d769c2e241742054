"""Penalties that join in backward, for training loops that know of a loss and nothing else."""
from __future__ import annotations

import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from graphreg.errors import GraphRegError, RegularizerError, shown
from graphreg.ir import builds, widest
from graphreg.regularizer import recorded
from graphreg.torch_internals import (
    base_of,
    first_scale,
    is_forward_mode,
    is_functionalized,
    is_plain_view,
    level_of,
    one_level_below,
    same_view,
    scale_tensor,
    storage_number,
    transform_level,
)

Penalties = Literal["return", "attach"]
Scale = float | Tensor | Callable[[], Any] | Any  # Any: a GradScaler, which torch keeps in two places


class AttachRule(nn.Module):
    """Adds the penalties to a scalar ``loss``, or makes their gradient join that of the output's tensors."""

    now: Tensor

    def __init__(self, names: tuple[str, ...], scale: Scale | None, device: torch.device | None = None) -> None:
        super().__init__()
        self.names, self.scale = names, scale
        self.last: dict[str, Tensor] = {}
        # what the scale is at the call that runs: not 0-d, for the reason that a strength is not
        self.register_buffer("now", torch.ones(1, device=device), persistent=False)
        self.fed = False  # whether it is told
        known_to_dynamo()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        known_to_dynamo()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachRule:
        """A copy with the same scale: a GradScaler of its own nobody would update."""
        memo.setdefault(id(self.scale), self.scale)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def told(self) -> str:
        """What the gradient of the penalties is multiplied by, in words."""
        scale = 1 if self.scale is None else self.scale
        if isinstance(scale, (int, float, Tensor)):
            return f"scale {float(scale):g}"
        return f"scaled by {getattr(scale, '__name__', type(scale).__name__)}"

    @property
    def asks(self) -> bool:
        """Whether the scale has to be asked for at each call, of a GradScaler or a function."""
        return not (self.scale is None or isinstance(self.scale, (int, float, Tensor)))

    def feed(self) -> None:
        """Ask for the scale and keep it as a tensor, a new one: an earlier call's may be saved for its backward.

        It is called before a forward, where Dynamo does not look: the first scale of a GradScaler is no tensor yet, and a function's
        number would be compiled in, again for each.
        """
        dtype = widest(self.now.device)
        value = current(self.scale)
        if isinstance(value, Tensor):
            self.now = value.detach().to(self.now.device, dtype, copy=True).view(1)
        else:
            self.now = torch.full((1,), value, dtype=dtype, device=self.now.device)

    def forward(self, outputs: tuple[Any, ...], penalties: tuple[Tensor, ...], to_loss: bool) -> tuple[Any, ...]:
        """The outputs, unchanged but for the gradient that they bring the penalties; ``to_loss``: the one output is a loss to add to."""
        self.last = {name: value.detach() for name, value in zip(self.names, penalties, strict=True)}
        if not penalties:
            return outputs
        total = torch.stack(penalties).sum()
        if to_loss:
            (loss,) = outputs
            if loss.dim():
                raise RegularizerError(
                    f"the output's loss has shape {tuple(loss.shape)}; penalties attach to a scalar. Use penalties='return'."
                )
            return (loss + total.to(loss.dtype),)
        found: list[Tensor] = []
        strange: list[str] = []
        for out in outputs:
            collect(out, found, strange)
        if strange and total.requires_grad and not any(tensor.requires_grad for tensor in found):
            raise RegularizerError(
                f"the model returns a {strange[0]}, and no tensor is found in it for the penalties to attach to. Return tensors, or "
                "tuples, lists, dicts, named tuples or dataclasses of them, or use penalties='return'."
            )
        if not found:
            return outputs
        scale = self.now[0] if self.fed else torch.as_tensor(current(self.scale))
        scale = scale.to(total.device, total.dtype, copy=True)  # it is saved for backward, and a GradScaler writes into its own
        joined = list(join(total, scale, tuple(found)))
        return tuple(rebuilt(out, joined) for out in outputs)


def current(scale: Scale | None) -> Any:
    """The scale at this call: of a GradScaler the present one, as a tensor where it has one already."""
    if scale is None:
        return 1.0
    if hasattr(scale, "get_scale"):
        # get_scale() reads the tensor to a number, which breaks a compiled graph; there is none until the first scale(loss)
        tensor = scale_tensor(scale)
        if tensor is not None:
            return tensor
        enabled, first = first_scale(scale)
        return first if enabled and first is not None else 1.0 if enabled is False else scale.get_scale()
    return scale() if callable(scale) and not isinstance(scale, Tensor) else scale


def collect(value: Any, found: list[Tensor], strange: list[str]) -> None:
    """Append the tensors of an output to ``found``, and the classes of what cannot be looked into to ``strange``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            collect(item, found, strange)
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, found, strange)
    elif is_dataclass(value):
        for field in fields(value):
            collect(getattr(value, field.name), found, strange)
    elif not isinstance(value, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
        strange.append(type(value).__name__)


def rebuilt(value: Any, joined: list[Tensor]) -> Any:
    """The output with tensors from the front of ``joined``, which are taken off, in the place of its own; containers are new ones."""
    if isinstance(value, Tensor):
        return joined.pop(0)
    if isinstance(value, (tuple, list)):
        items = [rebuilt(item, joined) for item in value]
        if type(value) is list:
            return items
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        items_by_key = {key: rebuilt(item, joined) for key, item in value.items()}
        if type(value) is dict:
            return items_by_key
        if type(value) is defaultdict:  # Dynamo copies none
            return defaultdict(value.default_factory, items_by_key)
        new = copy.copy(value)
        for key, item in items_by_key.items():
            new[key] = item
        return new
    if is_dataclass(value) and not isinstance(value, type):
        twin: Any = copy.copy(value)
        for field in fields(value):
            object.__setattr__(twin, field.name, rebuilt(getattr(value, field.name), joined))
        return twin
    return value


def check_penalties(penalties: str) -> None:
    """Refuse an unknown ``penalties``."""
    if penalties not in ("return", "attach"):
        raise RegularizerError(f"penalties={shown(penalties)} is unknown; it is 'return' or 'attach'.")


def check_scale(scale: Scale | None) -> None:
    """Refuse what is no scale."""
    ok = scale is None or hasattr(scale, "get_scale") or callable(scale) or (isinstance(scale, Tensor) and scale.dim() == 0)
    number = isinstance(scale, (int, float)) and 0 < scale < float("inf")
    if not ok and not number:
        raise RegularizerError(
            f"scale={shown(scale)} is not allowed; give a number above 0, a 0-d tensor, a GradScaler, or a function of no argument."
        )


def end_of(output: fx.Node) -> fx.Node:
    """The node that builds the output: the graph's own, or the dataclass or dict of its own type that it returns."""
    value = output.args[0]
    return value if isinstance(value, fx.Node) and builds(value) else output


def loss_of(output: fx.Node) -> fx.Node | None:
    """The output's ``loss``, where it has one."""
    end, value = end_of(output), output.args[0]
    if end is not output:  # built in the graph: a dataclass or named tuple by fields, a dict from a dict
        names: Any = getattr(end.target, "_fields", None) or getattr(end.target, "__dataclass_fields__", ())
        held = next((arg for arg in end.args if isinstance(arg, dict)), None)
        value = dict(zip(names, end.args, strict=False)) | end.kwargs if held is None else held
    found = value.get("loss") if isinstance(value, dict) else getattr(value, "loss", None) if isinstance(value, tuple) else None
    return found if isinstance(found, fx.Node) else None



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
    """``given``: the storages that the arguments of the call have which runs in this thread; None where they are not known."""

    given: frozenset[int] | None = None


_call = _Call()


def know(tensors: Iterable[Tensor] | None) -> frozenset[int] | None:
    """A call begins whose arguments these are (None: they are not known); gives what is to be put back by ``forget`` behind it."""
    before, _call.given = _call.given, None if tensors is None else frozenset(map(storage_of, tensors))
    return before


def forget(before: frozenset[int] | None) -> None:
    """The call has ended."""
    _call.given = before


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
    return in_place(apply, tensors, live, _call.given)


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
    found: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        found.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
    return {key: list(group.values()) for key, group in found.items()}


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
