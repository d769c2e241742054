"""The tutorials as notebooks: ``python tests/notebooks.py`` writes docs/notebooks/ from docs/tutorials/.

A notebook has the page's text, its code, and what the page says that the code prints. Nothing runs here: ``tests/test_notebooks.py`` holds
the notebooks equal to the pages, and executes them in the sweep.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pages import DOCS

BLOCK = re.compile(r"```python\n(.*?)\n```\n+(?:```text\n(.*?\n)```\n+)?", re.DOTALL)
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def path_of(page: Path) -> Path:
    return DOCS / "notebooks" / f"{page.stem}.ipynb"


def link(page: Path) -> str:
    """Return the line of a page that leads to its notebook. The notebook has a line that leads back in its place."""
    return f"To run it cell by cell, open [this page as a notebook](../notebooks/{page.stem}.ipynb).\n"


def notebook(page: Path) -> str:
    """Return the notebook of a page. Links are those of the page, since both folders are in docs/."""
    back = f"A notebook of [this page](../tutorials/{page.name}). graphreg and what its cells import must be installed.\n"
    text = page.read_text(encoding="utf-8").replace(link(page), back)
    cells: list[dict[str, Any]] = []
    for i, piece in enumerate(BLOCK.split(text)):
        kind = ("markdown", "code", "output")[i % 3]  # the groups of the pattern stand between what it splits
        if kind == "output" and piece:
            cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": piece.splitlines(keepends=True)}]
        elif kind != "output" and piece.strip():
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": piece.strip().splitlines(keepends=True)})
            cells[-1] |= {"execution_count": None, "outputs": []} if kind == "code" else {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for tutorial in TUTORIALS:
        path_of(tutorial).parent.mkdir(exist_ok=True)
        path_of(tutorial).write_text(notebook(tutorial), encoding="utf-8")
