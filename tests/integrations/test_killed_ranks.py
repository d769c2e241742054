"""The run of examples/demo_ranks.py in small: one of two ranks is killed, and both resume from the last checkpoint, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_processes import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = """
import sys
from pathlib import Path
from demo_ranks import Screen, Setup, killed_and_resumed

setup = Setup(steps=6, every=2, width=8, depth=2, batch=8, backend=sys.argv[2])
print(*killed_and_resumed(Screen(), setup, Path(sys.argv[1])), sep="\\n")
"""


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_killed_and_resumed(backend: str, tmp_path: Path) -> None:
    """The demo itself ends with an error if a loss, or a weight at the end, is not bit-equal with those of the uninterrupted run."""
    told = run_ranks("-c", SMALL, tmp_path, backend, paths=(EXAMPLES,))
    lines = told.splitlines()
    assert [line for line in lines[:-4] if len(line) > 80] == []
    assert "Rank 1 was killed by SIGKILL in the middle of step " in told and "; its status is -9.\nRank 0 ended with:\n" in told
    assert lines[-4].startswith("a run on 2 ranks was killed in step ")
    assert lines[-3].endswith(" losses are those of the uninterrupted run, bit for bit; so are its weights")
    assert lines[-2] == "2 of the 2 losses of the run that was resumed without RegularizerState differ, so the comparison can fail"
    whole = [(tmp_path / "whole" / f"losses.{rank}").read_text().split()[1::2] for rank in range(2)]
    assert len({*whole[0], *whole[1]}) == 12  # no two losses are equal: each step, on each rank, has data and masks of its own
