"""The random streams: frozen by known answers; rates, resolution and range; what a seed is. Their quality: test_randomness.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import graphreg
from graphreg import Noise
from graphreg.rng.hash import call_words, kept_words
from graphreg.rng.noise import bits, call_keys, ranked, stream
from scores import correlation, moment, tail, uniform_over

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


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=20), st.integers(0, (1 << 62)))
def test_few_keys_are_made_of_pythons_integers_and_many_of_tensors(streams: list[int], call: int) -> None:
    words = torch.tensor(streams, dtype=torch.int64)
    expected = torch.stack(call_words(words, torch.tensor([call])), dim=-1).to(torch.int32)
    assert torch.equal(call_keys(words, torch.tensor([call])), expected)


@given(st.integers(0, (1 << 31) - 1), st.sampled_from([torch.float32, torch.float64]))
def test_the_threshold_of_a_rate_is_the_compiled_forms(threshold: int, dtype: torch.dtype) -> None:
    """Eager compares whole words with a number that Python works out; compiled code takes the sign of a difference."""
    rate, z = torch.tensor(threshold / 2**31, dtype=dtype).clamp(max=1 - 2**-24), torch.empty(2048)
    assert torch.equal(Noise(KEY).keep(z, rate).to(torch.int32), kept_words(bits(KEY, z.shape), rate))


def test_a_tracer_sees_the_arithmetic_and_not_its_result() -> None:
    """What is quicker in Python is not taken where the numbers would be baked in."""
    graph = make_fx(lambda key, p: Noise(key).keep(torch.empty(8), p))(KEY, torch.tensor(0.5))
    for key in (KEY, key_of(1), key_of(2)):
        for p in (0.1, 0.9):
            assert torch.equal(graph(key, torch.tensor(p)), Noise(key).keep(torch.empty(8), p))
    assert torch.equal(make_fx(call_keys)(torch.tensor([5]), torch.tensor([3]))(torch.tensor([7]), torch.tensor([4])), key_of_words(7, 4))


def key_of_words(stream: int, call: int) -> Tensor:
    return torch.stack(call_words(torch.tensor([stream]), torch.tensor([call])), dim=-1).to(torch.int32)


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


def test_the_smallest_rate_drops_one_draw_of_two_to_the_31() -> None:
    draws = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int32)  # words: of each, the lowest bit is not looked at
    assert kept_words(draws, torch.tensor(2.0**-31)).tolist() == [0, 0, 1, 1, 1, 1]
    assert kept_words(draws, torch.tensor(2.0**-30)).tolist() == [0, 0, 0, 0, 1, 1]
    assert kept_words(draws, torch.tensor(0.0)).tolist() == [1] * 6
    assert kept_words(draws, torch.tensor(1 - 2.0**-31, dtype=torch.float64)).tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("p", [1e-6, 1e-5])
def test_small_rates_drop_as_many_as_they_say(p: float) -> None:
    n = 1 << 22
    dropped = sum(n - int(Noise(key_of(4, call=call)).keep(torch.empty(n), p).double().sum()) for call in range(8))
    expected = 8 * n * p  # 34 and 336
    assert abs(dropped - expected) < 4 * math.sqrt(expected)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("p", [0.5, 0.1, 1e-3])
def test_half_precision_draws_the_same_mask(dtype: torch.dtype, p: float) -> None:
    """Of values in half precision; and of a rate in it, which is another number, but not one that 2**31 times overflows."""
    n = 1 << 18

    def keep(like: torch.dtype, rate: Any) -> Tensor:
        return Noise(key_of(10)).keep(torch.empty(n, dtype=like), rate)

    kept, rounded = keep(dtype, p), torch.tensor(p, dtype=dtype)
    assert kept.dtype == dtype and torch.equal(kept.float(), keep(torch.float32, p))
    assert torch.equal(keep(torch.float32, rounded), keep(torch.float32, float(rounded)))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_in_half_precision_drops_at_the_rate_it_is_given(dtype: torch.dtype) -> None:
    """The number of bfloat16 next to 0.9 is 0.8984: 5 standard errors of 2**20 elements away."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 64)).to(dtype)
    torch.nn.init.ones_(model[0].bias)
    module = graphreg.regularize(model, dropout={"0": 0.9}, rng=1)
    dropped = (module(torch.zeros(1 << 14, 2, dtype=dtype)).output == 0).double().mean()
    assert abs(float(dropped) - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 2**20)
    assert graphreg.strengths(module) == {"dropout": 0.9}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normal_moments_and_tails(dtype: torch.dtype) -> None:
    """Beyond a bound of half precision lies what is rounded to more: half of its last place further on."""
    z = Noise(key_of(6)).normal(torch.empty(1 << 20, dtype=dtype))
    assert z.dtype == dtype
    for power in range(1, 7):
        assert abs(moment(z, power)) < 4, power
    for bound in (1.0, 2.0, 3.0, 4.0):
        place = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(bound))
        for sign in (1, -1):
            assert abs(tail(z.double(), sign * (bound + place / 2))) < 4, sign * bound


