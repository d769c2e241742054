"""Attached penalties (``penalties="attach"``): their gradient joins the output's backward pass, so that the training loop stays as it is.

The first half is the runtime module, ``AttachRule``, with the scale and with what finds the tensors and the loss in an output. The second
half, from ``join`` on, is the autograd function beneath it: the identity on the outputs, whose backward gives the penalties their
gradient, and the care that views, in-place writes, torch.func and AOTAutograd need.
"""
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
from torch._C._functorch import get_unwrapped, maybe_current_level, maybe_get_level
from torch.autograd import forward_ad

from graphreg.errors import GraphRegError, RegularizerError, shown
from graphreg.ir import builds, widest
from graphreg.regularizer import recorded

Penalties = Literal["return", "attach"]
Scale = float | Tensor | Callable[[], Any] | Any  # Any: a GradScaler, which torch keeps in two places


class AttachRule(nn.Module):
    """Adds the penalties to the output's scalar loss, or ties them to the output's tensors so that backward reaches them.

    Attributes:
        names: The penalties' names, in order.
        scale: What their gradient is multiplied by, as the user gave it; None is 1.
        last: The penalties of the last call by name, detached.
        now: The scale of the running call, shape [1]; it counts only while ``fed``.
        fed: Whether ``feed`` has set ``now`` for the running call.
    """

    now: Tensor

    def __init__(self, names: tuple[str, ...], scale: Scale | None, device: torch.device | None = None) -> None:
        super().__init__()
        self.names, self.scale = names, scale
        self.last: dict[str, Tensor] = {}
        self.register_buffer("now", torch.ones(1, device=device), persistent=False)  # not 0-d, for the reason given at Leaf
        self.fed = False
        known_to_dynamo()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        known_to_dynamo()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachRule:
        """A copy that shares the scale: nobody would update a copy of a GradScaler."""
        memo.setdefault(id(self.scale), self.scale)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def told(self) -> str:
        """Describe what the gradient of the penalties is multiplied by."""
        scale = 1 if self.scale is None else self.scale
        if isinstance(scale, (int, float, Tensor)):
            return f"scale {float(scale):g}"
        return f"scaled by {getattr(scale, '__name__', type(scale).__name__)}"

    @property
    def asks(self) -> bool:
        """Whether the scale must be read anew at each call, from a GradScaler or a function."""
        return not (self.scale is None or isinstance(self.scale, (int, float, Tensor)))

    def feed(self) -> None:
        """Read the scale into a new tensor: that of an earlier call may be saved for its backward.

        It is called before a forward, outside of what Dynamo traces: a GradScaler has no tensor before its first use, and the number
        that a function returns would be compiled in as a constant, with a recompilation for each new one.
        """
        dtype = widest(self.now.device)
        value = current(self.scale)
        if isinstance(value, Tensor):
            self.now = value.detach().to(self.now.device, dtype, copy=True).view(1)
        else:
            self.now = torch.full((1,), value, dtype=dtype, device=self.now.device)

    def forward(self, outputs: tuple[Any, ...], penalties: tuple[Tensor, ...], to_loss: bool) -> tuple[Any, ...]:
        """Return the outputs with the same values, so that a backward pass from them reaches the penalties.

        ``to_loss``: the one output is the loss, to which the penalties are added.
        """
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
        scale = scale.to(total.device, total.dtype, copy=True)  # it is saved for backward, and a GradScaler updates its own in place
        joined = list(join(total, scale, tuple(found)))
        return tuple(rebuilt(out, joined) for out in outputs)


def current(scale: Scale | None) -> Any:
    """Return the value of the scale at this call; that of a GradScaler as a tensor once it has one."""
    if scale is None:
        return 1.0
    if hasattr(scale, "get_scale"):
        # get_scale() reads the tensor into a Python number, which breaks a compiled graph; before the first scale(loss) there is no tensor
        tensor = getattr(scale, "_scale", None)
        if tensor is not None:
            return tensor
        # the attributes, because Dynamo does not trace torch.amp's functions
        enabled, first = getattr(scale, "_enabled", None), getattr(scale, "_init_scale", None)
        return first if enabled and first is not None else 1.0 if enabled is False else scale.get_scale()
    return scale() if callable(scale) and not isinstance(scale, Tensor) else scale


