"""The noise streams of a session, and what counts their calls.

A stream is a number of 64 bits. With the number of a call it gives the key of what is drawn in this call. A rewritten module has all its
streams from the start, and counts its calls (``FixedStreams``). A model in place makes streams as it is traced for further structures
(``GrowingStreams``). A backend counts the draws of each stream (``CountedStreams``): when a model runs as several graphs, one call may
draw at some of the sites only, or several times at a site that is in a loop. If each call draws once at every site, all ways of counting
give the same masks.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphreg.errors import GraphRegError, RegularizerError, listed
from graphreg.rng.noise import call_keys, of_process, stream
from graphreg.runtime.counter import Counter
from graphreg.runtime.noise_keys import KeyRule
from graphreg.runtime.rank_mesh import RankMesh
from graphreg.session.saved import BACKEND_STATE, IN_PLACE_STATE, MODULE_STATE, StateForm


@dataclass(frozen=True)
class StreamName:
    """What identifies a noise stream, together with a seed.

    Attributes:
        site: The name of the site.
        kind: The name of the regularizer's class; ``"own dropout"`` for native dropout.
        occurrence: The position of the splice among those of its class at the site, from 0.
        of: The name of the regularizer if it has a seed of its own, else ``""``.
    """

    site: str
    kind: str
    occurrence: int
    of: str = ""

    @property
    def text(self) -> str:
        return f"{self.site}|{self.kind}|{self.occurrence}"

    def number(self, seed: int) -> int:
        """Return the stream's 64-bit number."""
        return stream(seed, self.site, self.kind, self.occurrence)


class Streams(ABC):
    """The noise streams of a session.

    Attributes:
        form: The form of their saved state.
        seeds: The seeds that the streams were made with. The seed of a splice that has a seed of its own is under the regularizer's name;
            that of all others, under ``""``.
    """

    form: ClassVar[StateForm]
    seeds: dict[str, int]

    @property
    @abstractmethod
    def alike(self) -> bool:
        """Whether all ranks draw the same masks."""

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether a graph that exists draws noise."""

    @abstractmethod
    def set_ranks(self, ranks: Any) -> None:
        """Choose whether ranks draw different masks. ``ranks``: ``"differ"``, ``"same"`` or a ``RankMesh``."""

    @abstractmethod
    def counters(self) -> list[Any]:
        """Return what counts the calls that draw; it has ``freeze`` and ``release``."""

    @abstractmethod
    def saved(self) -> dict[str, Any]:
        """Return the fields of the state that ``form`` names, but for the ranks."""

    @abstractmethod
    def check(self, state: Mapping[str, Any]) -> None:
        """Raise RegularizerError or GraphRegError unless ``load`` can take a state of the right form."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved."""


class _KeyStreams(Streams):
    """Streams whose keys are made together, one call ahead. ``key``: the runtime module that makes them; None if nothing draws."""

    key: KeyRule | None

    @property
    def alike(self) -> bool:
        return self.key is not None and self.key.alike

    def set_ranks(self, ranks: Any) -> None:
        key = self.key
        assert key is not None
        key.alike = ranks == "same"
        mesh = ranks if isinstance(ranks, RankMesh) else None
        key.position, key.meshed, key.differing = (None, (), ()) if mesh is None else (mesh.position, mesh.tensor, mesh.differing)

    def counters(self) -> list[Counter]:
        return [] if self.key is None else [self.key]

    def load(self, state: Mapping[str, Any]) -> None:
        if self.key is not None:
            self._take(self.key, state)
            # Where set_ranks has placed the ranks in a mesh, they stay as it placed them.
            self.key.alike = state["ranks"] == "same" and self.key.position is None
            self.key.seek(state["call"])

    @abstractmethod
    def _take(self, key: KeyRule, state: Mapping[str, Any]) -> None:
        """Take the numbers of the streams from a state."""


class FixedStreams(_KeyStreams):
    """The streams of a rewritten module, which its state saves by number."""

    form = MODULE_STATE

    def __init__(self, key: KeyRule | None, seeds: Mapping[str, int]) -> None:
        self.key, self.seeds = key, dict(seeds)

    @property
    def draws(self) -> bool:
        return self.key is not None

    def saved(self) -> dict[str, Any]:
        if self.key is None:
            return {"call": 0, "streams": {}}
        return {"call": self.key.call(), "streams": dict(zip(self.key.names, self.key.streams.tolist(), strict=True))}

    def check(self, state: Mapping[str, Any]) -> None:
        names, streams = () if self.key is None else self.key.names, state["streams"]
        foreign, missing = [name for name in streams if name not in names], [name for name in names if name not in streams]
        pairs = (("only the state has", foreign), ("the state lacks", missing))
        if differences := [f"{whose}: {listed(unmatched, 3)}" for whose, unmatched in pairs if unmatched]:
            raise RegularizerError(
                f"the state belongs to another module, with other streams of noise; {'; '.join(differences)}. "
                "Build the module as for the run that saved it: the same regularizers by the same names, at the same sites."
            )

    def _take(self, key: KeyRule, state: Mapping[str, Any]) -> None:
        key.streams = key.streams.new_tensor([state["streams"][name] for name in key.names])


