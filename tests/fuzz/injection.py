"""After how many cases a fault that is put into the engine is found."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial

from fuzz.cases import Case, Discarded, Group, Maker, make
from fuzz.faults import FAULTS
from fuzz.inserted import judge_inserted
from fuzz.judge import judge
from fuzz.later_faults import LATER
from fuzz.runner import Options, _start, program_seed
from fuzz.scene_faults import OF
from fuzz.scene_judge import failing_scene
from fuzz.scenes import scene

Found = dict[str, list[int | None]]


def injected(names: str, seeds: int, options: Options, tell: Callable[[str], object] = lambda line: None) -> Found:
    """By fault, the number of the case that found it, one for each seed; None where none did. ``tell`` is given a line for each."""
    chosen = list(FAULTS) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        raise SystemExit(f"no fault is called {unknown[0]!r}; there are: {', '.join(FAULTS)}")
    jobs = [(name, seed) for name in chosen for seed in range(options.seed, options.seed + seeds)]
    found: Found = {name: [] for name in chosen}
    for (name, _), count in zip(jobs, _counts(jobs, options), strict=True):
        found[name].append(count)
        if len(found[name]) == seeds:
            tell(f"{name}: {', '.join('not found' if each is None else str(each) for each in found[name])}")
    return found


def _counts(jobs: list[tuple[str, int]], options: Options) -> Iterator[int | None]:
    work = [(name, seed, options) for name, seed in jobs]
    if options.workers <= 1:
        _start(options)
        yield from map(_job, work)
        return
    with multiprocessing.get_context("fork").Pool(options.workers, _start, (options,), maxtasksperchild=4) as pool:
        yield from pool.imap(_job, work)


def _job(work: tuple[str, int, Options]) -> int | None:
    name, seed, options = work
    return first(name, seed, options)


def first(name: str, seed: int, options: Options) -> int | None:
    """The number of the first case that is a fault with the fault in the engine, and none without."""
    if name in OF:
        return _first_scene(name, seed, options)
    count, (sets, later) = 0, (0, 6) if name in LATER else (options.sets, options.later)
    for index in range(options.cases):
        try:
            maker, group = make(program_seed(Options(seed=seed), index), sets, bool(options.compiled), later)
        except Discarded:
            continue
        with FAULTS[name]():
            verdicts = judge(group, options.compiled)
        for case, verdict in zip(group.cases, verdicts, strict=True):
            count += 1
            if verdict.result == "fault" and not _fails_anyway(maker, case, options):
                return count
            if count >= options.cases:
                return None
    return None


def _first_scene(name: str, seed: int, options: Options) -> int | None:
    for index in range(options.cases):
        own = program_seed(Options(seed=seed), index)
        fails = _pair_fails(own) if OF[name] == "inserted" else partial(failing_scene, scene(own, OF[name]), options.compiled)
        with FAULTS[name]():
            kind = fails()
        if kind and not fails():
            return index + 1
    return None


def _pair_fails(seed: int) -> Callable[[], bool]:
    def fails() -> bool:
        try:
            return judge_inserted(seed)[0].result == "fault"
        except Discarded:
            return False

    return fails


def _fails_anyway(maker: Maker, case: Case, options: Options) -> bool:
    group: Group = maker.group([case])
    return judge(group, options.compiled)[0].result == "fault"
