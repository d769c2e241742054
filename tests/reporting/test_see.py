"""docs/report.md and docs/diff.md show what examples/see.py prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import see

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(see.WHAT))
def test_the_page(name: str) -> None:
    page = (TOP / "docs" / f"{name}.md").read_text()
    assert re.findall(r"```text\n(.*?)\n```", page, re.DOTALL) == list(see.WHAT[name]())
    assert f"```sh\npython examples/see.py {name}\n```" in page


def test_the_report_at_two_widths() -> None:
    narrow, wide, _ = see.see_report()
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines())) <= 160
    words = [{word.strip(":") for word in text.split()} for text in (narrow, wide)]
    assert words[0] >= words[1] - {"regularizer"}  # nothing is left out but the head of a first column
