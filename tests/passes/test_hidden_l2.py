from __future__ import annotations

import torch
import torch.nn.functional as F

from graphreg.passes import HiddenL2
from penalties import agrees, before_and_after, nothing_else_changes, of, on_values, random, refused, same_compiled


def test_before_and_after() -> None:
    before_and_after(on_values("hidden_l2"), hidden_l2=1.0)


def test_by_hand() -> None:
    """a = [[1, 2], [3, -0.5]], h = relu(a) = [[1, 2], [3, 0]]: mean a² = 14.25/4, mean h² = 14/4, and both on average."""
    for selector, value in (("a", 14.25 / 4), ("act", 3.5), (["a", "act"], 28.25 / 8)):
        assert of(HiddenL2(selector, 0.5)) == 0.5 * value


def test_against_torch_and_differences() -> None:
    agrees(HiddenL2("*", 1.0), lambda z: F.mse_loss(z, torch.zeros_like(z)), random(3, 2, 4))


def test_compiled() -> None:
    same_compiled(HiddenL2("*", 0.5))


def test_what_must_not_change() -> None:
    nothing_else_changes(HiddenL2("*", 0.5))


def test_errors() -> None:
    refused("HiddenL2: weight=-1.0 is not allowed; weight must be 0 or more.", lambda: HiddenL2("*", -1))
