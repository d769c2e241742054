"""The tables of docs/fuzz.md, written from results.json: runs, refusals, injected faults, faults found."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fuzz.injection import Found
from fuzz.runner import Options, Tally

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "fuzz.md"


def results() -> dict[str, Any]:
    """What is recorded: ``runs``, ``injections``, ``found``."""
    empty: dict[str, Any] = {"runs": [], "injections": {}, "found": []}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def _save(data: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def record(options: Options, tally: Tally) -> None:
    """Enter a run; another of the same seed, backend and kind of cases is replaced."""
    data = results()
    key = {"seed": options.seed, "compiled": options.compiled or "eager", "of": options.of}
    data["runs"] = [each for each in data["runs"] if {name: each.get(name, "models") for name in key} != key]
    kinds: dict[str, int] = {}
    for each in tally.faults:
        kinds[each["kind"]] = kinds.get(each["kind"], 0) + 1
    data["runs"].append({
        **key, "sets": [options.sets, options.later], "cases": tally.cases, "models": tally.models, "fine": tally.fine,
        "refused": dict(tally.refused.most_common()),
        "faults": kinds, "seconds": round(tally.seconds), "date": date.today().isoformat(), "torch": torch.__version__,
    })  # fmt: skip
    _save(data)


def record_injection(options: Options, found: Found) -> None:
    data = results()
    data["injections"].update(found)
    data["injection seeds"] = options.seed
    _save(data)


def write() -> None:
    """Replace what stands between the page's marks."""
    data, text = results(), PAGE.read_text()
    for mark, table in (("runs", _runs(data)), ("refusals", _refusals(data)), ("injections", _injections(data)), ("found", _found(data))):
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        before, there, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not there or not ended:
            raise SystemExit(f"docs/fuzz.md has no place for {mark}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(text)


def _table(head: list[str], rows: list[list[Any]]) -> str:
    if not rows:
        return "None yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def _runs(data: dict[str, Any]) -> str:
    rows, total = [], dict[str, list[int]]()
    for each in data["runs"]:
        refused, faults = sum(each["refused"].values()), sum(each["faults"].values())
        first, later = each.get("sets", [2 if each["compiled"] != "eager" else 4, 0])  # 0.1 had no others
        of = each.get("of", "models")
        sets = f"{first} + {later}" if of == "models" else ""
        rows.append([
            each["compiled"], of, each["seed"], sets, f"{each['cases']:,}", f"{each['models']:,}", f"{each['fine']:,}",
            f"{refused:,} ({refused / max(each['cases'], 1):.1%})", faults, each["torch"], each["date"],
        ])  # fmt: skip
        own = total.setdefault(f"{each['compiled']}, {of}", [0, 0])
        own[0] += each["cases"]
        own[1] += faults
    sums = "; ".join(f"{name}: {cases:,} cases, {faults} faults" for name, (cases, faults) in total.items())
    head = ["run", "of", "seed", "sets", "cases", "models", "fine", "refused", "faults", "torch", "date"]
    return _table(head, rows) + f"\n\nIn all: {sums or 'none'}."


def _refusals(data: dict[str, Any]) -> str:
    kinds: dict[str, int] = {}
    for each in data["runs"]:
        for kind, count in each["refused"].items():
            kinds[kind] = kinds.get(kind, 0) + count
    return _table(["refusals", "first words"], [[f"{count:,}", kind] for kind, count in sorted(kinds.items(), key=lambda item: -item[1])])


def _injections(data: dict[str, Any]) -> str:
    rows = [[name, *("not found" if count is None else count for count in counts)] for name, counts in data["injections"].items()]
    width = max((len(row) for row in rows), default=1)
    start = data.get("injection seeds", 0)
    return _table(["fault", *(f"seed {start + i}" for i in range(width - 1))], [row + [""] * (width - len(row)) for row in rows])


def _found(data: dict[str, Any]) -> str:
    return _table(["what was wrong", "found in", "test"], [[each["what"], each["where"], each["test"]] for each in data["found"]])
