"""The table of regularizers in the benchmarks: each of them is in it, and regularizes its model."""

from __future__ import annotations

import catalogue
import pytest

import graphreg


def test_every_regularizer_has_its_line() -> None:
    classes = {cls for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.")}
    assert {graphreg.registered()[keyword] for keyword in catalogue.REGULARIZERS} == classes


@pytest.mark.filterwarnings("ignore:.*several times in a row")
@pytest.mark.parametrize("keyword", catalogue.REGULARIZERS)
def test_it_regularizes(keyword: str) -> None:
    make, inputs = catalogue.MODELS[catalogue.REGULARIZERS[keyword][0]]
    x = inputs()
    output, penalty = catalogue.regularized(keyword, make(), x)(x)
    (output.square().mean() + penalty).backward()
    assert output.isfinite().all() and penalty.isfinite()
