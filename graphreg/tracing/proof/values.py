"""Walks through outputs of any structure, and describes how two values differ: in type, shape, dtype or numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.ir.comparison import is_nan

# The tolerance relative to a tensor's largest value, where operations may run in another order than
# in the model: if torch.export traced the model, and for the gradients of parameters that splices
# replace.
NEAR = 1e-6
NO_GRADIENT = "requires a gradient, and does not in the model"


@dataclasses.dataclass(frozen=True)
class ContainerShape:
    """The class and the size of a container, which are compared with those of another container."""

    kind: type
    size: int

    def __str__(self) -> str:
        return f"{self.kind.__name__} of {self.size}"


def leaves_with_places(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield every value in a structure with its place, such as ``output['logits']`` or ``output[0].loc``.

    For each container, its ``ContainerShape`` is yielded before its contents. The contents of an object that is no container are yielded
    at its first place alone: objects may refer to one another, in more ways than can be followed.
    """
    yield from _leaves(value, place, set(), set())


def _leaves(value: Any, place: str, within: set[int], seen: set[int]) -> Iterator[tuple[str, Any]]:
    contents = None if isinstance(value, (Tensor, nn.Module)) else _contents(value)
    if contents is None or id(value) in within or id(value) in seen:
        yield place, value
        return
    if not isinstance(value, (Mapping, tuple, list)):
        seen.add(id(value))
    yield place, ContainerShape(type(value), len(contents))
    for name, item in contents.items():
        yield from _leaves(item, f"{place}{name}", within | {id(value)}, seen)


def _contents(value: Any) -> dict[str, Any] | None:
    """Return the items of a container by the text that follows its place, such as ``[0]`` or ``.loc``; None if it is no container."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        more = {f".{name}": item for name, item in getattr(value, "__dict__", {}).items()}
        return {f"[{i}]": item for i, item in enumerate(value)} | more
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name, None) for field in dataclasses.fields(value)}
    plain = isinstance(value, (type, FunctionType, Enum)) or not hasattr(value, "__dict__")
    # an object such as a distribution or a cache
    return None if plain else {f".{name}": item for name, item in vars(value).items()}


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors in a structure."""
    return [leaf for _, leaf in leaves_with_places(value, "") if isinstance(leaf, Tensor)]


def detached_copy(value: Any) -> Any:
    """Return a detached copy of a tensor, with its ``requires_grad``; return any other value as it is."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def difference(expected: Any, ours: Any, near: bool = False) -> str:
    """Describe how ``ours`` differs from ``expected``, as a sentence without its subject; ``""`` if it does not.

    Objects of classes that this function does not know differ only if their classes do.

    ``near``: whether to allow numbers in tensors to differ by ``NEAR``, or by rounding if the dtype
    is too coarse for that.
    """
    if isinstance(expected, Tensor) and isinstance(ours, Tensor):
        if expected.is_nested and ours.is_nested and expected.layout == ours.layout:
            theirs, parts = expected.unbind(), ours.unbind()
            if len(theirs) != len(parts):
                return f"has {len(parts)} parts, and {len(theirs)} in the model"
            return next((how for pair in zip(theirs, parts, strict=True) if (how := difference(*pair, near))), "")
        return _different_facts(expected, ours) or _different_numbers(_dense(expected), _dense(ours), near)
    if type(expected) is not type(ours) or (isinstance(expected, ContainerShape) and expected != ours):
        return f"is {_kind(ours)}, and {_kind(expected)} in the model"
    known = isinstance(expected, (int, float, complex, str, bytes, Enum, torch.dtype, torch.device, ContainerShape))
    same = not known or expected == ours or (is_nan(expected) and is_nan(ours))
    return "" if same else f"is {ours!r}, and {expected!r} in the model"


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, ContainerShape) else "None" if value is None else f"a {type(value).__name__}"


def _different_facts(expected: Tensor, ours: Tensor) -> str:
    for name, theirs, mine in [
        ("shape", tuple(expected.shape), tuple(ours.shape)), ("dtype", expected.dtype, ours.dtype),
        ("device", expected.device, ours.device), ("layout", expected.layout, ours.layout),
    ]:  # fmt: skip
        if theirs != mine:
            return f"has {name} {mine}, and {theirs} in the model"
    if expected.requires_grad != ours.requires_grad:
        return "requires no gradient, and does in the model" if expected.requires_grad else NO_GRADIENT
    return ""


def _dense(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    if plain.is_nested:
        plain = torch.nested.to_padded_tensor(plain, 0.0)
    return plain if plain.layout == torch.strided else plain.to_dense()


def _different_numbers(expected: Tensor, ours: Tensor, near: bool) -> str:
    if expected.device.type == "meta":  # a meta tensor has no numbers
        return ""
    # quick, and takes no further memory; but it never holds for tensors with NaN
    if torch.equal(expected, ours):
        return ""
    same = (expected == ours) | (expected.isnan() & ours.isnan())
    if bool(same.all()):
        return ""
    count = int((~same).sum())
    if not (expected.is_floating_point() or expected.is_complex()):
        return f"differs in {count} of {same.numel()} elements"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    apart = float((expected.to(wide) - ours.to(wide)).abs()[~same].nan_to_num(nan=torch.inf).max())
    sizes = expected.abs().double()
    largest = float(sizes[sizes.isfinite()].max()) if bool(sizes.isfinite().any()) else 0.0
    if near and apart <= max(NEAR, 4 * torch.finfo(expected.dtype).eps) * largest:
        return ""
    return f"differs in {count} of {same.numel()} elements, by {apart:.3g} at most, where the largest in the model is {largest:.3g}"
