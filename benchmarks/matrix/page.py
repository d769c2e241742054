"""The page docs/versions.md, written from the rows in docs/versions.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from matrix.pairs import PAIRS, Pair

Row = Mapping[str, Any]

HEAD = """# Versions of torch and Python

The goal is to support every minor release of torch of the last twelve months, and at least the last five, on CPython 3.11 to 3.13. \
The package requires torch 2.10 or newer. `make matrix` tests pairs of a Python and a torch, each in its own environment. The last \
table of this page has a row for each pair that was run. First, what older releases of torch lack:

| what torch lacks | what graphreg does |
|---|---|
| up to 2.11: torch.compile does not show what a compiled call returns | `graphreg.backend(penalties="attach")` with a penalty is refused. \
Use `penalties="return"`, or `graphreg.regularize` |
| up to 2.11: torch.compile traces neither a loop over the attributes of an object nor a copy of one | with `fullgraph=True`, two kinds of \
calls raise an error: a call with an object among its arguments, if `regularize_` has regularized the model; and a call with a dataclass \
or a subclass of dict nested in its output, if penalties are attached. Without `fullgraph=True`, such calls run in eager |
| up to 2.11: torch does not differentiate twice through a DTensor; the gradient of a gradient is missing, without an error | nothing: \
with `create_graph=True`, the gradient of a penalty on a DTensor has no gradient either |
| 2.10 on Python 3.13.0: torch.compile does not notice that an attribute has changed, such as a module's mode (also without graphreg) | \
a warning at the first use. Take Python 3.13.1 or newer |
| 2.10 on Python 3.13: code that torch.compile traces formats `{{value!r}}` as `{{value}}` | names in some errors have no quotes |
| 2.10: Dynamo does not record which code it leaves to eager | if Dynamo captures no graph in a call, `graphreg.backend` raises an error, \
which does not name the code that ran in eager. Set `TORCH_LOGS=graph_breaks` to see it |

The columns of the last table:

| column | meaning |
|---|---|
| passed, failed, skipped | the number of tests of `make test` and `make test-rest`. A test of something that this torch lacks is skipped; \
the reasons are below the table. The pairs were run at different commits, between which the number of tests changed, so the numbers of two \
rows cannot be compared |
| models | a *site* is a value or a parameter with a name. The column says how many of {models} models of torchvision, timm, transformers \
and torch have sites with the same names and roles as with most other pairs |
| known answers | a module with seed 0 runs in several ways. The column says in how many of them it draws the noise that every release \
must draw: {ways} |

`make matrix ONLY="3.13 2.15"` runs one pair and keeps the rows of the others. `3.13` or `2.15` alone means all pairs with that version; \
separate several by commas. To continue a run that was stopped, give the same command again; `make matrix ARGS=--fresh` starts over. PyPI \
has torch for Linux as a CUDA build, which is 3 GB to download and 7 GB on disk. Only one environment exists at a time, and nothing runs \
on a GPU.

To find out whether graphreg works with another torch, run `python -m graphreg doctor --torch`, or `graphreg.doctor()` in Python. It tests \
each part of graphreg on a tiny example, in a separate process; this takes about ten seconds. In a checkout, `pytest \
tests/torch_internals` tests each private part of torch that graphreg uses. If the torch is newer than all tested ones, the first trace \
gives an `UntestedTorchWarning`. `warnings.filterwarnings("ignore", category=graphreg.UntestedTorchWarning)` silences it.
"""


def page(rows: Iterable[Row]) -> str:
    """The page of these rows, one for each pair."""
    rows = sorted(rows, key=place)
    common = usual(rows)
    ways = next((list(row["answers"]) for row in rows if "answers" in row), [])
    lines = [
        HEAD.format(models=len(common) or "twenty", ways=", ".join(ways) or "eager and compiled"),
        "| Python | torch | date | passed | failed | skipped | models | known answers |",
        "|---|---|---|---|---|---|---|---|",
        *(cells(row, common) for row in rows),
        *notes(rows, common),
    ]
    return "\n".join(lines) + "\n"


def place(row: Row) -> tuple[int, Pair | tuple[list[int], ...]]:
    """Where a row stands: the usual pairs in their order, then others by version."""
    pair = Pair(row["python"], row["torch"])
    return (0, PAIRS.index(pair)) if pair in PAIRS else (1, tuple([*map(int, version.split("."))] for version in pair))  # type: ignore[return-value]


def usual(rows: Iterable[Row]) -> dict[str, Any]:
    """For each model what most rows found: how many names, and their digest; of equally frequent ones the latest row's."""
    votes: dict[str, Counter[str]] = {}
    values: dict[str, Any] = {}
    for row in rows:
        for model, value in row.get("names", {}).items():
            votes.setdefault(model, Counter())[repr(value)] += isinstance(value, list)
            values[repr(value)] = value
    return {model: values[max(reversed(found), key=found.__getitem__)] for model, found in votes.items()}


def cells(row: Row, common: Mapping[str, Any]) -> str:
    """One row of the table."""
    if "reason" in row:
        return f"| {row['python']} | {row['torch']} | {row['date']} | not run: {row['reason']} | | | | |"
    versions = row.get("versions", {})
    first = [versions.get("python", row["python"]), versions.get("torch", row["torch"]), row["date"]]
    tests = [row["passed"], len(row["failed"]), sum(row["skipped"].values())]
    names, answers = row.get("names", {}), row.get("answers", {})
    same = sum(names.get(model) == value for model, value in common.items())
    right = sum(answer is True for answer in answers.values())
    return "| " + " | ".join(map(str, [*first, *tests, f"{same} of {len(common)}", f"{right} of {len(answers)}"])) + " |"


def notes(rows: Iterable[Row], common: Mapping[str, Any]) -> list[str]:
    """Below the table: for each pair what failed, what was skipped and why, which models have other names, which answers are wrong."""
    lines: list[str] = []
    for row in rows:
        items = [f"- failed: `{test}`" for test in row.get("failed", ())]
        items += [f"- skipped {count}: {reason}" for reason, count in row.get("skipped", {}).items()]
        items += [f"- {model}: {_other(row['names'].get(model), value)}" for model, value in common.items()
                  if "names" in row and row["names"].get(model) != value]  # fmt: skip
        items += [f"- known answers, {way}: {answer}" for way, answer in row.get("answers", {}).items() if answer is not True]
        items += [f"- {row['error']}"] if "error" in row else []
        if items:
            lines += ["", f"## Python {row['python']}, torch {row['torch']}", "", *items]
    return lines


def _other(found: Any, common: Any) -> str:
    if isinstance(found, list):
        return f"other names ({found[0]} sites; elsewhere {common[0]})" if isinstance(common, list) else f"{found[0]} sites"
    return str(found)
