"""A training run killed by a signal in the middle of a step, and resumed from its checkpoint: every later loss is bit-equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "killed_run.py"
STEPS = 12


def started(place: Path, backend: str, *stop: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(place / "checkpoint.pt"), str(place / "losses"), backend, str(STEPS), *map(str, stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_LOGS": "-all"}  # a build for CUDA warns where there is none
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def losses(place: Path) -> list[str]:
    return (place / "losses").read_text().splitlines()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_killed_and_resumed(backend: str, tmp_path: Path) -> None:
    stop = random.randrange(1, STEPS - 1)  # any step will do: it is named in the process's command line
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with started(broken, backend, stop) as process:
        try:
            finished(started(whole, backend))
            assert process.stdout is not None and process.stdout.readline() == "standing\n"
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(losses(broken)) == stop
    finished(started(broken, backend))
    assert [line.split()[0] for line in losses(whole)] == [str(step) for step in range(STEPS)]
    assert losses(broken) == losses(whole), f"killed in step {stop}"
    assert len({line.split()[1] for line in losses(whole)}) == STEPS
