"""The page docs/suites.md, written from what docs/suites.json keeps of the logs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from suites.reasons import reason
from suites.run import Log, Record, versions
from suites.suites import REGULARIZERS, SUITES, Suite

LENGTH = 240  # characters of a message

HEAD = """# Other people's tests

`make suites` runs the tests that timm and transformers have for their own models, once on plain models and once on models regularized in \
place. A pytest plugin (`benchmarks/suites/plugin.py`) passes each model that a test creates through \
`graphreg.regularize_(model, rng=0, missing="ignore", {regularizers})`. Only tests that pass on plain models count. \
Nothing is downloaded while they run, so a test that needs trained weights does not count.

| suite | tests |
|---|---|
| timm | `tests/test_models.py`: all models that its own filters leave for a CPU |
| all others | transformers, `tests/models/NAME/test_modeling_NAME.py` |

The sources are those of the installed versions: timm's source distribution, and transformers' repository at the tag of the version. \
`make suites SUITES=FOLDER` takes them from `FOLDER/timm` and `FOLDER/transformers`. Each test has {seconds} minutes and {memory} GiB. \
To continue a run that was stopped, give the same command again. `make suites ARGS="--only bert 'g*'"` runs these suites.

Measured with {versions}.{note}

| column | meaning |
|---|---|
| tests | the number of tests that have run, and after "of" the number of all tests, if some have not run yet. One case of each \
test function runs first, then a second case of each, and so on, so that the first ones are a sample |
| pass plain | how many of them pass on plain models. The others are skipped or fail for reasons of their own, most often because they \
need a GPU or a download |
| pass in place | how many of these pass on models regularized in place |
| differ | how many do not. Each is named below, with its reason |

| suite | tests | pass plain | pass in place | differ |
|---|---|---|---|---|
"""


def results(found: Record, suite: Suite, log: Log, note: str | None) -> Record:
    """What is kept of all suites, with one of them as its log has it now."""
    ended, in_place = log.ended("plain"), log.ended("in place")
    counted = {test: record for test, record in in_place.items() if ended[test]["outcome"] == "passed"}
    row = {
        "tests": len(log.tests()),
        "ran": sum(record["outcome"] != "passed" or test in counted for test, record in ended.items()),
        "plain": len(counted),
        "differ": {test: shortened(record.get("message", record["outcome"])) for test, record in sorted(counted.items())
                   if record["outcome"] != "passed"},
    }  # fmt: skip
    kept = {"versions": versions(), "note": note or found.get("note", "")}
    rows = found.get("suites", {}) | {suite.name: row}
    return kept | {"suites": {each.name: rows[each.name] for each in SUITES if each.name in rows}}


def shortened(message: str) -> str:
    """A message without what is of one run or machine: addresses in memory and folders."""
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", re.sub(r"\b0x[0-9a-f]+", "0x…", " ".join(message.split())))
    return text if len(text) <= LENGTH else f"{text[:LENGTH]} …"


def unexplained(found: Record, name: str) -> list[str]:
    """The differences of a suite without a reason."""
    differ = found.get("suites", {}).get(name, {}).get("differ", {})
    return [test for test, message in differ.items() if reason(test, message) is None]


def summary(found: Record, name: str) -> str:
    row = found["suites"][name]
    ran, plain, differ = f"{row['ran']} of {row['tests']}", row["plain"], len(row["differ"])
    return f"{name}: {ran} tests ran, {plain} pass plain, {plain - differ} in place; {len(unexplained(found, name))} without a reason"


def page(found: Record) -> str:
    """The page of what is kept."""
    regularizers = ", ".join(f"{name}={strength!r}" for name, strength in REGULARIZERS.items())
    measured = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    note = f" {found['note']}" if found["note"] else ""
    head = HEAD.format(regularizers=regularizers, versions=measured, note=note, seconds=10, memory=11)
    return "\n".join([head + "\n".join(rows(found)), *reasons(found), *open_ends(found)]) + "\n"


def rows(found: Record) -> Iterator[str]:
    total: Counter[str] = Counter()
    for name, row in found["suites"].items():
        numbers = {"tests": row["tests"], "ran": row["ran"], "plain": row["plain"], "differ": len(row["differ"])}
        total.update(numbers)
        yield cells(name, numbers)
    yield cells("all", total)


def cells(name: str, row: Any) -> str:
    tests = row["ran"] if row["ran"] == row["tests"] else f"{row['ran']} of {row['tests']}"
    return f"| {name} | {tests} | {row['plain']} | {row['plain'] - row['differ']} | {row['differ']} |"


def reasons(found: Record) -> Iterator[str]:
    """For each reason the tests that differ for it: those of one name together, with the suites and how many there are in each."""
    groups: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for name, row in found["suites"].items():
        for test, message in row["differ"].items():
            if text := reason(test, message):
                groups[text][function(test)][name] += 1
    if groups:
        yield from ("", "## Differences", "", "| tests | reason |", "|---|---|")
    for text, tests in groups.items():
        named = "; ".join(f"`{test}` ({suites(counts)})" for test, counts in sorted(tests.items()))
        yield f"| {named} | {text} |"


def open_ends(found: Record) -> Iterator[str]:
    left = [(name, test, row["differ"][test]) for name, row in found["suites"].items() for test in unexplained(found, name)]
    if left:
        yield from ("", "## Differences without a reason", "", "| suite | test | message |", "|---|---|---|")
    for name, test, message in left:
        shown = message.replace("|", "\\|").replace("`", "'")
        yield f"| {name} | `{test.rpartition('::')[2]}` | `{shown}` |"


def function(test: str) -> str:
    """A test's name without its case: ``[resnet18]`` of pytest, ``_03_fp16_pad_left`` of parameterized."""
    return re.sub(r"_\d+(_\w+)?$", "", test.rpartition("::")[2].partition("[")[0])


def suites(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" if count > 1 else name for name, count in counts.items())
