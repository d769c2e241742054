"""The zoo's sweep on a zoo of its own: what passes and what does not, resuming, choosing, and the page as a whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zoo.__main__ import chosen, main
from zoo.columns import COLUMNS
from zoo.run import Limits, kept, one, passes
from zoo.table import page

TOP = Path(__file__).parents[2]
PATH = os.pathsep.join(str(TOP / folder) for folder in ("benchmarks", "tests/benchmarks"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of the sweep find what the tests find."""
    monkeypatch.setenv("PYTHONPATH", PATH)


def run(folder: Path, *more: str) -> int:
    places = ["--results", str(folder / "results.jsonl"), "--page", str(folder / "models.md")]
    return main(["--models", "tiny_zoo", "--seconds", "900", "--memory", "8", *places, *more])


def test_a_sweep_its_page_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "pass*", "tiny/raises") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny/raises, run: ValueError: it wants 5 channels",
        "1 of 2 models pass every column",
        "5 of the zoo's 7 models have not run: models.md is left as it is",
    ]
    results = tmp_path / "results.jsonl"
    with results.open("a") as file:  # the line that an interrupt leaves behind
        file.write('{"name": "tiny/branches", "versions": {}')
    first = kept("tiny_zoo", results)
    assert sorted(first) == ["tiny/passes", "tiny/raises"]
    assert run(tmp_path, "--only", "branches") == 0
    assert run(tmp_path, "--only", "passes", "raises", "branches", "--unfinished") == 0  # nothing runs
    text = (tmp_path / "models.md").read_text()
    assert "\n**4 of the zoo's 7 models have not been tried yet.** Python " in text and "2 of 3 models pass every column (66.7%)." in text
    assert "\nNot tried yet:\n\n- hangs, dies, leaves, fills\n" in text
    assert len(results.read_text().splitlines()) == 3
    assert {name: record for name, record in kept("tiny_zoo", results).items() if name in first} == first
    branches = kept("tiny_zoo", results)["tiny/branches"]
    assert (branches["figures"]["front end"], branches["figures"]["graphs"]) == ("backend", 2) and passes(branches)
    assert branches["figures"]["refused"].startswith("TraceError: Branching cannot be traced symbolically")


@pytest.mark.parametrize(
    ("name", "seconds", "error"),
    [
        ("hangs", 3, "it was stopped after 3 seconds"),
        ("dies", 300, "its process ended by signal SIGKILL"),
        ("leaves", 300, "its process ended: SystemExit: 3"),
        ("fills", 300, "RuntimeError: [enforce fail at alloc_cpu.cpp"),
    ],
)
def test_what_ends_its_process_is_reported(name: str, seconds: float, error: str) -> None:
    found = one("tiny_zoo", f"tiny/{name}", Limits(seconds, 8 << 30))
    assert found["error"].startswith(error) and "\n" not in found["error"]


def test_an_unknown_name_is_an_error_with_near_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--only", "passes", "rises") == 2
    assert capsys.readouterr() == ("", "--only 'rises' is no model of the zoo. Near names: tiny/raises, tiny/dies.\n")
    assert not list(tmp_path.iterdir())


def test_globs_mean_names_with_and_without_the_provider() -> None:
    names = ["torchvision/resnet18", "torchvision/vgg11", "timm/resnet18"]
    assert chosen(names, None) == names
    assert chosen(names, ["resnet*"]) == ["torchvision/resnet18", "timm/resnet18"]
    assert chosen(names, ["timm/*", "vgg11"]) == ["torchvision/vgg11", "timm/resnet18"]


