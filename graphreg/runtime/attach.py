"""Attached penalties (``penalties="attach"``): their gradient joins the output's backward pass, so the training loop needs no change.

``AttachRule`` is the runtime module. The functions below it read the scale, find and replace the tensors in an output, and check the
options. ``gradient_join.py`` has the autograd function that ``AttachRule`` calls.
"""
from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from graphreg.errors import RegularizerError, shown
from graphreg.ir.precision import widest
from graphreg.runtime.gradient_join import join
from graphreg.runtime.unfinished import counted
from graphreg.torch_internals.autograd import first_scale, scale_tensor
from graphreg.torch_internals.dynamo import graph_break, traces_objects
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.torch_modes import is_exporting

Penalties = Literal["return", "attach"]
Scale = float | Tensor | Callable[[], Any] | Any  # Any: a GradScaler, of which torch has several classes, or a CallScale


class AttachRule(nn.Module):
    """Adds the penalties to the output's scalar loss, or joins them to the output's tensors so that backward reaches them.

    Attributes:
        names: The penalties' names, in order.
        scale: What gives the factor for the gradient of the penalties: a number, a 0-d tensor, a GradScaler, a function without arguments
            or a ``CallScale``; None means 1.
        last: The penalties of the last call by name, detached.
        now: In the running call, the factor for the gradients of penalties that join the output's tensors, shape [1]. Used only while
            ``fed`` is True.
        share: In the running call, the factor for penalties that are added to a loss, shape [1]. Used only while ``fed`` is True.
        reads: The names of the model's inputs on which the loss depends, or, if the output has none, any value in the output. An input
            whose value the graph has fixed is among them, because nothing is known of it.
        fed: Whether ``feed`` has set ``now`` and ``share`` for the running call.
        apart: If it is a dict, the penalties of a call are put into it, by name, and not attached: ``graphreg.effect`` differentiates each
            by itself.
    """

    apart: dict[str, Tensor] | None = None

    now: Tensor
    share: Tensor

    def __init__(
        self, names: tuple[str, ...], scale: Scale | None, device: torch.device | None = None, reads: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.names, self.scale, self.reads = names, scale, reads
        self.last: dict[str, Tensor] = {}
        self.register_buffer("now", torch.ones(1, device=device), persistent=False)  # not 0-d: see RuntimeModule
        self.register_buffer("share", torch.ones(1, device=device), persistent=False)
        self.fed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachRule:
        """Return a copy that shares the scale: nobody would update a copy of a GradScaler."""
        memo.setdefault(id(self.scale), self.scale)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})  # type: ignore[no-untyped-call]
        return new

    def describe_scale(self) -> str:
        """Describe the factor for the gradient of the penalties."""
        scale = 1 if self.scale is None else self.scale
        if isinstance(scale, (int, float, Tensor)):
            return f"scale {float(scale):g}"
        return f"scaled by {getattr(scale, '__name__', type(scale).__name__)}"

    @property
    def asks(self) -> bool:
        """Whether the scale must be read anew at each call, because it is a GradScaler, a function or a ``CallScale``."""
        return not (self.scale is None or isinstance(self.scale, (int, float, Tensor)))

    def feed(self, args: Any = (), kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Read the scale for a call with these arguments, and store the two factors in ``now`` and ``share``.

        The factors are stored in new tensors, because the tensors of an earlier call may be saved for the backward pass of that call.

        This method runs before the forward, outside of the code that Dynamo traces, for two reasons. A GradScaler has no tensor before its
        first use. If the scale is a function, Dynamo would treat the number that the function returns as a constant, and recompile for
        each new number.
        """
        self.now, self.share = (self._fed(value) for value in factors(self.scale, args, kwargs, self.reads))

    def _fed(self, value: Any) -> Tensor:
        dtype = widest(self.now.device)
        if isinstance(value, Tensor):
            return value.detach().to(self.now.device, dtype, copy=True).view(1)
        return torch.full((1,), value, dtype=dtype, device=self.now.device)

    def _take_back(self, before: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        self.last = before if self.last is made else self.last

    def forward(self, outputs: tuple[Any, ...], penalties: tuple[Tensor, ...], to_loss: bool) -> tuple[Any, ...]:
        """Return the outputs, from which a backward pass now reaches the penalties.

        ``to_loss``: whether ``outputs`` has one element, the loss. The penalties are then added to the loss; otherwise no output changes
        its value.
        """
        if not is_exporting():  # the program has no attributes to assign, and the values are fake tensors
            before, self.last = self.last, {name: value.detach() for name, value in zip(self.names, penalties, strict=True)}
            if not is_compiling():
                counted(partial(self._take_back, before, self.last))
        if self.apart is not None:
            self.apart.update(zip(self.names, penalties, strict=True))
            return outputs
        if not penalties:
            return outputs
        total = torch.stack(penalties).sum()
        if to_loss:
            (loss,) = outputs
            if loss.dim():
                raise RegularizerError(
                    f"the output's loss has shape {tuple(loss.shape)}; penalties attach to a scalar. Use penalties='return'."
                )
            if not loss.dtype.is_floating_point and not loss.dtype.is_complex:
                raise RegularizerError(
                    f"the output's loss is {loss.dtype}, to which no penalty can be added: it would be rounded, and has no gradient. Give "
                    "this field of the output another name, or use penalties='return'."
                )
            if torch.is_grad_enabled() and total.requires_grad and not loss.requires_grad:
                raise RegularizerError(
                    "the output's loss has no gradient (is it detached?), so training does not go through it, and would miss the penalties "
                    "that are added to it. Give this field of the output another name, or use penalties='return'."
                )
            if self.training and self.scale is not None and not hasattr(self.scale, "get_scale"):  # an eval loss is not scaled
                total = total * _as(total, self.share[0] if self.fed else factors(self.scale, reads=self.reads)[1])
                added = None if is_compiling() else getattr(self.scale, "added", None)
                if added is not None and total.requires_grad:
                    added(total)
            return (loss + total.to(loss.dtype),)
        tensors: list[Tensor] = []
        strange: list[str] = []
        for out in outputs:
            collect(out, tensors, strange)
        if strange and total.requires_grad and not any(tensor.requires_grad for tensor in tensors):
            raise RegularizerError(
                f"the model returns a {strange[0]}, and no tensor is found in it for the penalties to attach to. Return tensors, or "
                "tuples, lists, dicts, named tuples or dataclasses of them, or use penalties='return'."
            )
        if not tensors:
            return outputs
        scale = _as(total, self.now[0] if self.fed else factors(self.scale, reads=self.reads)[0])
        joined = list(join(total, scale, tuple(tensors)))
        return tuple([rebuilt(out, joined) for out in outputs])  # no generator: in one, Dynamo of torch 2.10 loses the message of a break


def _as(like: Tensor, value: Any) -> Tensor:
    """Return a factor, a number or a 0-d tensor, as a new 0-d tensor of the dtype and on the device of ``like``."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype, copy=True)  # a copy for backward: a GradScaler updates its tensor in place
    return torch.full((), value, dtype=like.dtype, device=like.device)  # not like.new_full: under vmap, that has a value for each row


class CallScale(Protocol):
    """A scale that depends on the arguments of a call."""

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], reads: Set[str]) -> tuple[Any, Any]:
        """Return two factors: for the gradients of penalties that join the output's tensors, and for penalties that are added to a loss.

        ``reads``: the names of the inputs on which the loss depends; see ``AttachRule``.
        """

    def added(self, total: Tensor) -> None:
        """Take note of the sum of the penalties that an eager call in train mode adds to the loss."""


