"""Keras 3 with the torch backend: ``keras.layers.Dropout(rate, seed=...)``, whose seed generator is a state of its own.

Without a seed it is ``F.dropout``, and that column's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from torch import Tensor

from rivals.measures import IMAGES, ONES, afresh, backward_is_forward, compilations, compiled, kept, passes, same_mask, under_a_budget
from rivals.rows import Probe, yes


def layer(seed: int = 1, rate: float = 0.5) -> Any:
    return keras.layers.Dropout(rate, seed=seed)


def drop(of: Any = None) -> Callable[[Tensor], Tensor]:
    inner = of or layer()
    return lambda x: inner(x, training=True)


def compiled_alike() -> str:
    afresh()
    eager, run = drop(), compiled(drop())
    return yes(all(same_mask(eager(ONES), run(ONES)) for _ in range(3)))


def layouts_alike() -> str:
    one = drop()(IMAGES)
    images = (IMAGES.to(memory_format=torch.channels_last), torch.cat([IMAGES, IMAGES]))
    return yes(all(same_mask(one, drop()(x)[:4]) for x in images))


def rematerialized() -> str:
    """Keras' own scope for it, around a layer in a model."""
    with keras.RematScope(mode="full"):
        given = keras.Input((64,))
        model = keras.Model(given, keras.layers.Dense(64, use_bias=False, kernel_initializer="identity")(layer()(given)))
    return yes(backward_is_forward(lambda x: model(x, training=True) + 1))


def sites_apart() -> str:
    """The key of a call is the sum of seed and count: seed 1 at its second call is seed 2 at its first."""
    first, second = drop(layer(seed=1)), drop(layer(seed=2))
    first(ONES)
    return yes(not same_mask(first(ONES), second(ONES)))


def others_left_alone() -> str:
    alone = drop(layer(seed=2))(ONES)
    drop(layer(seed=1))(ONES)
    return yes(same_mask(alone, drop(layer(seed=2))(ONES)))


def resumed_by_hand() -> str:
    """The state is two numbers; a saved model does not carry them."""
    one, other = layer(), layer()
    drop(one)(ONES)
    other.seed_generator.state.assign(one.seed_generator.state)
    assert same_mask(drop(one)(ONES), drop(other)(ONES))
    given = keras.Input((64,))
    model = keras.Model(given, layer()(given))
    model(ONES, training=True)
    copied = keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    with tempfile.TemporaryDirectory() as place:
        model.save(f"{place}/model.keras")
        loaded = keras.models.load_model(f"{place}/model.keras")
    expected = model(ONES, training=True)
    return "yes" if any(same_mask(expected, again(ONES, training=True)) for again in (copied, loaded)) else "by hand"


def ranks_by_seed() -> str:
    assert not same_mask(drop(layer(seed=1))(ONES), drop(layer(seed=7))(ONES)) and same_mask(drop()(ONES), drop()(ONES))
    return "by hand"


def held_by_hand() -> str:
    inner = layer()
    state, first = inner.seed_generator.state.numpy(), drop(inner)(ONES)
    assert not same_mask(first, drop(inner)(ONES))
    inner.seed_generator.state.assign(state)
    assert same_mask(first, drop(inner)(ONES))
    return "by hand"


def sampled_by_hand() -> str:
    """``training=True`` reaches the batch norms, too, unless each is frozen first."""
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((64,)), norm, layer()])
    before = norm.moving_mean.numpy().copy()
    model(ONES, training=True)
    assert (norm.moving_mean.numpy() != before).any()
    before, norm.trainable = norm.moving_mean.numpy().copy(), False
    assert not same_mask(model(ONES, training=True), model(ONES, training=True))
    assert (norm.moving_mean.numpy() == before).all()
    return "by hand"


def moved_by_hand() -> str:
    inner = layer()
    for rate in (0.0, 0.25):
        inner.rate = rate
        assert abs(float((drop(inner)(torch.ones(1 << 16)) == 0).float().mean()) - rate) < 0.01
    return "by hand"


def recompiles() -> str:
    inner = layer()
    graphs = compilations(drop(inner), lambda rate: setattr(inner, "rate", rate))
    steady = compilations(drop(layer()), lambda rate: None)
    return yes(graphs == steady)


def fused() -> str:
    afresh()
    inner = drop()
    try:
        torch.compile(lambda x: torch.sin(inner(torch.tanh(x))), fullgraph=True)(ONES)
    except torch._dynamo.exc.Unsupported:
        return "no"
    return yes(passes(lambda x: torch.sin(inner(torch.tanh(x)))) == 1)


def kept_more() -> str:
    inner = drop()
    return kept(lambda x: torch.sin(inner(torch.sin(x))), lambda x: torch.sin(torch.sin(x)))


def under_budget() -> str:
    inner = drop()
    return under_a_budget(lambda x: torch.exp(inner(x)))


PROBES: dict[str, Probe] = {
    "compiled": compiled_alike,
    "layout": layouts_alike,
    "budget": under_budget,
    "checkpoint": rematerialized,
    "seeds": lambda: yes(not same_mask(drop(layer(seed=1))(ONES), drop(layer(seed=2))(ONES))),
    "apart": sites_apart,
    "added": others_left_alone,
    "resume": resumed_by_hand,
    "ranks": ranks_by_seed,
    "held": held_by_hand,
    "sampled": sampled_by_hand,
    "moved": moved_by_hand,
    "recompiles": recompiles,
    "fused": fused,
    "kept": kept_more,
}
