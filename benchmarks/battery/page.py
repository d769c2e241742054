"""The tables: a line for each kind of test, and every p-value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from page import row

from battery.cases import MORE, Case, Record, again, cases, doubtful, record
from battery.words import BATCH, ELEMENTS, NAMES, SITES, SPAN, STREAMS

MARKS = "<!-- battery -->", "<!-- /battery -->"
ITS_OWN_DOUBTS = {5: "suspect", 6: "suspect", 7: "suspect", 14: "do not use"}  # dieharder -l
Records = Mapping[Case, Record]

HEAD = """`make rng-battery`, run {dates} with dieharder {version} and torch {torch}, runs every test of `dieharder -a`, each in its own \
process (`dieharder -d N [-n SIZE] -g 200`). The tests read three streams of 32-bit words. Here, a stream is a sequence of words \
that graphreg's keys and hash give for `BernoulliDropout` with seed 0:

- *training*: the words in the order in which training draws them: step by step, {elements} elements of each of {sites} sites;
- *over steps*: element 0 of one site, step after step;
- *over sites*: element 0 of one step, over {names:,} sites, `layer.0`, `layer.1`, …; after the last site, the same sites at the next step.

Each test starts {span:,} words after the start of the test before it. So no two tests of a stream read the same words, and the verdicts \
of different tests are independent (those of one test are not). No stream is rewound. {read:,} words were read, {gigabytes:,.0f} GB.

{sums}
"""


def section(folder: Path, version: str) -> str:
    """What stands between the marks; ``version`` is dieharder's."""
    everything = cases(STREAMS)
    found = {case: kept for case in everything if (kept := record(case, folder))}
    if not found:
        return f"{MARKS[0]}\nNothing has run yet: `make rng-battery`.\n{MARKS[1]}\n"
    more = {again(case): kept for case in found if (kept := record(again(case), folder))}
    dates = sorted({kept["date"] for kept in [*found.values(), *more.values()]})
    read = sum(kept["words"] for kept in [*found.values(), *more.values()])
    head = HEAD.format(
        dates=" to ".join(dict.fromkeys([dates[0], dates[-1]])),
        version=version,
        torch=torch.__version__,
        sites=SITES,
        elements=ELEMENTS,
        names=NAMES,
        span=SPAN,
        read=read,
        gigabytes=read * 4 / 1e9,
        sums="\n".join(sums(found, more)),
    )
    parts = [
        head,
        *kinds(found, everything),
        "",
        *repeated(found, more),
        *left_out(found, everything),
        *steps_taken(found),
        *full({**found, **more}),
    ]
    return "\n".join([MARKS[0], *parts, MARKS[1], ""])


def values(kept: Iterable[Record]) -> list[float]:
    return [line["pvalues"] for record in kept for line in record["rows"]]


def verdicts(kept: Iterable[Record], word: str) -> int:
    return sum(line["assessment"] == word for record in kept for line in record["rows"])


def sums(found: Records, more: Records) -> Iterator[str]:
    """How many p-values of each stream there are, and how many of them random words would have dieharder call WEAK."""
    yield row("stream", "tests", "p-values", "PASSED", "WEAK", "WEAK expected by chance", "FAILED")
    yield "|---|---|---|---|---|---|---|"
    for stream in STREAMS:
        own = [kept for case, kept in found.items() if case.stream == stream]
        counts = (verdicts(own, word) for word in ("PASSED", "WEAK", "FAILED"))
        passed, weak, failed = counts
        yield row(stream, len(own), len(values(own)), passed, weak, f"{0.01 * len(values(own)):.1f}", failed)
    yield ""
    left = sum(map(doubtful, found.values())) - len(more)
    yield (
        "dieharder calls a p-value WEAK if it is below 0.005 or above 0.995, which happens to one of a hundred by chance, and FAILED if it "
        f"is less than 10⁻⁶ away from 0 or 1. Tests that did not pass ran again, with {MORE} times the samples, on words that no other "
        f"test had read. These were {len(more)} tests, of which {sum(map(doubtful, more.values()))} did not pass again"
        + (f"; {left} more {'waits' if left == 1 else 'wait'} for it." if left else ".")
    )


def kinds(found: Records, everything: Iterable[Case]) -> Iterator[str]:
    """A line for each kind of test: for each stream the number of p-values, the smallest and the largest, and what is not PASSED."""
    yield row("test", "sizes", *STREAMS)
    yield "|---|---|" + "---|" * len(STREAMS)
    for number in sorted({case.test for case in everything}):
        own = {case: kept for case, kept in found.items() if case.test == number}
        if own:
            sizes = [case.size for case in own if case.size is not None]
            span = f"{min(sizes)} to {max(sizes)}" if sizes else ""
            yield row(name(number, own), span, *(cell([kept for case, kept in own.items() if case.stream == stream]) for stream in STREAMS))


