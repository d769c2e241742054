"""The battery's streams against graphreg's own draws, and its run with a dieharder that answers what the tests want."""

from __future__ import annotations

import functools
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from battery import __main__ as command
from battery import words
from battery.cases import Case, again, cases, every_test, keep, record, waiting
from battery.page import MARKS, put, section
from battery.run import rows, run, sweep
from graphreg.rng.noise import bits, call_keys, stream

DIEHARDER = """#!/bin/sh
# reads 2**20 bytes; -d 15 gives two p-values, and a WEAK one at the default number of samples
case "$*" in -l) echo "# dieharder version 9.9 #"; exit;; esac
head -c 1048576 | cksum > "$(dirname "$0")/read.$2"
line="  a_test_$2,   0,  100,  100,0.50000000,  PASSED  "
case "$*" in
  "-d 12 "*) echo "no such test" >&2; exit 3;;
  "-d 15 "*" -m 10 "*) echo "$line";;
  "-d 15 "*) echo "  a_test_15,   0,  100,  100,0.99900000,   WEAK  "; echo "$line";;
  *) echo "$line";;
esac
"""


@pytest.fixture
def dieharder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "dieharder"
    program.write_text(DIEHARDER)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(words, "compiled", lambda: words.words)
    monkeypatch.setattr(words, "BATCH", 1 << 14)
    return folder


def key(site: int, call: int) -> Tensor:
    return call_keys(torch.tensor([stream(0, f"layer.{site}", "BernoulliDropout", 0)]), torch.tensor([call]))[0]


