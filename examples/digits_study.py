"""All runs on the digits: plain, each regularizer, all together. The study chooses strengths on a validation split; the demo uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future

from digits_mlp import Job, Outcome, run
from show import Screen
from trials import Entry, choose, collect, workers

Keywords = Mapping[str, float]
SEEDS = range(10)
GRID: Mapping[str, tuple[float, ...]] = {
    "hidden_dropout": (0.2, 0.5, 0.7),
    "input_noise": (0.1, 0.3, 0.6),
    "weight_l2": (10, 100, 1000),  # a mean over all weights of w ** 2, hence the large numbers
    "hidden_l1": (0.1, 0.3, 1),
}
SHARES = (0.5, 1)  # of the chosen strengths, for all four at once
FEW = range(5)  # the demo's seeds
FOUND: Keywords = {"hidden_dropout": 0.5, "input_noise": 0.3, "weight_l2": 10, "hidden_l1": 0.3}  # what the study chose


def submit(pool: Executor, keywords: Keywords, seeds: Sequence[int]) -> list[Future[Outcome]]:
    return [pool.submit(run, Job(keywords, seed)) for seed in seeds]


def train_few(screen: Screen) -> list[Entry]:
    """Plain, each regularizer at the strength that the study found, and all four together; few seeds."""
    asked = {"plain": {}, **{name: {name: weight} for name, weight in FOUND.items()}, "all four": FOUND}
    with workers() as pool, screen.progress("training many networks", len(FEW) * len(asked)) as advance:
        runs = {name: submit(pool, keywords, FEW) for name, keywords in asked.items()}
        return [collect(name, asked[name], futures, advance) for name, futures in runs.items()]


def train_all(screen: Screen) -> list[Entry]:
    """Plain, each regularizer at its best strength, and all four together."""
    grid = [(name, weight) for name, weights in GRID.items() for weight in weights]
    total = len(SEEDS) * (1 + len(grid) + len(SHARES))
    with workers() as pool, screen.progress("training many networks", total) as advance:
        first = submit(pool, {}, SEEDS)
        waiting = {(name, weight): submit(pool, {name: weight}, SEEDS) for name, weight in grid}
        plain = collect("plain", {}, first, advance)
        choose(screen, "plain", [("", plain)])
        chosen = [plain]
        for name, weights in GRID.items():
            tried = [(f"{w:g}:", collect(name, {name: w}, waiting[name, w], advance)) for w in weights]
            chosen.append(choose(screen, name, tried))
        all_four = {name: weight for entry in chosen for name, weight in entry.keywords.items()}
        shared = {share: {name: share * weight for name, weight in all_four.items()} for share in SHARES}
        runs = {share: submit(pool, keywords, SEEDS) for share, keywords in shared.items()}
        tried = [(f"x {share:g}:", collect(f"all four x {share:g}", shared[share], runs[share], advance)) for share in SHARES]
        return [*chosen, choose(screen, "all four", tried)]
