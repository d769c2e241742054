"""The models of the benchmarks that people train: by hand, by hooks and by graphreg, they have the same penalties at the same sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import catalogue
import pytest
import timm
import torch
import torchvision
from alternate import Series
from model_steps import cells
from torch import Tensor, nn

import known_models

SMALL: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=5), lambda: (torch.randn(2, 3, 32, 32),)),
    "timm": (lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32), lambda: (torch.randn(2, 3, 32, 32),)),
    "GPT": (lambda: known_models.GPT(2, 48, 2, 100, 32), lambda: (torch.randint(100, (1, 32)),)),
    "LSTM": (lambda: known_models.LSTM(8, 16), lambda: (torch.randn(2, 10, 8),)),
    "diffusion": (lambda: known_models.UNet(16), lambda: (torch.randn(2, 3, 16, 16), torch.rand(2) * 1000)),
}


@pytest.mark.parametrize("name", known_models.MODELS)
def test_all_forms_penalize_the_same(name: str) -> None:
    of = known_models.MODELS[name]
    make, inputs = SMALL[name.split(maxsplit=1)[0].rstrip(",")]
    torch.manual_seed(0)
    given = inputs()
    found: dict[str, Any] = {}
    for form, wrap in known_models.FORMS.items():
        torch.manual_seed(1)
        module = wrap(make(), of).eval()  # without dropout
        output, penalty = module(*given)
        (output.square().mean() + penalty).backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        found[form] = output.detach(), penalty.detach(), sum(g.square().sum() for g in gradients)
    for form in ("hooks", "graphreg"):
        torch.testing.assert_close(found[form], found["by hand"])
    torch.testing.assert_close(found["graphreg"][0], found["unregularized"][0])
    assert found["graphreg"][1] > 0 and found["unregularized"][1] == 0


def test_a_row_says_where_the_goal_is_missed_and_what_fails() -> None:
    """Ratios are of the same round: 2, 2 and 2 of 1, 2 and 4 times the unregularized step."""
    plain, facts = [1.0, 2.0, 4.0], {"kept": 3.0}
    found = {
        "unregularized": Series(plain, facts), "by hand": Series([2.0, 4.0, 8.0], facts), "hooks": Series(error="RuntimeError: no"),
        "graphreg": Series([1.1, 2.2, 4.4], facts),
    }  # fmt: skip
    shown, data = cells(found, 1.05)
    assert shown == ["2000", "2.00 (2.00 to 2.00)", "fails", "1.10 (1.10 to 1.10) (missed)", "1.05", "3 / 3 / - / 3"]
    assert data["hooks"] == {"error": "RuntimeError: no"} and data["goal"] == 1.05
    assert cells(found, None)[0][3:] == ["1.10 (1.10 to 1.10)", "", "3 / 3 / - / 3"]
    assert catalogue.cell({"with": found["by hand"], "without": found["unregularized"]})[0] == "2.00 (2.00 to 2.00)"
    assert catalogue.cell({"with": found["hooks"], "without": found["unregularized"]}) == ("fails", {"error": "RuntimeError: no"})