@pytest.fixture
def small(dieharder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of 64 names in four parts."""
    monkeypatch.setattr(words, "NAMES", 64)
    monkeypatch.setattr(words, "CHUNK", 16)
    monkeypatch.setattr(words, "SPAN", 1 << 16)
    for number in range(4):
        words.chunk(tmp_path, number)
    return tmp_path


def test_the_streams_are_those_of_training(small: Path) -> None:
    """Word for word what ``bits`` gives for each key, at the place of the second test."""
    training = next(words.drawn("training", 1, small)).flatten()
    steps = [(1 << 16) // (16 * 256) + step for step in range(4)]
    assert torch.equal(training, torch.cat([bits(key(site, step), (256,)) for step in steps for site in range(16)]))
    over_steps = next(words.drawn("over steps", 1, small)).flatten()
    assert over_steps[:50].tolist() == [int(bits(key(0, (1 << 16) + step), (1,))) for step in range(50)]
    over_sites = torch.cat([part.flatten() for part, _ in zip(words.drawn("over sites", 1, small), range(6), strict=False)])
    step = (1 << 16) // 64
    assert over_sites.tolist() == [int(bits(key(n % 64, step + n // 64), (1,))) for n in range(96)]


def test_words_that_eager_torch_does_not_draw_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "compiled", lambda: lambda *batch: words.words(*batch) ^ 1)
    with pytest.raises(RuntimeError, match="Inductor computes other words than eager torch"):
        next(words.drawn("training", 0, small))


def test_no_two_tests_read_the_same_words() -> None:
    everything = cases(["training"])
    places = [case.place for case in [*everything, *map(again, everything)]]
    assert len(set(places)) == 2 * len(every_test()) == len(places)
    assert len(set(every_test())) == len(every_test()) == 27 + 4 + 12 + 4 + 33  # as dieharder -a repeats 202, 200, 201 and 203


def test_lines_of_dieharder() -> None:
    text = "#====#\n        diehard_runs,   0,    100000,     100,0.92841354,  PASSED  \n"
    assert rows(text) == [
        {"test_name": "diehard_runs", "ntuple": "0", "tsamples": "100000", "psamples": "100", "pvalues": 0.92841354, "assessment": "PASSED"}
    ]


def test_a_test_reads_its_stream_from_its_place(small: Path, dieharder: Path) -> None:
    found = run(Case("over steps", 0, None, 3), small)
    assert found["words"] >= 1 << 18 and found["command"] == "dieharder -d 0 -g 200"
    assert record(Case("over steps", 0, None, 3), small) == found
    first = (dieharder / "read.0").read_text()
    run(Case("over steps", 0, None, 4), small)
    assert first != (dieharder / "read.0").read_text()


def test_what_did_not_pass_runs_again_with_more_samples(small: Path) -> None:
    chosen = [case for case in cases(["training"]) if case.test in (0, 15, 202)]
    with ThreadPoolExecutor(2) as pool:
        ran = [case for case, _ in sweep(pool, 2, waiting(chosen, small), small)]
    weak = next(case for case in chosen if case.test == 15)
    assert sorted(map(str, ran)) == sorted(map(str, [*chosen, again(weak)]))
    assert waiting(chosen, small) == []
    again(weak).path(small).unlink()
    assert waiting(chosen, small) == [again(weak)]


def test_a_test_that_fails_to_run_is_told_and_not_kept(small: Path) -> None:
    case = Case("training", 12, None, 0)
    with pytest.raises(RuntimeError, match=r"dieharder -d 12 .* ended with status 3: no such test"):
        run(case, small)
    assert record(case, small) is None


def kept(case: Case, *answers: tuple[float, str], folder: Path, words: int = 1000) -> None:
    lines = [
        {
            "test_name": f"test_{case.test}",
            "ntuple": "0",
            "tsamples": "5",
            "psamples": str(100 * case.times),
            "pvalues": p,
            "assessment": said,
        }
        for p, said in answers
    ]
    keep(case, folder, {"words": words, "date": "2026-01-02", "rows": lines})


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Path]:
    chosen = {(case.stream, case.test, case.size): case for case in cases(words.STREAMS)}
    put_in = functools.partial(kept, folder=tmp_path)
    put_in(chosen["training", 0, None], (0.25, "PASSED"))
    put_in(chosen["over steps", 0, None], (0.5, "PASSED"))
    put_in(chosen["training", 15, None], (0.001, "WEAK"), (0.75, "PASSED"))
    put_in(again(chosen["training", 15, None]), (0.3, "PASSED"), (0.4, "PASSED"))
    put_in(chosen["training", 203, 2], (1e-9, "FAILED"))
    put_in(chosen["over sites", 5, None], (0.125, "PASSED"), words=3 << 26)
    yield tmp_path


def test_the_tables(results: Path) -> None:
    text = section(results, "9.9")
    for line in (
        "| training | 3 | 4 | 2 | 1 | 0.0 | 1 |",
        "| test_0 |  | 1: 0.2500 | 1: 0.5000 | not run |",
        "| test_15 |  | 2: 0.0010 to 0.7500, 1 WEAK | not run | not run |",
        "| test_5 (dieharder: suspect) |  | not run | not run | 1: 0.1250 |",
        "| test_203 | 2 to 2 | 1: 0.0000, 1 FAILED | not run | not run |",
        "| training | `dieharder -d 15 -g 200` | 0 | 0.00100000 WEAK | 0.30000000 |",
        "| training | `dieharder -d 203 -n 2 -g 200` | 0 | 0.00000000 FAILED | not run |",
        "| test_15 | 0 | 100 of 5 | 0.00100000 WEAK | not run | not run |",
        "| test_15 | 0 | 100 of 5 | 0.75000000 | not run | not run |",
        "| test_15 | 0 | 1000 of 5 | 0.40000000 |  |  |",
        "In *over sites*, these tests read more words than there are sites, so their words come from up to 3 steps: `-d 5`.",
    ):
        assert line in text.splitlines()
    assert "1 tests, of which 0 did not pass again" in text
    left = next(line for line in text.splitlines() if line.startswith("Not run on *training*"))
    assert "`-d 0`" not in left and "`-d 203` at 0, 1, 3, 4," in left


def test_the_command_puts_the_tables_between_the_marks(results: Path, dieharder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = results / "page.md"
    page.write_text(f"# Before\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nAfter\n")
    assert command.main(["--report", "--results", str(results), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{MARKS[0]}\n`make rng-battery`, run 2026-01-02 with dieharder 9.9") and text.endswith(
        "\n\nAfter\n"
    )
    assert "old" not in text and put(section(results, "9.9"), text) == text
    with pytest.raises(ValueError, match="write <!-- battery --> and <!-- /battery -->"):
        put("new", "a page without a place")


def test_without_dieharder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["--results", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == "dieharder is not installed. On Debian and Ubuntu: apt-get install dieharder\n"
