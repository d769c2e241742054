"""set_ranks(module, mesh=...): ranks of data and tensor parallelism draw the masks that one process draws for the whole batch."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshed_ranks import WAYS, Net, plain
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import graphreg
from graphreg import GraphRegError, RegularizerError
from graphreg.passes import BernoulliDropout, DropBlock, HiddenL1
from graphreg.rng.noise import ranked

SCRIPT = Path(__file__).parent / "meshed_ranks.py"


def ran(place: Path, data: int, tensor: int, *ways: str) -> list[dict[str, Any]]:
    """What each rank of a mesh finds in these ways."""
    outs = [place / f"rank{rank}.pt" for rank in range(data * tensor)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), *map(str, (rank, data, tensor, place / "store", out)), *ways], **pipes)
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out) for out in outs]


FIRST = ("plain", "DTensor", "in place", "backend without set_ranks")
OTHERS = tuple(way for way in WAYS if way not in FIRST)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ran(tmp_path_factory.mktemp("first"), 1, 2, *FIRST)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ran(tmp_path_factory.mktemp("others"), 1, 2, *OTHERS)


def assert_as_one(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        ours, expected = rank[way]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", FIRST)
def test_two_tensor_ranks_are_one_process(found: list[dict[str, Any]], way: str) -> None:
    assert_as_one(found, way)


@pytest.mark.parametrize("way", OTHERS)
def test_two_tensor_ranks_are_one_process_in_other_ways(others: list[dict[str, Any]], way: str) -> None:
    assert_as_one(others, way)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (2, 2)])
def test_a_mesh_is_one_process(tmp_path: Path, data: int, tensor: int) -> None:
    ways = [way for way in WAYS if "without set_ranks" not in way]
    found = ran(tmp_path, data, tensor, *ways)
    for way in ways:
        assert_as_one(found, way)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    hook = sys.excepthook  # which a process group puts its own around
    yield
    sys.excepthook = hook
    if dist.is_initialized():
        dist.destroy_process_group()


def meshed(rank: int, data: int = 2, tensor: int = 2) -> DeviceMesh:
    """A mesh of a process group that sends nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=data * tensor, store=FakeStore())
    return init_device_mesh("cpu", (data, tensor), mesh_dim_names=("dp", "tp"))


STYLES: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def made(mesh: DeviceMesh, *regularizers: Any, styles: dict[str, Any] = STYLES, model: nn.Module | None = None, **options: Any) -> Any:
    module = graphreg.regularize(model or plain(), *regularizers, rng=5, **options)
    parallelize_module(module, mesh["tp"], styles)
    return module


def cuts_at(module: Any, site: str) -> list[tuple[int, int, int, str]]:
    rules = [child for child in module.graphreg_rules.children() if getattr(child, "site", None) == site]
    return [(cut.axis, cut.index, cut.parts, cut.name) for rule in rules for cut in rule.cuts]


def keys(module: Any) -> Tensor:
    found: Tensor = module.graphreg_rules.key()
    return found


def test_data_ranks_differ_and_tensor_ranks_agree() -> None:
    found, first = [], keys(graphreg.regularize(plain(), BernoulliDropout("down", 0.5), rng=5))  # without ranks
    for rank in range(4):
        mesh = meshed(rank)
        module = made(mesh, BernoulliDropout("down", 0.5))
        graphreg.set_ranks(module, mesh=mesh, data="dp", tensor=("tp",))
        found.append(keys(module))
    assert torch.equal(found[0], first) and torch.equal(found[1], first)
    assert torch.equal(found[2], ranked(first, 1)) and torch.equal(found[3], ranked(first, 1))
    assert not torch.isin(found[2], first).any()


def test_placements_follow_from_the_layers() -> None:
    mesh = meshed(3)
    module = made(mesh, BernoulliDropout(["up", "tanh", "down", "add", "out"], 0.5), own_dropout="seeded")
    graphreg.set_ranks(module, mesh=mesh, data="dp", tensor="tp")
    part = [(-1, 1, 2, "tp")]
    assert cuts_at(module, "up") == cuts_at(module, "tanh") == cuts_at(module, "drop") == part
    assert all(cuts_at(module, site) == [] for site in ("down", "add", "out"))
    graphreg.set_ranks(module, mesh=mesh, data="dp", tensor="tp", one_batch=True)
    assert cuts_at(module, "up") == [(0, 1, 2, "dp"), *part]
    assert cuts_at(module, "out") == [(0, 1, 2, "dp")]