def name(number: int, own: Records) -> str:
    called: str = next(iter(own.values()))["rows"][0]["test_name"]
    return f"{called} (dieharder: {ITS_OWN_DOUBTS[number]})" if number in ITS_OWN_DOUBTS else called


def cell(own: list[Record]) -> str:
    found = values(own)
    if not found:
        return "not run"
    notes = [f", {count} {word}" for word in ("WEAK", "FAILED") if (count := verdicts(own, word))]
    ends = f"{min(found):.4f} to {max(found):.4f}" if len(found) > 1 else f"{found[0]:.4f}"
    return f"{len(found)}: {ends}{''.join(notes)}"


def assessed(line: Mapping[str, object]) -> str:
    return f"{line['pvalues']:.8f}" + ("" if line["assessment"] == "PASSED" else f" {line['assessment']}")


def repeated(found: Records, more: Records) -> Iterator[str]:
    """Each p-value that did not pass, first or with more samples, beside the other."""
    doubts = [case for case, kept in found.items() if doubtful(kept)]
    if doubts:
        yield row("stream", "command", "size", "p-value", f"with {MORE} times the samples")
        yield "|---|---|---|---|---|"
    for case in sorted(doubts, key=lambda case: list(STREAMS).index(case.stream)):
        lines = found[case]["rows"]
        then = more[again(case)]["rows"] if again(case) in more else [None] * len(lines)
        for first, second in zip(lines, then, strict=True):
            if any(line and line["assessment"] != "PASSED" for line in (first, second)):
                command = f"`{' '.join(case.command)}`"
                yield row(case.stream, command, first["ntuple"], assessed(first), assessed(second) if second else "not run")
    yield ""


def left_out(found: Records, everything: Iterable[Case]) -> Iterator[str]:
    """What has not run, in a line for all the streams of which that is the same."""
    missing = {stream: listed(case for case in everything if case.stream == stream and case not in found) for stream in STREAMS}
    for what in dict.fromkeys(filter(None, missing.values())):
        yield f"Not run on *{'*, *'.join(stream for stream in STREAMS if missing[stream] == what)}*: {what}.\n"


def listed(some: Iterable[Case]) -> str:
    """Tests by dieharder's options; of one test, its sizes."""
    sizes: dict[int, list[int]] = {}
    for case in some:
        sizes.setdefault(case.test, []).extend([] if case.size is None else [case.size])
    return ", ".join(f"`-d {test}`" + (f" at {', '.join(map(str, sorted(own)))}" if own else "") for test, own in sorted(sizes.items()))


def steps_taken(found: Records) -> Iterator[str]:
    """The tests that the sites of one step do not suffice for; the words that were read are known to a BATCH."""
    words = {case: kept["words"] for case, kept in found.items() if case.stream == "over sites" and kept["words"] + BATCH > NAMES}
    if words:
        most = max(words.values()) / NAMES
        yield (
            "In *over sites*, these tests read more words than there are sites, so their words come from up to "
            f"{most:.0f} steps: {listed(words)}.\n"
        )


def full(found: Records) -> Iterator[str]:
    """Every p-value, in a part that is closed until it is asked for."""
    yield "<details><summary>Every p-value</summary>\n"
    yield row("test", "size", "samples", *STREAMS)
    yield "|---|---|---|" + "---|" * len(STREAMS)
    for test, size, times in sorted({(case.test, case.size, case.times) for case in found}, key=lambda key: (key[0], key[1] or 0, key[2])):
        own = {case.stream: kept["rows"] for case, kept in found.items() if (case.test, case.size, case.times) == (test, size, times)}
        for at, line in enumerate(next(iter(own.values()))):
            cells = [assessed(own[stream][at]) if stream in own else "not run" if times == 1 else "" for stream in STREAMS]
            yield row(line["test_name"], line["ntuple"], f"{line['psamples']} of {line['tsamples']}", *cells)
    yield "\n</details>"


def put(text: str, page: str) -> str:
    """The page with the section in the place of what stands between its marks; ValueError if it has none."""
    first, last = (page.find(mark) for mark in MARKS)
    if not 0 <= first < last:
        raise ValueError(f"the page has no place for the tables: write {MARKS[0]} and {MARKS[1]} where they are to stand")
    return page[:first] + text.rstrip("\n") + page[last + len(MARKS[1]) :]
