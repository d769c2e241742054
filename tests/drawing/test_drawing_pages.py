"""docs/drawing.md and docs/page.md: their code runs and prints what they show, and their pictures are those of examples/drawings.py."""

from __future__ import annotations

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import drawings
from browser import chromium, needs_chromium

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", ["drawing.md", "page.md"])
def test_blocks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((DOCS / name).read_text())
    space: dict[str, object] = {}
    compared = 0
    for (language, code), (following, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), space)
        assert printed.getvalue() == (expected if following == "text" else "")
        compared += following == "text"
    assert compared >= 1


def told(path: Path) -> list[str]:
    """Every text of a drawing, but for the lines of torchvision's code, which move from version to version."""
    return [re.sub(r" \(.*:\d+\)$", "", part.text or "") for part in ET.parse(path).getroot().iter() if part.text and part.text.strip()]


def test_the_pictures_are_those_of_the_command(tmp_path: Path) -> None:
    made = drawings.drawings(tmp_path)
    assert [path.name for path in made] == ["resnet18.svg", "block.svg"]
    for path in made:
        assert told(path) == told(DOCS / path.name)
        assert f"]({path.name})" in (DOCS / "drawing.md").read_text()


def test_the_pictures_of_the_readme(tmp_path: Path) -> None:
    """The same block twice: the second picture has all of the first, and the regularizers. Both are small files."""
    before, after = drawings.before_and_after(tmp_path)
    assert [before.name, after.name] == ["block_before.svg", "block_after.svg"]
    for path in (before, after):
        assert told(path) == told(DOCS / path.name)
        assert f'src="docs/{path.name}"' in (DOCS.parent / "README.md").read_text()
        assert (DOCS / path.name).stat().st_size < 10_000
    assert set(told(before)) <= set(told(after))
    assert {"drop_path 0.1", "hidden_l1 0.1", "weight: weight_l2 0.0001"} <= set(told(after)) - set(told(before))


@needs_chromium
def test_the_picture_of_the_page(tmp_path: Path) -> None:
    made = drawings.page(tmp_path, chromium(), depth=18)
    assert made.read_bytes()[:8] == (DOCS / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    told = chromium().execute_script("return [...document.querySelectorAll('.lit')].map((part) => part.dataset.key)")
    assert {"layer4.1.relu", "layer4.1.relu_1"} <= set(told)
