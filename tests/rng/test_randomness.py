"""The streams against random words: over elements, steps, sites and seeds, between neighbours of each; and poor generators that fail.

Seeds are fixed, so that nothing here can fail by chance; limits are in standard errors. ``make rng-battery`` reads a million times
as many words.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable
from functools import cache

import pytest
import torch
from torch import Tensor

from battery.words import named
from battery.words import words as drawn
from graphreg import Noise
from graphreg.rng.hash import mix
from graphreg.rng.noise import bits, call_keys, ranked, stream
from scores import collisions, correlation, moment, spacings, tail, uniform_over

N = 1 << 18  # words of each stream


def unsigned(words: Tensor) -> Tensor:
    return words.flatten().to(torch.int64) & 0xFFFFFFFF


def key_of(seed: int = 0, site: str = "fc", kind: str = "BernoulliDropout", occurrence: int = 0, call: int = 0) -> Tensor:
    return call_keys(torch.tensor([stream(seed, site, kind, occurrence)]), torch.tensor([call]))[0]


def of_streams(identities: Iterable[int], element: int = 5) -> Tensor:
    """One element of one call of many streams."""
    return drawn(torch.tensor(array("q", identities)), torch.tensor([0]), torch.tensor([element], dtype=torch.int32))


def in_training() -> Tensor:
    sites, elements = 16, 256
    steps = N // (sites * elements)
    return drawn(
        torch.tensor(named(0, sites)).repeat(steps),
        torch.arange(steps).repeat_interleave(sites),
        torch.arange(elements, dtype=torch.int32),
    )


STREAMS: dict[str, Callable[[], Tensor]] = {
    "elements": lambda: bits(key_of(1), (N,)),
    "steps": lambda: drawn(torch.tensor(named(0, 1)), torch.arange(N), torch.tensor([5], dtype=torch.int32)),
    "sites": lambda: of_streams(named(0, N)),
    "seeds": lambda: of_streams(stream(seed, "fc", "BernoulliDropout", 0) for seed in range(N)),
    "training": in_training,
}


@cache
def words_of(name: str) -> Tensor:
    return unsigned(STREAMS[name]())


over_streams = pytest.mark.parametrize("name", STREAMS)


@over_streams
def test_bytes_high_and_low_bits_and_pairs_are_uniform(name: str) -> None:
    words = words_of(name)
    for by in (0, 8, 16, 24):
        assert abs(uniform_over((words >> by) & 255, 256)) < 4, f"byte at bit {by}"
    assert abs(uniform_over(words >> 20, 4096)) < 4, "the 12 high bits"
    assert abs(uniform_over(words & 4095, 4096)) < 4, "the 12 low bits"
    for by in (0, 26):
        six = (words >> by) & 63
        assert abs(uniform_over(six[::2] * 64 + six[1::2], 4096)) < 4, f"pairs of six bits at bit {by}"


@over_streams
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 64, 256, 512, 1024, 4096])
def test_no_correlation_over_lags(name: str, lag: int) -> None:
    words = words_of(name)
    assert abs(correlation(words[:-lag], words[lag:])) < 4.5
    for bit in (0, 16, 31):
        assert abs(correlation((words[:-lag] >> bit) & 1, (words[lag:] >> bit) & 1)) < 4.5, f"bit {bit}"


@over_streams
def test_birthday_spacings(name: str) -> None:
    words = words_of(name)
    assert abs(spacings(words)) < 4
    assert abs(spacings((words >> 16) | ((words & 0xFFFF) << 16))) < 4, "the low half first"


def test_birthday_collisions() -> None:
    """2**24 draws: 2**20 are too few to see that a bijection never repeats."""
    assert abs(collisions(bits(key_of(3), (1 << 24,)))) < 4


NEIGHBOURS = {
    "site": [key_of(site=f"layer1.{i}") for i in range(8)],
    "name": [key_of(site=name) for name in ("layer.1", "layer.2", "layer.3", "layer.11", "layer.1.1", "layer.1_1", "layer.", "Layer.1")],
    "step": [key_of(call=i) for i in range(8)],
    "late step": [key_of(call=(1 << 32) + i) for i in range(8)],
    "seed": [key_of(i) for i in (0, 1, 2, 3, 4, 5, 6, -1)],
    "class": [key_of(kind=kind) for kind in ("BernoulliDropout", "GaussianNoise", "")],
    "occurrence": [key_of(occurrence=i) for i in range(8)],
    "rank": [ranked(key_of()[None], i)[0] for i in range(8)],
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_no_correlation_between_neighbours(kind: str) -> None:
    draws = [unsigned(bits(key, (1 << 15,))) for key in NEIGHBOURS[kind]]
    for (i, a), (j, b) in itertools.combinations(enumerate(draws), 2):
        assert abs(correlation(a, b)) < 5, (i, j)
        assert abs(correlation(a[1:], b[:-1])) < 5, (i, j, "shifted")
        for bit in (0, 15, 31):  # single bits as well
            assert abs(correlation((a >> bit) & 1, (b >> bit) & 1)) < 5, (i, j, bit)


def test_no_correlation_between_lanes() -> None:
    lanes = [unsigned(bits(key_of(), (1 << 16,), lane)) for lane in range(4)]
    for (i, a), (j, b) in itertools.combinations(enumerate(lanes), 2):
        assert abs(correlation(a, b)) < 5 and abs(correlation(a & 1, b & 1)) < 5, (i, j)


def flips(keys: Tensor) -> float:
    """int32 [n, 2] keys of neighbours in turn: how far the bit that changes least like a coin is from one, in standard errors."""
    changed = (keys[1:] ^ keys[:-1]).to(torch.int64)
    rates = torch.stack([((changed >> bit) & 1).double().mean(dim=0) for bit in range(32)])
    return float(((rates - 0.5) * 2 * changed.shape[0] ** 0.5).abs().max())


def test_neighbours_change_half_of_the_bits_of_a_key() -> None:
    one, zero, many = torch.tensor(named(0, 1)), torch.tensor([0]), torch.arange(1 << 14)
    assert flips(call_keys(one, many)) < 5
    assert flips(call_keys(torch.tensor(named(0, 1 << 14)), zero)) < 5
    seeds = array("q", (stream(seed, "fc", "BernoulliDropout", 0) for seed in range(1 << 14)))
    assert flips(call_keys(torch.tensor(seeds), zero)) < 5
    assert flips(torch.stack([many, many], dim=1).to(torch.int32)) > 100, "a counter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_moments_and_independence(dtype: torch.dtype) -> None:
    z = Noise(key_of(6)).normal(torch.empty(1 << 21, dtype=dtype))
    for power in range(1, 7):
        assert abs(moment(z, power)) < 4, power
    assert abs(correlation(z[:-1], z[1:])) < 4 and abs(correlation(z[:-1] ** 2, z[1:] ** 2)) < 4


@pytest.mark.parametrize("calls", [4, pytest.param(16, marks=pytest.mark.sweep)])
def test_normal_tails(calls: int) -> None:
    """Both tails beyond 3, 4 and 5 standard deviations: of 2**26 values (16 calls), 19 on each side are beyond the last."""
    counts = {bound: 0.0 for sign in (1, -1) for bound in (3.0 * sign, 4.0 * sign, 5.0 * sign)}
    for call in range(calls):
        z = Noise(key_of(8, call=call)).normal(torch.empty(1 << 22))
        for bound in counts:
            counts[bound] += tail(z, bound) / calls**0.5
    assert max(map(abs, counts.values())) < 4, counts


def congruential(count: int) -> Tensor:
    """The generator of Numerical Recipes (1986), x ↦ 1664525 x + 1013904223 mod 2**32."""
    x, found = 1, []
    for _ in range(count):
        x = (1664525 * x + 1013904223) & 0xFFFFFFFF
        found.append(x)
    return torch.tensor(found)


def test_a_congruential_generator_fails_by_its_low_bits_and_its_spacings() -> None:
    words = congruential(N)
    assert abs(uniform_over(words >> 24, 256)) < 4, "its high bits pass"
    assert uniform_over(words & 255, 256) < -30, "each low byte comes equally often, far too equally"
    assert correlation(words[:-256] & 1, words[256:] & 1) > 100, "the lowest bit has a period of 2"
    assert spacings(words) > 8, "its points lie on a lattice"


def test_a_bijection_fails_by_birthdays() -> None:
    counter = torch.arange(1 << 24, dtype=torch.int32)
    key = key_of(3)
    assert collisions(mix(counter, key[0], key[1]) - (counter ^ key[1])) < -30, "the mixer without the feed-forward"


def test_steps_that_only_move_the_counter_fail_as_neighbours() -> None:
    """What the second word of the key is for: with the first alone, a step draws the mask of the step before, moved by one."""
    counter, same = torch.arange(1 << 15, dtype=torch.int32), torch.tensor(12345, dtype=torch.int32)
    a, b = (unsigned(mix(counter, torch.tensor(step, dtype=torch.int32), same)) for step in (7, 8))
    assert abs(correlation(a, b)) < 5
    assert correlation(a[1:], b[:-1]) > 100


def test_twelve_uniforms_fail_as_normal() -> None:
    z = sum((Noise(key_of(9, call=i)).uniform(torch.empty(1 << 20)) for i in range(12)), torch.tensor(-6.0))
    assert abs(moment(z, 2)) < 4
    assert moment(z, 4) < -8 and moment(z, 6) < -8, "its tails are too thin"
