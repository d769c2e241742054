"""``make bench`` measures nothing and writes no page while other processes keep the machine busy; loads are given, nothing is timed."""

from __future__ import annotations

from pathlib import Path

import bench
import pytest
from machine import Clock, Load, between, busy

QUIET, BUSY = Load(0.2, 0.02, 2), Load(1.7, 0.9, 2)
UNKNOWN = Load(3.0, None, 2)  # a machine without /proc/stat
TABLE = "| a | b |\n| --- | --- |\n| 1 | 2 |"


def measured(before: Load, meanwhile: Load, anyway: bool = False) -> str:
    return bench.measure("steps", anyway, lambda name: TABLE, lambda: before, lambda start: meanwhile)


@pytest.mark.parametrize(
    ("load", "idle", "reason"),
    [
        (QUIET, True, None), (QUIET, False, None), (Load(5.0, 0.02, 2), True, None),  # a load average of what has ended
        (BUSY, True, "0.90 of 2 cores"), (BUSY, False, "0.90 of 2 cores"), (Load(0.0, 0.11, 2), False, "0.11 of 2 cores"),
        (UNKNOWN, True, "load average is 3.00"), (UNKNOWN, False, None), (Load(0.4, None, 2), True, None),
    ],
)  # fmt: skip
def test_when_it_is_busy(load: Load, idle: bool, reason: str | None) -> None:
    found = busy(load, idle)
    assert found is None if reason is None else found is not None and reason in found


def test_the_work_of_others_is_what_is_not_our_own() -> None:
    """Ten seconds, in which all cores worked 14 s, 9 of them for the benchmark: others kept half a core busy."""
    load = between(Clock(100.0, 1000.0, 3.0), Clock(110.0, 1014.0, 12.0), 1.2, 2)
    assert load == Load(1.2, 0.5, 2) and str(load) == "load average 1.20, other processes kept 0.50 of 2 cores busy"
    assert between(Clock(0.0, None, 0.0), Clock(1.0, None, 1.0), 1.2, 2) == Load(1.2, None, 2)
    assert between(Clock(0.0, 5.0, 0.0), Clock(1.0, 5.9, 1.0), 1.0, 2).others == 0.0  # ticks are coarse


def test_a_quiet_machine_is_measured_and_its_load_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = measured(QUIET, QUIET)
    assert TABLE in text and "other processes kept 0.02 of 2 cores busy" in text and "was busy" not in text
    assert capsys.readouterr().out.count("other processes kept 0.02 of 2 cores busy") == 2


def test_a_busy_machine_is_not_measured() -> None:
    with pytest.raises(SystemExit, match=r"'steps' is not measured, because other processes kept 0\.90 of 2 cores busy.*--anyway"):
        bench.measure("steps", False, lambda name: pytest.fail("it was measured"), lambda: BUSY, lambda start: QUIET)


def test_what_was_measured_while_it_became_busy_is_thrown_away() -> None:
    with pytest.raises(SystemExit, match="'steps' is thrown away and the page is not written"):
        measured(QUIET, BUSY)


def test_anyway_the_page_says_it() -> None:
    assert "**measured while the machine was busy**: other processes kept 0.90 of 2 cores busy" in measured(BUSY, BUSY, anyway=True)


def test_no_page_is_written_when_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STORE", tmp_path)
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", "steps"])
    monkeypatch.setattr(bench.measure, "__defaults__", (lambda name: TABLE, lambda: BUSY, lambda start: BUSY))
    with pytest.raises(SystemExit):
        bench.main()
    assert not (tmp_path / "page.md").exists() and not (tmp_path / "steps.md").exists()
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", "steps", "--anyway"])
    bench.main()
    assert "**measured while the machine was busy**" in (tmp_path / "page.md").read_text()
