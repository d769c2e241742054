"""The sweep: each model in a process of its own, so that none that crashes, hangs or fills the memory ends it."""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import os
import platform
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from zoo.one import run

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # nothing is fetched
Record = Mapping[str, Any]
PLACE = re.compile(r"(?<![\w.])/(?:[\w.-]+/)*?(?:lib/python3\.\d+/(?:site-packages/)?|(?=benchmarks/zoo/))")  # where things are installed


@dataclass(frozen=True)
class Limits:
    """Of one model: seconds, and bytes of memory."""

    seconds: float
    memory: int


def versions(module: str) -> dict[str, str]:
    """What the results depend on beside graphreg itself."""
    return {"python": platform.python_version()} | {name: version(name) for name in importlib.import_module(module).PACKAGES}


def kept(module: str, results: Path) -> dict[str, Record]:
    """The records of earlier sweeps by the versions of today; of several of one model, the last."""
    if not results.exists():
        return {}
    records = [json.loads(line) for line in _whole_lines(results).splitlines()]
    return {record["name"]: record for record in records if record["versions"] == versions(module)}


def _whole_lines(results: Path) -> str:
    """Without the half of a line that a sweep which was killed may leave."""
    text = results.read_text()
    return text[: text.rfind("\n") + 1]


def passes(record: Record) -> bool:
    return not failures(record)  # what cannot be asked of a model is no failure


def failures(record: Record) -> dict[str, str]:
    """Each column that did not pass, with its reason; ``run`` where the model did not come so far."""
    if "error" in record:
        return {"run": record["error"]}
    return {name: answer["remark"] for name, answer in record["columns"].items() if not answer["passed"]}


def failure_lines(record: Record) -> list[str]:
    """A line for each reason: the columns that failed for it, and the reason."""
    return [f"{', '.join(columns)}: {reason}" for reason, columns in by_reason(failures(record)).items()]


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for what, reason in reasons.items():
        groups.setdefault(reason, []).append(what)
    return groups


def server(module: str) -> ForkServerContext:
    """Forks the processes: it has the libraries in it, whose import costs more than a small model, and has run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo.one", "torch._dynamo", "torch._inductor.compile_fx", *importlib.import_module(module).PRELOADED])
    with mock.patch.dict(os.environ, QUIET):
        forkserver.ensure_running()
    return context


def one(module: str, name: str, limits: Limits) -> Record:
    """What one model's process says, or what became of the process."""
    provider, _, model = name.partition("/")
    context = server(module)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender, limits.memory, module, provider, model), daemon=True)
    process.start()
    sender.close()
    found = answer(receiver, limits.seconds)
    if "error" in found and process.is_alive():
        process.kill()
    process.join()
    found = found or {"error": ended(process.exitcode)}
    return {"name": name, "date": str(datetime.date.today()), "versions": versions(module)} | found


def answer(receiver: Connection, seconds: float) -> dict[str, Any]:
    """What the process sent; nothing where it ended without a word."""
    if not receiver.poll(seconds):
        return {"error": f"it was stopped after {seconds:g} seconds"}
    try:
        return dict(receiver.recv())
    except EOFError:
        return {}


def ended(status: int | None) -> str:
    how = f"by signal {signal.Signals(-status).name}" if status and status < 0 else f"with status {status}"
    return f"its process ended {how}"


def sweep(module: str, names: Iterable[str], results: Path, workers: int, limits: Limits, tell: Callable[[Record], None]) -> None:
    """Run each model and append its record to ``results`` as soon as it is there; an interrupted sweep goes on from that."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists():
        results.write_text(_whole_lines(results))
    stopping = threading.Event()

    def each(name: str) -> Record | None:
        record = None if stopping.is_set() else one(module, name, limits)
        return None if stopping.is_set() else record  # what an interrupt ended says nothing of the model

    with ThreadPoolExecutor(workers) as pool, results.open("a") as file:
        waiting = [pool.submit(each, name) for name in names]
        try:
            for done in as_completed(waiting):
                record = done.result()
                if record is not None:
                    file.write(PLACE.sub("", json.dumps(record)) + "\n")
                    file.flush()
                    tell(record)
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