def factors(
    scale: Scale | None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = MappingProxyType({}), reads: Set[str] = frozenset()
) -> tuple[Any, Any]:
    """Return two factors: for the gradients of penalties that join the output's tensors, and for penalties that are added to a loss.

    For a GradScaler, the second factor is 1, because the GradScaler scales the loss after the penalties have been added to it.
    """
    if scale is not None and hasattr(scale, "of_call"):
        gradient, share = scale.of_call(args, kwargs, reads)
        return gradient, share
    value = current(scale)
    return value, 1.0 if scale is None or hasattr(scale, "get_scale") else value


def current(scale: Scale | None) -> Any:
    """Return the present value of the scale. For a GradScaler, this is its tensor, or a number as long as it has no tensor."""
    if scale is None:
        return 1.0
    if hasattr(scale, "get_scale"):
        # get_scale() calls item() on the tensor, which causes a graph break. A GradScaler has no tensor before its first scale(loss).
        tensor = scale_tensor(scale)
        if tensor is not None:
            return tensor
        enabled, first = first_scale(scale)
        return first if enabled and first is not None else 1.0 if enabled is False else scale.get_scale()
    return scale() if callable(scale) and not isinstance(scale, Tensor) else scale


# Classes of outputs that contain no tensor. ``collect`` tests for them before it calls is_dataclass, because Dynamo of torch 2.10 cannot
# trace is_dataclass(None).
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def collect(value: Any, tensors: list[Tensor], strange: list[str]) -> None:
    """Append an output's tensors to ``tensors``, and to ``strange`` the class name of each value that cannot be searched for tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            collect(item, tensors, strange)
    elif isinstance(value, dict):
        for item in value.values():
            collect(item, tensors, strange)
    elif isinstance(value, _PLAIN):
        return
    elif is_dataclass(value):
        for field in fields(value):
            collect(getattr(value, field.name), tensors, strange)
    else:
        strange.append(type(value).__name__)


def rebuilt(value: Any, joined: list[Tensor]) -> Any:
    """Return a copy of the output in which its tensors are replaced, in order, by tensors that are taken out of ``joined``."""
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
        if type(value) is OrderedDict:
            return OrderedDict(items_by_key)
        if type(value) is defaultdict:  # Dynamo cannot trace copy.copy of a defaultdict
            return defaultdict(value.default_factory, items_by_key)
        new = _copied(value)
        for key, item in items_by_key.items():
            new[key] = item
        return new
    if not isinstance(value, _PLAIN) and is_dataclass(value) and not isinstance(value, type):
        twin: Any = _copied(value)
        for field in fields(value):
            object.__setattr__(twin, field.name, rebuilt(getattr(value, field.name), joined))
        return twin
    return value


def _copied(value: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() and not traces_objects():
        graph_break(
            msg=f"the model returns a {type(value).__name__}. penalties='attach' copies it, and torch.compile traces that from torch 2.12 "
            "on. Leave fullgraph=True out, return a tuple or a dict, or use penalties='return'."
        )
    return copy.copy(value)


@contextmanager
def fed(rules: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within the context, let the scale of a module's penalties be that of a call with these arguments, unless the call has set it already.

    ``rules``: the container of the module's runtime modules.
    """
    attach = rules._modules.get("attach")
    if not isinstance(attach, AttachRule) or not attach.asks or attach.fed:
        yield
        return
    attach.feed(args, kwargs)
    attach.fed = True
    try:
        yield
    finally:
        attach.fed = False


def check_penalties(penalties: str) -> None:
    """Raise RegularizerError for an unknown ``penalties=``."""
    if penalties not in ("return", "attach"):
        raise RegularizerError(f"penalties={shown(penalties)} is unknown; it is 'return' or 'attach'.")


def _takes_nothing(scale: object) -> bool:
    """Return whether something is a function that can be called without arguments, as far as Python can tell."""
    if not callable(scale):
        return False
    try:
        inspect.signature(scale).bind()
    except TypeError:
        return False
    except ValueError:
        pass  # it has no signature, so only the call can tell
    return True


def check_scale(scale: Scale | None) -> None:
    """Raise RegularizerError for a ``scale=`` that is no positive number, 0-d tensor, GradScaler, function or ``CallScale``."""
    reads = hasattr(scale, "get_scale") or hasattr(scale, "of_call")
    ok = scale is None or reads or _takes_nothing(scale) or (isinstance(scale, Tensor) and scale.dim() == 0)
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < float("inf")
    if not ok and not number:
        raise RegularizerError(
            f"scale={shown(scale)} is not allowed; give a number above 0, a 0-d tensor, a GradScaler, or a function of no argument."
        )
