"""What Inductor and Triton make of the draws for a GPU, tested without one: ``mocked_gpu.py`` runs both as far as PTX."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from graphreg.rng.hash import _M1, _M2, _M3, _S1

pytest.importorskip("triton", reason="Triton is not installed; pip install 'graphreg[gpu]' brings it")

SCRIPT = Path(__file__).with_name("mocked_gpu.py")
FUSES_SUMS = TorchVersion(torch.__version__) >= (2, 11)  # the Inductor of torch 2.10 sums the absolute values in a kernel of its own


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("triton")
    settings = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def kernels(generated: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of a linear layer, ReLU, a mask, Gaussian noise and an L1 penalty, forward and backward."""
    found: list[dict[str, Any]] = generated["kernels"]
    return found


def that_have(kernels: list[dict[str, Any]], multiplier: int) -> list[dict[str, Any]]:
    return [each for each in kernels if re.search(rf"\D{re.escape(str(multiplier))}\D", each["source"])]


def instructions(ptx: str) -> Counter[str]:
    """How often each instruction stands in PTX."""
    return Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.]*)\s", ptx, re.MULTILINE))


def test_a_mask_is_computed_within_the_kernel_of_its_neighbours(kernels: list[dict[str, Any]]) -> None:
    """One forward kernel loads the layer's output, and has ReLU, the words of mask and noise, the absolute values and their sum."""
    drawing = [each for each in that_have(kernels, _M1) if each["phase"] == "forward"]
    assert len(drawing) == 1
    source = drawing[0]["source"]
    for multiplier in (_M1, _M2, _M3):
        assert len(re.findall(rf"\D{re.escape(str(multiplier))}\D", source)) >= 1
    for operation in ("maximum(", "tl_math.cos(", *(("tl_math.abs(", "tl.sum(") if FUSES_SUMS else ())):
        assert operation in source
    calls = [each["source"] for each in kernels if each["phase"] == "forward"]
    # the call number, the next call's keys, the kernel above, and the last sum of the penalty; without FUSES_SUMS its first one, too
    assert len(calls) == 4 + (not FUSES_SUMS)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_words_are_hashed_in_32_bits(kernels: list[dict[str, Any]], architecture: str) -> None:
    """Three multiplications for each word, and no 64-bit multiplication: a GPU makes several instructions of one."""
    (drawing,) = (each for each in that_have(kernels, _M1) if each["phase"] == "forward")
    ptx = drawing["ptx"][architecture]
    found = instructions(ptx)
    assert f".target {architecture}" in ptx
    words = 3  # one for the mask, two for the noise
    assert found["mul.lo.s32"] >= 3 * words and found["mul.lo.s32"] % (3 * words) == 0
    assert found["shr.u32"] and found["xor.b32"] and found["add.s32"]
    assert not [name for name in found if re.match(r"(mul|mad)\.(lo|hi)\.[subf]64", name)]
    assert not [name for name in found if name.startswith(("div.s", "div.u", "rem."))]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_keys_are_the_only_64_bit_arithmetic(kernels: list[dict[str, Any]], architecture: str) -> None:
    """SplitMix64 multiplies in 64 bits, once for each splice and call, in a kernel of its own."""
    (keys,) = that_have(kernels, _S1)
    assert not that_have([keys], _M1)
    found = instructions(keys["ptx"][architecture])
    assert found["mul.lo.s64"] + found["mad.lo.s64"] == 3 and found["shr.u64"] == 3 and found["xor.b64"] == 3


def test_no_cuda_graph_has_what_one_call_leaves_to_the_next(generated: dict[str, Any]) -> None:
    """Call number and keys are copied before and after the one CUDA graph of the forward; the backward has none of them."""
    forward, backward = generated["recorded"]
    assert forward.count("self.partitions[") == backward.count("self.partitions[") == 1
    before, inputs, results = re.split(r"partition0_args = \[(.*?)\]", forward)
    copied = dict(re.findall(r"(\w+) = torch\.ops\.graphreg\.unrecorded\.default\((\w+)\)", forward))
    assert len(copied) == 4
    taken = [source for source in copied.values() if source.startswith("primals_")]
    assert len(taken) == 2 and not set(taken) & set(inputs.split(", "))
    returned = re.search(r"return \((.*?)\)", results)[1].split(", ")  # type: ignore[index]
    left = [name for name, source in copied.items() if source not in taken]
    aliases = dict(re.findall(r"(\w+) = (buf\d+)$", results, re.MULTILINE))
    assert {aliases.get(name, name) for name in returned} >= set(left)
    assert not set(taken) & set(re.findall(r"\w+", backward))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernels_of_eager_draws_are_compiled(generated: dict[str, Any], architecture: str) -> None:
    found = {name: instructions(ptx[architecture]) for name, ptx in generated["eager"].items()}
    for name in ("_words_kernel", "_keep_kernel"):
        assert found[name]["mul.lo.s32"] >= 3 and found[name]["shr.u32"] and not found[name]["mul.lo.s64"]
    assert found["_keys_kernel"]["mul.lo.s64"] + found["_keys_kernel"]["mad.lo.s64"] == 3 and found["_keys_kernel"]["shr.u64"]
