"""Rank 1 of two, of a process group that sends nothing: compiled whole, each way, it draws what it draws in eager."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise, WeightL2
from graphreg.rng.noise import ranked

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
REGULARIZERS = [BernoulliDropout("0", 0.5), GaussianNoise("1", 0.2), WeightL2("*", 0.1)]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    hook = sys.excepthook  # which a process group puts its own around
    yield
    sys.excepthook = hook
    if dist.is_initialized():
        dist.destroy_process_group()


def become(rank: int) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def regularized() -> Any:
    return graphreg.regularize(plain(), REGULARIZERS, rng=5)


Steps = list[tuple[Tensor, ...]]


def steps(run: Callable[[Tensor], Any], parameters: list[nn.Parameter]) -> Steps:
    """Of three calls the output and the gradients."""
    found: Steps = []
    for _ in range(3):
        output, penalties = run(X)
        loss = output.square().mean() + sum(penalties.values())
        found.append((output.detach(), *torch.autograd.grad(loss, parameters)))
    return found


def by_torch_compile(module: Any, counter: Any) -> Any:
    return torch.compile(module, backend=counter, fullgraph=True)


def by_itself(module: Any, counter: Any) -> Any:
    module.compile(backend=counter, fullgraph=True)
    return module


def within(module: Any, counter: Any) -> Any:
    def step(x: Tensor) -> Any:
        return module(x)

    return torch.compile(step, backend=counter, fullgraph=True)


def wrapped(module: Any, counter: Any) -> Any:
    return DistributedDataParallel(by_itself(module, counter))


def around_the_wrapper(module: Any, counter: Any) -> Any:
    return torch.compile(DistributedDataParallel(module), backend=counter)  # whose own forward no fullgraph takes


WAYS = [by_torch_compile, by_itself, within, wrapped, around_the_wrapper]


@pytest.mark.parametrize("way", WAYS)
def test_one_graph_draws_what_eager_draws(way: Callable[[Any, Any], Any]) -> None:
    become(1)
    module, counter = regularized(), CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(module)
    expected = steps(twin, list(twin.parameters()))
    torch.testing.assert_close(steps(way(module, counter), list(module.parameters())), expected)
    assert counter.frame_count == 1
    assert way is around_the_wrapper or not counters["graph_break"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_backend_draws_what_a_rewritten_module_draws(inside: bool) -> None:
    """Also inside DistributedDataParallel, as long as the gradients fill one bucket."""
    become(1)
    module, model = regularized(), plain()
    backend = graphreg.backend(REGULARIZERS, rng=5, inner="aot_eager")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    compiled = DistributedDataParallel(compiled) if inside else compiled

    def run(x: Tensor) -> Any:
        output = compiled(x)
        return output, backend.penalties()

    torch.testing.assert_close(steps(run, list(model.parameters())), steps(module, list(module.parameters())))
    assert len(backend.subgraphs) == 1


class Wide(nn.Module):
    """With more than a mebibyte of gradients, which fill several buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 520), nn.Linear(520, 520), nn.Linear(520, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide()


SITES: dict[str, Any] = {"hidden_dropout": 0.5, "hidden_l1": 0.1, "weight_l2": 0.1, "rng": 5}


@pytest.mark.parametrize("way", [wrapped, around_the_wrapper])
@pytest.mark.parametrize("penalties", ["return", "attach"])
def test_a_graph_that_is_split_at_the_buckets(way: Callable[[Any, Any], Any], penalties: Any) -> None:
    """Torch splits the graph of a rewritten module; masks, penalties and gradients stay."""
    become(1)
    options = {"penalties": penalties, **({"scale": 1} if penalties == "attach" else {})}
    module, counter = graphreg.regularize(wide(), **SITES, **options), CompileCounterWithBackend("aot_eager")
    twin, parameters = copy.deepcopy(module), list(module.parameters())

    def returning(run: Any) -> Any:
        return run if penalties == "return" else lambda x: (run(x), {})

    with mock.patch.object(torch._dynamo.config, "optimize_ddp", True):
        found = steps(returning(way(module, counter)), parameters)
    assert counter.frame_count == 2  # the parts
    torch.testing.assert_close(found, steps(returning(twin), list(twin.parameters())))


def with_penalties(run: Any, backend: Any) -> Callable[[Tensor], Any]:
    return lambda x: (run(x), backend.penalties())


@pytest.mark.parametrize("way", ["inside", "around"])
def test_the_backend_names_optimize_ddp_where_it_splits_a_graph(way: str) -> None:
    """A part of a graph does not tell which of its inputs are parameters. Switched off, all is as without the wrapper."""
    become(1)
    found = []
    for optimized in (True, False):
        torch._dynamo.reset()
        model, module = wide(), graphreg.regularize(wide(), **SITES)
        backend = graphreg.backend(inner="aot_eager", **SITES)
        compiled: Any = torch.compile(DistributedDataParallel(model) if way == "around" else model, backend=backend)
        run = DistributedDataParallel(compiled) if way == "inside" else compiled
        with mock.patch.object(torch._dynamo.config, "optimize_ddp", optimized):
            if optimized:
                with pytest.raises(graphreg.TraceError, match=r"optimize_ddp is on, so torch splits.*config\.optimize_ddp = False before"):
                    run(X)
                continue
            found = steps(with_penalties(run, backend), list(model.parameters()))
        torch.testing.assert_close(found, steps(module, list(module.parameters())))
        assert [[site.name for site in entry.traced.values] for entry in backend.subgraphs] == [["x", "a", "tanh", "b", "tanh_1", "c"]]


def test_other_ranks_draw_other_masks_and_set_ranks_makes_them_the_same() -> None:
    def keys(rank: int, ranks: Any) -> Tensor:
        become(rank)
        module = regularized()
        graphreg.set_ranks(module, ranks)
        key = module.graphreg_rules.key
        torch._dynamo.reset()
        found: Tensor = torch.compile(key.forward, backend="eager", fullgraph=True)()
        return found

    first, second = keys(0, "differ"), keys(1, "differ")
    assert torch.equal(second, ranked(first, 1)) and not torch.isin(first, second).any()
    assert torch.equal(keys(0, "same"), first) and torch.equal(keys(1, "same"), first)


def test_a_process_group_that_comes_or_changes_after_the_first_call_is_noticed() -> None:
    module, counter = graphreg.regularize(plain(), BernoulliDropout("1", 0.5), rng=5), CompileCounterWithBackend("eager")
    run, twin = by_torch_compile(module, counter), copy.deepcopy(module)
    for rank in (None, 1, 1, 0, 1):
        if rank is not None:
            become(rank)
        assert torch.equal(run(X).output, twin(X).output), rank
    dist.destroy_process_group()
    assert torch.equal(run(X).output, twin(X).output)


def test_a_module_that_was_pickled_on_one_rank_draws_as_the_rank_on_which_it_wakes_up() -> None:
    become(0)
    module = regularized()
    module(X)
    told = pickle.dumps(module)
    become(1)
    found: list[Tensor] = [make(pickle.loads(told))(X).output for make in (lambda m: m, lambda m: by_torch_compile(m, "eager"))]
    module.graphreg_rules.key.seek(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], module(X).output)
