"""A training run killed by a signal in the middle of a step, and resumed from its checkpoint: every later loss is bit-equal."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_run import main

SCRIPT = Path(__file__).parent / "killed_run.py"
STEPS = 12


def started(place: Path, backend: str, stop: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(place / "checkpoint.pt"), str(place / "losses"), backend, str(STEPS), str(stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_LOGS": "-all"}  # a build for CUDA warns where there is none
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, process_group=0, **pipes)  # type: ignore[call-overload, no-any-return]


def losses(place: Path) -> list[str]:
    return (place / "losses").read_text().splitlines()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_killed_and_resumed(backend: str, tmp_path: Path) -> None:
    stop = random.randrange(1, STEPS - 1)  # any step will do: it is named in the process's command line
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with started(broken, backend, stop) as process, torch.random.fork_rng():
        try:
            main(whole / "checkpoint.pt", whole / "losses", backend, STEPS, -1)
            assert process.stdin is not None and process.stdout is not None
            word, run = process.stdout.readline().split()
            assert word == "standing"
            os.kill(int(run), signal.SIGKILL)
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"
            assert len(losses(broken)) == stop
            output, _ = process.communicate("go on\n", timeout=300)
            assert process.returncode == 0, output
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert [line.split()[0] for line in losses(whole)] == [str(step) for step in range(STEPS)]
    assert losses(broken) == losses(whole), f"killed in step {stop}"
    assert len({line.split()[1] for line in losses(whole)}) == STEPS
