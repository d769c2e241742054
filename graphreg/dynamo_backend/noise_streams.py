"""The noise streams of a backend. Each belongs to one splice at a site, or to one native dropout, and counts its own draws.

New graphs may bring new streams. A rewritten module counts its calls, and not the draws of each stream. But when a model runs as several
graphs, one call may draw at some of the sites only, or several times at a site that is in a loop. If each call draws once at every site,
both ways of counting give the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.rng import call_keys, of_process, stream
from graphreg.runtime import BACKEND_STATE, checked_state, clock_of_state, written_state
from graphreg.torch_internals import Changes


@dataclass(frozen=True)
class Stream:
    """What identifies a stream, together with the backend's seed.

    Attributes:
        site: The name of the site.
        kind: The name of the regularizer's class; ``"own dropout"`` for native dropout.
        occurrence: If several splices of that class act at the site, the number of this splice among them, from 0.
        seed: A seed that replaces the backend's, or None.
        once: Whether all graphs of a call share one draw, as for a parameter, which is replaced once in a call.
        shared_by: If the value is a DTensor, the first of the ranks that share it. All of them draw parts of the mask of that rank.
    """

    site: str
    kind: str
    occurrence: int
    seed: int | None = None
    once: bool = False
    shared_by: int | None = None

    @property
    def text(self) -> str:
        """The stream's name in the dict that ``Streams.state`` returns."""
        return f"{self.site}|{self.kind}|{self.occurrence}"


class Streams:
    """All streams of a backend.

    Attributes:
        seed: The seed of the streams without a seed of their own.
        alike: Whether all ranks draw the same masks.
        calls: The number of draws of each stream, by its ``text``.
        clock: How many calls in train mode have begun, not counting those in blocks of ``noise_on`` and ``noise_off``. All calls in a block
            of ``frozen_noise`` count as one. Scheduled strengths depend on this number.
        frozen_clock: In a block of ``frozen_noise``, the clock of every call.
        frozen_calls: In a block of ``frozen_noise``, the value of ``calls`` with which every call begins; otherwise None.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.alike = seed, False
        self.calls: dict[str, int] = {}
        self.clock, self.frozen_clock = 0, 0
        self.frozen_calls: dict[str, int] | None = None
        self._blocks: dict[object, None] = {}  # the open blocks of frozen_noise
        self._numbers: dict[Stream, int] = {}
        self._drawn: dict[str, int] = {}  # by ``text`` of a stream with ``once``: the number of its draw in this call
        self._counted: list[tuple[str, int]] = []  # the draws of the running call: the stream's ``text``, and its count after the draw

    def keys(self, rows: Sequence[Stream], draws: Sequence[bool], device: torch.device) -> Tensor:
        """Return the key of each stream's next draw, int32 [rows, 2]. Count a draw for each stream for which ``draws`` has True."""
        numbers = torch.tensor([self._number(row) for row in rows], dtype=torch.int64, device="cpu")
        calls = torch.tensor([self._drawn.get(row.text, self.calls.get(row.text, 0)) for row in rows], dtype=torch.int64, device="cpu")
        for row, drawn in zip(rows, draws, strict=True):
            if drawn and row.text not in self._drawn:
                if row.once:
                    self._drawn[row.text] = self.calls.get(row.text, 0)
                self.calls[row.text] = self.calls.get(row.text, 0) + 1
                self._counted.append((row.text, self.calls[row.text]))
        keys = call_keys(numbers, calls)
        positions = {row.shared_by for row in rows}
        if len(positions) <= 1:
            return of_process(keys, self.alike, next(iter(positions), None)).to(device)
        each = [of_process(keys[i : i + 1], self.alike, row.shared_by) for i, row in enumerate(rows)]
        return torch.cat(each).to(device)

    def _number(self, row: Stream) -> int:
        if row not in self._numbers:
            self._numbers[row] = stream(self.seed if row.seed is None else row.seed, row.site, row.kind, row.occurrence)
        return self._numbers[row]

    def begin(self, counts: bool) -> int:
        """Begin a call, and return its clock. In a block of ``freeze``, set the counts back to those at the beginning of the block.

        ``counts``: whether the call moves the clock, as a call in train mode does.
        """
        self._drawn = {}
        now = self.now()
        if self.frozen_calls is not None:
            self.calls = dict(self.frozen_calls)
        self.clock = max(self.clock, now + counts)
        return now

    def begun(self, counts: bool) -> tuple[int, Callable[[bool], None]]:
        """Begin a call as ``begin`` does. Return its clock, and the function that ends it.

        That function takes whether the call has finished. If not, the call is not counted: its draws and its step of the clock are free
        again, unless a call within it has counted since.
        """
        outer, self._counted = self._counted, []
        before, now = self.clock, self.begin(counts)
        after = self.clock

        def end(finished: bool) -> None:
            counted, self._counted = self._counted, outer
            if finished:
                return
            for text, number in reversed(counted):
                if self.calls.get(text) == number:
                    self.calls[text] = number - 1
            self.clock = before if self.clock == after else self.clock

        return now, end

    def now(self) -> int:
        """Return the clock of the next call."""
        return self.clock if self.frozen_calls is None else self.frozen_clock

    @contextmanager
    def freeze(self) -> Iterator[None]:
        """Draw the same masks in every call of the block.

        If blocks of several threads overlap, the masks stay the same until the last of these blocks ends.
        """
        block = object()
        with Changes() as changes, changes:
            changes.later(partial(self._release, block))
            self._blocks[block] = None
            if self.frozen_calls is None:
                self.frozen_calls, self.frozen_clock = dict(self.calls), self.clock
            yield

    def _release(self, block: object) -> None:
        self._blocks.pop(block, None)
        if not self._blocks:
            self.frozen_calls = None

    def state(self, has_clock: bool = False) -> dict[str, Any]:
        """Return the state of the noise: a plain dict with the seed, the counts of all streams and, if ``has_clock``, the clock."""
        clock = self.clock if has_clock else None
        return written_state(BACKEND_STATE, self.alike, clock=clock, seed=self.seed, calls=dict(self.calls))

    def restore(self, state: object, has_clock: bool = False) -> None:
        """Resume the noise at a state that ``state()`` has returned. ``has_clock``: whether a strength has a schedule.

        Raises:
            RegularizerError: The state is invalid. Nothing is changed.
            GraphRegError: A block of ``freeze`` is open.
        """
        checked = checked_state(state, BACKEND_STATE)
        if self.frozen_calls is not None:
            raise GraphRegError("the noise is frozen (graphreg.frozen_noise): set its state before or after that block.")
        clock = clock_of_state(checked, has_clock)
        self.clock = self.clock if clock is None else clock
        self.seed, self.alike, self.calls = checked["seed"], checked["ranks"] == "same", dict(checked["calls"])
        self._numbers.clear()
