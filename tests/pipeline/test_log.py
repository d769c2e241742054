"""One INFO line a regularizer goes to the logger ``graphreg``; nothing goes to the terminal by itself."""

from __future__ import annotations

import logging

import pytest
from torch import nn

import graphreg


def test_one_line_a_regularizer(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    log = logging.getLogger("graphreg")
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    graphreg.regularize(model, hidden_dropout=0.1)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        graphreg.regularize(model, hidden_dropout=0.1, weight_l2={"weight": 1e-4, "pattern": "0.*"})
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    assert lines == [
        "INFO 0.1 BernoulliDropout '*': 1 site (hidden_dropout)",
        "INFO 0.0001 WeightL2 '0.*': 1 site (weight_l2)",
    ]
    assert capsys.readouterr() == ("", "")
