"""The fuzzer's scenes and pairs of models: a few of them, faults that they find, and their own parts. The long runs: docs/fuzz.md."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fuzz import argument_kinds, asks, model_changes
from fuzz.cases import forgotten, loaded
from fuzz.faults import FAULTS
from fuzz.injection import first
from fuzz.inserted import HOWS, judge_inserted
from fuzz.runner import Options, replayed, run
from fuzz.scene_judge import failing_scene, judge_scene, shrunk_scene, write_scene
from fuzz.scenes import KINDS, Fragment, Scene, Step, scene

NEVER = "a model that never changes"


@pytest.mark.parametrize(("kind", "cases"), [("asks", 8), ("kinds", 8), ("changes", 8), ("inserted", 3)])
def test_a_few_of_each_kind(kind: str, cases: int) -> None:
    tally = run(Options(seed=1, cases=cases, of=kind, shrink=False, out=Path("build/fuzz")))
    assert tally.cases == cases
    assert tally.faults == []


@pytest.mark.parametrize(("name", "seed"), [(NEVER, 4), ("a stand in that is no tensor", 6), ("names that count all operations", 0)])
def test_a_fault_in_the_engine_is_found(name: str, seed: int) -> None:
    """With seeds by which few scenes come before the one that shows it."""
    assert first(name, seed, Options(cases=50)) is not None


@pytest.mark.parametrize(("way", "name"), [("in place", "one structure for all arguments"), ("example", "arguments that are not compared")])
def test_a_wrong_argument_is_a_fault(way: str, name: str) -> None:
    """By hand: two arguments that are one object, and then two."""
    same = Fragment("h = h * 2.0 + q if q is k else h + k", takes="q=None, k=None")
    steps = [Step("", "dict(x=T(0, 3, 4), q=A, k=A)"), Step("", "dict(x=T(0, 3, 4), q=A, k=B)")]
    made = Scene(0, "kinds", [same], steps, way, "symbolic", ["BernoulliDropout('*', 0.0)"])
    assert judge_scene(made).result == {"in place": "fine", "example": "refused"}[way]
    with FAULTS[name]():
        assert judge_scene(made).kind == "output"


def _alone(fragment: Fragment, kind: str) -> Scene:
    given = (fragment.calls or [""])[0]
    steps = [Step(change, f"dict(x={(fragment.x or ['T(0, 3, 4)'])[0]}, {given})") for change in ("", *fragment.changes)]
    return Scene(3, kind, [fragment], steps, "in place", "auto", [])


def _fragments() -> list[tuple[str, Fragment]]:
    """Each that the tables have, by drawing often."""
    rng, found = random.Random(0), dict[str, tuple[str, Fragment]]()
    draws = [("kinds", argument_kinds.argument), ("kinds", argument_kinds.input_changed), ("asks", asks.default)]
    draws += [("changes", model_changes.changed), ("changes", model_changes.assigned)]
    for kind, draw in draws:
        for _ in range(250):
            fragment = draw(rng, 0)
            found.setdefault(fragment.made + fragment.text, (kind, fragment))
    return list(found.values())


def test_each_fragment_runs_by_itself() -> None:
    """A statement that does not run would be discarded, and test nothing."""
    found = _fragments()
    tables = (argument_kinds.ARGUMENTS, argument_kinds.INPUTS, asks.DEFAULTS, model_changes.CHANGES, model_changes.ASSIGNED)
    assert len(found) > 0.9 * sum(map(len, tables))
    for kind, fragment in found:
        made = _alone(fragment, kind)
        space = loaded(made.source(), "scene_alone")
        try:
            outcomes = []
            for i in range(len(made.steps)):
                net = space["model"]()
                outcomes.append(net(**space["call_0"]()))
                space[f"change_{i}"](net)
            assert all(torch.isfinite(each).all() for each in outcomes), fragment.text
        finally:
            forgotten("scene_alone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_scene(kind: str) -> None:
    made = [scene(seed, kind) for seed in range(20)]
    assert [each.source() for each in made] == [scene(seed, kind).source() for seed in range(20)]
    assert [Scene.from_dict(each.to_dict()) for each in made] == made
    assert len({each.source() for each in made}) == 20


def test_a_wrong_answer_is_a_fault_and_a_refusal_is_none() -> None:
    """By hand: the scale is set later. Where the engine does not see it, the output differs; a refusal of it would be right."""
    late = Fragment("h = h * self.scale", "self.scale = 2.0", changes=["net.scale = 3.0"])
    steps = [Step("", "dict(x=T(0, 3, 4))"), Step("net.scale = 3.0", "dict(x=T(0, 3, 4))")]
    made = Scene(0, "changes", [late], steps, "in place", "symbolic", ["BernoulliDropout('*', 0.0)"])
    assert judge_scene(made).result == "fine"
    with FAULTS[NEVER]():
        assert judge_scene(made).kind == "output"
    unknown = Fragment("if h.sum() > 0:\n    h = h * 2.0")
    assert judge_scene(Scene(0, "asks", [unknown], steps[:1], "no example", "symbolic", made.regs)).result == "refused"


def test_a_scene_is_shrunk_written_and_replayed(tmp_path: Path) -> None:
    late = Fragment("h = h * self.scale", "self.scale = 2.0")
    other = Fragment("h = torch.tanh(h)")
    steps = [Step(change, "dict(x=T(0, 3, 4))") for change in ("", "", "net.scale = 3.0", "")]
    regs = ["BernoulliDropout('*', 0.0)", "GaussianNoise('*', 0.0)"]
    with FAULTS[NEVER]():
        small = shrunk_scene(Scene(0, "changes", [other, late], steps, "in place", "symbolic", regs))
        assert failing_scene(small) == "output"
        assert (len(small.fragments), len(small.steps), len(small.regs)) == (1, 2, 1)
        path = write_scene(tmp_path, small)
        assert [each.kind for each in replayed(path)] == ["output"]
    assert [each.result for each in replayed(path)] == ["fine"]
    assert small.source() in path.read_text()


def test_a_pair_of_models_is_told() -> None:
    verdict, about = judge_inserted(2)
    assert verdict.result == "fine"
    assert about.partition("\n")[0].removeprefix("# ") in HOWS and about.count("class Net(nn.Module)") == 2
