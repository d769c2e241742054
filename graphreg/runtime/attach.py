"""Penalties that join in backward, for training loops that know of a loss and nothing else."""
from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphreg.errors import RegularizerError, shown
from graphreg.ir import builds, widest
from graphreg.runtime.join import join, known_to_dynamo
from graphreg.torch_internals import (
    first_scale,
    scale_tensor,
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
