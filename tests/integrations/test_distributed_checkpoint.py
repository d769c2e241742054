"""Checkpoints of torch.distributed.checkpoint: what they bring back, on as many ranks as saved them and on others; what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from perceptron import perceptron
from rank_processes import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torch.testing import assert_close

import graphreg
from graphreg import GraphRegError, RegularizerError, schedules
from graphreg.integrations.distributed_checkpoint import RegularizerState

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
RISING = schedules.linear(0, 0.5, 10)
SETTINGS: dict[str, Any] = {"hidden_dropout": RISING, "noise": 0.1, "weight_l2": 0.2, "hidden_l1": 0.1}
KEPT: dict[str, Any] = {"l2_sp": 0.1, "spectral": 0.1}


def save(path: Path, target: Any) -> None:
    dcp.save({"noise": RegularizerState(target)}, checkpoint_id=path)


def load(path: Path, target: Any) -> None:
    dcp.load({"noise": RegularizerState(target)}, checkpoint_id=path)


def assert_equal(ours: Any, theirs: Any) -> None:
    """Compare nested dicts, tensors bit for bit."""
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            assert_equal(value, theirs[key])
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


# In one process


class Case:
    """A regularized model.

    Attributes:
        control: What graphreg's functions take.
        target: What RegularizerState gets.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.model = perceptron()
        self.control: Any
        if kind == "backend":
            self.control = self.target = graphreg.backend(rng=seed, inner="eager", **SETTINGS)
            self.call = torch.compile(self.model, backend=self.control)
            return
        if kind == "in place":
            self.control = graphreg.regularize_(self.model, rng=seed, penalties="return", **SETTINGS, **KEPT)
        else:
            self.control = graphreg.regularize(self.model, rng=seed, **SETTINGS, **KEPT)
        self.call = torch.compile(self.control, backend="aot_eager") if kind == "compiled" else self.control
        self.target = nn.ModuleDict({"student": self.control, "teacher": nn.Linear(2, 2)}) if kind == "inside" else self.call

    def step(self) -> tuple[Tensor, ...]:
        """The output, the penalties and the gradients of a call."""
        result = self.call(X)
        output, penalties = result if isinstance(result, graphreg.Regularized) else (result, self.control.penalties())
        loss = output.square().mean() + sum(penalties.values())
        return (output.detach(), *(p.detach() for p in penalties.values()), *torch.autograd.grad(loss, list(self.model.parameters())))


@pytest.mark.parametrize("kind", ["beside", "compiled", "in place", "inside", "backend"])
def test_noise_strengths_schedules_and_state_come_back(kind: str, tmp_path: Path) -> None:
    case, other = Case(kind, 1), Case(kind, 2)
    for _ in range(3):
        case.step()
    graphreg.set_strength(case.control, "weight_l2", 0.7)
    save(tmp_path, case.target)
    expected = [case.step() for _ in range(3)]
    assert not torch.equal(other.step()[0], expected[0][0])
    graphreg.set_strength(other.control, "hidden_l1", 0.9)  # was not set in the run that saved
    load(tmp_path, other.target)
    for ours, theirs in zip([other.step() for _ in range(3)], expected, strict=True):
        assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert graphreg.strengths(other.control) == graphreg.strengths(case.control)
    assert graphreg.strengths(other.control)["weight_l2"] == 0.7


def test_strengths_by_site_and_another_schedule_come_back(tmp_path: Path) -> None:
    """A checkpoint has no entry for each: DCP would not load an entry that the present state lacks."""
    case, other = Case("beside", 1), Case("beside", 1)
    graphreg.set_strength(case.control, "weight_l2", {"hid.*": 0.7})
    graphreg.set_strength(case.control, "hidden_dropout", schedules.linear(0.5, 0, 3))
    case.step()
    save(tmp_path, case.target)
    load(tmp_path, other.target)
    assert graphreg.site_strengths(other.control) == graphreg.site_strengths(case.control)
    assert graphreg.site_strengths(other.control)["weight_l2"] == {"hid.weight": 0.7, "out.weight": 0.2}
    assert all(map(torch.equal, other.step(), case.step()))


