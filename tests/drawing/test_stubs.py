"""Values that many repeated blocks read, such as a mask: a stub with a name at each block, and no line past all blocks before it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import graphreg
from browser import Page, needs_chromium
from drawn_nets import Blocks
from graphreg.drawing.scene import IN, picture, stub_text
from graphreg.drawing.view import viewed

X = torch.zeros(2, 8)


def test_a_value_that_many_blocks_read_is_a_stub() -> None:
    shown = picture(viewed(Blocks(12), example_inputs=X))
    box = shown.boxes["h/"]
    assert box.stubs == {f"h.{i}/": ("relu",) for i in range(1, 12)}
    assert [link.end for link in box.links if link.start == IN] == ["h.0/"]  # the first has its line, as it stands below the border
    assert [(link.start, link.end) for link in box.links[1:-1]] == [(f"h.{i}/", f"h.{i + 1}/") for i in range(11)]
    assert [child.stubs for key, child in shown.boxes.items() if key != "h/"] == [{}] * (len(shown.boxes) - 1)
    assert stub_text(shown, "h.3/") == stub_text(shown, "h.3/", 150) == "relu"
    assert (stub_text(shown, "h.3/", 20), stub_text(shown, "h.0/")) == ("relu", "")


@pytest.mark.parametrize("model", [Blocks(3), Blocks(12, dense=True)], ids=["few", "dense"])
def test_otherwise_lines_are_drawn(model: nn.Module) -> None:
    """Few readers have lines that can be followed; blocks that read all blocks before them have no chain that a line would run past."""
    shown = picture(viewed(model, example_inputs=X))
    assert not any(box.stubs for box in shown.boxes.values())
    readers = [link.end for box in shown.boxes.values() for link in box.links if link.start in (IN, "relu")]
    assert len({end for end in readers if end.startswith("h.") and end.endswith("/")}) == len(model.h)  # type: ignore[arg-type]


def test_a_file_shows_the_stubs(tmp_path: Path) -> None:
    text = graphreg.draw(Blocks(12), tmp_path / "deep.svg", example_inputs=X, level=2).read_text()
    space = "{http://www.w3.org/2000/svg}"
    stubs = [group for group in ElementTree.fromstring(text).iter(f"{space}g") if group.get("class") == "stub"]
    assert [stub.findtext(f"{space}title") for stub in stubs] == ["relu"] * 11


@needs_chromium
def test_a_page_shows_the_stubs(folder: Path) -> None:
    page = Page(graphreg.draw(Blocks(12), folder / "stubs.html", example_inputs=X))
    page.run("graphreg.scene.open(['h/']); graphreg.scene.fit('width')")
    assert page.run("return [...document.querySelectorAll('#graph text.stub')].map((one) => one.firstChild.data)")[:3] == ["relu"] * 3
    blocks = "Object.values(graphreg.scene.places).filter((one) => one.key.startsWith('h.'))"
    middles = page.run(f"return {blocks}.map((one) => one.x + one.width / 2)")
    assert len(middles) == 12 and max(middles) - min(middles) < 1  # no staircase
    assert page.run("return graphreg.scene.label('h.4/')").endswith(", reads relu")
    page.run("graphreg.choose('h.4/')")
    assert "reads from afar" in page.text("panel")
