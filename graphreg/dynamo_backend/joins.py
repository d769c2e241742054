"""Attached penalties in a backend: connects the measurements of a call's graphs to the outputs of these graphs in autograd.

Each graph that measures gets an autograd node, whose backward gives the measurements their share of the penalties' gradient. The nodes
form a chain: in backward, each node leads to the node of the previous graph. The outputs of a graph lead to the node that is the last in
the chain when the graph has run. So a backward pass from any output runs the node of the output's own graph and those of earlier graphs,
each once, however many outputs the pass starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.runtime.attach import Scale, collect, current
from graphreg.runtime.gradient_join import Views, Way, in_place, link, refuse_twice
from graphreg.torch_internals.autograd import backward_task, storage_of
from graphreg.torch_internals.functorch import transform_level

Measured = tuple[str, str]  # the name of the penalty that made a measurement, and the site; "" for all sites at once
Share = Callable[[str, str, torch.device, torch.dtype], Tensor]  # from a measurement: the derivative of its penalty with respect to it


class Joins:
    """The chain of autograd nodes of one call.

    Attributes:
        share: Returns a penalty's derivative with respect to a measurement. It is called in backward, because only then is the number of
            measurements in all graphs known.
        scale: The factor of the penalties' gradient.
        names: For each node of the chain, a list of its measurements.
        token: The output of the chain's last node, from which backward runs the chain; None before the first node and after the call.
        reached: The number of the latest backward pass, and the number of the node that ran last in it.
    """

    def __init__(self, share: Share, scale: Scale | None) -> None:
        self.share, self.scale = share, scale
        self.names: list[list[Measured]] = []
        self.token: Tensor | None = None
        self.reached = (-1, 0)

    def measured(self, names: Sequence[Measured], values: Sequence[Tensor]) -> None:
        """Add a node to the chain, for the measurements of a graph or for the totals of penalties on parameters.

        Nothing is added if no value requires grad or if grad mode is off.

        Args:
            names: For each value, the name of its penalty, and the site.
            values: The measurements or totals.
        """
        live = [(name, value) for name, value in zip(names, values, strict=True) if value.requires_grad]
        if not live or not torch.is_grad_enabled():
            return
        if transform_level() is not None:
            raise GraphRegError(
                "a backend's attached penalties cannot join under a transform of torch.func. Use penalties='return' and add "
                "backend.penalties() to the loss, or graphreg.regularize."
            )
        self.names.append([name for name, _ in live])
        values = [value for _, value in live]
        self.token = _Shares.apply(self, len(self.names), current(self.scale), self.token, *values)  # type: ignore[no-untyped-call]

    def join(self, outputs: list[Any], inputs: Sequence[Any]) -> list[Any]:
        """Connect those outputs of a graph that require grad to the node that is now the last in the chain. Return all outputs.

        ``inputs``: the arguments of the graph.
        """
        live = list({id(out): out for out in outputs if isinstance(out, Tensor) and out.requires_grad}.values())
        token = self.token
        if not live or token is None:
            return outputs

        def apply(ways: Sequence[Way], entering: Sequence[Tensor], views: Views) -> tuple[Tensor, ...]:
            joined = link(token, ways, entering, views)
            for each in joined:
                each.grad_fn.joins = self  # type: ignore[union-attr]
            return joined

        known = frozenset(storage_of(value) for value in inputs if isinstance(value, Tensor))
        joined = dict(zip(map(id, live), in_place(apply, live, live, known), strict=True))
        return [joined.get(id(out), out) for out in outputs]

    def apart(self, result: Any) -> tuple[list[Tensor], bool]:
        """Return the outputs of a call that require grad and from which no backward pass reaches the chain.

        Such an output did not come from a graph: the model returned an argument or a parameter itself, or code that Dynamo left to eager
        computed the output. The second result is whether all outputs that require grad are of this kind.
        """
        if self.token is None or not torch.is_grad_enabled():
            return [], False
        outputs: list[Tensor] = []
        collect(result, outputs, [])
        live = [out for out in outputs if out.requires_grad]
        found = [out for out in live if not self._leads(out.grad_fn)]
        return found, len(found) == len(live)

    def _leads(self, start: Any) -> bool:
        waiting, seen = [start], {None}
        while waiting:
            node = waiting.pop()
            if getattr(node, "joins", None) is self:
                return True
            if node not in seen:
                seen.add(node)
                waiting += [each for each, _ in node.next_functions]
        return False

    def end(self) -> None:
        """Release the chain at the end of the call: its nodes refer to this object, so keeping the chain would be a reference cycle."""
        self.token = None


class _Shares(torch.autograd.Function):
    """A node of the chain. Its backward gives the measurements of one graph their share of the penalties' gradient."""

    @staticmethod
    def forward(ctx: Any, joins: Joins, number: int, scale: Any, before: Tensor | None, *values: Tensor) -> Tensor:
        ctx.joins, ctx.number, ctx.scale, ctx.before = joins, number, scale, None if before is None else before.device
        ctx.kinds = [(value.device, value.dtype) for value in values]
        return torch.zeros((), device=values[0].device)  # on the values' device: autograd then runs the backward in that device's thread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        refuse_twice()
        joins, task = ctx.joins, backward_task()
        if ctx.number < len(joins.names) and joins.reached != (task, ctx.number + 1):  # in a backward pass, nodes of later graphs run first
            missed = dict.fromkeys(name for names in joins.names[ctx.number :] for name, _ in names)
            raise GraphRegError(
                f"penalties='attach': this backward pass does not reach all graphs of the call, and would miss what {', '.join(missed)} "
                "measured in the others. Have the loss depend on what the last graph computes, use penalties='return' and add "
                "backend.penalties() to the loss, or use graphreg.regularize."
            )
        joins.reached = (task, ctx.number)
        shares = [joins.share(*name, *kind) for name, kind in zip(joins.names[ctx.number - 1], ctx.kinds, strict=True)]
        scaled = [share * torch.as_tensor(ctx.scale, dtype=share.dtype, device=share.device) for share in shares]
        return (None, None, None, None if ctx.before is None else grads[0].to(ctx.before), *scaled)
