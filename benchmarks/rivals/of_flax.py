"""Flax's ``nnx.Dropout`` on JAX, compiled by XLA. JAX draws from keys, with Threefry-2x32 (Salmon et al. 2011)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rivals.rows import Probe, yes

ONES = jnp.ones((64, 64))


def layer(seed: int = 0) -> nnx.Dropout:
    return nnx.Dropout(0.5, rngs=nnx.Rngs(seed))


def alike(a: Any, b: Any) -> bool:
    return bool(((a != 0) == (b != 0)).all())


def compiled_alike() -> str:
    eager, twin = layer(), layer()
    run = nnx.jit(lambda inner, x: inner(x))
    return yes(all(alike(eager(ONES), run(twin, ONES)) for _ in range(3)))


def batches_alike() -> str:
    """JAX shows no memory layout to its user."""
    return yes(alike(layer()(ONES), layer()(jnp.ones((128, 64)))[:64]))


def rematerialized(compiled: bool) -> str:
    inner = nnx.remat(lambda inner, x: jnp.exp(inner(x)))

    def loss(x: Any, of: nnx.Dropout) -> Any:
        y = inner(of, x)
        return y.sum(), y

    gradient = nnx.grad(loss, argnums=0, has_aux=True)
    slope, y = (nnx.jit(gradient) if compiled else gradient)(ONES, layer())
    return yes(bool(((slope != 0) == (y != 1)).all()))


class Sites(nnx.Module):
    def __init__(self, n: int) -> None:
        rngs = nnx.Rngs(0)
        self.sites = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(n)])


def sites_apart() -> str:
    one, other = Sites(2).sites
    return yes(not alike(one(ONES), other(ONES)))


def others_left_alone() -> str:
    """The last of two, and of three."""
    return yes(alike(Sites(2).sites[-1](ONES), Sites(3).sites[-1](ONES)))


def resumes() -> str:
    one, other = layer(), layer()
    one(ONES)
    nnx.update(other, nnx.state(one))
    return yes(alike(one(ONES), other(ONES)))


def ranks_by_key() -> str:
    keys = [jax.random.fold_in(jax.random.key(0), rank) for rank in range(2)]
    assert not alike(*[nnx.Dropout(0.5)(ONES, rngs=key) for key in keys])
    return "by hand"


def held() -> str:
    key, inner = jax.random.key(3), layer()
    return yes(alike(inner(ONES, rngs=key), inner(ONES, rngs=key)))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.norm, self.drop = nnx.BatchNorm(64, rngs=nnx.Rngs(0)), layer()

    def __call__(self, x: Any) -> Any:
        return self.drop(self.norm(x + 1))


def sampled() -> str:
    net = Net()
    net.eval()
    noisy, before = nnx.view(net, only=nnx.Dropout, deterministic=False), net.norm.mean[...]
    return yes(not alike(noisy(ONES), noisy(ONES)) and bool((net.norm.mean[...] == before).all()) and bool((net(ONES) != 0).all()))


def moved_by_hand() -> str:
    inner = layer()
    for rate in (0.0, 0.25):
        inner.rate = rate
        assert abs(float((inner(jnp.ones(1 << 16)) == 0).mean()) - rate) < 0.01
    return "by hand"


def recompiles() -> str:
    traced, inner = [], layer()

    def step(of: nnx.Dropout, x: Any) -> Any:
        traced.append(of.rate)
        return of(x)

    run = nnx.jit(step)
    for rate in (0.1, 0.2, 0.3):
        inner.rate = rate
        run(inner, ONES)
    return yes(len(traced) == 1)


def fused() -> str:
    """On a CPU XLA's code has a loop over the rounds, each of which writes the whole of the words."""
    inner = nnx.Dropout(0.5)
    code = jax.jit(lambda x, key: jnp.sin(inner(jnp.tanh(x), rngs=key))).lower(ONES, jax.random.key(0)).compile().as_text()
    return yes(" while(" not in code[code.index("ENTRY") :])


def kept() -> str:
    """What ``jax.vjp`` keeps, eager / of a function under jit; under one jit of forward and backward XLA may choose otherwise."""
    inner, key, x = nnx.Dropout(0.5), jax.random.key(0), jax.random.normal(jax.random.key(1), (256, 256))

    def kept_by(function: Any) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if getattr(leaf, "size", 0) == x.size]
        return sum(leaf.nbytes for leaf in leaves) / x.size

    def plain(x: Any) -> Any:
        return jnp.sin(jnp.sin(x))

    def noisy(x: Any) -> Any:
        return jnp.sin(inner(jnp.sin(x), rngs=key))

    return " / ".join(f"{kept_by(a) - kept_by(b):g}" for a, b in ((noisy, plain), (jax.jit(noisy), jax.jit(plain))))


PROBES: dict[str, Probe] = {
    "compiled": compiled_alike,
    "layout": batches_alike,
    "budget": lambda: rematerialized(compiled=True),
    "checkpoint": lambda: rematerialized(compiled=False),
    "seeds": lambda: yes(not alike(layer(0)(ONES), layer(1)(ONES))),
    "apart": sites_apart,
    "added": others_left_alone,
    "resume": resumes,
    "ranks": ranks_by_key,
    "held": held,
    "sampled": sampled,
    "moved": moved_by_hand,
    "recompiles": recompiles,
    "fused": fused,
    "kept": kept,
}
