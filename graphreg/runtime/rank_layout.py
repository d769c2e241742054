"""How ranks share the value at a site: which axes they divide. A splice then draws its part of the one mask for the whole value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.rng.window import Window
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.torch_modes import without_modes


@dataclass(frozen=True)
class Cut:
    """An axis of a value that ranks divide among them, in equal parts.

    Attributes:
        axis: The axis; a negative number counts from the last.
        index: Which part this rank has.
        parts: The number of parts.
        name: The dimension of the mesh along which these ranks lie.
    """

    axis: int
    index: int
    parts: int
    name: str


def window(z: Tensor, cuts: Sequence[Cut] | None, description: str) -> Window | None:
    """Return the place of a rank's value in the whole value; None if the rank has the whole.

    Args:
        z: The value.
        cuts: The divided axes. If two cuts divide one axis, the cut into larger parts comes first. None if they are not known.
        description: The splice and its site, for messages.

    Raises:
        RegularizerError: The value has no such axis.
        GraphRegError: ``cuts`` is None.
    """
    if cuts is None:
        raise GraphRegError(
            f"{description}: the model was traced once more, for other arguments, after set_ranks(mesh=...). Call set_ranks again with the "
            "same arguments; the trace is kept."
        )
    if not cuts:
        return None
    index, parts = [0] * z.dim(), [1] * z.dim()
    for cut in cuts:
        if not -z.dim() <= cut.axis < z.dim():
            raise RegularizerError(
                f"{description}: set_ranks was told that the ranks of {cut.name!r} divide axis {cut.axis} of the value, and it has the "
                f"shape {tuple(z.shape)}. Give another placement, or leave the site out."
            )
        # A further cut of the same axis divides each part of the one before.
        index[cut.axis], parts[cut.axis] = index[cut.axis] * cut.parts + cut.index, parts[cut.axis] * cut.parts
    sizes = tuple(z.shape)
    whole = tuple(size * n for size, n in zip(sizes, parts, strict=True))
    return Window(whole, tuple(size * i for size, i in zip(sizes, index, strict=True)), sizes)


def within(inner: Window | None, z: Tensor, cuts: Sequence[Cut] | None, description: str) -> Window | None:
    """Return the place of this rank's shard in the whole value, of which the DTensor ``z`` may be a part; None if it has the whole.

    ``inner``: the place of the shard in ``z``; None if the rank has all of ``z``. ``cuts``: how ranks divide the whole value into parts
    such as ``z``, as in ``window``.
    """
    outer = window(z, cuts, description)
    if inner is None or outer is None:
        return inner or outer
    return Window(outer.shape, tuple(a + b for a, b in zip(outer.starts, inner.starts, strict=True)), inner.sizes)


def shard_window(z: Any) -> Window | None:
    """Return the place of this rank's shard in a DTensor; None if every rank has the whole.

    An axis of n elements is divided by d ranks as ``torch.chunk`` does: parts of ceil(n / d) elements, of which the last may be smaller
    or empty. Several dimensions of the mesh may divide one axis, one after the other in the order of the mesh.
    """
    coordinate = z.device_mesh.get_coordinate()
    starts, sizes = [0] * z.dim(), list(z.shape)
    for i, placement in enumerate(z.placements):
        if placement.is_replicate():
            continue
        # Nor as _StridedShard, whose parts lie in another order.
        if type(placement).__name__ != "Shard":
            raise GraphRegError(
                f"a value is shared among ranks as {placement}, and splices act on values that are replicated, or divided by Shard. Call "
                "redistribute on the value in the model's code, or leave the site out."
            )
        axis, ranks = placement.dim, z.device_mesh.size(i)
        part = (sizes[axis] + ranks - 1) // ranks
        first = min(coordinate[i] * part, sizes[axis])
        starts[axis], sizes[axis] = starts[axis] + first, min(part, sizes[axis] - first)
    return None if sizes == list(z.shape) else Window(tuple(z.shape), tuple(starts), tuple(sizes))


def require_separable(regularizer: Any, place: Window | None, description: str) -> None:
    """Raise RegularizerError if a formula cannot be applied to a part of a value, because it may look at the whole of it.

    ``place``: where the part lies; None if this rank has the whole value.
    """
    if place is None or regularizer.separable == "elements":
        return
    divided = [axis for axis, (size, whole) in enumerate(zip(place.sizes, place.shape, strict=True)) if size != whole]
    if divided == [0] and regularizer.separable == "examples":
        return
    name = type(regularizer).__name__
    raise RegularizerError(
        f"{description}: ranks divide the value along {'axes' if len(divided) > 1 else 'axis'} {', '.join(map(str, divided))}, and "
        f"{name} may look at the whole of it. Leave the site out, or choose one at which each rank has the whole value. If the formula of "
        f"{name} treats each element by itself, its class can say so: separable = 'elements'."
    )


@assume_constant_result
def lead(mesh: Any) -> int:
    """Return the smallest rank in a mesh: the rank whose masks all ranks of the mesh draw."""
    with without_modes():
        return int(mesh.mesh.min())
