"""Draws for a part of a value: they are the part of the draws for the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphreg.errors import RandomnessError
from graphreg.rng.noise import Noise
from graphreg.rng.window import Window

KEY = torch.tensor([123456, -98765], dtype=torch.int32)
DRAWS: dict[str, Any] = {
    "keep": lambda noise, z, shared: noise.keep(z, 0.4, shared),
    "uniform": lambda noise, z, shared: noise.uniform(z, shared),
    "normal": lambda noise, z, shared: noise.normal(z, shared),
}


@st.composite
def parts(draw: st.DrawFn) -> tuple[Window, tuple[slice, ...], tuple[int, ...]]:
    """A part of a value, the slices that cut it out, and axes that share a draw."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]  # 0: a rank without a part
    shared = draw(st.sets(st.sampled_from(range(len(shape)))))
    slices = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return Window(tuple(shape), tuple(starts), tuple(sizes)), slices, tuple(shared)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15)
@given(part=parts())
def test_it_is_the_part_of_the_whole(part: tuple[Window, tuple[slice, ...], tuple[int, ...]], dtype: torch.dtype, kind: str) -> None:
    window, slices, shared = part
    whole, own = torch.zeros(window.shape, dtype=dtype), torch.zeros(window.sizes, dtype=dtype)
    expected, drawn = Noise(KEY), Noise(KEY, window=window)
    for _ in range(2):  # the second draw has other lanes
        want: Tensor = DRAWS[kind](expected, whole, shared)
        got: Tensor = DRAWS[kind](drawn, own, shared)
        of_part = tuple(slice(min(window.sizes[axis], 1)) if axis in shared else cut for axis, cut in enumerate(slices))
        assert torch.equal(got, want[of_part])
        assert got.dtype == want.dtype


def test_compiled_it_is_the_same() -> None:
    window = Window((6, 8), (2, 4), (2, 4))

    def drawn(z: Tensor, key: Tensor) -> Tensor:
        return Noise(key, window=window).keep(z, 0.5) + Noise(key, window=window).normal(z)

    z = torch.zeros(2, 4)
    torch.testing.assert_close(torch.compile(drawn, backend="aot_eager", fullgraph=True)(z, KEY), drawn(z, KEY))


def test_past_two_to_the_31() -> None:
    """An index of 2**31 or more has the words that the whole would have."""
    window, z = Window((1 << 17, 1 << 15), (1 << 16, 7), (2, 3)), torch.zeros(2, 3)
    start = (1 << 16) * (1 << 15) + 7
    for row in range(2):
        expected = Noise(KEY, window=Window((1 << 32,), (start + row * (1 << 15),), (3,))).uniform(z[row])
        assert torch.equal(Noise(KEY, window=window).uniform(z)[row], expected)
    assert start >= 1 << 31


def test_another_shape_is_refused() -> None:
    noise = Noise(KEY, window=Window((4, 4), (0, 2), (4, 2)))
    with pytest.raises(RandomnessError, match=r"draws \(4, 1\) for a part \(4, 2\) of a value \(4, 4\); a part can only draw"):
        noise.keep(torch.zeros(4, 1), 0.5)


def test_repeated_noise_draws_the_same_again() -> None:
    for noise in (Noise(KEY), Noise(KEY, window=Window((4, 4), (0, 2), (4, 2)))):
        z = torch.zeros(4, 2)
        first = noise.keep(z, 0.5), noise.normal(z)
        again = noise.repeated()
        assert torch.equal(again.keep(z, 0.5), first[0])
        assert torch.equal(again.normal(z), first[1])
        assert not torch.equal(noise.keep(z, 0.5), first[0])
