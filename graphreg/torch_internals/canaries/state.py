"""Canaries of random state, and nested values.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import random
import threading
from typing import Any, NamedTuple

import torch

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes, pytree
from graphreg.torch_internals.canaries.canary import canary


@canary(
    "a dispatch mode sees which operators draw", "modules that draw while they are traced", "draws_watched", "randomness",
    "restore_randomness", "with_draws_restored",
)  # fmt: skip
def draws() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        with door.draws_watched():
            before = door.randomness()
            torch.rand(1)
            random.random()
            assert door.randomness() != before
            door.restore_randomness(before)
            assert before.states == door.randomness().states
        door.with_draws_restored(lambda: (torch.rand(1), random.random()))
        assert before.states == door.randomness().states
    finally:
        end.set()
        thread.join()


seed_all = torch.manual_seed  # user code may have imported it like this, before any trace


@canary("torch seeds its generator", "modules that seed while they are traced", "on_seeding", "draws_watched", "randomness",
        "restore_randomness")  # fmt: skip
def seeds() -> None:
    seeds = list[int]()
    with torch.random.fork_rng():
        with Changes() as changes, changes:
            door.on_seeding(changes, lambda: seeds.append(1))
            seed_all(1)
            torch.rand(1)
            torch.get_rng_state()
            assert seeds == [1]
        seed_all(1)
        assert seeds == [1]
        with door.draws_watched():
            before = door.randomness()
            seed_all(1)  # with the seed that the generator has already, so the state does not change
            assert before.states == door.randomness().states and before != door.randomness()
            door.restore_randomness(before)
            assert before == door.randomness()
            with torch.random.fork_rng():
                seed_all(2)
            assert before == door.randomness()


class Pair(NamedTuple):
    first: Any
    second: Any


@canary("nested values are taken apart", "samples, penalties and front ends", *(f"pytree.{name}" for name in pytree.__all__))
def nested_values() -> None:
    pytree.register_namedtuple(Pair, serialized_type_name="graphreg_canary.Pair")
    assert list in pytree.SUPPORTED_NODES and object not in pytree.SUPPORTED_NODES
    value = {"a": Pair(1, [torch.ones(1)])}
    leaves, spec = pytree.tree_flatten(value)
    assert "graphreg_canary.Pair" in torch.utils._pytree.treespec_dumps(spec)
    assert isinstance(spec, pytree.TreeSpec) and leaves == pytree.tree_leaves(value) == [1, value["a"].second[0]]
    assert pytree.tree_unflatten([2, 3], spec) == {"a": Pair(2, [3])}
    assert pytree.tree_map_only(int, lambda n: n + 1, {"a": 1, "b": "c"}) == {"a": 2, "b": "c"}
    assert pytree.tree_unflatten([5], pytree.treespec_leaf()) == 5