def test_uniform_range_and_resolution() -> None:
    u = Noise(key_of(7)).uniform(torch.empty(1 << 20))
    assert 0 <= float(u.min()) < 1e-5 and 1 - 1e-5 < float(u.max()) < 1
    assert torch.equal(u * 2.0**24, (u * 2.0**24).round())


def test_uniform_float64_draws_53_bits() -> None:
    """Each of them a coin, high and low ones independent."""
    n = 1 << 18
    u = Noise(key_of(7)).uniform(torch.empty(n, dtype=torch.float64))
    whole = (u * 2.0**53).to(torch.int64)
    assert torch.equal(whole.double() * 2.0**-53, u)
    for bit in range(53):
        assert abs(float(((whole >> bit) & 1).double().mean()) - 0.5) * 2 * math.sqrt(n) < 4, bit
    for by in (0, 13, 26, 41):
        assert abs(uniform_over((whole >> by) & 4095, 4096)) < 4, by
    assert abs(correlation(whole >> 26, whole & ((1 << 26) - 1))) < 4


def test_layout_does_not_matter() -> None:
    z = torch.empty(4, 3, 8, 8)
    masks = [Noise(KEY).keep(v, 0.5) for v in (z, z.contiguous(memory_format=torch.channels_last), torch.empty(8, 3, 8, 4).transpose(0, 3))]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_past_two_to_the_31_elements() -> None:
    """The block that an element lies in joins the key: draws go on, and do not start again."""
    across = bits(KEY, (1 << 12,), start=(1 << 31) - (1 << 11))
    assert torch.equal(across[: 1 << 11], bits(KEY, (1 << 11,), start=(1 << 31) - (1 << 11)))
    assert not torch.equal(across[1 << 11 :], bits(KEY, (1 << 11,)))


def test_known_answers_past_two_to_the_31_elements() -> None:
    """Whole blocks of 2**31, each with keys of its own: frozen as the streams are."""
    for start in ((1 << 31) - 2, 1 << 31, (1 << 32) - 2, 1 << 32, (1 << 33) + 5, 1 << 40):
        indices = range(start, start + 4)
        blocks = [(index >> 31) * 0x9E3779B9 for index in indices]
        expected = [python_mix(i & 0x7FFFFFFF, 0x1234567 + block, -0x7654321 ^ block) for i, block in zip(indices, blocks, strict=True)]
        assert (bits(KEY, (4,), start=start).to(torch.int64) & 0xFFFFFFFF).tolist() == expected, start


def test_no_repetition_past_two_to_the_32_elements() -> None:
    """At the same place of each block, and shifted by one: nothing comes again, and nothing is correlated."""
    starts = (0, 1 << 31, 1 << 32, 3 << 31, 1 << 33, (1 << 33) + (1 << 31), 1 << 40)
    drawn = [bits(KEY, (1 << 14,), start=start).to(torch.int64) for start in starts]
    for (i, a), (j, b) in itertools.combinations(enumerate(drawn), 2):
        both = torch.unique(torch.cat([a, b])).numel()
        assert 2 * a.numel() - both <= 3, (i, j)  # 0.06 of the 2**15 would repeat by chance
        assert abs(correlation(a, b)) < 4.5 and abs(correlation(a[1:], b[:-1])) < 4.5, (i, j)
        assert abs(correlation(a & 1, b & 1)) < 4.5, (i, j)


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
