"""The suites of timm and transformers: what runs, what is noted, how a sweep goes on, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from suites import run as sweeping
from suites.__main__ import main
from suites.page import function, page, results, shortened, unexplained
from suites.reasons import REASONS, reason
from suites.run import Limits, Log, forget, in_order, process, sweep, versions
from suites.suites import SUITES, Missing, Suite, sources

TOP = Path(__file__).parents[2]
SUITE = Suite("tiny", "transformers", "tests/test_tiny.py")
LIMITS = Limits(seconds=600, memory=8 * 2**30, shard=2)

TINY = """
import signal
import time

import pytest
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Inner(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.hid = nn.Linear(2, 2)

    def forward(self, x):
        return self.hid(x)


class Outer(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.inner = Inner(config)

    def forward(self, x):
        return self.inner(x)


def test_a_model_is_regularized_and_none_within_it():
    made = Outer(PretrainedConfig())
    assert [name for name, module in made.named_modules() if hasattr(module, "penalties")] == [""]
    assert hasattr(Inner(PretrainedConfig()), "penalties")
    assert made.rewritten is None


def test_subtests(subtests):
    for i in range(2):
        with subtests.test(i=i):
            assert i == 0, "not the first"


@pytest.mark.parametrize("i", [0, 1])
def test_cases(i):
    if i:
        pytest.skip("no GPU")


@pytest.mark.xfail
def test_expected():
    assert False


def test_hangs():
    signal.alarm(1)  # the time is over
    time.sleep(60)


def test_not_wanted():
    assert False
"""


def test_the_plugin_regularizes_models_and_notes_what_becomes_of_each_test(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / SUITE.file).write_text(TINY)
    log = Log(tmp_path / "tiny.jsonl")
    names = ["a_model_is_regularized_and_none_within_it", "subtests", "cases[0]", "cases[1]", "expected", "hangs"]
    process(SUITE, tmp_path, "in place", [f"{SUITE.file}::test_{name}" for name in names], LIMITS, log)
    records = {test.rpartition("::test_")[2]: record for test, record in log.records("in place").items()}
    outcomes = ["failed", "failed", "passed", "skipped", "skipped", "failed"]
    assert {name: record["outcome"] for name, record in records.items()} == dict(zip(names, outcomes, strict=True))
    first, second = records[names[0]], records["subtests"]
    assert "has no attribute 'rewritten'" in first["message"] and "not the first" in second["message"]
    assert records["hangs"]["message"].startswith("suites.plugin.Late") and records["hangs"]["seconds"] < 50


class Processes:
    """Stands in for the processes: each plays the next of the scripts, which is an outcome for each test and a status."""

    def __init__(self, *scripts: tuple[dict[str, str], int]) -> None:
        self.scripts, self.ran = list(scripts), list[tuple[str, list[str]]]()

    def __call__(self, suite: Suite, folder: Path, way: str, tests: Sequence[str] | None, limits: Limits, log: Log) -> int:
        log.path.parent.mkdir(parents=True, exist_ok=True)
        if tests is None:
            log.add({"listed": ["a", "b", "c"]})
            return 0
        self.ran.append((way, list(tests)))
        outcomes, status = self.scripts.pop(0)
        for test, outcome in outcomes.items():
            log.add({"way": way, "test": test, "outcome": outcome} | ({"message": f"no {test}"} if outcome == "failed" else {}))
        return status


def swept(monkeypatch: pytest.MonkeyPatch, folder: Path, *scripts: tuple[dict[str, str], int]) -> list[tuple[str, list[str]]]:
    """What ran in each process of a sweep."""
    processes = Processes(*scripts)
    monkeypatch.setattr(sweeping, "process", processes)
    monkeypatch.setattr(sweeping, "in_order", list)
    sweep(SUITE, folder, folder, LIMITS, 1, lambda log: None)
    assert not processes.scripts
    return processes.ran


def test_what_was_stopped_goes_on_and_only_what_passes_on_plain_models_runs_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    stopped = swept(monkeypatch, tmp_path, ({"a": "passed", "b": "began"}, 2), ({"c": "skipped"}, 1))
    assert stopped == [("plain", ["a", "b"]), ("plain", ["c"])]
    again = swept(monkeypatch, tmp_path, ({"b": "failed"}, 1), ({"a": "failed"}, 1))
    assert again == [("plain", ["b"]), ("in place", ["a"])]
    log = sweeping.log_of(SUITE, tmp_path)
    assert swept(monkeypatch, tmp_path) == []  # all has run
    forget(log, passed=False)
    assert swept(monkeypatch, tmp_path, ({"a": "passed"}, 0)) == [("in place", ["a"])]
    forget(log, passed=False)  # none has failed
    assert swept(monkeypatch, tmp_path) == []
    forget(log, passed=True)
    assert swept(monkeypatch, tmp_path, ({"a": "failed"}, 1)) == [("in place", ["a"])]
    found = results({}, SUITE, log, None)
    assert found["suites"] == {}  # it is none of the suites of the page
    monkeypatch.setattr("suites.page.SUITES", (SUITE,))
    found = results({}, SUITE, log, "From a shelf.")
    assert found["suites"] == {"tiny": {"tests": 3, "ran": 3, "plain": 1, "differ": {"a": "no a"}}}
    assert results(found, SUITE, log, None) == found  # the note stays


def test_a_test_that_ends_its_process_has_failed_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = swept(monkeypatch, tmp_path, ({"a": "began"}, -11), ({"b": "passed"}, 0), ({}, 1), ({}, 3))
    assert ran == [("plain", ["a", "b"]), ("plain", ["b"]), ("in place", ["b"]), ("plain", ["c"])]
    log = sweeping.log_of(SUITE, tmp_path)
    messages = {test: record.get("message") for test, record in log.ended("plain").items()}
    assert messages == {"a": "the process ended with status -11", "b": None, "c": "the process ended with status 3"}
    assert log.ended("in place")["b"]["message"] == "the process ended with status 1"  # it began no test, and never will


def test_the_first_tests_are_a_sample_of_all() -> None:
    tests = ["f[1]", "f[2]", "f[3]", "g", "h[1]", "h[2]"]
    ordered = in_order(tests)
    assert sorted(test[0] for test in ordered[:3]) == ["f", "g", "h"] and sorted(test[0] for test in ordered[3:5]) == ["f", "h"]
    assert sorted(ordered) == tests and in_order(tests[::-1])[:3] != tests[:3]


def test_sources_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "timm" / "timm").mkdir(parents=True)
    (tmp_path / "timm" / "timm" / "version.py").write_text("__version__ = '0.1'")
    with pytest.raises(Missing, match=r"timm does not have the sources of timm [\d.]+, which is installed: .*make suites SUITES=FOLDER"):
        sources("timm", tmp_path)
    (tmp_path / "timm" / "timm" / "version.py").write_text(f"__version__ = '{versions()['timm']}'")
    assert sources("timm", tmp_path) == tmp_path / "timm"


def test_an_unknown_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "bird"]) == 2
    assert capsys.readouterr().err.startswith("--only 'bird' is no suite. There are bert, roberta, ")


def test_a_page_with_and_without_reasons() -> None:
    rows: dict[str, Any] = {
        "bert": {"tests": 9, "ran": 9, "plain": 5, "differ": {"x.py::T::test_odd_03_fp16": "a|b"}},
        "timm": {"tests": 9, "ran": 4, "plain": 3, "differ": {}},
    }
    text = page({"versions": {"torch": "2.13.0"}, "note": "From a shelf.", "suites": rows})
    assert "\n| bert | 9 | 5 | 4 | 1 |\n| timm | 4 of 9 | 3 | 3 | 0 |\n| all | 13 of 18 | 8 | 7 | 1 |\n" in text
    assert "\nMeasured with torch 2.13.0. From a shelf.\n" in text
    assert "\n## Differences without a reason\n" in text and "\n| bert | `test_odd_03_fp16` | `a\\|b` |\n" in text
    assert unexplained({"suites": rows}, "bert") == ["x.py::T::test_odd_03_fp16"]


def test_messages_and_names_are_the_same_on_each_machine() -> None:
    message = "OSError: /home/me/lib/x.py at 0x7f00\n  is gone"
    assert shortened(message) == "OSError: x.py at 0x… is gone" and len(shortened("a" * 999)) == 242
    assert [function(f"t.py::T::{name}") for name in ("test_a", "test_b[vit_tiny]", "test_c_03_fp16_pad")] == ["test_a", "test_b", "test_c"]


def test_the_page_is_that_of_its_results_and_each_reason_is_used() -> None:
    found = json.loads((TOP / "docs" / "suites.json").read_text())
    assert (TOP / "docs" / "suites.md").read_text() == page(found)
    differ = [item for row in found["suites"].values() for item in row["differ"].items()]
    assert {reason(*item) for item in differ} - {None} == {each.text for each in REASONS}
    assert set(found["suites"]) <= {suite.name for suite in SUITES}