def test_declared_layouts_count() -> None:
    mesh = meshed(1)
    down = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    styles = {"up": ColwiseParallel(output_layouts=Replicate()), "down": down}
    module = made(mesh, BernoulliDropout(["up", "down"], 0.5), styles=styles)
    graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    assert cuts_at(module, "up") == [] and cuts_at(module, "down") == [(1, 1, 2, "tp")]
    module = made(mesh, BernoulliDropout("norm", 0.5), styles={"norm": SequenceParallel(use_local_output=True)})
    graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    assert cuts_at(module, "norm") == [(1, 1, 2, "tp")]
    module = made(mesh, BernoulliDropout("norm", 0.5), styles={"norm": SequenceParallel()})
    graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    assert cuts_at(module, "norm") == []  # a DTensor says itself where its part lies


class Heads(nn.Module):
    """Its heads lie on an axis of their own, which no rule finds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).unflatten(-1, (-1, 4)).tanh()
        return self.down(h.flatten(-2))


def test_what_cannot_be_inferred_is_asked_for() -> None:
    mesh = meshed(1)
    module = made(mesh, BernoulliDropout(["tanh", "down"], 0.5), model=Heads())
    with pytest.raises(GraphRegError, match=r"BernoulliDropout at tanh: how the ranks of tp share the value is not known: it comes from "
                       r"'unflatten', which gets a part of a value. Say it: .*placements=\{'tanh': \{'tp': Shard\(-1\)\}\}"):  # fmt: skip
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements={"tanh": {"tp": Shard(-2)}})
    assert cuts_at(module, "tanh") == [(-2, 1, 2, "tp")] and cuts_at(module, "down") == []
    graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements={"tanh": {"tp": Replicate()}})
    assert cuts_at(module, "tanh") == []


def test_layers_that_torch_did_not_make_parallel_need_placements() -> None:
    mesh = meshed(1)
    module = graphreg.regularize(plain(), BernoulliDropout("tanh", 0.5), rng=5)
    with pytest.raises(GraphRegError, match="comes from layers that are not parallel in a way that torch records"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements={"*": {"tp": Replicate()}})
    graphreg.set_ranks(module, mesh=mesh, data=["dp", "tp"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "ranks=None is not allowed; give 'differ' .*, 'same', or mesh="),
    "both": ({"ranks": "same", "mesh": True}, "either 'differ' or 'same', or mesh= with the dimensions data= and tensor=, not both"),
    "no mesh": ({"ranks": "same", "tensor": "tp"}, "belong to mesh=, the device mesh whose dimensions they name"),
    "not a mesh": ({"mesh": 3}, r"mesh=3 is not allowed; give a DeviceMesh whose dimensions have names"),
    "unknown": ({"mesh": True, "tensor": "pp"}, r"tensor=\('pp',\): the mesh has no dimension 'pp'; it has dp, tp"),
    "twice": ({"mesh": True, "tensor": "tp", "data": "tp"}, "the dimension 'tp' is named twice"),
    "one batch": ({"mesh": True, "tensor": "tp", "one_batch": True}, "one_batch=True is for ranks that have different examples"),
    "no dict": ({"mesh": True, "tensor": "tp", "placements": {"*": Shard(0)}}, "give a dict from a dimension of tensor= to a placement"),
    "data": ({"mesh": True, "data": "dp", "placements": {"*": {"dp": Shard(0)}}}, r"placements: 'dp' is no dimension of tensor=\(\)"),
    "partial": ({"mesh": True, "tensor": "tp", "placements": {"*": {"tp": Partial()}}}, "a value is shared by Replicate"),
    "no site": ({"mesh": True, "tensor": "tp", "placements": {"nowhere": {"tp": Shard(0)}}}, "'nowhere' matches no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_change_nothing(case: str) -> None:
    mesh, (arguments, message) = meshed(1), REFUSED[case]
    module = made(mesh, BernoulliDropout("down", 0.5))
    graphreg.set_ranks(module, "same")
    before = keys(module)
    module.graphreg_rules.key.seek(0)
    arguments = {**arguments, **({"mesh": mesh} if arguments.get("mesh") is True else {})}
    with pytest.raises(GraphRegError, match=message):
        graphreg.set_ranks(module, arguments.pop("ranks", None), **arguments)
    assert torch.equal(keys(module), before) and module.graphreg_rules.key.alike


def test_a_formula_that_sees_the_whole_value_is_refused_at_a_part() -> None:
    mesh, model = meshed(1), nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU())
    module = graphreg.regularize(model, DropBlock("1", 0.1, block_size=2), rng=5)
    message = "the ranks of 'dp' \\(axis 0\\) share the value, and DropBlock may look at the whole of it"
    with pytest.raises(RegularizerError, match=message):
        graphreg.set_ranks(module, mesh=mesh, data="dp", one_batch=True)
    graphreg.set_ranks(module, mesh=mesh, data="dp")


def test_a_penalty_on_a_part_of_a_value_is_refused() -> None:
    mesh = meshed(1)
    module = made(mesh, BernoulliDropout("down", 0.5), HiddenL1("tanh", 0.1))
    with pytest.raises(GraphRegError, match="HiddenL1 at tanh: the ranks of 'tp' divide axis -1 of the value, and each would measure"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")


def test_a_hook_that_never_runs_is_refused() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    mesh = meshed(1)
    styles = {"inner": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()), "inner.up": ColwiseParallel()}
    module = made(mesh, BernoulliDropout("inner.down", 0.5), styles=styles, model=Outer())
    with pytest.raises(GraphRegError, match=r"a hook on 'inner', .* so that the hook never runs. Make it a block .*blocks='inner'"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")


def test_copies_and_pickles_keep_it_and_differ_undoes_it() -> None:
    mesh = meshed(3)
    module = graphreg.regularize(plain(), BernoulliDropout("down", 0.5), rng=5)
    graphreg.set_ranks(module, "same")
    unranked = keys(module)
    module.graphreg_rules.key.seek(0)
    graphreg.set_ranks(module, mesh=mesh, data="dp", one_batch=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert cuts_at(other, "down") == [(0, 1, 2, "dp")]
        assert torch.equal(keys(other), unranked)
    graphreg.set_rng_state(module, {**graphreg.rng_state(module), "ranks": "same"})  # of a run with one rank
    assert cuts_at(module, "down") == [(0, 1, 2, "dp")]
    graphreg.set_ranks(module, "differ")
    module.graphreg_rules.key.seek(0)
    assert cuts_at(module, "down") == []
    assert torch.equal(keys(module), ranked(unranked, 3))


def test_in_place_a_later_graph_asks_for_set_ranks_again() -> None:
    mesh, x = meshed(2), torch.randn(4, 3, 8, dtype=torch.double)
    model = graphreg.regularize_(plain(), BernoulliDropout("down", 0.5), example_inputs=x, rng=5)
    graphreg.set_ranks(model, mesh=mesh, data="dp", one_batch=True)
    model(x)
    with pytest.raises(GraphRegError, match="traced once more, for other arguments, after set_ranks"):
        model(x[0])
    graphreg.set_ranks(model, mesh=mesh, data="dp", one_batch=True)
    model(x[0])


def test_a_backend_is_refused() -> None:
    mesh = meshed(0)
    with pytest.raises(GraphRegError, match="needs the whole graph of a model, and a backend sees it in parts"):
        graphreg.set_ranks(graphreg.backend(BernoulliDropout("*", 0.5)), mesh=mesh, data="dp")


def test_the_report_says_which_ranks_agree() -> None:
    mesh = meshed(1)
    module = made(mesh, BernoulliDropout(["tanh", "down"], 0.5))
    graphreg.set_ranks(module, mesh=mesh, data="dp", tensor="tp")
    text = graphreg.report(module).text(200)
    assert "ranks: at tanh, the ranks of 'tp' (axis -1) draw parts of one mask" in text
    assert "ranks: those of 'dp' draw different masks; all others draw the same" in text
    graphreg.set_ranks(module, mesh=mesh, data="dp", tensor="tp", one_batch=True)
    text = graphreg.report(module).text(200)
    assert "ranks: at tanh, the ranks of 'dp' (axis 0) and 'tp' (axis -1) draw parts of one mask" in text
    assert "ranks: at down, the ranks of 'dp' (axis 0) draw parts of one mask" in text
    graphreg.set_ranks(module, "same")
    assert "ranks: all draw the same masks" in str(graphreg.report(module))
    graphreg.set_ranks(module, "differ")
    assert "ranks:" not in str(graphreg.report(module))
