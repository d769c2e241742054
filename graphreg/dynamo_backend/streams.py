"""The noise of a backend: streams that come to be as graphs are captured, each with the number of its own next call.

A rewritten module counts its calls. Of a model in several graphs a call may draw at some sites, or at one of them in a loop,
so here each site counts how often it was drawn. Where every call draws at every site once, the two are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError
from graphreg.rng import call_keys, of_process, stream
from graphreg.runtime import BACKEND_STATE, checked_state, written_state
from graphreg.torch_internals import Changes


@dataclass(frozen=True)
class Stream:
    """What a stream is made of, but for the seed that all share; ``seed``: one of its own."""

    site: str
    kind: str
    occurrence: int
    seed: int | None = None

    @property
    def text(self) -> str:
        return f"{self.site}|{self.kind}|{self.occurrence}"


class Streams:
    """All streams of a backend. ``alike``: whether all ranks draw the same."""

    def __init__(self, seed: int) -> None:
        self.seed, self.alike = seed, False
        self.calls: dict[str, int] = {}
        self.held: dict[str, int] | None = None
        self._blocks: dict[object, None] = {}  # those that hold the noise
        self._words: dict[Stream, int] = {}

    def keys(self, rows: Sequence[Stream], draws: Sequence[bool], device: torch.device) -> Tensor:
        """int32 [rows, 2]: the keys of each stream's call; those that draw go on to their next."""
        words = torch.tensor([self._word(row) for row in rows], dtype=torch.int64)
        calls = torch.tensor([self.calls.get(row.text, 0) for row in rows], dtype=torch.int64)
        for row, drawn in zip(rows, draws, strict=True):
            if drawn:
                self.calls[row.text] = self.calls.get(row.text, 0) + 1
        keys = call_keys(words, calls)
        return of_process(keys, self.alike).to(device)

    def _word(self, row: Stream) -> int:
        if row not in self._words:
            self._words[row] = stream(self.seed if row.seed is None else row.seed, row.site, row.kind, row.occurrence)
        return self._words[row]

    def begin(self) -> None:
        """A call begins: under ``hold`` at the calls that were next when the noise was held."""
        if self.held is not None:
            self.calls = dict(self.held)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Each call in the block draws the masks of the first. Blocks that overlap, of several threads, end with the last of them."""
        block = object()
        with Changes() as changes, changes:
            changes.later(partial(self._release, block))
            self._blocks[block] = None
            if self.held is None:
                self.held = dict(self.calls)
            yield

    def _release(self, block: object) -> None:
        self._blocks.pop(block, None)
        if not self._blocks:
            self.held = None

    def state(self) -> dict[str, Any]:
        """A plain dict: the seed, and the number of each stream's next call."""
        return written_state(BACKEND_STATE, self.alike, seed=self.seed, calls=dict(self.calls))

    def restore(self, state: object) -> None:
        """Go where ``state`` was taken. Raises RegularizerError for what ``state`` never gave; the noise then stays."""
        checked = checked_state(state, BACKEND_STATE)
        if self.held is not None:
            raise GraphRegError("the noise is held still (graphreg.frozen_noise): set its state before or after that block.")
        self.seed, self.alike, self.calls = checked["seed"], checked["ranks"] == "same", dict(checked["calls"])
        self._words.clear()
