"""Runs many cases, in several processes, and writes down what failed."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuzz import argument_kinds, asks, generate, model_changes  # noqa: F401  (they register what scenes are drawn from)
from fuzz.cases import Case, Discarded, Group, Maker, make
from fuzz.inserted import judge_inserted
from fuzz.judge import Verdict, judge
from fuzz.scene_judge import judge_scene, shrunk_scene, write_scene
from fuzz.scenes import KINDS, Scene, scene
from fuzz.shrink import shrunk

SECONDS, COMPILED_SECONDS = 60, 600  # for a model with all of its cases
SOURCES = ("models", *KINDS, "inserted")  # what cases are made of: models with an instrumented oracle, scenes, and pairs of models


@dataclass
class Options:
    """What to run: ``sets`` of regularizers a model; ``without``: makers of statements that are left out."""

    seed: int = 0
    cases: int = 1000
    compiled: str = ""
    workers: int = 1
    sets: int = 4
    without: tuple[str, ...] = ()
    out: Path = Path("build/fuzz")
    shrink: bool = True
    later: int = 2  # sets with the regularizers and options of 0.2
    most: int = 20  # faults of one kind that are written down
    of: str = "models"  # one of SOURCES


@dataclass
class Tally:
    """What came of a run."""

    cases: int = 0
    models: int = 0
    discarded: int = 0
    fine: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        refused = sum(self.refused.values())
        share = refused / max(self.cases, 1)
        counts = f"{self.fine:,} fine, {refused:,} refused ({share:.1%}), {len(self.faults)} faults"
        return f"{self.cases:,} cases on {self.models:,} models: {counts}"


def program_seed(options: Options, index: int) -> int:
    """Of the index-th model."""
    return options.seed * 1_000_003 + index


def results(options: Options) -> Iterator[tuple[int, list[tuple[str, str, str]], str]]:
    """The models in order: (index, verdicts, why it was discarded)."""
    indices = iter(range(1 << 40))
    if options.workers <= 1:
        _start(options)
        for index in indices:
            yield _one(index)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(options.workers, _start, (options,), maxtasksperchild=40 if options.compiled else 400) as pool:
        chunk = options.workers * 8
        while True:
            yield from pool.imap(_one, [next(indices) for _ in range(chunk)])


_OPTIONS = Options()


def _start(options: Options) -> None:
    global _OPTIONS  # noqa: PLW0603  (of a worker)
    _OPTIONS = options
    torch.set_num_threads(1)
    generate.WITHOUT.clear()
    generate.WITHOUT.update(options.without)


class _Late(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise _Late


def _one(index: int) -> tuple[int, list[tuple[str, str, str]], str]:
    options = _OPTIONS
    seed = program_seed(options, index)
    main = multiprocessing.current_process().name == "MainProcess"
    if not main:
        signal.signal(signal.SIGALRM, _alarm)
        signal.alarm(COMPILED_SECONDS if options.compiled else SECONDS)
    try:
        if options.of == "inserted":
            return index, [_told_pair(options, seed, *judge_inserted(seed))], ""
        if options.of in KINDS:
            made = scene(seed, options.of)
            return index, [_told_scene(options, made, judge_scene(made, options.compiled))], ""
        maker, group = make(seed, options.sets, bool(options.compiled), options.later)
        verdicts = judge(group, options.compiled)
        return index, [_told(options, maker, case, verdict) for case, verdict in zip(group.cases, verdicts, strict=True)], ""
    except Discarded as reason:
        return index, [], str(reason)[:60]
    except _Late:
        return index, [("fault", "it does not end", f"seed {seed}")], ""
    except AssertionError as error:  # of the fuzzer's own
        return index, [("fault", "the fuzzer contradicts itself", f"seed {seed}: {error}")], ""
    finally:
        if not main:
            signal.alarm(0)


_WRITTEN: Counter[str] = Counter()


def _told(options: Options, maker: Maker, case: Case, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.result != "fault":
        return verdict.result, verdict.kind, ""
    _WRITTEN[verdict.kind] += 1
    if _WRITTEN[verdict.kind] > options.most:
        return "fault", verdict.kind, ""
    group = maker.group([case])
    if options.shrink:
        group = shrunk(maker, case, lambda g: failing(g, options.compiled), 40 if options.compiled else 150)
    path = write(options.out, group, options.compiled)
    return "fault", verdict.kind, str(path)


def _told_scene(options: Options, made: Scene, verdict: Verdict) -> tuple[str, str, str]:
    if verdict.result != "fault":
        return verdict.result, verdict.kind, ""
    kind = f"{made.kind} {verdict.kind}"
    _WRITTEN[kind] += 1
    if _WRITTEN[kind] > options.most:
        return "fault", verdict.kind, ""
    path = write_scene(options.out, shrunk_scene(made, options.compiled) if options.shrink else made, options.compiled)
    return "fault", verdict.kind, str(path)


def _told_pair(options: Options, seed: int, verdict: Verdict, about: str) -> tuple[str, str, str]:
    if verdict.result != "fault":
        return verdict.result, verdict.kind, ""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"inserted-{seed}.py"
    said = "\n".join(f"# {line}" for line in verdict.detail.splitlines()[-12:])
    path.write_text(f"# {verdict.kind}\n{said}\n# python -m fuzz --replay {path.name}\n{about}\n# inserted: {seed}\n")
    return "fault", verdict.kind, str(path)


def failing(group: Group, compiled: str = "") -> str:
    """The kind of fault of a group's one case, or nothing."""
    verdict = judge(group, compiled)[0]
    return verdict.kind if verdict.result == "fault" else ""