class GrowingStreams(_KeyStreams):
    """The streams of a model in place, which its state saves by their seeds. ``names``: the streams, in the order of the keys' rows."""

    form = IN_PLACE_STATE

    def __init__(self, seeds: Mapping[str, int], device: torch.device) -> None:
        self.key: KeyRule = KeyRule({}).to(device)
        self.seeds, self.names = dict(seeds), list[StreamName]()

    @property
    def draws(self) -> bool:
        return bool(self.names)

    def rows(self, streams: Mapping[str, StreamName]) -> dict[str, int]:
        """Return the row of each runtime module's stream in the keys of a call, by the module's name. Add the streams that are new."""
        new = [name for name in dict.fromkeys(streams.values()) if name not in self.names]
        self.names += new
        if new:
            self._make()
        return {module: self.names.index(name) for module, name in streams.items()}

    def _make(self) -> None:
        key = self.key
        numbers = [name.number(self.seeds[name.of]) for name in self.names]
        key.names = tuple(name.text for name in self.names)
        key.streams = torch.tensor(numbers, dtype=torch.int64, device=key.step.device)
        # In a block of frozen_noise, a new stream draws as if it had been there from the start.
        call = key.step if key.frozen_call is None else torch.full_like(key.step, key.frozen_call)
        key.keys = call_keys(key.streams, call)

    def copied(self) -> GrowingStreams:
        """Return streams with the same seeds and call number, to which ``rows`` adds those of each graph."""
        twin = GrowingStreams(self.seeds, self.key.step.device)
        for name in ("alike", "position", "meshed", "differing"):
            setattr(twin.key, name, getattr(self.key, name))
        twin.key.seek(self.key.call())
        return twin

    def saved(self) -> dict[str, Any]:
        return {"call": self.key.call(), "seeds": dict(self.seeds)}

    def check(self, state: Mapping[str, Any]) -> None:
        if other := sorted(state["seeds"].keys() ^ self.seeds.keys()):
            raise RegularizerError(
                f"the state belongs to another model: only the state or only the model has a seed of its own for {listed(other)}. "
                "Give regularize_ the arguments that it had in the run that saved the state."
            )

    def _take(self, key: KeyRule, state: Mapping[str, Any]) -> None:
        self.seeds = dict(state["seeds"])
        self._make()


@dataclass(frozen=True)
class CountedStream:
    """A stream that counts its own draws.

    Attributes:
        name: What identifies it, with a seed.
        seed: A seed that replaces the backend's, or None.
        once: Whether all graphs of a call share one draw, as for a parameter, which is replaced once in a call.
        shared_by: If the value is a DTensor, the first of the ranks that share it. All of them draw parts of the mask of that rank.
    """

    name: StreamName
    seed: int | None = None
    once: bool = False
    shared_by: int | None = None

    @property
    def text(self) -> str:
        """The stream's name in a saved state."""
        return self.name.text


