"""The random streams: frozen by known answers, and no worse than random in the ways that matter for training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import graphreg
from graphreg import Noise
from graphreg.mixer import mix
from graphreg.noise import bits, call_keys, ranked, stream

KEY = torch.tensor([0x1234567, -0x7654321], dtype=torch.int32)


def words(key: Tensor, count: int, lane: int = 0) -> Tensor:
    """The draws as unsigned integers."""
    return bits(key, (count,), lane).to(torch.int64) & 0xFFFFFFFF


def key_of(seed: int, site: str = "fc", call: int = 0) -> Tensor:
    return call_keys(torch.tensor([stream(seed, site, "BernoulliDropout", 0)]), torch.tensor([call]))[0]


def test_known_answers() -> None:
    """These numbers freeze the streams for all releases: a checkpoint resumed under a new version draws the same masks."""
    assert stream(0, "fc", "BernoulliDropout", 0) == KNOWN["stream"]
    assert key_of(0).tolist() == KNOWN["key"]
    assert key_of(0, call=1_000_000).tolist() == KNOWN["late key"]
    assert words(KEY, 4).tolist() == KNOWN["words"]
    assert words(KEY, 2, lane=1).tolist() == KNOWN["lane"]
    assert Noise(KEY).keep(torch.empty(16), 0.5).tolist() == KNOWN["keep"]
    assert ranked(KEY[None], 3)[0].tolist() == KNOWN["rank 3"]
    torch.testing.assert_close(Noise(KEY).normal(torch.empty(3)), torch.tensor(KNOWN["normal"]), rtol=1e-6, atol=1e-6)


KNOWN: dict[str, Any] = {
    "stream": 397514744688752528,
    "key": [6405547, -2054708894],
    "late key": [-495606315, -306116817],
    "words": [438028812, 3001771917, 1550759435, 3001568541],
    "lane": [190144660, 3194550266],
    "keep": [0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1],
    "rank 3": [818941845, -570675778],
    "normal": [2.0546439, -0.0330235, -0.490332],
}


def python_mix(counter: int, k0: int, k1: int) -> int:
    """The element's mixer again, in Python's integers: torch's wrap-around and shifts are held against it."""
    mask = 0xFFFFFFFF
    x = (counter + k0) & mask
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) & mask
    x = (((x ^ (x >> 11)) + k1) * 0xAC4C1B51) & mask
    x = ((x ^ (x >> 15)) * 0x31848BAB) & mask
    return ((x ^ (x >> 14)) + (counter ^ (k1 & mask))) & mask


def test_the_mixer_is_the_published_one() -> None:
    expected = [python_mix(i, 0x1234567, -0x7654321 & 0xFFFFFFFF) for i in range(1000)]
    assert words(KEY, 1000).tolist() == expected


def chi_square(observed: Tensor, expected: float) -> float:
    """As standard normal (Wilson & Hilferty 1931)."""
    df = observed.numel() - 1
    statistic = float((observed.double() - expected).square().sum() / expected)
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_uniform(shift: int) -> None:
    counts = torch.bincount((words(key_of(1), 1 << 20) >> shift) & 255, minlength=256)
    assert abs(chi_square(counts, (1 << 20) / 256)) < 4


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 512, 1024, 4096])
def test_no_correlation_over_lags(lag: int) -> None:
    u = words(key_of(2), 1 << 18)
    assert abs(correlation(u[:-lag], u[lag:])) < 4.5


def test_no_correlation_between_sites_steps_seeds_and_ranks() -> None:
    streams = {
        "site": [key_of(0, f"layer1.{i}") for i in range(8)],
        "step": [key_of(0, call=i) for i in range(8)],
        "seed": [key_of(i) for i in range(8)],
        "rank": [ranked(key_of(0)[None], i)[0] for i in range(8)],
    }
    for kind, keys in streams.items():
        draws = [words(key, 1 << 16) for key in keys]
        for (i, a), (j, b) in itertools.combinations(enumerate(draws), 2):
            assert abs(correlation(a, b)) < 5, (kind, i, j)
            for bit in (0, 15, 31):  # single bits as well
                assert abs(correlation((a >> bit) & 1, (b >> bit) & 1)) < 5, (kind, i, j, bit)


def collisions(draws: Tensor) -> float:
    """Birthdays: how far the number of repeated 32-bit words is from that of random draws, in standard deviations."""
    n = draws.numel()
    repeated = n - torch.unique(draws).numel()
    # expected number of repeats among n draws of m words, and its (nearly Poisson) deviation
    m = 2.0**32
    expected = n - m * -math.expm1(n * math.log1p(-1 / m))
    return (repeated - expected) / math.sqrt(expected)


