"""Numbers among the options of a regularizer, and options that must be given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from graphreg import Penalty, RegularizerError, Site, plan, required, trace


class Power(Penalty):
    power: float = required()

    def check(self) -> None:
        super().check()
        self.require_number("power", lambda power: power > 0, "above 0")

    def why_not(self, site: Site) -> str:
        return "it is called nowhere. Select another." if site.name.endswith("1") else ""

    def __call__(self, z: Tensor) -> Tensor:
        return z.abs().pow(self.power).mean()


def test_numbers_of_other_kinds_become_numbers() -> None:
    for value in (2, np.float32(2), torch.tensor(2.0)):
        assert type(Power("*", 0.1, power=value).power) is float and Power("*", 0.1, power=value).power == 2  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    with pytest.raises(RegularizerError, match=r"Power: power was not given; it must be a number above 0\. Write Power\('\*', 0.1, power="):
        Power("*", 0.1)
    for value in (0, -1.0, float("nan"), "2", None, True):
        with pytest.raises(RegularizerError, match="Power: power=.* is not allowed; power must be a number above 0"):
            Power("*", 0.1, power=value)  # type: ignore[arg-type]


def test_a_site_where_the_class_cannot_act() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    with pytest.raises(RegularizerError, match=r"Power at 1: it is called nowhere\. Select another\."):
        plan(trace(model), Power("*", 0.1, power=2))
    assert [edit.site.name for edit in plan(trace(model), Power("0", 0.1, power=2)).edits] == ["0"]
