"""set_ranks(module, mesh=...): ranks of data and tensor parallelism draw the masks that one process draws for the whole batch."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshed_ranks import WAYS, Net, plain
from rank_processes import results_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import graphreg
from graphreg import GraphRegError, Penalty, RegularizerError
from graphreg.passes import BernoulliDropout, DeCov, DropBlock, HiddenL1, KLSparsity
from graphreg.rng.noise import ranked

SCRIPT = Path(__file__).parent / "meshed_ranks.py"


FIRST = ("1: plain", "1: DTensor", "1: in place", "2: plain", "2: sharded")  # 1 x 2 and 2 x 1 ranks
OTHERS = tuple(f"1: {way}" for way in WAYS if f"1: {way}" not in FIRST)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("first"), *FIRST)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("others"), *OTHERS)


def assert_as_one(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        ours, expected = rank[way]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", FIRST)
def test_two_ranks_are_one_process(found: list[dict[str, Any]], way: str) -> None:
    assert_as_one(found, way)


@pytest.mark.parametrize("way", OTHERS)
def test_two_tensor_ranks_are_one_process_in_other_ways(others: list[dict[str, Any]], way: str) -> None:
    assert_as_one(others, way)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (2, 2)])
def test_a_mesh_is_one_process(tmp_path: Path, data: int, tensor: int) -> None:
    ways = [f"{data}: {way}" for way in WAYS if "without set_ranks" not in way]
    found = results_of(SCRIPT, data * tensor, tmp_path, *ways)
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


class Local(nn.Module):
    def forward(self, x: Any) -> Tensor:
        local: Tensor = x.to_local()
        return local


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
    "no placement": ({"mesh": True, "tensor": "tp", "placements": {"*": {"tp": "Shard(0)"}}}, r"has 'Shard\(0\)' for 'tp'; a value is"),
    "no placements": ({"mesh": True, "tensor": "tp", "placements": [Shard(0)]}, r"placements=\[.*\] is not allowed; give a dict from sel"),
    "empty": ({"mesh": True, "tensor": "tp", "placements": {"*": {}}}, "give a dict from a dimension of tensor= to a placement"),
    "one of two": (
        {"mesh": True, "tensor": ["dp", "tp"], "placements": {"*": {"tp": Shard(0)}}},
        "'\\*' says nothing about 'dp'. Give a placement for each dimension",
    ),
    "no names": ({"mesh": True, "data": 5}, r"data=5 is not allowed; give names of dimensions of the mesh: data=\('dp', 'pp'\)"),
    "no bool": ({"mesh": True, "data": "dp", "one_batch": "yes"}, "one_batch='yes' is not allowed; give True or False"),
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


class Masked(graphreg.Splice):
    """Takes an input of the model."""

    mask: graphreg.ModelInput = None
    separable = "elements"

    def __call__(self, z: Tensor, weight: Tensor, noise: graphreg.Noise, mask: Tensor) -> Tensor:
        return z * noise.keep(z, weight) * mask


def test_an_input_of_the_model_beside_a_dtensor_is_refused() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Identity()), Masked("0", 0.5, mask="input"), rng=5)
    z = DTensor.from_local(torch.ones(4, 6), meshed(0)["tp"], [Replicate()], run_check=False)
    with pytest.raises(RegularizerError, match=r"the value is a DTensor, and the input that mask= names is not divided as it is\. Leave"):
        module(z)


def test_a_penalty_on_a_part_of_a_value_is_refused() -> None:
    mesh = meshed(1)
    module = made(mesh, BernoulliDropout("down", 0.5), HiddenL1("tanh", 0.1))
    with pytest.raises(GraphRegError, match="HiddenL1 at tanh: the ranks of 'tp' divide axis -1 of the value, and each would measure"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")


def test_a_penalty_on_a_value_of_unknown_sharing_is_asked_about() -> None:
    mesh = meshed(1)
    module = made(mesh, BernoulliDropout("down", 0.5), HiddenL1("tanh", 0.1), model=Heads())
    with pytest.raises(GraphRegError, match=r"HiddenL1 at tanh: how the ranks of tp share the value is not known: .*'unflatten'"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    with pytest.raises(GraphRegError, match=r"HiddenL1 at tanh: the ranks of 'tp' divide axis -2 of the value"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements={"tanh": {"tp": Shard(-2)}})
    graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements={"tanh": {"tp": Replicate()}})


def test_a_penalty_on_all_sites_at_once_is_no_exception() -> None:
    class Together(Penalty):
        def __call__(self, values: dict[str, Tensor]) -> Tensor:
            return torch.stack([value.mean() for value in values.values()]).var()

    mesh = meshed(1)
    module = made(mesh, BernoulliDropout("down", 0.5), Together(["tanh", "down"], 0.1))
    with pytest.raises(GraphRegError, match=r"Together.* at tanh: the ranks of 'tp' divide axis -1 of the value, and each would measure"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")


@pytest.mark.parametrize("placements", [None, {"**": {"tp": Shard(-1)}}])
def test_unequal_parts_are_refused(placements: Any) -> None:
    mesh, wide = meshed(1), nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 8))
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    module = made(mesh, BernoulliDropout("1", 0.5), model=copy.deepcopy(wide), styles=styles)
    message = "BernoulliDropout at 1: the value comes from '0', and 2 ranks divide its 15 features unequally. Leave the site out; or give"
    with pytest.raises(GraphRegError, match=message):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp", placements=placements)
    other = made(mesh, BernoulliDropout("2", 0.5), model=copy.deepcopy(wide), styles=styles)
    graphreg.set_ranks(other, mesh=mesh, tensor="tp")


class Told(ParallelStyle):
    """A style that torch does not have."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, output_fn=lambda module, result, mesh: result)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Sum(nn.Module):
    """Adds to a part, of which ranks divide an axis that is counted from the first, a value that they have whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(x) + x.mean(0)).tanh()


class Sends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        sent = torch.ops._c10d_functional.all_reduce(self.down(x), "sum", "0")
        received: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
        return received.tanh()


OUT = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
LINEAR: Any = ColwiseParallel(use_local_output=False)
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "a style of the user's": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), {"0": ColwiseParallel(), "1": Told()}, "comes from '1', and what",
    ),
    "an opaque module": (lambda: nn.Sequential(nn.Linear(8, 8), Opaque(), nn.Tanh()), {"0": LINEAR}, "comes from '1', which is not"),
    "a part and a whole": (Sum, {"norm": SequenceParallel(use_local_output=True)}, "comes from 'add', which gets a part"),
    "to_local": (lambda: nn.Sequential(nn.Linear(8, 8), Local(), nn.Tanh()), {"0": LINEAR}, "comes from 'to_local'"),
    "what ranks send": (Sends, {"down": RowwiseParallel()}, "comes from '.*'"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_may_be_a_part_is_asked_about(case: str) -> None:
    mesh, (model, styles, why) = meshed(1), UNKNOWN[case]
    module = made(mesh, BernoulliDropout("**#output", 0.5), model=model(), styles=styles)
    with pytest.raises(GraphRegError, match=f"how the ranks of tp share the value is not known: it {why}"):
        graphreg.set_ranks(module, mesh=mesh, tensor="tp")


def test_styles_that_prepare_what_a_module_returns_count() -> None:
    mesh = meshed(1)
    styles = {"0": ColwiseParallel(), "1": OUT}
    module = made(mesh, BernoulliDropout(["0", "1"], 0.5), model=nn.Sequential(nn.Linear(8, 8), nn.Tanh()), styles=styles)
    graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    assert cuts_at(module, "0") == [(-1, 1, 2, "tp")] and cuts_at(module, "1") == [(1, 1, 2, "tp")]


@pytest.mark.parametrize("local", [False, True])
def test_values_that_enter_and_leave_a_block_are_shared_as_its_style_says(local: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Tanh(), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.relu()).sigmoid()

    mesh = meshed(1)
    styles = {
        "inner": PrepareModuleInputOutput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_input=local,
            output_layouts=Replicate(), desired_output_layouts=Shard(0), use_local_output=True,
        ),
        "inner.1": RowwiseParallel(),
    }  # fmt: skip
    sites = ["relu", "inner.0", "inner.1", "sigmoid"]
    module = made(mesh, BernoulliDropout(sites, 0.5), model=Outer(), styles=styles, blocks="inner")
    graphreg.set_ranks(module, mesh=mesh, tensor="tp")
    cut = [(1, 1, 2, "tp")] if local else []
    assert [cuts_at(module, site) for site in sites] == [[], cut, [], [(0, 1, 2, "tp")]]


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
    with pytest.raises(GraphRegError, match=r"applied to 'inner', .* without calling it, .* Make it a block .*blocks='inner'"):
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


def test_the_report_says_what_each_rank_computes_from_its_own_examples() -> None:
    def regularized() -> Any:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4), nn.Sigmoid())
        return graphreg.regularize(model, DeCov("2", 0.1), KLSparsity("5", 0.1), HiddenL1("2", 0.1), BernoulliDropout("2", 0.1))

    assert "own examples" not in str(graphreg.report(regularized()))
    mesh, module = meshed(1), regularized()
    for _ in range(2):
        text = graphreg.report(module).text(200)
        assert "ranks: decov, kl_sparsity: a statistic of the batch, which each rank computes from its own examples" in text
        assert "ranks: 1: normalizes by the statistics of the rank's own examples; nn.SyncBatchNorm by those of all ranks" in text
        graphreg.set_ranks(module, mesh=mesh, data="dp")
