"""Thirty cases, a few injected faults, and the fuzzer's own parts. The long runs: docs/fuzz.md."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from fuzz import draws, matching, reading, strengths
from fuzz.cases import Discarded, Group, Maker, make
from fuzz.choices import Reg
from fuzz.faults import FAULTS, patched
from fuzz.generate import generate
from fuzz.injection import first
from fuzz.judge import judge
from fuzz.program import Plain
from fuzz.runner import Options, failing, program_seed, read, run, write
from fuzz.shrink import shrunk

PROBE = "a sum for a mean"


def test_thirty_cases() -> None:
    tally = run(Options(seed=1, cases=30, shrink=False, out=Path("build/fuzz")))
    assert tally.cases == 30
    assert tally.faults == []
    assert sum(tally.refused.values()) < 8


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("a sum for a mean", 0), ("noise in eval mode", 6), ("a moved generator", 1), ("another mask in backward", 1),
        ("a penalty without gradient", 2), ("a penalty reads before the splice", 6), ("no copy before a later write", 6),
        ("the power iteration forgets", 0), ("a schedule one call late", 1), ("units on the last axis of a convolution", 5),
        ("a site strength at the neighbour", 5), ("what a write has left is not read", 6),
    ],
)  # fmt: skip
def test_a_fault_in_the_engine_is_found(name: str, seed: int) -> None:
    """With seeds by which few cases come before the one that shows it."""
    assert first(name, seed, Options(cases=100)) is not None


def test_what_a_fault_is_put_into_must_be_there() -> None:
    with pytest.raises(KeyError), patched("runtime.splice:SpliceRule", "gone", lambda was: was):
        pass
    for name, inject in FAULTS.items():
        with inject():
            assert name


def test_the_draws_are_those_of_the_page() -> None:
    """The known answers that freeze graphreg's streams, from an implementation that calls nothing of it."""
    stream = draws.stream(0, "fc", "BernoulliDropout", 0)
    assert stream == 397514744688752528
    assert [word - (word >> 31 << 32) for word in draws.key(stream, 0)] == [6405547, -2054708894]
    assert [word - (word >> 31 << 32) for word in draws.key(stream, 1_000_000)] == [-495606315, -306116817]
    key = (0x1234567, -0x7654321 & 0xFFFFFFFF)
    assert draws.words(*key, 4).tolist() == [438028812, 3001771917, 1550759435, 3001568541]
    assert draws.words(*key, 2, 1).tolist() == [190144660, 3194550266]
    assert draws.keep(key, torch.empty(16), 0.5).tolist() == [0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1]


def test_a_selector_names_a_thing_and_not_its_insides() -> None:
    name = matching.Name
    inner = matching.Place([name("block.relu", "relu")])
    block = matching.Place([name("block.add", "add"), name("block", "Block", module="block")])
    port = matching.Place([name("rnn", "LSTM", ("h_n",), False, "rnn")])
    places = [inner, block, port]

    def found(text: str) -> list[matching.Place]:
        return matching.matches(text, places)

    assert found("block*") == [block]
    assert found("block**") == [inner, block]
    assert found("**@relu") == [inner]
    assert found("rnn") == [] and found("rnn:h_n") == [port]
    assert matching.select(["**", "!block"], places, places)[0] == [inner]
    assert matching.select(["nothing"], places, places)[1] == ["nothing"]


def test_sets_of_a_later_version_change_none_of_those_before() -> None:
    for seed in (0, 3, 8):
        (_, before), (_, after) = make(seed, 4), make(seed, 4, later=3)
        assert before.cases == after.cases[: len(before.cases)]
        assert len(after.cases) > len(before.cases) and all(case.later for case in after.cases[len(before.cases) :])


def test_a_name_reads_a_tied_parameter_where_its_module_does() -> None:
    name = matching.Name
    tied = matching.Place([name("a.weight", "Linear"), name("b.weight", "Linear")], "parameter")
    table = matching.Place([name("word.weight", "Embedding"), name("out.weight", "Linear")], "parameter")

    def read(kind: str, *pattern: str, place: matching.Place = tied) -> list[str]:
        return [each.name for each in reading.readers(kind, pattern, place)]

    assert read("DropConnect", "a.weight") == ["a.weight"] and read("DropConnect", "*.weight") == ["a.weight", "b.weight"]
    assert read("DropConnect", "**a.weight") == read("DropConnect", "*") == ["a.weight", "b.weight"]
    assert read("EmbeddingDropout", "**", place=table) == ["word.weight"]


def test_strengths_by_hand() -> None:
    assert [strengths.scheduled(["linear", 0.0, 0.4, 2, 1], call) for call in range(4)] == [0.0, 0.2, 0.4, 0.4]
    assert [strengths.scheduled(["piecewise", [[0, 0.1], [2, 0.5]], 2], call) for call in (0, 3, 4)] == [0.1, 0.1, 0.5]
    assert strengths.ramped([0.0, 0.4], ["a", "b", "c"]) == {"a": 0.0, "b": 0.2, "c": 0.4}
    assert strengths.ramped([0.36, 0.0], "abcd")["d"] == 0.0  # a rate below 0 is none
    own = strengths.Strengths({"noise": 0.3}, {"noise": {"a": 0.1}}, [[1, "noise", {"b": 0.5}, {"b": 0.5}], [2, "noise", 0.7, {}]])
    assert [own.of("noise", site) for site in "abc"] == [0.1, 0.3, 0.3]
    assert own.change(1) == [("noise", {"b": 0.5})] and [own.of("noise", site) for site in "abc"] == [0.1, 0.5, 0.3]
    assert own.change(2) == [("noise", 0.7)] and {own.of("noise", site) for site in "abc"} == {0.7}


def test_a_seed_gives_the_same_models_in_every_process() -> None:
    sources = [Plain(generate(seed)).text() for seed in range(3)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a forked process has no backward where autograd has started threads
        assert pool.map(_source, range(3)) == sources


def _source(seed: int) -> str:
    return Plain(generate(seed)).text()


@pytest.mark.parametrize("seed", [412002018, 412002163, 413003256])
def test_a_gradient_that_rounding_decides_on_is_no_fault(seed: int) -> None:
    """A covariance whose derivative is 0; a variance much smaller than the mean; a ratio of numbers that are 0 but for rounding."""
    assert [verdict for verdict in judge(make(seed, 4, later=2)[1]) if verdict.result == "fault"] == []


def _failing_case() -> tuple[Maker, Group, int]:
    for index in range(20):
        try:
            maker, group = make(program_seed(Options(seed=2), index))
        except Discarded:
            continue
        for i, verdict in enumerate(judge(group)):
            sites = max(len(found.sites) for found in group.cases[i].found)
            if verdict.kind == "penalty" and len(group.cases[i].regs) > 1 and sites > 1:
                return maker, group, i
    raise AssertionError("no case fails")


def test_a_case_is_shrunk_written_and_replayed(tmp_path: Path) -> None:
    with FAULTS[PROBE]():
        maker, group, i = _failing_case()
        small = shrunk(maker, group.cases[i], failing, 16)
        assert failing(small) == "penalty"
        assert len(small.cases[0].regs) == 1 < len(group.cases[i].regs)
        assert len(small.source) < len(group.source)
        path = write(tmp_path, small)
        assert failing(read(path)) == "penalty"
    assert judge(read(path))[0].result == "fine"
    assert small.source in path.read_text()


def test_a_regularizer_prints_as_python_writes_it() -> None:
    assert Reg("HiddenL1", ("a", "!b"), 0.5, {"clean": True}).made() == "HiddenL1(['a', '!b'], 0.5, clean=True)"