def write(out: Path, group: Group, compiled: str = "") -> Path:
    """A case as a file: to be read, and to be replayed."""
    out.mkdir(parents=True, exist_ok=True)
    case, verdict = group.cases[0], judge(group, compiled)[0]
    kind = "".join(c if c.isalnum() else "-" for c in verdict.kind.partition(" in ")[0])[:30].strip("-")
    path = out / f"{kind or 'fine'}-{group.seed}-{zlib.crc32(case.oracle.encode()) % 10**6:06d}.py"
    regs = "\n".join(f"#     {reg.made()}" for reg in case.regs)
    own = f"\n# own_dropout={case.own_dropout!r}" if case.own else ""
    attach = f'\n# penalties="attach", scale={case.scale}' if case.penalties == "attach" else ""
    attach += "".join(f"\n# {name}={getattr(case, name)!r}" for name in ("blocks", "changes", "keywords", "depth") if getattr(case, name))
    said = "\n".join(f"# {line}" for line in verdict.detail.splitlines()[-12:])
    oracle = "\n".join(f"# {line}" for line in case.oracle.splitlines())
    by = f" --compiled {compiled}" if compiled else ""
    head = f"# {verdict.result}: {verdict.kind}\n{said}\n# python -m fuzz --replay {path.name}{by}\n# Regularizers, rng={case.rng}:\n"
    data = json.dumps(group.to_dict())
    path.write_text(f"{head}{regs}{own}{attach}\n\n{group.source}\n\n# The oracle:\n{oracle}\n\n# replay: {data}\n")
    return path


def read(path: Path) -> Group:
    """The case of a file."""
    return Group.from_dict(json.loads(_last(path, "# replay: ")))


def replayed(path: Path, compiled: str = "") -> list[Verdict]:
    """The verdicts of a file, whatever made it."""
    text = path.read_text()
    if "\n# inserted: " in text:
        return [judge_inserted(int(_last(path, "# inserted: ")))[0]]
    if "\n# scene: " in text:
        return [judge_scene(Scene.from_dict(json.loads(_last(path, "# scene: "))), compiled)]
    return judge(read(path), compiled)


def _last(path: Path, beginning: str) -> str:
    return next(line for line in reversed(path.read_text().splitlines()) if line.startswith(beginning)).removeprefix(beginning)


def run(options: Options, show: bool = False) -> Tally:
    """Cases until there are as many as asked for."""
    tally, began, told = Tally(), time.monotonic(), 0.0
    for _, verdicts, discarded in results(options):
        tally.models += not discarded
        tally.discarded += bool(discarded)
        for result, kind, path in verdicts:
            if tally.cases >= options.cases:
                break
            tally.cases += 1
            if result == "fine":
                tally.fine += 1
            elif result == "refused":
                tally.refused[kind] += 1
            else:
                tally.faults.append({"kind": kind, "file": path})
        tally.seconds = time.monotonic() - began
        if show and tally.seconds - told > 0.5:
            told = tally.seconds
            sys.stderr.write(f"\r{tally.text()}, {tally.seconds / max(tally.cases, 1) * 1e3:.0f} ms a case ")
            sys.stderr.flush()
        if tally.cases >= options.cases:
            break
    if show:
        sys.stderr.write("\r\033[K")
    return tally
