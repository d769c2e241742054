"""Starts a script that forks ranks of torch.distributed, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def run_ranks(*arguments: object, paths: tuple[Path, ...] = (), cwd: Path | None = None, timeout: float = 900) -> str:
    """Run Python, and return what it and the processes that it forks print to stdout. Fail with all that they print.

    Args:
        arguments: The arguments of Python.
        paths: Folders from which the script imports.
        cwd: The folder in which it runs.
        timeout: The seconds after which all its processes are killed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_LOGS": "-all"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command, pipes = [sys.executable, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=cwd, text=True, process_group=0, **pipes) as process:  # type: ignore[call-overload]
        try:
            output, errors = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output + errors
    told: str = output
    return told
