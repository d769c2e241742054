"""Canaries of random state, and nested values."""

from __future__ import annotations

import random
import threading
from typing import Any, NamedTuple

import torch

from graphreg.torch_internals import pytree, random_state
from graphreg.torch_internals.patching import Changes


def test_draws() -> None:
    """How a dispatch mode sees which operators draw. It concerns modules that draw while they are traced."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with random_state.draws_watched():
            before = random_state.randomness()
            torch.rand(1)
            random.random()
            assert random_state.randomness() != before
            random_state.restore_randomness(before)
            assert before.states == random_state.randomness().states
        random_state.with_draws_restored(lambda: (torch.rand(1), random.random()))
        assert before.states == random_state.randomness().states
    finally:
        end.set()
        thread.join()


seed_all = torch.manual_seed  # user code may have imported it like this, before any trace


def test_seeds() -> None:
    """How torch seeds its generator. It concerns modules that seed while they are traced."""
    seeds = list[int]()
    with torch.random.fork_rng():
        with Changes() as changes, changes:
            random_state.on_seeding(changes, lambda: seeds.append(1))
            seed_all(1)
            torch.rand(1)
            torch.get_rng_state()
            assert seeds == [1]
        seed_all(1)
        assert seeds == [1]
        with random_state.draws_watched():
            before = random_state.randomness()
            seed_all(1)  # with the seed that the generator has already, so the state does not change
            assert before.states == random_state.randomness().states and before != random_state.randomness()
            random_state.restore_randomness(before)
            assert before == random_state.randomness()
            with torch.random.fork_rng():
                seed_all(2)
            assert before == random_state.randomness()


class Pair(NamedTuple):
    first: Any
    second: Any


def test_nested_values() -> None:
    """How nested values are taken apart. It concerns samples, penalties and front ends."""
    pytree.register_namedtuple(Pair, serialized_type_name="graphreg_canary.Pair")
    assert list in pytree.SUPPORTED_NODES and object not in pytree.SUPPORTED_NODES
    value = {"a": Pair(1, [torch.ones(1)])}
    leaves, spec = pytree.tree_flatten(value)
    assert "graphreg_canary.Pair" in torch.utils._pytree.treespec_dumps(spec)
    assert isinstance(spec, pytree.TreeSpec) and leaves == pytree.tree_leaves(value) == [1, value["a"].second[0]]
    assert pytree.tree_unflatten([2, 3], spec) == {"a": Pair(2, [3])}
    assert pytree.tree_map_only(int, lambda n: n + 1, {"a": 1, "b": "c"}) == {"a": 2, "b": "c"}
    assert type(pytree.tree_map_only(int, str, (torch.Size([1]),))[0]) is torch.Size
    assert pytree.tree_unflatten([5], pytree.treespec_leaf()) == 5
