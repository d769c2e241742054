"""``python -m fuzz``: see docs/fuzz.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fuzz import page
from fuzz.injection import injected
from fuzz.runner import SOURCES, Options, Tally, replayed, run


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Random models and regularizers against an instrumented copy of the model.")
    parser.add_argument("--seed", type=int, default=0, help="the run (default 0): the same seed gives the same cases")
    parser.add_argument("--of", default=",".join(SOURCES), metavar="NAMES", help=f"what cases are made of (default {','.join(SOURCES)})")
    parser.add_argument("--cases", type=int, help="how many of each (default 1000 of models, 250 of others; with --inject at most 500)")
    parser.add_argument("--compiled", default="", metavar="BACKEND", help="run the rewritten module by torch.compile: aot_eager, inductor")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sets", type=int, default=None, help="sets of regularizers for each model (default 4; compiled 2)")
    parser.add_argument("--later", type=int, default=None, help="sets with what version 0.2 brought (default 2; compiled 1)")
    parser.add_argument("--without", default="", metavar="NAMES", help="leave out statements, by the names of their makers, with commas")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where faults are written (default build/fuzz)")
    parser.add_argument("--no-shrink", action="store_true", help="write faults as they are")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run written cases again")
    parser.add_argument("--inject", default="", metavar="NAMES", help="put faults into the engine: all, or names with commas")
    parser.add_argument("--seeds", type=int, default=1, help="with --inject: so many seeds, from --seed on")
    parser.add_argument("--record", action="store_true", help="enter the run in tests/fuzz/results.json")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/fuzz.md from tests/fuzz/results.json")
    args = parser.parse_args(given)
    options = Options(
        args.seed, args.cases or 1000, args.compiled, args.workers, _or(args.sets, 2 if args.compiled else 4),
        tuple(filter(None, args.without.split(","))), args.out, not args.no_shrink,
        _or(args.later, 1 if args.compiled else 2),
    )  # fmt: skip
    if args.page:
        page.write()
        return 0
    if args.replay:
        return _replay(args.replay, args.compiled)
    if args.inject:
        return _inject(args.inject, args.seeds, replace(options, cases=args.cases or 500), args.record)
    faults = 0
    for name in filter(None, args.of.split(",")):
        if name not in SOURCES:
            parser.error(f"--of {name!r}: there are {', '.join(SOURCES)}")
        own = replace(options, of=name, cases=args.cases or (1000 if name == "models" else 250))
        tally = run(own, show=sys.stderr.isatty())
        print(f"{name}: ", end="")
        _print(tally)
        if args.record:
            page.record(own, tally)
        faults += len(tally.faults)
    return 1 if faults else 0


def _or(given: int | None, usual: int) -> int:
    return usual if given is None else given


def _print(tally: Tally) -> None:
    print(f"{tally.text()}, {tally.seconds:.0f} s")
    for kind, count in tally.refused.most_common():
        print(f"  refused {count:6,}  {kind}")
    kinds = {each["kind"] for each in tally.faults}
    for kind in sorted(kinds):
        own = [each for each in tally.faults if each["kind"] == kind]
        print(f"  fault   {len(own):6,}  {kind}  {next((each['file'] for each in own if each['file']), '')}")


def _replay(files: Sequence[Path], compiled: str) -> int:
    wrong = 0
    for path in files:
        for verdict in replayed(path, compiled):
            print(f"{path.name}: {verdict.result} {verdict.kind}\n{verdict.detail}".rstrip())
            wrong += verdict.result == "fault"
    return 1 if wrong else 0


def _inject(names: str, seeds: int, options: Options, record: bool) -> int:
    found = injected(names, seeds, options, lambda line: print(line, flush=True))
    if record:
        page.record_injection(options, found)
    return 1 if any(count is None for counts in found.values() for count in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
