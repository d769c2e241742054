"""The Python of a page in docs/, run section by section or as a whole.

``python tests/pages.py docs/regularizers/*.md`` runs these pages, and writes what each block prints into the ``text`` block behind it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import graphreg
from graphreg.regularizer import registry

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```\n+```text\n(.*?)```", re.DOTALL)

AS_WIDE_AS_THE_SITE = {"COLUMNS": "88"}  # what a column of code on the site has room for; what prints as a table fits it


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
        with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, AS_WIDE_AS_THE_SITE):
            exec(compile(code, page, "exec", dont_inherit=True), space)
        assert expected.strip() in printed.getvalue()  # a trainer prints lines of its own, too
    return space


@contextlib.contextmanager
def registry_restored(bare: bool = False) -> Iterator[None]:
    """The classes that a page registers are taken back at the end. ``bare``: within the block, only graphreg's own are registered."""
    graphreg.registered()
    before = registry._classes
    registry._classes = {name: cls for name, cls in before.items() if not bare or cls.__module__.startswith("graphreg.passes.")}
    try:
        yield
    finally:
        registry._classes = before


def printed_by(text: str, name: str, space: dict[str, Any] | None = None) -> Iterator[tuple[str, str | None]]:
    """Run every Python block of a page in one space of names; yield what each prints and the ``text`` block behind it, or None."""
    if space is None:
        # a module, as Dynamo expects of classes that it compiles; each page has a name of its own, which Dynamo keeps
        path = re.sub(r"\W", "_", f"docs_page_{name}")
        module = sys.modules[path] = ModuleType(path)
        space = vars(module)
    blocks = list(FENCE.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, AS_WIDE_AS_THE_SITE):
                code = compile(block[2], f"<{name}>", "exec", dont_inherit=True)  # no file of that name: Dynamo would read it as Python
                exec(code, space)
            yield printed.getvalue().strip(), following[2].strip() if following and following[1] == "text" else None


def written(text: str, name: str) -> str:
    """The page with what its blocks print."""
    bare = re.sub(r"(```python\n.*?```)\n+```text\n.*?```", r"\1", text, flags=re.DOTALL)
    outputs = [out for out, _ in printed_by(bare, name)]
    pieces = re.split(r"(```python\n.*?```)", bare, flags=re.DOTALL)
    codes = [i for i, piece in enumerate(pieces) if piece.startswith("```python")]
    for i, out in zip(codes, outputs, strict=True):
        pieces[i] += f"\n\n```text\n{out}\n```" if out else ""
    return "".join(pieces)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        with registry_restored():
            path.write_text(written(path.read_text(), path.name))
