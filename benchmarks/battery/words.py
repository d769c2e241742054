"""The three streams of words that the battery reads: how training draws, one element over the steps, one step over the sites."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphreg.rng.hash import mix
from graphreg.rng.noise import call_keys, stream

SITES, ELEMENTS = 16, 256  # of the first stream, at each step
NAMES, CHUNK = 1 << 26, 1 << 20  # of the third, hashed once; and how many at a time
SPAN = 1 << 36  # words: more than any test reads, so that no two tests of a stream read the same ones
BATCH = 1 << 18  # words a write


def words(streams: Tensor, calls: Tensor, elements: Tensor) -> Tensor:
    """int64 streams and calls [n] or [1], int32 elements [m] -> int32 [n, m]: what ``bits`` of each call's key has there."""
    keys = call_keys(streams, calls)
    found: Tensor = mix(elements, keys[:, :1], keys[:, 1:])
    return found


@functools.cache
def compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As Inductor computes them: 1.7 GB in a second of one core, 0.06 in eager."""
    found: Any = torch.compile(words, dynamic=False, fullgraph=True)
    return found  # type: ignore[no-any-return]


def named(first: int, last: int) -> array[int]:
    """The streams of the sites layer.first to layer.(last - 1), by graphreg's own hash."""
    return array("q", (stream(0, f"layer.{i}", "BernoulliDropout", 0) for i in range(first, last)))


def chunk(folder: Path, number: int) -> None:
    """One part of the table of streams, written whole or not at all."""
    path = folder / f"streams-{number:02}.bin"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_bytes(named(number * CHUNK, (number + 1) * CHUNK).tobytes())
        part.replace(path)


Batch = tuple[Tensor, Tensor, Tensor]  # what ``words`` takes


def training(place: int, folder: Path) -> Iterator[Batch]:
    """Step by step, site by site, element by element, as training draws them."""
    streams, elements = torch.tensor(named(0, SITES)), torch.arange(ELEMENTS, dtype=torch.int32)
    steps = BATCH // (SITES * ELEMENTS)
    for step in itertools.count(place * SPAN // (SITES * ELEMENTS), steps):
        yield streams.repeat(steps), torch.arange(step, step + steps).repeat_interleave(SITES), elements


def over_steps(place: int, folder: Path) -> Iterator[Batch]:
    """One element of one site: step after step."""
    streams, element = torch.tensor(named(0, 1)), torch.zeros(1, dtype=torch.int32)
    for step in itertools.count(place * SPAN, BATCH):
        yield streams, torch.arange(step, step + BATCH), element


def over_sites(place: int, folder: Path) -> Iterator[Batch]:
    """One element of one step: site after site; after the last of the NAMES the same sites at the next step."""
    element = torch.zeros(1, dtype=torch.int32)
    parts = [torch.from_file(str(path), size=CHUNK, dtype=torch.int64) for path in sorted(folder.glob("streams-*.bin"))]
    for step in itertools.count(place * SPAN // NAMES):
        for part in parts:
            for streams in torch.split(part, BATCH):
                yield streams, torch.tensor([step]), element


STREAMS: dict[str, Callable[[int, Path], Iterator[Batch]]] = {
    "training": training,
    "over steps": over_steps,
    "over sites": over_sites,
}


def drawn(stream: str, place: int, folder: Path) -> Iterator[Tensor]:
    """The words of a stream from ``place`` times SPAN on, compiled; the first ones are held against eager torch's."""
    for number, batch in enumerate(STREAMS[stream](place, folder)):
        found = compiled()(*batch)
        if number == 0 and not torch.equal(found, words(*batch)):
            raise RuntimeError("Inductor computes other words than eager torch: what dieharder would say is of no use")
        yield found
