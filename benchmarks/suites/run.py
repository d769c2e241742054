"""The sweep: the tests of a suite in shards, each in a process of its own. The log has every test as soon as it has run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from suites.suites import Suite

WAYS = ("plain", "in place")
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # nothing is fetched
INTERRUPTED = 2  # pytest's exit status
Record = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Seconds for a test, bytes of memory for a process, tests in a shard."""

    seconds: int
    memory: int
    shard: int


@dataclass(frozen=True)
class Log:
    """What has run of a suite, as lines of JSON: its list of tests, and for each way what became of a test."""

    path: Path

    def lines(self) -> list[Record]:
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # the last may be cut off

    def add(self, line: Record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def tests(self) -> list[str]:
        """The tests of the suite; none if they have not been listed yet."""
        return next((list(line["listed"]) for line in self.lines() if "listed" in line), [])

    def records(self, way: str) -> dict[str, Record]:
        """The last record of each test: its outcome is passed, skipped or failed, or began if nothing is known of its end."""
        return {line["test"]: line for line in self.lines() if line.get("way") == way}

    def ended(self, way: str) -> dict[str, Record]:
        return {test: record for test, record in self.records(way).items() if record["outcome"] != "began"}


def versions() -> dict[str, str]:
    """What the results depend on beside graphreg itself."""
    return {name: version(name) for name in ("torch", "timm", "transformers")}


def log_of(suite: Suite, build: Path) -> Log:
    """The log for the versions of today."""
    return Log(build / "-".join(versions().values()) / f"{suite.name}.jsonl")


def in_order(tests: Sequence[str]) -> list[str]:
    """First one case of each test function, then another one of each, and so on, so that what has run first is a sample of all."""
    cases: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        cases[test.partition("[")[0]].append(test)
    places: dict[str, int] = {}
    for function in cases.values():
        function.sort(key=lambda test: hashlib.sha1(test.encode()).digest())
        places |= {test: place for place, test in enumerate(function)}
    return sorted(tests, key=places.__getitem__)


def left(log: Log, way: str, tests: Sequence[str]) -> list[str]:
    """Which of the tests have not run; with models in place, which of those that pass on plain models."""
    ended, plain = log.ended(way), log.ended("plain")
    return [test for test in tests if test not in ended and (way == "plain" or plain.get(test, {}).get("outcome") == "passed")]


def forget(log: Log, passed: bool) -> None:
    """Have the models in place run again: the tests that failed, and with ``passed`` the others, too."""
    for test, record in log.ended("in place").items():
        if passed or record["outcome"] != "passed":
            log.add({"way": "in place", "test": test, "outcome": "began"})


def process(suite: Suite, folder: Path, way: str, tests: Sequence[str] | None, limits: Limits, log: Log) -> int:
    """Run the tests in one process, which adds to the log; ``None`` lists them. Its exit status."""
    log.path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "-p", "suites.plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    listing = ["--collect-only", "-q"] if tests is None else []
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    output = log.path.with_suffix(f".{way.replace(' ', '_')}.log").resolve()
    with tempfile.TemporaryDirectory() as place, output.open("a") as file:
        work = {"library": suite.library, "way": way, "tests": tests, "log": str(log.path.resolve()), "seconds": limits.seconds,
                "memory": limits.memory}  # fmt: skip
        given = Path(place) / "work.json"
        given.write_text(json.dumps(work))
        settings = os.environ | QUIET | {"PYTHONPATH": path, "GRAPHREG_SUITES": str(given), "TMPDIR": place}
        return subprocess.run(
            [*command, *listing, suite.file], cwd=folder, env=settings, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode


def run_shard(suite: Suite, folder: Path, tests: Sequence[str], limits: Limits, log: Log, stopping: threading.Event) -> None:
    """Run what is left of the tests, in one process for each way; in another one after it if a test ends its process."""
    for way in WAYS:
        while (these := left(log, way, tests)) and not stopping.is_set():
            status = process(suite, folder, way, these, limits, log)
            if status == INTERRUPTED:
                return
            records = log.records(way)
            begun = [test for test in these if records.get(test, {}).get("outcome") == "began"]
            for test in begun or ([] if len(left(log, way, tests)) < len(these) else these):  # where none began, none ever will
                log.add({"way": way, "test": test, "outcome": "failed", "message": f"the process ended with status {status}"})


def sweep(suite: Suite, folder: Path, build: Path, limits: Limits, workers: int, tell: Callable[[Log], None]) -> None:
    """Run what is left of a suite. ``tell`` gets the log every ten seconds.

    Raises:
        RuntimeError: The suite's tests cannot be listed.
    """
    log = log_of(suite, build)
    if not log.tests():
        process(suite, folder, "plain", None, limits, log)
    tests = in_order(log.tests())
    if not tests:
        raise RuntimeError(f"pytest lists no tests of {suite.file}; {log.path.with_suffix('.plain.log')} has what it says")
    shards = [tests[start : start + limits.shard] for start in range(0, len(tests), limits.shard)]
    stopping = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(run_shard, suite, folder, shard, limits, log, stopping) for shard in shards}
        try:
            while waiting:
                tell(log)
                done, waiting = wait(waiting, timeout=10, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
