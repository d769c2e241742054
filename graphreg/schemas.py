"""What torch's schemas tell of an operator's storage: the arguments that its result may share it with, and those that it writes into.

The operators of ``torch.ops.aten`` carry both, as ``Tensor(a!) self``. Of an operator with kernels of its own that is the whole truth
(batch norms aside); one that is composed of others has no note of what these do.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch._ops import OpOverload, OpOverloadPacket

from graphreg.probes import is_written, writes_silently

Place = tuple[int, str]  # an argument: its position and its name


class Told(NamedTuple):
    """``shares``, ``writes``: the arguments that some overload notes. ``whole``: whether an overload without a note does neither.

    ``silent``: whether one may write without a note.
    """

    shares: tuple[Place, ...]
    writes: tuple[Place, ...]
    whole: bool
    silent: bool


@cache
def told(operator: str | OpOverload) -> Told | None:
    """Of an overload, or of all overloads of the aten operator of that name; None where there is none."""
    overloads = [operator] if isinstance(operator, OpOverload) else _overloads(operator)
    if not overloads:
        return None
    shares, writes = dict[Place, None](), dict[Place, None]()
    for overload in overloads:
        schema = overload._schema
        noted = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and not a.kwarg_only]
        writes.update(((i, a.name), None) for i, a in noted if is_written(a))
        if any(r.alias_info is not None for r in schema.returns):
            shares.update(((i, a.name), None) for i, a in noted)
    kinds = {_kind(overload) for overload in overloads if _takes_tensors(overload)}
    # an overload for a number, composed of that for a tensor (``add.Scalar``), does what the other does
    whole = not kinds & {"implicit", "real"} and ("explicit" not in kinds or "own" in kinds)
    silent = any(writes_silently(overload) for overload in overloads)
    return Told(tuple(shares), tuple(writes), whole and not silent, silent)


def _overloads(name: str) -> list[OpOverload]:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not _is_internal(name) else None
    if not isinstance(packet, OpOverloadPacket):
        return []
    found = [getattr(packet, overload) for overload in packet.overloads()]  # type: ignore[no-untyped-call]
    return [overload for overload in found if _takes_tensors(overload) and not _is_out(overload) and _is_callable(overload)]


def _is_internal(name: str) -> bool:
    return name.startswith("__") or hasattr(torch._ops._OpNamespace, name)  # what the namespace has itself: ``name``, ``default``


def _takes_tensors(overload: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in overload._schema.arguments)


def _is_callable(overload: OpOverload) -> bool:
    """Not one of TorchScript's alone (``sort.Tensor`` sorts a list), nor for named tensors."""
    return "name" not in overload._overloadname.lower() and torch._C._dispatch_has_kernel(_name(overload))


def _is_out(overload: OpOverload) -> bool:
    return any(argument.kwarg_only and is_written(argument) for argument in overload._schema.arguments)


def _kind(overload: OpOverload) -> str:
    """Whether kernels of its own run the operator; else whether it is composed where autograd looks, or below.

    Without a kernel for shapes alone nobody compares what it gives with its schema: ``dequantize`` gives a plain tensor back.
    """
    for kind in ("Implicit", "Explicit"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(_name(overload), f"Composite{kind}Autograd"):
            return kind.lower()
    return "own" if torch._C._dispatch_has_kernel_for_dispatch_key(_name(overload), "Meta") else "real"


def _name(overload: OpOverload) -> str:
    return str(overload.name())  # type: ignore[no-untyped-call]
