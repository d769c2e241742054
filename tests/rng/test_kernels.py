"""The Triton kernels of eager draws on a GPU, run on CPU tensors by Triton's interpreter: they draw what a CPU draws."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import graphreg.rng.hash
from graphreg import Noise
from graphreg.rng import kernels
from graphreg.rng.hash import call_words, kept_words, words
from graphreg.rng.noise import call_keys, stream

KEY = torch.tensor([0x1234567, -0x7654321], dtype=torch.int32)
KEYS = [KEY, torch.tensor([-1, 1 << 30], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of triton_kernels.py whose kernels Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'graphreg[gpu]' brings it")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("graphreg.rng.triton_kernels")
    assert spec is not None and spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    return copied


@pytest.fixture
def on_a_gpu(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors are drawn as a GPU's are; the names of the kernels that drew."""
    used = list[str]()

    def counted(name: str) -> Any:
        def draw(*args: Any) -> Any:
            used.append(name)
            return getattr(interpreted, name)(*args)

        return draw

    module = ModuleType("counted")
    for name in ("words", "keep", "call_keys"):
        setattr(module, name, counted(name))
    monkeypatch.setattr(kernels, "_triton", lambda: module)
    monkeypatch.setattr(kernels, "launches", graphreg.rng.hash.readable)
    monkeypatch.setattr(graphreg.rng.noise, "_is_cuda", lambda z: True)
    return used


@pytest.mark.parametrize("key", KEYS)
def test_words_are_the_cpus(key: Tensor, interpreted: ModuleType) -> None:
    for (count, start), lane in itertools.product([(1, 0), (1023, 5), (2050, 1 << 20), (3, (1 << 31) - 3), (0, 0)], [0, 1, 7, 4001]):
        assert torch.equal(interpreted.words(key, count, lane, start), words(key, count, lane, start))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_the_cpus(dtype: torch.dtype, interpreted: ModuleType) -> None:
    for rate, lane in itertools.product([0.0, 0.3, 1 - 2.0**-20], [0, 4]):
        for p in (torch.tensor(rate), torch.tensor(rate, dtype=torch.float64)):
            expected = kept_words(words(KEY, 1500, lane, 0), p).to(dtype).view(3, 500)
            assert torch.equal(interpreted.keep(KEY, p, torch.Size((3, 500)), lane, dtype), expected)
    assert interpreted.keep(KEY, torch.tensor(0.5), torch.Size((0, 3)), 0, dtype).shape == (0, 3)


@pytest.mark.parametrize("count", [1, 5, 70])
def test_keys_are_the_cpus(count: int, interpreted: ModuleType) -> None:
    streams = torch.tensor([stream(3, f"site {i}", "Kind", 0) for i in range(count)], dtype=torch.int64)
    for number in (0, 1, 12345, 1 << 40):
        call = torch.tensor([number], dtype=torch.int64)
        expected = torch.stack(call_words(streams, call), dim=-1).to(torch.int32)
        assert torch.equal(interpreted.call_keys(streams, call), expected)


def test_the_keys_of_a_call_are_one_launch(on_a_gpu: list[str]) -> None:
    streams = torch.arange(20)  # more than the few for which Python's integers are used
    expected = torch.stack(call_words(streams, torch.tensor([7])), dim=-1).to(torch.int32)
    assert torch.equal(call_keys(streams, torch.tensor([7])), expected) and on_a_gpu == ["call_keys"]


def draws(dtype: torch.dtype) -> list[Tensor]:
    """The draws of a formula, a few of each kind."""
    noise, z = Noise(KEY), torch.empty(40, 30, dtype=dtype)
    rates = torch.tensor(0.5), 0.25
    return [draw for p in rates for draw in (noise.keep(z, p), noise.uniform(z), noise.normal(z, shared=[1]), noise.keep(z, 0.3, [0]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_formula_draws_the_same(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    expected = draws(dtype)
    used = request.getfixturevalue("on_a_gpu")
    drawn = draws(dtype)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(drawn, expected, strict=True))
    assert used.count("keep") == 4 and "words" in used  # a mask is one launch


def test_under_a_transform_and_a_compiler_the_operators_draw(on_a_gpu: list[str]) -> None:
    z = torch.empty(4, 6)
    expected = torch.stack([Noise(KEY).keep(z[0], 0.5)] * 4)
    on_a_gpu.clear()
    assert torch.equal(torch.vmap(lambda row: Noise(KEY).keep(row, 0.5), randomness="same")(z), expected)
    compiled = torch.compile(lambda z: Noise(KEY).keep(z, 0.5) * z, backend="aot_eager", fullgraph=True)(torch.ones(6))
    assert torch.equal(compiled, expected[0]) and not on_a_gpu


def test_a_cpu_never_asks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_triton", lambda: pytest.fail("a draw on a CPU imports Triton"))
    assert draws(torch.float32)


def test_without_triton_the_operators_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draws(torch.float32)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "graphreg.rng.triton_kernels", raising=False)
    monkeypatch.setattr(kernels, "launches", lambda tensor: True)
    kernels._triton.cache_clear()
    try:
        assert kernels.kernels_for(KEY) is None
        assert all(torch.equal(a, b) for a, b in zip(draws(torch.float32), expected, strict=True))
    finally:
        kernels._triton.cache_clear()
