"""All runs of the study: plain, each regularizer, all together; strengths chosen on the validation split."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean

import torch
from digits_mlp import Job, Outcome, run
from show import Advance, Screen

Keywords = Mapping[str, float]
SEEDS = range(10)
GRID: Mapping[str, tuple[float, ...]] = {
    "hidden_dropout": (0.2, 0.5, 0.7),
    "input_noise": (0.1, 0.3, 0.6),
    "weight_l2": (10, 100, 1000),  # a mean over all weights of w ** 2, hence the large numbers
    "hidden_l1": (0.1, 0.3, 1),
}
SHARES = (0.5, 1)  # of the chosen strengths, for all four at once


@dataclass(frozen=True)
class Entry:
    """One row of the study: its name, its strengths, an outcome a seed."""

    name: str
    keywords: Keywords
    outcomes: tuple[Outcome, ...]

    @property
    def title(self) -> str:
        weights = list(self.keywords.values())
        return f"{self.name} {weights[0]:g}" if len(weights) == 1 else self.name

    def of(self, measure: str) -> list[float]:
        return [getattr(outcome, measure) for outcome in self.outcomes]


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """One process a core and one thread each: such small products gain nothing from threads."""
    count = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool


def submit(pool: ProcessPoolExecutor, keywords: Keywords) -> list[Future[Outcome]]:
    return [pool.submit(run, Job(keywords, seed)) for seed in SEEDS]


def collect(name: str, keywords: Keywords, futures: Iterable[Future[Outcome]], advance: Advance) -> Entry:
    outcomes = []
    for future in futures:
        outcomes.append(future.result())
        advance()
    return Entry(name, keywords, tuple(outcomes))


def choose(screen: Screen, label: str, tried: Sequence[tuple[str, Entry]]) -> Entry:
    """The entry with the best validation accuracy, the weaker one where two are equal; tells how they did."""
    scores = [fmean(entry.of("validation")) for _, entry in tried]
    best = scores.index(max(scores))
    marks = ["*" if i == best and len(tried) > 1 else " " for i in range(len(tried))]
    cells = [f"{text:>8} {score:.1f}{mark}" for (text, _), score, mark in zip(tried, scores, marks, strict=True)]
    screen.line(f"  {label:<16}{''.join(cells)}".rstrip())
    return tried[best][1]


def train_all(screen: Screen) -> list[Entry]:
    """Plain, each regularizer at its best strength, and all four together."""
    grid = [(name, weight) for name, weights in GRID.items() for weight in weights]
    total = len(SEEDS) * (1 + len(grid) + len(SHARES))
    with workers() as pool, screen.progress("training", total) as advance:
        first = submit(pool, {})
        waiting = {(name, weight): submit(pool, {name: weight}) for name, weight in grid}
        plain = collect("plain", {}, first, advance)
        choose(screen, "plain", [("", plain)])
        chosen = [plain]
        for name, weights in GRID.items():
            tried = [(f"{w:g}:", collect(name, {name: w}, waiting[name, w], advance)) for w in weights]
            chosen.append(choose(screen, name, tried))
        all_four = {name: weight for entry in chosen for name, weight in entry.keywords.items()}
        shared = {share: {name: share * weight for name, weight in all_four.items()} for share in SHARES}
        runs = {share: submit(pool, keywords) for share, keywords in shared.items()}
        tried = [(f"x {share:g}:", collect(f"all four x {share:g}", shared[share], runs[share], advance)) for share in SHARES]
        return [*chosen, choose(screen, "all four", tried)]
