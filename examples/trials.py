"""What the studies share: runs in processes, strengths chosen on a validation split, means over seeds with their spread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.special import stdtrit  # type: ignore[import-untyped]
from show import Advance, Screen


@dataclass(frozen=True)
class Entry:
    """One row of a study: its name, its strengths, an outcome a seed."""

    name: str
    keywords: Mapping[str, float]
    outcomes: tuple[Any, ...]

    @property
    def title(self) -> str:
        weights = list(self.keywords.values())
        return f"{self.name} {weights[0]:g}" if len(weights) == 1 else self.name

    def of(self, measure: str) -> list[float]:
        return [getattr(outcome, measure) for outcome in self.outcomes]


@contextmanager
def workers() -> Iterator[Executor]:
    """One process a core and one thread each: such small products gain nothing from threads."""
    count = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool


def collect(name: str, keywords: Mapping[str, float], futures: Iterable[Future[Any]], advance: Advance) -> Entry:
    outcomes = []
    for future in futures:
        outcomes.append(future.result())
        advance()
    return Entry(name, keywords, tuple(outcomes))


def choose(
    screen: Screen, label: str, tried: Sequence[tuple[str, Entry]], best: Callable[[Sequence[float]], float] = max, form: str = ".1f"
) -> Entry:
    """The entry whose mean ``validation`` is ``best``, the weaker one where two are equal; tells how they did."""
    scores = [fmean(entry.of("validation")) for _, entry in tried]
    at = scores.index(best(scores))
    marks = ["*" if i == at and len(tried) > 1 else " " for i in range(len(tried))]
    cells = [f"{text:>8} {score:{form}}{mark}" for (text, _), score, mark in zip(tried, scores, marks, strict=True)]
    screen.line(f"  {label:<16}{''.join(cells)}".rstrip())
    return tried[at][1]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval, by Student's t."""

    mean: float
    half: float

    def text(self, form: str) -> str:
        """``form`` is a format for each of the numbers."""
        return f"{self.mean:{form}} [{self.mean - self.half:{form}}, {self.mean + self.half:{form}}]"

    def short(self, form: str) -> str:
        """The mean with its sign where ``form`` asks for one, and half the interval's width."""
        return f"{self.mean:{form}} ± {self.half:{form.lstrip('+')}}"

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return abs(self.mean) > self.half

    def verdict(self, up: str, down: str) -> str:
        return (up if self.mean > 0 else down) if self.clear else "no effect"


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    return Interval(fmean(values), float(stdtrit(n - 1, 0.975)) * stdev(values) / n**0.5)


def difference(entry: Entry, plain: Entry, measure: str) -> Interval:
    """Seed by seed: both saw the same samples and started from the same weights."""
    return interval([a - b for a, b in zip(entry.of(measure), plain.of(measure), strict=True)])
