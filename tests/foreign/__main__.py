"""``python -m foreign``: NNSmith's models and random settings of Inductor; goes on where it was stopped. See docs/fuzz.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foreign.checks import checked
from foreign.nnsmith_models import drawn
from foreign.work import Record, run, seed_of


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="foreign", description=__doc__)
    parser.add_argument("--seed", type=int, help="the run; default: the run that was stopped, else a new one")
    parser.add_argument("--models", type=int, default=500, help="NNSmith's models (default 500)")
    parser.add_argument("--settings", type=int, default=20, help="random settings of Inductor (default 20)")
    parser.add_argument("--inductor", type=int, default=25, metavar="N", help="each N-th model by Inductor, too (default 25)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these models alone, at length, recorded nowhere")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/foreign"))
    args = parser.parse_args(given)
    args.out.mkdir(parents=True, exist_ok=True)
    seed = args.seed if args.seed is not None else _stopped(args.out, args.models + args.settings)
    if args.only:
        return _at_length(seed, args.only, args.inductor)
    path = args.out / f"{seed}.jsonl"
    records = _kept(path)
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))  # without a line that was cut off
    names = [*(f"model {i}" for i in range(args.models)), *(f"settings {i}" for i in range(args.settings))]
    left = [name for name in names if name not in records]
    began, told = time.monotonic(), 0.0
    try:
        with path.open("a") as file:
            for record in run(left, seed, args.inductor, args.workers):
                records[record["name"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                if sys.stderr.isatty() and time.monotonic() - told > 0.5:
                    told = time.monotonic()
                    done = sum(name in records for name in names)
                    sys.stderr.write(f"\r{done} of {len(names)}, {_wrong(records.values())} wrong, {told - began:.0f} s \033[K")
                    sys.stderr.flush()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    print(_summary([records[name] for name in names if name in records], seed))
    return 1 if _wrong(records.values()) else 0


def _stopped(out: Path, wanted: int) -> int:
    """The seed of a run that was stopped, or a new one."""
    for path in sorted(out.glob("*.jsonl")):
        if path.stem.isdigit() and len(_kept(path)) < wanted:
            return int(path.stem)
    return int(time.time())


def _kept(path: Path) -> dict[str, Record]:
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    return {record["name"]: record for record in records}


def _is_wrong(record: Record) -> bool:
    return any(text.startswith("wrong") for text in record["results"].values())


def _wrong(records: Any) -> int:
    return sum(map(_is_wrong, records))


def _summary(records: Sequence[Record], seed: int) -> str:
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for check, text in record["results"].items():
            counts.setdefault(check, Counter())[text.partition(":")[0]] += 1
    lines = [f"{check:12} {', '.join(f'{count} {word}' for word, count in found.most_common())}" for check, found in counts.items()]
    wrong = [
        f"{record['name']}, {check}: {text}" for record in records for check, text in record["results"].items() if text.startswith("wrong")
    ]  # fmt: skip
    refused = Counter(text[:100] for record in records for text in record["results"].values() if text.startswith(("refused", "none")))
    shown = [f"{count:4} {text}" for text, count in refused.most_common(10)]
    end = f"seed {seed}: {len(records) - len(wrong and {line.partition(',')[0] for line in wrong})} of {len(records)} without a fault"
    return "\n".join([*lines, *shown, *wrong, end])


def _at_length(seed: int, numbers: Sequence[int], inductor: int) -> int:
    wrong = 0
    for number in numbers:
        print(drawn(seed_of(seed, number)).text)
        for check, text in checked(seed_of(seed, number), number % inductor == 0).items():
            print(f"  {check}: {text}")
            wrong += text.startswith("wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
