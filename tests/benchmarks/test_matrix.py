"""The matrix of Pythons and torches: which pairs are meant, going on, what is counted, what the page says. Nothing is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from matrix.__main__ import main, with_row
from matrix.environment import Environment, Unavailable, find_python, reason
from matrix.page import page
from matrix.pairs import PAIRS, Pair, chosen
from matrix.stages import counted, share

TOP = Path(__file__).parents[2]
OLD, NEW = Pair("3.11", "2.10"), Pair("3.13", "2.15")


def test_the_pairs() -> None:
    assert [str(pair) for pair in PAIRS] == [
        "3.11 2.10", "3.11 2.11", "3.11 2.12", "3.11 2.13", "3.11 2.14", "3.11 2.15", "3.13 2.10", "3.13 2.13", "3.13 2.15",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("only", "pairs"),
    [
        (None, list(PAIRS)),
        ("3.13 2.15", [NEW]),
        ("2.15 3.13", [NEW]),
        ("2.15", [Pair("3.11", "2.15"), NEW]),
        ("3.13 2.15, 3.11 2.10", [NEW, OLD]),
        ("3.13, 3.13 2.15", [Pair("3.13", "2.10"), Pair("3.13", "2.13"), NEW]),
        ("3.14 2.16", [Pair("3.14", "2.16")]),
    ],
)
def test_only(only: str | None, pairs: list[Pair]) -> None:
    assert chosen(only) == pairs


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        ("newest", "ONLY='newest' is no pair. Write a Python, a torch or both, as in ONLY='3.13 2.15'."),
        ("", "ONLY='' is no pair. Write a Python, a torch or both, as in ONLY='3.13 2.15'."),
        ("3.11 3.13", "ONLY='3.11 3.13' is no pair. Write a Python, a torch or both, as in ONLY='3.13 2.15'."),
        (
            "2.9",
            "ONLY='2.9' is of no usual pair (2.10, 2.11, 2.12, 2.13, 2.14, 2.15, 3.11, 3.13). Name both versions to run it anyway.",
        ),
    ],
)
def test_what_is_no_pair(only: str, sentence: str) -> None:
    with pytest.raises(LookupError) as caught:
        chosen(only)
    assert caught.value.args == (sentence,)


def measured(pair: Pair, **more: Any) -> dict[str, Any]:
    return {
        "python": pair.python, "torch": pair.torch, "date": "2026-11-27",
        "versions": {"python": f"{pair.python}.1", "torch": f"{pair.torch}.0"},
        "passed": 7, "failed": [], "skipped": {}, "names": {"vision/a": [3, "abc"], "text/b": [5, "def"]},
        "answers": {"eager": True, "inductor": True},
    } | more  # fmt: skip


def run(folder: Path, *more: str, rows: dict[Pair, Any]) -> int:
    """The command, with rows, or errors, that are given in the place of environments."""

    def made(environment: Environment, workers: int, tell: Any) -> dict[str, Any]:
        row = rows[environment.pair]
        if isinstance(row, BaseException) or (isinstance(row, type) and issubclass(row, BaseException)):
            raise row
        return {key: value for key, value in row.items() if key not in ("python", "torch", "date")}

    places = ("--build", str(folder / "build"), "--results", str(folder / "versions.json"), "--page", str(folder / "versions.md"))
    return main([*places, *more], made)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[Pair, Any] = {OLD: measured(OLD), Pair("3.11", "2.11"): KeyboardInterrupt}
    assert run(tmp_path, "--only", "3.11 2.10, 3.11 2.11", rows=rows) == 130
    assert capsys.readouterr() == ("3.11 2.10: 7 passed, 0 failed, 0 skipped\n", "interrupted; the same command goes on from here\n")
    rows = {Pair("3.11", "2.11"): measured(Pair("3.11", "2.11"), failed=["tests/a.py::test"])}  # the first would raise
    assert run(tmp_path, "--only", "3.11 2.10, 3.11 2.11", rows=rows) == 1
    assert capsys.readouterr().out.startswith("3.11 2.11: 7 passed, 1 failed, 0 skipped\nwritten: ")
    assert [row["torch"] for row in json.loads((tmp_path / "versions.json").read_text())] == ["2.10", "2.11"]
    rows[OLD] = measured(OLD, passed=8)
    assert run(tmp_path, "--only", "3.11 2.10", rows=rows) == 0  # it had ended: all is run again
    assert "8 passed" in capsys.readouterr().out


def test_other_pairs_keep_their_rows_and_a_measured_row_stays_where_its_pair_cannot_be_had(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "3.11 2.10", rows={OLD: measured(OLD)}) == 0
    assert run(tmp_path, "--only", "3.13 2.15", rows={NEW: Unavailable("no python3.13 on this machine")}) == 0
    assert run(tmp_path, "--only", "3.11 2.10", rows={OLD: Unavailable("no python3.11 on this machine")}) == 0
    text = (tmp_path / "versions.md").read_text()
    assert "| 3.11.1 | 2.10.0 | 2026-11-27 | 7 | 0 | 0 | 2 of 2 | 2 of 2 |\n" in text.replace(today(text), "2026-11-27")
    assert "| 3.13 | 2.15 | 2026-11-27 | not run: no python3.13 on this machine | | | | |\n" in text.replace(today(text), "2026-11-27")


def today(text: str) -> str:
    return text.rpartition("| 2.15 | ")[2].partition(" |")[0]


def test_a_row_takes_the_place_of_its_pairs() -> None:
    rows = [measured(OLD), measured(NEW)]
    assert with_row(rows, measured(OLD, passed=9)) == [rows[1], measured(OLD, passed=9)]
    unavailable = {"python": "3.13", "torch": "2.15", "date": "2026-11-28", "reason": "no python3.13 on this machine"}
    assert with_row(rows, unavailable) == rows
    assert with_row([unavailable], rows[1]) == [rows[1]]


def test_the_environment_is_removed_but_after_an_interrupt(tmp_path: Path) -> None:
    root = tmp_path / "build" / "3.11-2.10" / "env"
    for error, there in ((KeyboardInterrupt, True), (Unavailable("x"), False), (measured(OLD), False)):
        root.mkdir(parents=True, exist_ok=True)
        run(tmp_path, "--only", "3.11 2.10", rows={OLD: error})
        assert root.exists() is there
    root.mkdir(parents=True)
    run(tmp_path, "--only", "3.11 2.10", "--keep", rows={OLD: measured(OLD)})
    assert root.exists()


def test_the_page() -> None:
    rows = [
        measured(NEW, skipped={"needs Chromium": 4, "torch 2.15 lacks x": 1}),
        measured(OLD, failed=["tests/a.py::test_b[c]"], names={"vision/a": [4, "xyz"], "text/b": "TraceError: no"},
                 answers={"eager": True, "inductor": "NameError: Regularized"}),
        measured(Pair("3.11", "2.13")),
    ]  # fmt: skip
    text = page(rows)
    assert text.partition("| Python |")[2] == (
        " torch | date | passed | failed | skipped | models | known answers |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| 3.11.1 | 2.10.0 | 2026-11-27 | 7 | 1 | 0 | 0 of 2 | 1 of 2 |\n"
        "| 3.11.1 | 2.13.0 | 2026-11-27 | 7 | 0 | 0 | 2 of 2 | 2 of 2 |\n"
        "| 3.13.1 | 2.15.0 | 2026-11-27 | 7 | 0 | 5 | 2 of 2 | 2 of 2 |\n"
        "\n## Python 3.11, torch 2.10\n\n"
        "- failed: `tests/a.py::test_b[c]`\n"
        "- vision/a: other names (4 sites; elsewhere 3)\n"
        "- text/b: TraceError: no\n"
        "- known answers, inductor: NameError: Regularized\n"
        "\n## Python 3.13, torch 2.15\n\n"
        "- skipped 4: needs Chromium\n"
        "- skipped 1: torch 2.15 lacks x\n"
    )
    assert "how many of 2 models" in text and "every release must draw: eager, inductor |" in text


def test_outcomes_are_counted_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_a(n): assert n == 1\n"
        "def test_b(): pytest.skip('too new')\n"
        "@pytest.mark.skipif(True, reason='too new')\n"
        "def test_c(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise RuntimeError\n"
        "def test_d(broken): pass\n"
    )
    report = tmp_path / "tests.xml"
    options = ["-q", f"--junitxml={report}", f"--rootdir={tmp_path}", "-c", "/dev/null", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, str(tmp_path)], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 1
    assert counted(report) == {"passed": 1, "failed": ["test_one.py::test_a[2]", "test_one.py::test_d"], "skipped": {"too new": 2}}




def test_pip_says_why() -> None:
    log = "Collecting torch==2.99.*\nERROR: Could not find a version\nERROR: No matching distribution found for torch==2.99.*\n[notice] x\n"
    assert reason(log) == "No matching distribution found for torch==2.99.*" and reason("") == "pip failed without a word"


def test_a_python_is_found_on_the_path_or_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(Unavailable, match=f"^no python{version} on this machine$"):
        find_python(version)
    (tmp_path / f"python{version}").write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")  # a shim of pyenv's
    (tmp_path / f"python{version}").chmod(0o755)
    place = tmp_path / "versions" / f"{version}.0" / "bin"
    place.mkdir(parents=True)
    (place / "python").symlink_to(sys.executable)
    assert find_python(version) == place / "python"


def test_a_full_disk_makes_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    version = ".".join(map(str, sys.version_info[:2]))
    with pytest.raises(Unavailable, match="less than 12 GB of disk are free"):
        Environment(Pair(version, "2.15"), tmp_path / "pair").make()


def test_how_far_the_tests_are(tmp_path: Path) -> None:
    log = tmp_path / "tests.log"
    assert share(log) == ""
    log.write_text("bringing up nodes...\n....... [  3%]\n....... [ 45%]\n..")
    assert share(log) == "45%"


def test_the_page_is_that_of_its_rows() -> None:
    rows = json.loads((TOP / "docs" / "versions.json").read_text())
    assert (TOP / "docs" / "versions.md").read_text() == page(rows)
