"""``graphreg.doctor()`` without a module finds out which parts of graphreg work with the installed torch.

All parts are tried in one separate process, at torch's default settings. So nothing changes in the caller's process. If a part crashes the
separate process, the crash becomes a finding.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from graphreg.diagnosis.findings import Diagnosis, Finding
from graphreg.torch_internals.versions import known_versions

TRIALS = "graphreg.diagnosis.torch_parts"
MARK = "graphreg: "
PACKAGE = Path(__file__).parents[2]


def check_torch(show: Callable[[str], None], module: str = TRIALS) -> Diagnosis:
    """Try all parts of graphreg in one separate process, and report the parts that fail.

    Args:
        show: A function that shows progress. It is called with the name of each part before the part is tried.
        module: The Python module that the process runs.

    Returns:
        A diagnosis. ``bool(diagnosis)`` is True if every part works.
    """
    # The process must import this graphreg, also from a checkout that is not installed.
    path = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment) as child:
        assert child.stdout is not None
        lines, last = _read(child.stdout, show)

    # If a trial crashed the process, how it ended is the error of the part that was being tried.
    status = child.returncode
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    findings, right = _findings(lines, f"the process ended with {how}" + f": {last[:160]}" * bool(last))
    return Diagnosis(f"torch {torch.__version__}, Python {platform.python_version()}: {known_versions()}", tuple(findings), tuple(right))


def _read(output: Iterable[str], show: Callable[[str], None]) -> tuple[list[dict[str, Any]], str]:
    """Return the lines of the report, parsed, and the last other line that the process printed."""
    lines, last = list[dict[str, Any]](), ""
    for text in output:
        if text.startswith(MARK):
            lines.append(json.loads(text.removeprefix(MARK)))
            show(lines[-1].get("trying", ""))
        elif text.strip():
            last = text.strip()
    return lines, last


def _findings(lines: Iterable[dict[str, Any]], ended: str) -> tuple[list[Finding], list[str]]:
    broken, right = list[Finding](), list[str]()
    # Before the first part is tried, only the import of graphreg can have failed.
    trying, done = "graphreg itself", False
    for line in lines:
        trying, done = line.get("trying", trying), done or "done" in line
        if "part" in line and line["error"]:
            broken.append(_broken(line["part"], line["error"]))
        elif "part" in line:
            right.append(f"{line['part']} work{'s' * (not line['part'].startswith(PLURAL))}")
    if not done:
        broken.append(_broken(trying, ended))
    return broken, right


PLURAL = ("attached penalties", "penalties", "recurrent layers")


def _broken(part: str, error: str) -> Finding:
    return Finding("broken", f"{part} with this torch", error, (), "another version of torch or of graphreg; other parts work without it")
