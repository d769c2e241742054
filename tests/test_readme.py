"""Every Python block of the README, docs/randomness.md and docs/depth.md runs, in order, and prints what the block behind it shows."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
import torch

import graphreg
from graphreg.regularizer import registry

TOP = Path(__file__).parent.parent
README = TOP / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


# torch's own: Dynamo asks each input that is no leaf, and hides the warning
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["README.md", "docs/randomness.md", "docs/depth.md"])
def test_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_classes", dict(graphreg.registered()))  # the page's own classes go with the test
    blocks = BLOCK.findall((TOP / name).read_text())
    space: dict[str, object] = {"__name__": "readme"}
    compared = 0
    for (language, code), (following, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), space)
        if following == "text":
            assert printed.getvalue().strip() == expected.strip()
            compared += 1
    assert compared >= 2


def test_every_option_stands_in_the_table() -> None:
    told = dict(re.findall(r"^\| `(\w+)=(\S+)` \|", README.read_text(), re.MULTILINE))
    parameters = inspect.signature(graphreg.regularize).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {name: ast.literal_eval(default) for name, default in told.items() if name != "regularizers"} == options
    assert graphreg.from_kwargs(torch.nn.Linear(2, 2), regularizers=None) == []


def test_the_commands_stand_alone() -> None:
    shell = [code.strip() for language, code in BLOCK.findall(README.read_text()) if language == "sh"]
    assert shell == ["make demo", "make demo-penalties", "make test"]
