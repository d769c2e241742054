"""The sweep: each model in a process of its own, so that none that crashes, hangs or fills the memory ends it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}  # nothing is fetched
Record = Mapping[str, Any]


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


def told(record: Record) -> list[str]:
    """A line for each reason: the columns that failed for it, and the reason."""
    return [f"{', '.join(columns)}: {reason}" for reason, columns in by_reason(failures(record)).items()]


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for what, reason in reasons.items():
        groups.setdefault(reason, []).append(what)
    return groups


def one(module: str, name: str, limits: Limits) -> Record:
    """What one model's process says, or what became of the process."""
    provider, _, model = name.partition("/")
    command = [sys.executable, "-m", "zoo.one", str(limits.memory), module, provider, model]
    found: dict[str, Any]
    try:
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=limits.seconds, check=False)
        found = answer(done)
    except subprocess.TimeoutExpired:
        found = {"error": f"it was stopped after {limits.seconds:g} seconds"}
    return {"name": name, "versions": versions(module)} | found


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line that the process printed; without one, what became of it, in a line."""
    if done.returncode < 0:
        return {"error": f"its process ended by signal {signal.Signals(-done.returncode).name}"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"error": f"its process ended with status {done.returncode}: {last[0]}"}


def sweep(module: str, names: Iterable[str], results: Path, workers: int, limits: Limits, tell: Callable[[Record], None]) -> None:
    """Run each model and append its record to ``results`` as soon as it is there; an interrupted sweep goes on from that."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if results.exists():
        results.write_text(_whole_lines(results))
    stopping = threading.Event()

    def run(name: str) -> Record | None:
        record = None if stopping.is_set() else one(module, name, limits)
        return None if stopping.is_set() else record  # what an interrupt ended says nothing of the model

    with ThreadPoolExecutor(workers) as pool, results.open("a") as file:
        waiting = [pool.submit(run, name) for name in names]
        try:
            for done in as_completed(waiting):
                record = done.result()
                if record is not None:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    tell(record)
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