def test_it_is_a_stateful_of_one_text_and_tensors() -> None:
    case = Case("inside", 1)
    state = RegularizerState(case.target).state_dict()
    assert isinstance(RegularizerState(case.target), Stateful)
    assert list(state) == ["state", *(f"student/{name}" for name in (
        "l2_sp/hid.weight/start", "l2_sp/out.weight/start", "spectral/hid.weight/u", "spectral/out.weight/u",
    ))]  # fmt: skip
    assert json.loads(state["state"])["modules"]["student"]["noise"]["call"] == 0
    held = state["student/spectral/hid.weight/u"]
    held.zero_()  # DCP loads into the tensors: they are copies
    assert graphreg.rng_state(case.control)["state"]["spectral"]["hid.weight"]["u"].any()


def test_asynchronous(tmp_path: Path) -> None:
    """A checkpoint is of the moment when it was begun."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case, other = Case("beside", 1), Case("beside", 2)
        case.step()
        future: Any = dcp.async_save({"noise": RegularizerState(case.target)}, checkpoint_id=tmp_path / "saved")
        expected = case.step()
        future.result()
        load(tmp_path / "saved", other.target)
    finally:
        torch.distributed.destroy_process_group()
    assert all(map(torch.equal, other.step(), expected))


def test_why_the_state_is_one_text(tmp_path: Path) -> None:
    """Of a plain dict, DCP loads no entry that the present dict lacks, and says nothing."""
    case, other = Case("backend", 1), Case("backend", 1)
    case.step()
    dcp.save({"noise": graphreg.rng_state(case.control)}, checkpoint_id=tmp_path)
    state = graphreg.rng_state(other.control)
    dcp.load({"noise": state}, checkpoint_id=tmp_path)
    assert graphreg.rng_state(case.control)["calls"] and not state["calls"]


# What is refused


def damaged(**changes: Any) -> dict[str, Any]:
    state = RegularizerState(Case("beside", 1).target).state_dict()
    return state | {"state": json.dumps(json.loads(state["state"]) | changes)}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (3, r"^3 is no state of RegularizerState\. Give what its state_dict returned, or let dcp\.load call load_state_dict\.$"),
        ({"version": 1, "call": 0, "ranks": "differ", "streams": {}}, r"is no state of RegularizerState\. Give what its state_dict"),
        ({"state": "{"}, r"^the state is damaged: its text is '\{'\. Load an older checkpoint, or start anew\.$"),
        ({"state": "{}"}, r"^the state is damaged: its text is '\{\}'\."),
        (damaged(version=2), r"^the state has version 2; this graphreg reads version 1\. Read it with the graphreg that saved it\.$"),
        (damaged(modules={}), r"only the model has a regularized module at the model itself\. Regularize the model as for the run"),
        (
            {"state": damaged()["state"]},
            r"only the checkpoint or only the model has the tensors l2_sp/hid\.weight/start, .*\. Regularize the model as for the run",
        ),
    ],
)
def test_what_is_no_state_changes_nothing(state: Any, sentence: str) -> None:
    case, twin = Case("beside", 2), Case("beside", 2)
    with pytest.raises(RegularizerError, match=sentence):
        RegularizerState(case.target).load_state_dict(state)
    assert all(map(torch.equal, case.step(), twin.step()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**SETTINGS, "decov": 0.1}, r"only the checkpoint or only the model has a regularizer named decov, l2_sp, spectral\. Regularize"),
        ({**SETTINGS, **KEPT, "noise": {"hid": 0.1}}, r"with other streams of noise; only the state has:"),
        ({**SETTINGS, **KEPT, "hidden_dropout": 0.3}, r"^the state belongs to another module: it has the clock of schedules"),
    ],
)
def test_checkpoints_of_other_models_change_nothing(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    save(tmp_path, Case("beside", 1).target)
    module = graphreg.regularize(perceptron(), rng=2, **settings)
    before = graphreg.rng_state(module)
    with pytest.raises(RegularizerError, match=sentence):
        load(tmp_path, module)
    assert_equal(graphreg.rng_state(module), before)


def test_dcp_names_the_tensors_that_a_checkpoint_lacks(tmp_path: Path) -> None:
    save(tmp_path, graphreg.regularize(perceptron(), weight_l2=0.1))
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: noise\.l2_sp/hid\.weight/start"):
        load(tmp_path, graphreg.regularize(perceptron(), l2_sp=0.1))


def test_a_model_in_place_may_load_before_its_first_call(tmp_path: Path) -> None:
    case, other = Case("in place", 1), Case("in place", 2)
    case.step()
    save(tmp_path, case.target)
    load(tmp_path, other.target)
    assert all(map(torch.equal, other.step(), case.step()))


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (nn.Linear(2, 2), r"^no module in this Linear is regularized.* compiled with graphreg\.backend, give RegularizerState the backend"),
        ({"a": 1}, r"^RegularizerState was given \{'a': 1\}\. Give it a module that is regularized, or a backend of graphreg's\.$"),
    ],
)
def test_what_is_not_regularized(target: Any, sentence: str) -> None:
    with pytest.raises(GraphRegError, match=sentence):
        RegularizerState(target)


class Dropping(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def test_native_dropout_that_torch_draws_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: told.append(text % args))
    RegularizerState(graphreg.regularize(Dropping(), weight_l2=0.1, own_dropout="seeded")).state_dict()
    assert not told
    state = RegularizerState(graphreg.regularize(Dropping(), weight_l2=0.1))
    state.state_dict()
    state.state_dict()
    assert [text.partition(": a run")[0] for text in told] == [
        "RegularizerState does not save the state of torch's generators, from which 1 draws"
    ]


# On several ranks

SCRIPT = Path(__file__).parent / "resharded.py"
FIRST = ("FSDP2", "DDP in place, remembering")
OTHERS = ("FSDP2 in place", "FSDP2, learned", "DDP, remembering")


def ran(folder: Path, *ways: str) -> Path:
    run_ranks(SCRIPT, folder, *ways, paths=(SCRIPT.parents[1] / "blocks",))
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tmp_path_factory.mktemp("first"), *FIRST)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(tmp_path_factory.mktemp("others"), *OTHERS)


def ranks(folder: Path, group: str, count: int, way: str) -> list[Any]:
    return [torch.load(folder / f"{group}.{rank}.pt")[way] for rank in range(count)]


def assert_resumed(folder: Path, way: str) -> None:
    """Parameters, moments, noise, strengths and state; all losses with the same number of ranks, the next one with another number."""
    four, two, back = ranks(folder, "first", 4, way), ranks(folder, "second", 2, way), ranks(folder, "third", 4, way)
    (saved, step), other = four[0], four[1]
    assert saved["noise"]["call"] == 2 and step != other[1]
    for rank, (loaded, following, saved_again, steps, loaded_again, steps_again) in enumerate(two):
        assert_equal(loaded, saved)
        assert_close(following, four[rank][1])  # rank r of two draws what rank r of four draws, and adds fewer shards up
        assert_equal(loaded_again, saved_again)
        assert steps_again == steps
        assert_close(back[rank][1], steps[0])
    for loaded, _ in back:
        assert_equal(loaded, two[0][2])


@pytest.mark.parametrize("way", FIRST)
def test_saved_on_four_ranks_loaded_on_two_and_back(found: Path, way: str) -> None:
    assert_resumed(found, way)


@pytest.mark.parametrize("way", OTHERS)
def test_saved_on_four_ranks_loaded_on_two_and_back_in_other_ways(others: Path, way: str) -> None:
    assert_resumed(others, way)


def test_parts_of_a_model_that_share_a_key_are_refused(found: Path) -> None:
    """Those with keys of their own come back: resharded.py asserts it."""
    texts = [torch.load(found / f"stages.{rank}.pt") for rank in range(2)]
    assert texts.count("") == 1  # the part that DCP saved
    assert any("each part needs a key of its own in what dcp.save gets, for example f'noise{stage}'." in text for text in texts)
