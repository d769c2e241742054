"""What is run in the environment of a pair: the tests, and ``probe.py`` for the names of twenty models and the streams."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from matrix.environment import TOP, Environment


def run_tests(environment: Environment, workers: int) -> dict[str, Any]:
    """Run the suite as ``make test`` and ``make test-rest`` do. What passed, failed (by test) and was skipped (by reason)."""
    report = environment.folder / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-m", "not sweep and not gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    status = environment.run("tests.log", "-m", "pytest", "-n", str(workers), "--dist", "worksteal", *options)
    if not report.exists():
        return {"passed": 0, "failed": [f"pytest ended with status {status}: {last_line(environment.folder / 'tests.log')}"], "skipped": {}}
    return counted(report)


def counted(report: Path) -> dict[str, Any]:
    """The outcomes in a report of pytest's (JUnit XML)."""
    passed, failed, skipped = 0, list[str](), Counter[str]()
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{str(case.get('classname')).replace('.', '/')}.py::{case.get('name')}")
        elif (skip := case.find("skipped")) is not None:
            skipped[str(skip.get("message"))] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": sorted(set(failed)), "skipped": dict(sorted(skipped.items()))}


def probe(environment: Environment) -> dict[str, Any]:
    """The versions, the names of twenty models and the known answers, as ``probe.py`` found them in the environment."""
    out = environment.folder / "probe.json"
    out.unlink(missing_ok=True)
    path = {"PYTHONPATH": str(TOP / "benchmarks")}
    status = environment.run("probe.log", "-m", "matrix.probe", str(out), settings=path)
    if not out.exists():
        return {"error": f"probe ended with status {status}: {last_line(environment.folder / 'probe.log')}"}
    return dict(json.loads(out.read_text()))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1][:200] if lines else "it printed nothing"


def share(log: Path) -> str:
    """How far pytest has come, by what it has printed: "45%"."""
    found = re.findall(r"\[ *(\d+%)\]", log.read_text(errors="replace")) if log.exists() else []
    return found[-1] if found else ""
