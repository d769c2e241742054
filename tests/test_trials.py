"""The trials of docs/trials/: the tasks and their checks belong together, and a check tells right from wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loading import loaded

TRIALS = Path(__file__).parent.parent / "docs" / "trials"
TASKS, CODE, PAGE = ((TRIALS / name).read_text(encoding="utf-8") for name in ("tasks.md", "check.py", "README.md"))
FOREIGN = {14, 15, 16, 19}  # these checks import timm, transformers, peft or onnx, which takes seconds

check: Any = loaded(TRIALS / "check.py")


def test_the_tasks_the_checks_and_the_table_have_the_same_numbers() -> None:
    numbers = list(range(1, 20))
    assert [int(number) for number in re.findall(r"^## (\d+)\. ", TASKS, re.MULTILINE)] == list(check.CHECKS) == numbers
    assert re.findall(r"^## (\d+\. .+)$", TASKS, re.MULTILINE) == re.findall(r"^\| (\d+\. [^|]+) \|", PAGE, re.MULTILINE)


def test_the_model_of_the_tasks_is_that_of_the_checks() -> None:
    (model,) = re.findall(r"```python\n(.*?)```", TASKS, re.DOTALL)
    assert f"\n\n{model}\n" in CODE


def test_a_check_gives_the_arguments_that_the_task_names() -> None:
    """And it does not need graphreg to know what is right."""
    named = {int(number): names for number, names in re.findall(r"^## (\d+)\..*?`solve\(([\w, ]+)\)`", TASKS, re.MULTILINE | re.DOTALL)}
    bodies = dict(re.findall(r"^def task_(\d+)\(.*?\n(.*?)(?=^@check|^# The command)", CODE, re.MULTILINE | re.DOTALL))
    for number, names in named.items():
        calls = re.findall(r"\bsolve\((.*)\)", bodies[str(number)])
        assert calls and all(", ".join(re.findall(r"(\w+)=(?!=)", re.sub(r"\(.*?\)", "", call))) == names for call in calls)
    assert len(named) == 19 and "import graphreg" not in CODE


@pytest.mark.filterwarnings("ignore")  # of the foreign libraries
@pytest.mark.parametrize("number", [pytest.param(number, marks=[pytest.mark.sweep] * (number in FOREIGN)) for number in check.CHECKS])
def test_a_solution_that_does_nothing_is_refused(number: int) -> None:
    for solve in (lambda **given: given["model"], lambda **given: None):
        assert re.match("wrong: expected (?!no error)", check.verdict(number, solve))


def losses(model: nn.Module, x: torch.Tensor, y: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Task 2, by torch alone."""
    h = model.act1(model.norm(model.first(x)))
    loss = F.cross_entropy(model.head(model.act2(model.second(h))), y)
    return loss + a * model.first.weight.square().sum() + b * model.head.weight.square().sum() + c * h.sum() / len(h)


def test_a_right_solution_is_right_and_a_near_one_is_not() -> None:
    assert check.verdict(2, losses) == "right"
    twice = check.verdict(2, lambda c, **given: losses(c=2 * c, **given))
    assert re.fullmatch(r"wrong: expected a loss of \d\.\d+, came \d\.\d+", twice)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "03.py").write_text("print('not shown')\n\n\ndef solve(model, strength, parts):\n    return model.nothing\n")
    assert check.main(["3", str(tmp_path / "03.py")]) == 1
    assert capsys.readouterr().out == "3 wrong: expected no error, came AttributeError: 'Net' object has no attribute 'nothing' (03.py:5)\n"
    assert check.main(["all", str(tmp_path)]) == 19
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 19 and lines[0] == f"1 wrong: expected the file {tmp_path / '01.py'}, came none"
    assert check.main(["20", "file.py"]) == 2
