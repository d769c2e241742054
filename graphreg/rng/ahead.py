"""Draws ahead: the keys of the next calls, and the masks of small values for these calls, computed in one batch.

In eager code, a small draw is all overhead: a mask of 64 x 64 takes 72 µs alone and 19 µs in a batch. What is drawn ahead is what would be
drawn at the call, so it changes no number:

    CallsAhead of the counter              DrawnAhead of each splice
    call n        keys  ------------------>  mask
    call n + 1    keys  ---(one batch)---->  mask
    ...                                      ...
    call n + 63   keys  ------------------>  mask

``CallPlace`` says which row a splice reads in the running call. What was drawn is found by the identity of tensors that a caller passes on,
and by their versions. So whatever makes other keys (another rank, a worker, a seek, frozen noise, a copy of the module) finds nothing here,
and draws at the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphreg.rng.hash import call_words, in_plain_eager, index_blocks, lane_keys, mixed
from graphreg.torch_internals.autograd import version_of

CALLS = 64  # calls whose keys are computed in one batch
SMALL = 1 << 13  # elements; a mask with more is not drawn ahead, because its arithmetic takes longer than what surrounds it
_BATCH = 1 << 16  # elements that are drawn in one batch
_TOTAL = 1 << 22  # elements that all splices of a module may have drawn ahead, 16 MB


Request = tuple[int, torch.Size, int]  # the lane, the shape, and the limit that a word of a kept element reaches


@dataclass(frozen=True, eq=False)
class KeysAhead:
    """The numbers and the keys of calls in a row. Each is a tensor of its own, because a caller may write into it.

    Attributes:
        streams: The streams that the keys are of, int64 [streams].
        version: The version of ``streams``.
        steps: The numbers of the calls, each int64 [1].
        keys: The keys of each call, each int32 [streams, 2].
        together: The keys of all these calls, int32 [calls, streams, 2].
        places: The position of each tensor in ``keys``, by its ``id``.
    """

    streams: Tensor
    version: int
    steps: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    together: Tensor
    places: dict[int, int]

    def place(self, keys: Tensor) -> int | None:
        """Return the position of a call by its keys; None if they are not among these keys, or were changed."""
        place = self.places.get(id(keys))
        return place if place is not None and self.keys[place] is keys and not version_of(keys) else None


class _OfOneModule:
    """What one runtime module has drawn ahead. A copy or a pickle of the module has drawn nothing ahead."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class CallsAhead(_OfOneModule):
    """Computes the numbers and keys of calls ahead, for one counter.

    Attributes:
        known: What was computed last; None if nothing was.
        last: The number of the call for which the counter, in eager code, has computed the keys at the call before.
    """

    def __init__(self) -> None:
        self.known: KeysAhead | None = None
        self.last: Tensor | None = None

    def holds(self, step: Tensor) -> int:
        """Return how many references this object has to the number of a call."""
        known, place = self.known, None if self.known is None else self.known.places.get(id(step))
        return (self.last is step) + (known is not None and place is not None and known.steps[place] is step)

    def after(self, step: Tensor, streams: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the number and the keys of the call after call ``step``; None if they have to be computed at the call.

        Keys are computed ahead at the second eager call in a row: an eager call now and then, among calls of compiled code, would waste
        them. So would a number that is written into between calls, as DistributedDataParallel writes into buffers.
        """
        if not in_plain_eager() or type(step) is not Tensor or type(streams) is not Tensor:
            return None
        if step.device.type != "cpu" or streams.device.type != "cpu":
            return None

        # The batch that has this call may have the next one, too. It holds as long as nobody has
        # written into one of its tensors.
        known = self.known
        place = None if known is None else known.places.get(id(step))
        if known is not None and place is not None and known.steps[place] is step and place + 1 < len(known.steps):
            following = known.keys[place + 1]
            if streams is known.streams and version_of(streams) == known.version and not version_of(step) and not version_of(following):
                return known.steps[place + 1], following

        # ``last`` is this call's number if the call before was eager, too. A tensor made in
        # inference mode has no version that would show a write.
        if self.last is not step or version_of(step) or torch.is_inference_mode_enabled() or step.is_inference() or streams.is_inference():
            return None
        if not len(streams) or (number := int(step.item())) >= _LAST:
            return None

        # With many streams, each call has many keys, so the batch has fewer calls.
        count = max(2, min(CALLS, _KEYS // len(streams)))
        steps = torch.arange(number + 1, number + 1 + count, device="cpu")
        together = torch.stack(call_words(streams[None], steps[:, None]), dim=-1).to(torch.int32)
        unbound: Callable[[Tensor], tuple[Tensor, ...]] = torch.unbind_copy  # type: ignore[assignment]
        each, keys = unbound(steps[:, None]), unbound(together)
        places = {id(tensor): place for tensors in (each, keys) for place, tensor in enumerate(tensors)}
        self.known = KeysAhead(streams, version_of(streams), each, keys, together, places)
        return each[0], keys[0]


_KEYS = 1 << 15  # at most about so many keys are computed in one batch
_LAST = 1 << 62  # the number of a call that no run reaches


@dataclass(frozen=True, eq=False)
class MasksAhead:
    """Where the mask of a call was drawn, and the masks of the following calls.

    Attributes:
        request: What was asked for.
        calls: The keys of the calls.
        first: The position in ``calls`` of the call that the first row is for.
        rows: The masks, int32 0 or 1, each of the shape in ``request``; empty if only the mask of call ``first`` was drawn.
    """

    request: Request
    calls: KeysAhead
    first: int
    rows: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class CallPlace:
    """Where a splice's draws for the running call are among those that are drawn ahead.

    Attributes:
        drawn: What the splice has drawn ahead.
        calls: The keys of calls in a row.
        place: The position of the running call in ``calls``.
        slot: The splice's stream.
    """

    drawn: DrawnAhead
    calls: KeysAhead
    place: int
    slot: int


class DrawnAhead(_OfOneModule):
    """What a splice has drawn ahead.

    A request is drawn ahead when it comes a second time in a row: values whose shape changes at each call would waste the batch. Several
    threads may use this object, because each assigns ``drawn`` as a whole.
    """

    def __init__(self) -> None:
        self.drawn: MasksAhead | None = None

    def mask(self, at: CallPlace, request: Request) -> Tensor | None:
        """Return the mask for a call, int32 0 or 1, of the shape in ``request``; None if it has to be drawn at the call.

        The caller must not write into the mask.
        """
        drawn, calls, place = self.drawn, at.calls, at.place
        if drawn is None or drawn.request != request:
            self.drawn = MasksAhead(request, calls, place)
            return None
        if drawn.calls is calls and 0 <= place - drawn.first < len(drawn.rows):
            return drawn.rows[place - drawn.first]
        _, shape, _ = request
        count = min(len(calls.keys) - place, min(_BATCH, _TOTAL // len(calls.streams)) // shape.numel())
        if count < 2:
            return None
        rows = _masks(calls.together[place : place + count, at.slot], request)
        self.drawn = MasksAhead(request, calls, place, rows)
        return rows[0]


def _masks(keys: Tensor, request: Request) -> tuple[Tensor, ...]:
    """Draw a mask for each row of keys, int32 [calls, 2], as ``Noise.keep`` draws it for one."""
    lane, shape, limit = request
    k0, k1 = lane_keys(keys[:, :1], keys[:, 1:], lane)
    ((_, _, counter),) = index_blocks(shape.numel(), 0, keys.device)
    drawn = mixed(counter, k0, k1, k1 ^ FLIP)
    return torch.ge(drawn, limit, out=drawn).view(-1, *shape).unbind()


FLIP = -(1 << 31)  # flips the sign bit of a word: torch compares signed numbers, and words are unsigned