class CountedStreams(Streams):
    """All streams of a backend.

    Attributes:
        calls: The number of draws of each stream, by its ``text``.
        frozen_calls: In a block of ``frozen_noise``, the value of ``calls`` with which every call begins; otherwise None.
    """

    form = BACKEND_STATE
    alike = False

    def __init__(self, seed: int, seeds: Mapping[str, int]) -> None:
        self.seeds = {"": seed, **seeds}
        self.calls: dict[str, int] = {}
        self.frozen_calls: dict[str, int] | None = None
        self._blocks: set[object] = set()  # the open blocks of frozen_noise
        self._numbers: dict[CountedStream, int] = {}
        self._drawn: dict[str, int] = {}  # by ``text`` of a stream with ``once``: the number of its draw in this call
        self._counted: list[tuple[str, int]] = []  # the draws of the running call: the stream's ``text``, and its count after the draw

    def keys(self, rows: Sequence[CountedStream], draws: Sequence[bool], device: torch.device) -> Tensor:
        """Return the key of each stream's next draw, int32 [rows, 2]. Count a draw for each stream for which ``draws`` has True."""
        numbers = torch.tensor([self._number(row) for row in rows], dtype=torch.int64, device="cpu")
        calls = torch.tensor([self._drawn.get(row.text, self.calls.get(row.text, 0)) for row in rows], dtype=torch.int64, device="cpu")
        for row, drawn in zip(rows, draws, strict=True):
            if drawn and row.text not in self._drawn:
                # A parameter is replaced once in a call: the graphs after this one get the same
                # draw.
                if row.once:
                    self._drawn[row.text] = self.calls.get(row.text, 0)
                self.calls[row.text] = self.calls.get(row.text, 0) + 1
                self._counted.append((row.text, self.calls[row.text]))
        keys = call_keys(numbers, calls)
        positions = {row.shared_by for row in rows}
        if len(positions) <= 1:
            return of_process(keys, self.alike, next(iter(positions), None)).to(device)
        # Ranks that share a DTensor draw parts of one mask: the key is that of the first of them.
        each = [of_process(keys[i : i + 1], self.alike, row.shared_by) for i, row in enumerate(rows)]
        return torch.cat(each).to(device)

    def _number(self, row: CountedStream) -> int:
        if row not in self._numbers:
            self._numbers[row] = row.name.number(self.seeds[""] if row.seed is None else row.seed)
        return self._numbers[row]

    def begin(self) -> Callable[[bool], None]:
        """Begin a call. Return the function that ends it.

        That function takes whether the call has finished. If not, its draws are free again, unless a call within it has counted since.
        """
        outer, self._counted, self._drawn = self._counted, [], {}
        if self.frozen_calls is not None:
            self.calls = dict(self.frozen_calls)

        def end(finished: bool) -> None:
            counted, self._counted = self._counted, outer
            # The last draw first: only a count that is still this draw's may be taken back.
            for text, number in reversed([] if finished else counted):
                if self.calls.get(text) == number:
                    self.calls[text] = number - 1

        return end

    @property
    def draws(self) -> bool:
        return True  # at any later call, a backend may capture a graph that draws

    def set_ranks(self, ranks: Any) -> None:
        if ranks not in ("differ", "same"):
            raise GraphRegError(
                "set_ranks(mesh=...) needs the whole graph of a model, and a backend sees it in parts. Use graphreg.regularize; or give "
                "'differ' or 'same'."
            )
        self.alike = ranks == "same"

    def counters(self) -> list[Any]:
        return [self]

    def freeze(self, block: object) -> None:
        """Begin a block of ``frozen_noise``. If blocks of several threads overlap, the masks stay the same until the last one ends."""
        self._blocks.add(block)
        if self.frozen_calls is None:
            self.frozen_calls = dict(self.calls)

    def release(self, block: object) -> None:
        """End a block."""
        self._blocks.discard(block)
        if not self._blocks:
            self.frozen_calls = None

    @property
    def is_frozen(self) -> bool:
        return self.frozen_calls is not None

    def settle(self) -> None:
        """Do nothing: no tensor is kept from call to call."""

    def saved(self) -> dict[str, Any]:
        return {"seed": self.seeds[""], "calls": dict(self.calls)}

    def check(self, state: Mapping[str, Any]) -> None:
        if self.frozen_calls is not None:
            raise GraphRegError("the noise is frozen (graphreg.frozen_noise): set its state before or after that block.")

    def load(self, state: Mapping[str, Any]) -> None:
        self.seeds[""], self.alike, self.calls = state["seed"], state["ranks"] == "same", dict(state["calls"])
        # They were computed from the former seed.
        self._numbers.clear()


class CallClock:
    """Counts the calls in train mode, where the graphs have no clock because scheduled strengths are inputs like any others.

    Calls in blocks of ``noise_on`` and ``noise_off`` do not count. All calls in a block of ``frozen_noise`` count as one.
    """

    room = sys.maxsize  # how many pieces a schedule may have

    def takes(self, name: str) -> bool:
        """Whether the strengths of a regularizer may be schedules."""
        return True

    def __init__(self) -> None:
        self.next, self.frozen = 0, 0
        self._blocks: set[object] = set()

    def call(self) -> int:
        return self.next

    def present_call(self) -> int:
        """Return the number of the call whose strengths count now."""
        return self.frozen if self._blocks else self.next

    def seek(self, call: int) -> None:
        self.next = call

    def begin(self, counts: bool) -> tuple[int, Callable[[bool], None]]:
        """Begin a call. Return its number, and the function that ends it; a call that has not finished does not count."""
        before, now = self.next, self.present_call()
        # In a block of frozen_noise, only the first call moves it on.
        self.next = after = max(self.next, now + counts)

        def end(finished: bool) -> None:
            if not finished and self.next == after:
                self.next = before

        return now, end

    def freeze(self, block: object) -> None:
        if not self._blocks:
            self.frozen = self.next
        self._blocks.add(block)

    def release(self, block: object) -> None:
        self._blocks.discard(block)

    def settle(self) -> None:
        """Do nothing: no tensor is kept from call to call."""
