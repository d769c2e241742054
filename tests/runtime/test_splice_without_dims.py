"""Splices at values without dims and of half precision, which a strength in float32 would promote. NNSmith's models found it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, GaussianDropout, GaussianNoise


class Mean(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).mean() * 2


@pytest.mark.parametrize(
    ("splice", "dtype", "compiled"),
    [
        (BernoulliDropout, torch.float16, True),
        (BernoulliDropout, torch.bfloat16, False),
        (GaussianNoise, torch.float16, False),
        (GaussianNoise, torch.bfloat16, True),
        (GaussianDropout, torch.float16, True),
        (GaussianDropout, torch.bfloat16, False),
    ],
)
def test_it_keeps_its_dtype_eager_and_compiled(splice: type[BernoulliDropout], dtype: torch.dtype, compiled: bool) -> None:
    x, changed = torch.linspace(0.5, 1.5, 4), 0
    for rng in range(3):
        module = graphreg.regularize(Mean(dtype), splice("mean", 0.5), example_inputs=x, rng=rng)
        again = graphreg.regularize(Mean(dtype), splice("mean", 0.5), example_inputs=x, rng=rng)
        eager = module(x).output
        assert eager.dtype == dtype and eager.shape == ()
        if not rng and compiled:
            torch.testing.assert_close(torch.compile(again, backend="aot_eager", fullgraph=True)(x).output, eager)
        changed += eager.item() != 2.0
    assert changed  # the splice acts
