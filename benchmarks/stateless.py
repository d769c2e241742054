"""torch's own stateless keys, ``torch.func._random``, beside graphreg's draws: time, statistics and promises, in one run.

``python benchmarks/stateless.py`` prints the tables of docs/randomness.md. It needs a torch whose operators have kernels for the CPU;
2.13 has none, 2.15 has them.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as F
from machine import clock, since
from page import row
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from graphreg import Noise
from graphreg.rng.noise import bits, call_keys

_random: Any
try:
    _random = importlib.import_module("torch.func._random")
except ImportError:  # up to torch 2.12
    _random = None

RATE = 0.1
NAMES = ("graphreg", "torch.func._random", "F.dropout")
SHAPES = ((64, 64), (256, 512), (2048, 1024))
Draw = Callable[[Any, Tensor], Tensor]


def is_here() -> bool:
    """Whether the installed torch can draw from its own keys on a CPU."""
    try:
        _random.uniform(_random.key(0), 1)
    except (AttributeError, NotImplementedError):
        return False
    return True


def our_key(seed: int) -> Tensor:
    """The key of call 0 of the stream ``seed``."""
    return call_keys(torch.tensor([seed]), torch.tensor([0]))[0]


def their_key(seed: int) -> Tensor:
    key: Tensor = _random.fold_in(_random.key(0), seed)
    return key


def our_dropout(key: Tensor, z: Tensor) -> Tensor:
    return z * Noise(key).keep(z, RATE) / (1 - RATE)


def their_dropout(key: Tensor, z: Tensor) -> Tensor:
    drawn: Tensor = _random.uniform(key, z.shape, dtype=z.dtype)
    return z * (drawn >= RATE) / (1 - RATE)


def native_dropout(key: Tensor, z: Tensor) -> Tensor:
    return F.dropout(z, RATE)


DROPOUTS: dict[str, Draw] = dict(zip(NAMES, (our_dropout, their_dropout, native_dropout), strict=True))


def alternately(runs: Mapping[str, Callable[[], object]], rounds: int) -> list[str]:
    """The median time of each run in microseconds of the processor, which counts no other process. In each round every run has its turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(rounds + 3), runs.items()):
        start = time.process_time()
        run()
        times[name].append((time.process_time() - start) * 1e6)
    return [f"{statistics.median(found[3:]):,.0f}" for found in times.values()]


def between(draw: Draw, key: Tensor, z: Tensor) -> Tensor:
    """A dropout between two elementwise operations."""
    return torch.sin(draw(key, torch.tanh(z))).sum()


def step(function: Draw, key: Tensor, z: Tensor) -> Tensor:
    gradient: Tensor = torch.autograd.grad(function(key, z), z)[0]
    return gradient


def times(rounds: int) -> None:
    print(row("microseconds", *NAMES), row(*["---"] * 4), sep="\n")
    keys = dict(zip(NAMES, (our_key(1), their_key(1), our_key(1)), strict=True))
    for shape in SHAPES:
        z, size = torch.randn(shape), "x".join(map(str, shape))
        print(row(f"dropout of {size}, eager", *alternately({n: partial(draw, keys[n], z) for n, draw in DROPOUTS.items()}, rounds)))
        torch._dynamo.reset()
        forwards = {name: torch.compile(partial(between, draw), fullgraph=True) for name, draw in DROPOUTS.items()}
        steps = {name: partial(step, forward, keys[name], z.clone().requires_grad_()) for name, forward in forwards.items()}
        print(row(f"a step with dropout of {size}, Inductor", *alternately(steps, rounds)))
    streams, sites, call = torch.arange(100) * 7919, _random.split(_random.key(0), 100), torch.tensor([5])
    derived = {"graphreg": partial(call_keys, streams, call), "torch": partial(_random.fold_in, sites, 5)}
    print(row("keys of a call, 100 sites, eager", *alternately(derived, rounds), ""))


def words(name: str, seed: int, count: int) -> Tensor:
    """Words of 32 bits."""
    if name == NAMES[0]:
        return bits(our_key(seed), (count,))
    drawn: Tensor = _random.bits(their_key(seed), (count,))
    return drawn


def birthdays(name: str, draws: int = 1 << 24) -> float:
    """How many standard deviations the number of words that repeat is from that of random words."""
    expected = draws - 2.0**32 * -math.expm1(draws * math.log1p(-(2.0**-32)))
    return (draws - len(torch.unique(words(name, 1, draws))) - expected) / math.sqrt(expected)


def bias(name: str, draws: int = 1 << 22) -> float:
    """The largest of 32 deviations: each bit is 1 in half of the words."""
    drawn = words(name, 2, draws)
    ones = torch.stack([(drawn >> bit & 1).sum() for bit in range(32)])
    return float(((ones - draws / 2) / math.sqrt(draws / 4)).abs().max())


