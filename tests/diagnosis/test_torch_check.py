"""``doctor`` without a module: each trial of a part, and what is made of a process's report, and of a crash."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

import graphreg
from graphreg import Diagnosis, GraphRegError, RegularizerError
from graphreg.diagnosis.torch_check import check_torch
from graphreg.diagnosis.torch_parts import PARTS
from graphreg.torch_internals.dynamo import tells_result

ABOUT = f"torch {torch.__version__}, Python {platform.python_version()}: graphreg is made for torch 2.10 to 2.15"
LINES: dict[str, list[Any]] = {
    "whole": ["torch says something", {"trying": "the backend"}, {"part": "the backend", "error": ""},
              {"trying": "attached penalties"}, {"part": "attached penalties", "error": ""}, {"done": True}],
    "broken": [{"trying": "the backend"}, {"part": "the backend", "error": "NameError: x"}, {"done": True}],
    "ended": [{"trying": "the backend"}],
}  # fmt: skip


LACKING = {} if tells_result() else {"attached penalties of the backend": "penalties='attach' in a backend needs torch 2.12 or newer"}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_works(part: str) -> None:
    """Or says which torch it needs."""
    if part not in LACKING:
        PARTS[part]()
        return
    with pytest.raises(GraphRegError) as caught:
        PARTS[part]()
    assert str(caught.value).startswith(LACKING[part])


def test_of_a_whole_run() -> None:
    """In a process of its own, which is at torch's defaults whatever they are here."""
    diagnosis = graphreg.doctor(progress=False)
    assert [finding.cause for finding in diagnosis.findings] == [f"{part} with this torch" for part in LACKING], diagnosis
    assert all(sentence in finding.observed for sentence, finding in zip(LACKING.values(), diagnosis.findings, strict=True))
    assert diagnosis.subject == ABOUT and len(diagnosis.right) == len(PARTS) - len(LACKING)


def reported(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, end: str = "") -> tuple[Diagnosis, list[str]]:
    """The diagnosis of a process that prints these lines, and what was shown meanwhile."""
    prints = [f"print({line!r})" if isinstance(line, str) else f"print('graphreg: ' + json.dumps({line!r}))" for line in LINES[name]]
    (folder / "a_report.py").write_text("\n".join(["import json, os, sys", *prints, "sys.stdout.flush()", end]))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    progress = list[str]()
    return check_torch(progress.append, "a_report"), progress


def test_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis, progress = reported(tmp_path, "whole", monkeypatch)
    assert [text for text in progress if text] == ["the backend", "attached penalties"]
    assert diagnosis.ok and str(diagnosis) == (
        f"{ABOUT}\nright: the backend works\nright: attached penalties work"
    )
    assert diagnosis.to_dict() == {"subject": ABOUT, "ok": True, "findings": [], "right": list(diagnosis.right)}


def test_what_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis, _ = reported(tmp_path, "broken", monkeypatch)
    assert not diagnosis and str(diagnosis) == (
        f"{ABOUT}\n"
        "broken: the backend with this torch\n"
        "  observed  NameError: x\n"
        "  cure      another version of torch or of graphreg; other parts work without it\n"
        "  upstream  no upstream issue found"
    )


@pytest.mark.parametrize(
    ("end", "observed"),
    [
        ("os.kill(os.getpid(), 11)", "the process ended with signal SIGSEGV"),
        ("sys.exit('no more memory')", "the process ended with status 1: no more memory"),
        ("sys.exit(0)", "the process ended with status 0"),
    ],
)
def test_a_process_that_ends_too_early(end: str, observed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis, _ = reported(tmp_path, "ended", monkeypatch, end)
    (finding,) = diagnosis.findings
    assert (finding.kind, finding.cause, finding.observed) == ("broken", "the backend with this torch", observed)


def test_what_is_about_a_module_needs_one() -> None:
    sentence = "step= and backend= are about a module, and none is given. graphreg.doctor() alone tests torch."
    for options in ({"step": lambda: None}, {"backend": "aot_eager"}):
        with pytest.raises(RegularizerError) as caught:
            graphreg.doctor(**options)  # type: ignore[arg-type]
        assert str(caught.value) == sentence
