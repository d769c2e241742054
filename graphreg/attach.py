"""Penalties that join in backward, for training loops that know of a loss and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphreg.errors import RegularizerError, shown

Penalties = Literal["return", "attach"]
Scale = float | Tensor | Callable[[], Any] | Any  # Any: a GradScaler, which torch keeps in two places


class AttachRule(nn.Module):
    """Adds the penalties to a scalar ``loss``, or makes their gradient join that of the output's tensors."""

    def __init__(self, names: tuple[str, ...], scale: Scale | None) -> None:
        super().__init__()
        self.names, self.scale = names, scale
        self.last: dict[str, Tensor] = {}

    def told(self) -> str:
        """What the gradient of the penalties is multiplied by, in words."""
        scale = 1 if self.scale is None else self.scale
        if isinstance(scale, (int, float, Tensor)):
            return f"scale {float(scale):g}"
        return f"scaled by {getattr(scale, '__name__', type(scale).__name__)}"

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
        live = [i for i, out in enumerate(outputs) if isinstance(out, Tensor) and out.requires_grad]
        if not live or not total.requires_grad:
            return outputs
        scale = torch.as_tensor(current(self.scale), dtype=total.dtype, device=total.device)
        joined = _Join.apply(total, scale, *(outputs[i] for i in live))  # type: ignore[no-untyped-call]
        new = dict(zip(live, joined, strict=True))
        return tuple(new.get(i, out) for i, out in enumerate(outputs))


def current(scale: Scale | None) -> Any:
    """The scale at this call: of a GradScaler the present one, as a tensor where it has one already."""
    if scale is None:
        return 1.0
    if hasattr(scale, "get_scale"):
        # get_scale() reads the tensor to a number, which breaks a compiled graph; None until the first scale(loss)
        tensor = getattr(scale, "_scale", None)
        return scale.get_scale() if tensor is None else tensor
    return scale() if callable(scale) and not isinstance(scale, Tensor) else scale


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
    built = isinstance(value, fx.Node) and value.op == "call_function" and isinstance(value.target, type)
    return value if built and isinstance(value, fx.Node) else output


def loss_of(output: fx.Node) -> fx.Node | None:
    """The output's ``loss``, where it has one."""
    end, value = end_of(output), output.args[0]
    if end is not output:  # built in the graph: a dataclass or named tuple by fields, a dict from a dict
        names: Any = getattr(end.target, "_fields", None) or getattr(end.target, "__dataclass_fields__", ())
        value = end.args[0] if end.args and isinstance(end.args[0], dict) else dict(zip(names, end.args, strict=False)) | end.kwargs
    found = value.get("loss") if isinstance(value, dict) else getattr(value, "loss", None) if isinstance(value, tuple) else None
    return found if isinstance(found, fx.Node) else None


class _Join(torch.autograd.Function):
    """The identity on the outputs; in backward the penalty gets the gradient ``scale``, once a pass."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale)
        return tuple(out.view_as(out) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return (scale, None, *grads)