def collect(value: Any, found: list[Tensor], strange: list[str]) -> None:
    """Append the tensors of an output to ``found``, and to ``strange`` the class names of values that may hide tensors."""
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
    """Return a copy of the output whose tensors are replaced, in order, by those popped from the front of ``joined``."""
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
        if type(value) is defaultdict:  # Dynamo cannot trace copy.copy of one
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
    """Raise RegularizerError for an unknown ``penalties=``."""
    if penalties not in ("return", "attach"):
        raise RegularizerError(f"penalties={shown(penalties)} is unknown; it is 'return' or 'attach'.")


def check_scale(scale: Scale | None) -> None:
    """Raise RegularizerError for a ``scale=`` that is not a positive number, a 0-d tensor, a GradScaler or a function."""
    ok = scale is None or hasattr(scale, "get_scale") or callable(scale) or (isinstance(scale, Tensor) and scale.dim() == 0)
    number = isinstance(scale, (int, float)) and 0 < scale < float("inf")
    if not ok and not number:
        raise RegularizerError(
            f"scale={shown(scale)} is not allowed; give a number above 0, a 0-d tensor, a GradScaler, or a function of no argument."
        )


def end_of(output: fx.Node) -> fx.Node:
    """Return the node that builds the output: the graph's output node, or the call that makes the dataclass or dict that it returns."""
    value = output.args[0]
    return value if isinstance(value, fx.Node) and builds(value) else output


def loss_of(output: fx.Node) -> fx.Node | None:
    """Return the node of the output's ``loss``, or None if it has none."""
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


Way = Literal["alias", "copy", "view"]  # how ``_Attached`` returns a tensor: see ``identity``
Apply = Callable[[Sequence[Way], Sequence[Tensor]], tuple[Tensor, ...]]


class _Call(threading.local):
    """The call that runs in this thread. ``given``: the storages of its arguments; None where they are not known."""

    given: frozenset[int] | None = None


_call = _Call()


def know(tensors: Iterable[Tensor] | None) -> frozenset[int] | None:
    """Begin a call with these arguments (None: they are not known). Returns what ``forget`` needs to end it."""
    before, _call.given = _call.given, None if tensors is None else frozenset(map(storage_of, tensors))
    return before


def forget(before: frozenset[int] | None) -> None:
    """End a call: restore what ``know`` returned at its beginning."""
    _call.given = before