def neighbours(name: str, keys: int = 200, draws: int = 1 << 16) -> float:
    """The largest of 199 deviations: masks of neighbouring seeds agree in half of their elements."""
    masks = torch.stack([words(name, seed, draws) < 0 for seed in range(keys)])
    agree = (masks[1:] == masks[:-1]).sum(1)
    return float(((agree - draws / 2) / math.sqrt(draws / 4)).abs().max())


def normals(name: str, draws: int = 1 << 22) -> str:
    """Deviations of the mean and of the variance, and the largest value."""
    z = torch.empty(draws)
    drawn = (Noise(our_key(3)).normal(z) if name == NAMES[0] else _random.normal(their_key(3), draws)).double()
    mean, variance = drawn.mean() * math.sqrt(draws), (drawn.square().mean() - 1) / math.sqrt(2 / draws)
    return f"{mean:.1f}, {variance:.1f}, {drawn.abs().max():.2f}"


STATISTICS: dict[str, Callable[[str], object]] = {
    "words that repeat among 2²⁴": birthdays,
    "ones in each of 32 bits, 2²² words, the largest": bias,
    "agreement of masks of neighbouring seeds, 199 pairs, the largest": neighbours,
    "normals, 2²²: mean, variance; the largest value": normals,
}


def numbers() -> None:
    print(row("standard deviations from random", *NAMES[:2]), row(*["---"] * 3), sep="\n")
    for said, measure in STATISTICS.items():
        found = [measure(name) for name in NAMES[:2]]
        print(row(said, *(each if isinstance(each, str) else f"{each:.1f}" for each in found)))


def compiled_is_eager(draw: Draw, key: Tensor) -> bool:
    z = torch.ones(64, 64)
    torch._dynamo.reset()
    return torch.equal(torch.compile(draw, fullgraph=True)(key, z) != 0, draw(key, z) != 0)


def any_layout(draw: Draw, key: Tensor) -> bool:
    z = torch.ones(4, 8, 6, 6)
    mask = draw(key, z) != 0
    return torch.equal(draw(key, z.to(memory_format=torch.channels_last)) != 0, mask) and torch.equal(draw(key, z[:2]) != 0, mask[:2])


def any_dtype(draw: Draw, key: Tensor) -> bool:
    masks = [draw(key, torch.ones(500, 300, dtype=dtype)) != 0 for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    return all(torch.equal(mask, masks[0]) for mask in masks)


def backward_draws_again(draw: Draw, key: Tensor) -> bool:
    z, function = torch.randn(64, 64, requires_grad=True), partial(between, draw)
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        again = step(torch.compile(function, fullgraph=True), key, z)
    return torch.allclose(again, step(function, key, z), atol=1e-5)


def is_fused(draw: Draw, key: Tensor) -> bool:
    """Whether the compiled forward calls no operator of its own for the draw."""
    torch._dynamo.reset()
    _, (code, *_) = run_and_get_code(torch.compile(draw, fullgraph=True), key, torch.ones(64, 64))
    return "torch.ops.aten._philox" not in code


def rows_under_vmap(draw: Draw, key: Tensor) -> bool:
    """Whether each row can have a mask of its own: by the option ``randomness``, or by a key for each row."""
    for keys, axis in ((key, None), (torch.stack([key, key.flip(0)]), 0)):
        try:
            one, other = torch.vmap(draw, in_dims=(axis, 0), randomness="different")(keys, torch.ones(2, 50))
        except RuntimeError:
            continue
        if not torch.equal(one, other):
            return True
    return False


PROMISES: dict[str, Callable[[Draw, Tensor], bool]] = {
    "compiled code draws the same masks as eager": compiled_is_eager,
    "a mask is the same in every memory layout, and is the beginning of the mask of a larger batch": any_layout,
    "a mask is the same in every dtype": any_dtype,
    "the compiler may draw a mask again in backward": backward_draws_again,
    "Inductor fuses a draw into the surrounding kernels": is_fused,
    "the rows of `torch.vmap` have masks of their own": rows_under_vmap,
}


def verdicts(draw: Draw, key: Tensor) -> dict[str, str]:
    """For each promise "yes" or "no"."""
    return {said: "yes" if holds(draw, key) else "no" for said, holds in PROMISES.items()}


def main(rounds: int = 60) -> None:
    if not is_here():
        raise SystemExit(f"torch {torch.__version__} has no stateless keys on a CPU. Take torch 2.15 or newer.")
    torch.set_num_threads(1)
    start = clock()
    print(f"torch {torch.__version__}, one thread; medians of {rounds} rounds, in which all take turns\n")
    times(rounds)
    print()
    numbers()
    print("", row("promise", *NAMES[:2]), row(*["---"] * 3), sep="\n")
    ours, theirs = verdicts(our_dropout, our_key(1)), verdicts(their_dropout, their_key(1))
    for said in PROMISES:
        print(row(said, ours[said], theirs[said]))
    print(f"\n{since(start)}")


if __name__ == "__main__":
    main()