def test_the_command_is_silent_in_a_pipe_until_the_end(tmp_path: Path) -> None:
    places = ["--results", str(tmp_path / "r.jsonl"), "--page", str(tmp_path / "models.md")]
    command = [sys.executable, "-m", "zoo", "--models", "tiny_zoo", "--only", "raises", *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith("tiny/raises, run: ValueError: it wants 5 channels\n0 of 1 models")


def told(text: str) -> dict[str, object]:
    if not text:
        return {"passed": True, "cell": "yes", "remark": ""}
    return {"passed": text[0] == "+", "cell": "n/a" if text[0] == "+" else "**no**", "remark": text.lstrip("+")}


def record(**columns: str) -> dict[str, object]:
    """A record in which the columns named fail, or pass with a remark that begins with a plus."""
    said = {name: columns.get(name, "") for name in COLUMNS}
    answers = {n: told(text) for n, text in said.items()}
    whole = {"blocks.0": "it draws", "blocks.1": "it draws"} if "names" in columns else {}
    figures = {"parameters": 1_230_000, "sites": 12, "hidden": 3, "regularize": 0.123, "traces": 0.1, "plain step": 0.004, "step": 0.0056}
    about = {"kept whole": whole, "examples": bool(whole), "graphs": 1, "front end": "symbolic", "refused": ""}
    return {"versions": {"python": "3.11", "torch": "2.13"}, "inputs": ["2x4"], "columns": answers, "figures": figures | about}


def through_the_backend() -> dict[str, object]:
    """A record of a model that neither front end takes."""
    found: dict[str, Any] = record()
    found["figures"] |= {
        "front end": "backend",
        "refused": "TraceError: it decides at /opt/x/lib/python3.11/site-packages/net/a.py:3 by its data",
        "traces": 0.0,
        "parameters": 1_230,
    }
    found["columns"]["zero"]["cell"] = "1e-06"
    return found


def test_the_page() -> None:
    names = {"a/one": "", "a/other": "", "b/two": "first", "b/three": "second", "b/four": "third"}
    records = {
        "a/one": record(),
        "a/other": through_the_backend(),
        "b/two": record(names="+torchvision cannot trace it: why"),
        "b/three": record(step="3 parameters lost their gradient: w", zero="train mode: 1 of 1 outputs differ, by 1.0e-07 at most"),
        "b/four": {"versions": {}, "error": "ValueError: it wants 5 channels", "ours": False},
    }
    text = page(names, records, {"a": {}, "b": {"five": "it takes no picture"}}, "# Nets\n\n{a} of one, {b} of another.\n")
    assert text.startswith("# Nets\n\n2 of one, 3 of another.\n\nEach model goes through `regularize(model)`")
    line = (
        "\nPython 3.11, torch 2.13. 3 of 5 models pass every column (60.0%). "
        "1 failed with an error that graphreg does not raise itself: b/four. Front ends: symbolic 3, backend 1, none 1.\n"
    )
    assert line in text
    assert text[text.index("## a") :] == PAGE
    assert all(re.search(rf"^\| {name} \| ", text, re.MULTILINE) for name in COLUMNS)  # each is explained


PAGE = """\
## a

2 of 2 pass every column.

| model | input | front end | names | step | gradients | eval | stripped | zero | verify | keys | modes | compiled | parameters | sites \
| hidden | regularize | step time |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| one | 2x4 | symbolic | yes | yes | yes | yes | yes | yes | yes | yes | yes | yes | 1.2 M | 12 | 3 | 0.12 s, traces 0.10 s | 4, 6 ms |
| other | 2x4 | backend | yes | yes | yes | yes | yes | 1e-06 | yes | yes | yes | yes | 1.2 k | 12 | 3 | 0.12 s | 4, 6 ms |

Run through the backend, because `regularize` refuses it:

- other: TraceError: it decides at net/a.py:3 by its data

## b

1 of 3 pass every column.

| model | family | input | front end | names | step | gradients | eval | stripped | zero | verify | keys | modes | compiled | parameters \
| sites | hidden | regularize | step time |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| two | first | 2x4 | symbolic | n/a | yes | yes | yes | yes | yes | yes | yes | yes | yes | 1.2 M | 12 | 3 | 0.12 s, traces 0.10 s \
| 4, 6 ms |
| three | second | 2x4 | symbolic | yes | **no** | yes | yes | yes | **no** | yes | yes | yes | yes | 1.2 M | 12 | 3 | 0.12 s, \
traces 0.10 s | 4, 6 ms |
| four | third | refused |  |  |  |  |  |  |  |  |  |  |  |  |  |  |  |  |

What failed, and why:

- three, step: 3 parameters lost their gradient: w
- three, zero: train mode: 1 of 1 outputs differ, by 1.0e-07 at most
- four, run: ValueError: it wants 5 channels

Not checked, and why:

- two: torchvision cannot trace it: why

Traced with `example_inputs`, because without them a module becomes opaque, the model cannot be traced, or the graph does not take these inputs:

- two

Opaque modules, and why:

- two: blocks.0 and 1 more (it draws)

Left out, and why:

- five: it takes no picture
"""  # noqa: E501
