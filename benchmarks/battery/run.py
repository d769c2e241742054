"""The run: each test in a process of its own that reads its words from a pipe."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from battery.cases import FIELDS, Case, Record, again, doubtful, keep
from battery.words import drawn


def rows(output: str) -> list[dict[str, Any]]:
    """dieharder's lines, one for each p-value."""
    lines = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    found = [dict(zip(FIELDS, cells, strict=True)) for cells in lines if len(cells) == len(FIELDS)]
    return [row | {"pvalues": float(row["pvalues"])} for row in found]


def feed(case: Case, pipe: IO[bytes], folder: Path) -> int:
    """Writes words until the reader has enough; how many it took, to the BATCH that is written at a time."""
    count = 0
    try:
        for words in drawn(case.stream, case.place, folder):
            data = words.numpy().data.cast("B")
            while data:
                data = data[pipe.write(data) :]
            count += words.numel()
    except BrokenPipeError:  # it closes its end when it has enough
        pass
    return count


def run(case: Case, folder: Path) -> Record:
    """Runs one test and keeps what it says; nothing is kept of a test that did not end."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), os.times().children_user
    command = [*case.command, "-c", ",", *(word for field in FIELDS for word in ("-D", field))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin and process.stdout and process.stderr
        count = feed(case, process.stdin, folder)
        output, complaint = process.stdout.read().decode(), process.stderr.read().decode()
    found = rows(output)
    if process.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}: {complaint or output}")
    setting = {"command": " ".join(case.command), "place": case.place, "times": case.times, "words": count}
    took = {"seconds": time.perf_counter() - start, "cpu": os.times().children_user - cpu, "date": datetime.now(UTC).date().isoformat()}
    keep(case, folder, setting | took | {"rows": found})
    return setting | took | {"rows": found}


def sweep(pool: Executor, workers: int, cases: list[Case], folder: Path) -> Iterator[tuple[Case, int]]:
    """Each case as it ends, with the number of those that are left; what did not pass runs again next."""
    left = list(cases)
    running: dict[Future[Record], Case] = {}
    while left or running:
        while left and len(running) < workers:
            case = left.pop(0)
            running[pool.submit(run, case, folder)] = case
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            case = running.pop(future)
            if doubtful(future.result()) and case.times == 1:
                left.insert(0, again(case))
            yield case, len(left) + len(running)
