"""Several threads, and the workers of a DataLoader: each call has masks of its own, and a trace is one thread's."""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import graphreg
from graphreg.errors import GraphRegError, TraceError
from graphreg.rng import noise
from graphreg.runtime.counter import taking

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.scale)


def regularized(model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(model or Net(), **({"hidden_dropout": 0.5, "rng": 1} | options))


@pytest.fixture
def restless() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returns; an error of any is raised."""
    found: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            found[i] = works[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


@pytest.mark.usefixtures("restless")
def test_no_call_is_lost_where_two_threads_call_one_module() -> None:
    key = regularized().graphreg_rules.key
    found = in_threads(*[lambda: [tuple(key().flatten().tolist()) for _ in range(1000)]] * 4)
    assert len({keys for each in found for keys in each}) == 4000 and key.call() == 4000


def test_what_the_lock_must_not_break() -> None:
    """Copies and pickles; a fork while another thread holds it."""
    module = regularized()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin(X)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with taking():
            held.set()
            free.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        module.graphreg_rules.key()
        os._exit(0)
    free.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


class Waiting(nn.Module):
    """Its forward lets another thread work, once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["waits"] = (threading.Event(), threading.Event())

    def forward(self, x: Tensor) -> Tensor:
        entered, done = self.__dict__["waits"]
        entered.set()
        done.wait(20)
        return self.inner(x)


def meanwhile(work: Callable[[], Any], inner: nn.Module) -> tuple[graphreg.Traced, Any]:
    """A trace, and what another thread makes of ``work`` in the midst of it."""
    model = Waiting(inner)
    entered, done = model.__dict__["waits"]

    def other() -> Any:
        entered.wait(20)
        try:
            return work()
        finally:
            done.set()

    traced, found = in_threads(lambda: graphreg.trace(model, front_end="symbolic"), other)
    return traced, found


def test_a_module_may_be_called_while_another_thread_traces() -> None:
    """Also one whose layers are those that are traced: neither sees the other's."""
    model = Net()
    module = regularized(model)
    expected = copy.deepcopy(module)(X).output
    traced, found = meanwhile(lambda: module(X).output, model)
    assert torch.equal(found, expected)
    (graph,) = traced.graphs.values()
    alone, _ = meanwhile(lambda: None, model)
    assert [node.name for node in graph.nodes] == [node.name for node in alone.graphs["both"].nodes]
    assert not traced.opaque_modules


def test_a_plain_model_may_run_and_checkpoint_while_another_thread_traces() -> None:
    model = Net()

    def train() -> list[Tensor]:
        output = checkpoint(model, X, use_reentrant=False)
        return [output, *torch.autograd.grad(output.sum(), list(model.parameters()))]

    expected = train()
    torch.testing.assert_close(meanwhile(train, model)[1], expected)


def test_a_thread_that_traces_a_rewritten_module_is_refused_all_the_same() -> None:
    module = regularized()
    for work in (lambda: fx.symbolic_trace(module), lambda: in_threads(lambda: fx.symbolic_trace(module))):
        with pytest.raises(TraceError, match="a rewritten module cannot be traced again"):
            work()


def test_what_another_thread_draws_is_not_the_models() -> None:
    """Nor is it taken back."""
    model = Net()
    torch.manual_seed(0)
    random.seed(0)
    states, expected = (random.getstate(), torch.get_rng_state()), (random.random(), torch.rand(3))
    after = random.random(), torch.rand(3)
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    traced, found = meanwhile(lambda: (random.random(), torch.rand(3)), model)
    assert not traced.opaque_modules
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert random.random() == after[0] and torch.equal(torch.rand(3), after[1])


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.a, self.draw = nn.Linear(4, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * float(self.draw())


DRAWS: dict[str, Callable[[], Any]] = {
    "random": random.random, "randint": lambda: random.randint(1, 5), "gauss": lambda: random.gauss(1, 1),
    "torch": lambda: torch.rand(()) + 1, "dropout": lambda: F.dropout(torch.ones(()), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS)
def test_what_the_model_draws_is_noticed_beside_other_threads(draw: str) -> None:
    model = Draws(DRAWS[draw])
    states = random.getstate(), torch.get_rng_state()
    traced, _ = meanwhile(lambda: None, model)
    assert "draws random numbers" in traced.opaque_modules["inner"]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert sys.getprofile() is None


@pytest.mark.parametrize(
    ("work", "counted"), [(lambda: None, False), (random.random, True), (lambda: torch.rand(1), True)], ids=["nothing", "random", "torch"]
)
def test_draws_are_counted_only_after_a_generator_has_changed(
    work: Callable[[], Any], counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To count them is slow, and most programs have a second thread."""
    calls, setprofile = list[Any](), sys.setprofile
    monkeypatch.setattr(sys, "setprofile", lambda function: (calls.append(function), setprofile(function)))
    traced, _ = meanwhile(work, Net())
    assert bool(calls) is counted and not traced.opaque_modules


@pytest.mark.parametrize("work", [lambda: None, random.random], ids=["nothing", "random"])
def test_an_error_beside_other_threads_is_raised_whether_they_draw_or_not(work: Callable[[], Any]) -> None:
    with pytest.raises(GraphRegError, match="is a rewritten module"):
        meanwhile(work, regularized())
    assert sys.getprofile() is None


def test_export_beside_another_thread() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        traced = graphreg.trace(Net(), X, front_end="export")
    finally:
        stop.set()
        thread.join()
    assert [site.name for site in traced.values] == [site.name for site in graphreg.trace(Net(), X, front_end="export").values]


class Augmented(Dataset[Tensor]):
    """A data set that regularizes: its items are the masks."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        output: Tensor = self.module(torch.ones(64)).output
        return output.detach()


def epochs(module: Any, seed: int, workers: int = 2) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.cat(list(DataLoader(Augmented(module), batch_size=2, num_workers=workers))) for _ in range(2)]


def test_workers_of_a_loader_draw_apart_from_each_other_and_from_epoch_to_epoch() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Identity()), dropout={"0": 0.5}, rng=1)
    first, again, other = epochs(module, 0), epochs(module, 0), epochs(module, 1)
    assert len({tuple(row.tolist()) for each in (*first, *other) for row in each}) == 32
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert graphreg.rng_state(module)["call"] == 0
    plain = copy.deepcopy(module)
    assert torch.equal(epochs(module, 0, workers=0)[0], torch.stack([plain(torch.ones(64)).output for _ in range(8)]))


def test_a_worker_compiles_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that the parent compiled has no worker in it."""
    module = regularized()
    key = module.graphreg_rules.key
    run = torch.compile(module, backend="eager", fullgraph=True)

    def both() -> Tensor:
        key.seek(0)
        eager = module(X).output
        key.seek(0)
        torch.testing.assert_close(run(X).output, eager)
        return eager

    parent = both()
    monkeypatch.setattr(noise._process, "name", "")
    monkeypatch.setattr(noise, "get_worker_info", lambda: SimpleNamespace(id=1, seed=77))
    noise._forked()
    worker = both()
    assert not torch.equal(worker, parent)
    monkeypatch.setattr(noise._process, "name", "another")
    monkeypatch.setattr(noise, "get_worker_info", lambda: SimpleNamespace(id=2, seed=78))
    assert not torch.equal(both(), worker)


def test_each_thread_ends_its_own_block_of_held_noise() -> None:
    """The one that ends first draws on, with masks of its own; the other's stay as they are to the end of its block."""
    module = regularized()
    twin = copy.deepcopy(module)
    calls = [twin(X).output for _ in range(6)]
    inside, ended, drawn = threading.Event(), threading.Event(), threading.Event()

    def first() -> list[Tensor]:
        with graphreg.frozen_noise(module):
            found = [module(X).output]
            inside.wait(20)
            found.append(module(X).output)
        ended.set()
        found += [module(X).output, module(X).output]
        drawn.set()
        return found

    def second() -> list[Tensor]:
        with graphreg.frozen_noise(module), graphreg.frozen_noise(module):
            found = [module(X).output]
            inside.set()
            ended.wait(20)
            found.append(module(X).output)
            drawn.wait(20)
            return [*found, module(X).output]

    ours, theirs = in_threads(first, second)
    assert torch.equal(ours[0], ours[1]) and torch.equal(theirs[0], theirs[1]) and torch.equal(theirs[1], theirs[2])
    each = [ours[0], theirs[0], ours[2], ours[3], module(X).output]
    places = [[i for i, call in enumerate(calls) if torch.equal(call, value)] for value in each]
    assert sorted(places) == [[0], [1], [2], [3], [4]]  # no two share their masks, and no call is lost
    assert graphreg.rng_state(module)["call"] == 5


def test_a_thread_that_a_block_starts_draws_what_the_block_holds() -> None:
    module = regularized()
    with graphreg.frozen_noise(module):
        expected = module(X).output
        assert all(torch.equal(found, expected) for found in in_threads(*[lambda: module(X).output] * 2))
    assert graphreg.rng_state(module)["call"] == 1


def test_blocks_that_overlap_in_one_thread_end_with_the_last() -> None:
    """As tasks of asyncio do: the first to begin is not the last to end."""
    module = regularized()
    one, two = graphreg.frozen_noise(module), graphreg.frozen_noise(module)
    one.__enter__()
    two.__enter__()
    expected = module(X).output
    one.__exit__(None, None, None)
    assert torch.equal(module(X).output, expected)
    two.__exit__(None, None, None)
    assert not torch.equal(module(X).output, expected) and graphreg.rng_state(module)["call"] == 2


def test_a_backends_noise_is_held_until_the_last_block_ends() -> None:
    backend = graphreg.backend(hidden_dropout=0.5, inner="eager", rng=1)
    run = torch.compile(Net(), backend=backend)
    one, two = graphreg.frozen_noise(backend), graphreg.frozen_noise(backend)
    one.__enter__()
    two.__enter__()
    expected = run(X)
    one.__exit__(None, None, None)
    assert torch.equal(run(X), expected)
    two.__exit__(None, None, None)
    assert not torch.equal(run(X), run(X))


def test_the_noise_is_on_until_the_last_block_ends() -> None:
    """The first to end took it from the other, whose end then left it on for good."""
    module, backend = regularized().eval(), graphreg.backend(hidden_dropout=0.5, inner="eager", rng=1)
    run = torch.compile(Net().eval(), backend=backend)
    for handle, call in ((module, lambda: module(X).output), (backend, lambda: run(X))):
        plain = call()
        one, two = graphreg.noise_on(handle), graphreg.noise_on(handle)
        one.__enter__()
        two.__enter__()
        one.__exit__(None, None, None)
        assert not torch.equal(call(), plain)
        two.__exit__(None, None, None)
        assert torch.equal(call(), plain)
