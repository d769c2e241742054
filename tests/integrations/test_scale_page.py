"""The scripts of docs/scale.md run as the page says, and the tests that it names are there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_processes import run_ranks, without_gloo

from pages import DOCS

PAGE = DOCS / "scale.md"
TEXT = PAGE.read_text()
LAUNCHER = Path(__file__).parent / "as_torchrun.py"


@dataclass(frozen=True)
class Script:
    """A script of the page.

    Attributes:
        name: Its file.
        ranks: The number of processes.
        code: What to paste.
        outputs: What it prints when it is run, and run again.
    """

    name: str
    ranks: int
    code: str
    outputs: tuple[str, ...]


def scripts() -> list[Script]:
    """Each python block whose first line is a command of torchrun; the text blocks up to the next python block are its outputs."""
    found = []
    for part in TEXT.split("```python\n")[1:]:
        code, _, rest = part.partition("```")
        first = re.match(r"# (\w+\.py): torchrun --nproc-per-node (\d+) (\w+\.py)\n", code)
        assert first and first[1] == first[3], code[:80]
        found.append(Script(first[1], int(first[2]), code, tuple(re.findall(r"```text\n(.*?)```", rest, re.DOTALL))))
    return found


SCRIPTS = {script.name: script for script in scripts()}


def written(script: Script, folder: Path) -> Path:
    path = folder / script.name.removesuffix(".py") / script.name
    path.parent.mkdir()
    path.write_text(script.code)
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    """Started by a process that imports torch once for all ranks and runs."""
    script, path = SCRIPTS[name], written(SCRIPTS[name], tmp_path)
    assert script.outputs
    run_ranks(LAUNCHER, script.ranks, len(script.outputs), path)
    for i, output in enumerate(script.outputs):
        assert without_gloo(path.with_name(f"{name}.{i}").read_text()).strip() == output.strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_by_torchrun(name: str, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    path = written(script, tmp_path)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", script.ranks, path.name]
    for output in script.outputs:
        assert run_ranks(*command, cwd=path.parent).strip() == output.strip()


def test_every_way_has_a_recipe() -> None:
    rows = re.findall(r"^\| ([^|]+) \| \[[^]]+\]\(((?:#|trainers\.md#)[^)]+)\) \|", TEXT, re.MULTILINE)
    assert len(rows) == 7


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 10
    for file, test in named:
        assert f"\ndef {test}(" in (DOCS.parent / file).read_text(), f"{file}::{test}"
