"""The notebooks of docs/notebooks/ are the tutorials, cell by cell, and run as they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from notebooks import TUTORIALS, link, notebook, path_of
from pages import AS_WIDE_AS_THE_SITE

each_tutorial = pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])


def test_a_page_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "two.md"
    page.write_text(f"# Two\n\n{link(page)}\n```python\nx = 1\n\nprint(x)\n```\n\n```text\n1\n```\n\nAnd:\n\n```python\nx\n```\n\n## End\n")
    cells = [(cell["cell_type"], "".join(cell["source"]), cell.get("outputs")) for cell in json.loads(notebook(page))["cells"]]
    back = "A notebook of [this page](../tutorials/two.md). graphreg and what its cells import must be installed."
    assert cells == [
        ("markdown", f"# Two\n\n{back}", None),
        ("code", "x = 1\n\nprint(x)", [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]),
        ("markdown", "And:", None),
        ("code", "x", []),
        ("markdown", "## End", None),
    ]


@each_tutorial
def test_it_is_the_page(page: Path) -> None:
    assert path_of(page).read_text() == notebook(page), "python tests/notebooks.py writes them again"
    assert page.read_text().count(f"\n\n{link(page)}\n") == 1


def test_there_is_no_other() -> None:
    assert {path.name for path in path_of(TUTORIALS[0]).parent.iterdir()} == {path_of(page).name for page in TUTORIALS}


@pytest.mark.sweep
@each_tutorial
def test_it_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of Jupyter it prints what it shows."""
    monkeypatch.setenv("COLUMNS", AS_WIDE_AS_THE_SITE["COLUMNS"])
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    shown, executed = (nbformat.read(path_of(page), as_version=4) for _ in range(2))
    nbformat.validate(shown)
    nbclient.NotebookClient(executed, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert printed(executed) == printed(shown)


def printed(cells: object) -> list[str]:
    """What each cell wrote to stdout."""
    texts = [[out.text for out in cell.outputs if out.get("name") == "stdout"] for cell in cells.cells if cell.cell_type == "code"]  # type: ignore[attr-defined]
    return ["".join(text).strip() for text in texts]