def test_birthday_collisions() -> None:
    """2**24 draws: 2**20 are too few to see that a bijection never repeats."""
    assert abs(collisions(bits(key_of(3), (1 << 24,)))) < 4


def test_a_bijection_fails_the_birthday_test() -> None:
    counter = torch.arange(1 << 24, dtype=torch.int32)
    bijection = mix(counter, KEY[0], KEY[1]) - (counter ^ KEY[1])  # without the feed-forward
    assert collisions(bijection) < -30


@pytest.mark.parametrize("p", [0.5, 0.1, 0.01, 1e-3, 0.9, 0.999])
def test_rates(p: float) -> None:
    n = 1 << 20
    kept = Noise(key_of(4)).keep(torch.empty(n), p).double().mean()
    assert abs(float(kept) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)


def test_rates_are_exact_to_the_resolution() -> None:
    """keep() draws 0 exactly where the 31-bit draw is below p * 2**31."""
    for p in (1e-6, 0.25, 1 / 3):
        draws = words(key_of(5), 1 << 22) >> 1
        assert torch.equal(Noise(key_of(5)).keep(torch.empty(1 << 22), p) == 0, draws < int(p * 2**31))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normal_moments_and_tails(dtype: torch.dtype) -> None:
    n = 1 << 20
    z = Noise(key_of(6)).normal(torch.empty(n, dtype=dtype))
    assert z.dtype == dtype
    z = z.double()
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n) + (1e-4 if dtype == torch.bfloat16 else 0)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n) + (1e-3 if dtype == torch.bfloat16 else 0)
    for bound in (1.0, 2.0, 3.0, 4.0):
        tail = math.erfc(bound / math.sqrt(2))
        rounding = 0.02 * tail if dtype == torch.bfloat16 else 2e-3 * tail
        assert abs(float((z.abs() > bound).double().mean()) - tail) < 4 * math.sqrt(tail / n) + rounding


def test_uniform_range_and_resolution() -> None:
    u = Noise(key_of(7)).uniform(torch.empty(1 << 20))
    assert 0 <= float(u.min()) < 1e-5 and 1 - 1e-5 < float(u.max()) < 1
    fine = Noise(key_of(7)).uniform(torch.empty(1 << 12, dtype=torch.float64))
    scaled = fine * 2.0**53
    assert torch.equal(scaled, scaled.round()) and bool((scaled % 2).any())  # all 53 bits are drawn


def test_layout_does_not_matter() -> None:
    z = torch.empty(4, 3, 8, 8)
    masks = [Noise(KEY).keep(v, 0.5) for v in (z, z.contiguous(memory_format=torch.channels_last), torch.empty(8, 3, 8, 4).transpose(0, 3))]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_past_two_to_the_31_elements() -> None:
    """The block that an element lies in joins the key: draws go on, and do not start again."""
    across = bits(KEY, (1 << 12,), start=(1 << 31) - (1 << 11))
    assert torch.equal(across[: 1 << 11], bits(KEY, (1 << 11,), start=(1 << 31) - (1 << 11)))
    assert not torch.equal(across[1 << 11 :], bits(KEY, (1 << 11,)))
    later = bits(KEY, (1 << 16,), start=1 << 33)
    assert abs(correlation(later, bits(KEY, (1 << 16,)))) < 4.5


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 512), torch.nn.Linear(512, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_seeds() -> None:
    """None follows torch.manual_seed, an int is itself, a generator is asked once."""
    x = torch.randn(64, 8)
    torch.manual_seed(0)
    model = Small()

    def run(**options: object) -> Tensor:
        return graphreg.regularize(model, hidden_dropout=0.5, **options)(x).output  # type: ignore[arg-type]

    torch.manual_seed(5)
    first = run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    assert not torch.equal(first, run())
    assert torch.equal(run(rng=3), run(rng=3)) and not torch.equal(run(rng=3), run(rng=4))
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    assert torch.equal(run(rng=generators[0]), run(rng=generators[1]))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_no_draw_without_noise() -> None:
    """A model with penalties alone leaves torch's generator where it was."""
    model, before = Small(), torch.get_rng_state()
    graphreg.regularize(model, weight_l2=1.0, hidden_l1=1.0)
    assert torch.equal(torch.get_rng_state(), before)