def join(total: Tensor, scale: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the same values, tied to ``total`` []: a backward pass from any of the tensors gives it the gradient ``scale`` []."""
    live = list({id(tensor): tensor for tensor in tensors if recorded(tensor)}.values())
    if _has_tangent(total):
        raise GraphRegError(_FORWARD_MODE)
    if not live or not recorded(total):
        return tuple(tensors)

    def apply(ways: Sequence[Way], entering: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Attached.apply(total, scale, tuple(ways), *entering)  # type: ignore[no-any-return,no-untyped-call]

    if maybe_current_level() is not None:  # torch.func's tensors have no storage
        joined = dict(zip(map(id, live), apply(["view"] * len(live), live), strict=True))
        return tuple(joined.get(id(tensor), tensor) for tensor in tensors)
    if _functionalized():
        return _apart(apply, tensors, live)
    return in_place(apply, tensors, live, _call.given)


@cache
def known_to_dynamo() -> None:
    """Make ``join`` opaque to Dynamo, which cannot trace its comparison of storages, nor the same tensor passed twice."""
    torch.compiler.allow_in_graph(join)  # type: ignore[no-untyped-call]


def refuse_twice(below: Tensor | None = None) -> None:
    """Raise GraphRegError in a backward pass that is itself recorded by autograd, to be differentiated again.

    ``below``: under a transform of torch.func, the penalty one level below. The transform always records its own backward pass; only
    the level below says whether anybody differentiates that pass.
    """
    if torch.is_grad_enabled() and (below is None or recorded(below)):
        hint = "" if below is None else " If the gradient is not differentiated again, give torch.func the parameters detached."
        raise GraphRegError(TWICE + hint)


def _has_tangent(total: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(total).tangent is not None  # type: ignore[no-untyped-call]


def _functionalized() -> bool:
    """Whether AOTAutograd is tracing. Outputs that share storage are then rebuilt outside of its graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def in_place(apply: Apply, tensors: Sequence[Tensor], live: Sequence[Tensor], known: frozenset[int] | None) -> tuple[Tensor, ...]:
    """Join in eager: outputs keep their storage, and may be written into as the model's own may.

    torch forbids writes into a view that a custom function returned. So the function returns the common base of the outputs that share
    storage, as an alias that is not a view, and the outputs are made views of that. A tensor that shares storage with an argument of
    the call (``known``) or with a parameter is returned as a view all the same: autograd could not tell the caller's tensor of a write.
    """
    outside = {id(t) for t in live if known is None or storage_of(t) in known or _root(t).is_leaf}
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
    """Join under AOTAutograd: outputs get storage of their own.

    AOTAutograd rebuilds outputs that share storage with each other at run time, as views of their common base. That base would be the
    model's, from before the join, and the penalty's gradient would be lost. So the base itself is copied behind the join, and the outputs
    are views of the copy. A lone output needs the copy too: an alias has a version counter of its own at run time, so autograd would
    not notice that a user writes into a tensor saved for backward. What shares storage with an input or a parameter stays a view of
    it: AOTAutograd does not rebuild a view that a custom function made.
    """
    groups = _groups(tensors)
    entering, sources = list[Tensor](), dict[int, Tensor]()  # by the tensor's id: what joins for it
    for tensor in live:
        group = groups[storage_of(tensor)]
        base = tensor if len(group) == 1 else _base(group)
        if base is not None and (base.is_leaf or torch.empty_like(base).stride() != base.stride()):
            base = None  # a copy cannot replace a leaf, nor a base whose strides it would not have
        source = sources[id(tensor)] = tensor if base is None else base
        if all(source is not other for other in entering):
            entering.append(source)
    ways: list[Way] = ["view" if _root(source).is_leaf else "copy" for source in entering]
    joined = dict(zip(map(id, entering), apply(ways, entering), strict=True))
    made = {id(tensor): _like(tensor, sources[id(tensor)], joined[id(sources[id(tensor)])]) for tensor in live}
    for tensor in tensors:
        others = [other for other in live if storage_of(other) == storage_of(tensor)]
        if id(tensor) not in made:  # detached: it shares the copy's storage where it shared the original's
            same = next((made[id(other)] for other in others if _geometry(other) == _geometry(tensor)), None)
            made[id(tensor)] = same.detach() if same is not None else tensor.clone() if others else tensor
    return tuple(made[id(tensor)] for tensor in tensors)


def storage_of(tensor: Tensor) -> int:
    """Return an integer that identifies a tensor's storage; a tensor without one (sparse, or torch.func's) is identified by itself."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _groups(tensors: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """Group the tensors by storage, each tensor once."""
    found: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        found.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
    return {key: list(group.values()) for key, group in found.items()}


def _root(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _base(group: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor that all of a group are views of and can be rebuilt from, or None."""
    bases = list({id(base): base for base in map(_root, (t for t in group if t.requires_grad))}.values())
    if len(bases) == 1 and bases[0].requires_grad and all(_is_plain_view(t) for t in group if t.requires_grad and t is not bases[0]):
        return bases[0]
    return None


def _is_plain_view(tensor: Tensor) -> bool:
    """Whether only view operations lead from the base to it. A custom function may return a view and define another derivative
    (gradient reversal), which a rebuilt view would lose."""
    kinds = torch._C._autograd.CreationMeta
    return torch._C._autograd._get_creation_meta(tensor) in (kinds.DEFAULT, kinds.MULTI_OUTPUT_NODE)


def _like(tensor: Tensor, source: Tensor, joined: Tensor) -> Tensor:
    """Return the view of ``joined`` that corresponds to ``tensor`` as a view of ``source``."""
    if tensor is source or _geometry(tensor) == _geometry(source):
        return joined
    view: Tensor = tensor._view_func(joined)  # type: ignore[attr-defined]
    return view


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def identity(ways: Sequence[Way], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs as a custom function may: each as an alias (same storage, not a view), as a copy, or as a view."""
    by_way: dict[Way, Callable[[Tensor], Tensor]] = {"alias": Tensor.detach, "copy": Tensor.clone, "view": lambda out: out.view_as(out)}
    return tuple(by_way[way](out) for way, out in zip(ways, outputs, strict=True))


class _Attached(torch.autograd.Function):
    """The identity on the outputs; its backward gives the penalty the gradient ``scale``, once a pass."""

    @staticmethod
    def forward(total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        return identity(ways, outputs)

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
    def vmap(info: Any, in_dims: tuple[Any, ...], total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Any, ...]:
        """Each element of the batch is a call of its own, so the sum of their penalties joins."""
        if in_dims[1] is not None:
            raise GraphRegError("penalties='attach' under torch.vmap: the scale differs from call to call. Scale the loss outside.")
        summed = total * info.batch_size if in_dims[0] is None else total.sum()
        return _Attached.apply(summed, scale, ways, *outputs), tuple(in_dims[3:])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GraphRegError(_FORWARD_MODE)
