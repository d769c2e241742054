"""The Python of a page in docs/, run section by section."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)


def run_page(page: str, section: str | None = "") -> dict[str, Any]:
    """Run the blocks of a section, of what stands before the first, or (None) of all; compare what each prints with what stands behind it.

    Gives the names that they define.
    """
    whole = (DOCS / page).read_text()
    parts = whole.split("\n## ")
    text = next(part for part in parts[1:] if part.startswith(f"{section}\n")) if section else whole if section is None else parts[0]
    space: dict[str, Any] = {"__name__": "page"}
    blocks = BLOCK.findall(text)
    assert blocks
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec", dont_inherit=True), space)
        assert expected.strip() in printed.getvalue()  # a trainer prints lines of its own, too
    return space
