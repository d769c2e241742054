"""What the tests with Lightning have in common: data of two classes, regularizers, and Lightning's advice, which they ignore."""

from __future__ import annotations

from typing import Any

import pytest
import torch

ADVICE_IGNORED = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # Lightning's advice
    "ignore:Be aware that when using .ckpt_path.",  # the checkpoint was written with a callback for writing it
    "ignore:.*LeafSpec.*:FutureWarning",  # torch's, of what Lightning uses
)
SETTINGS: dict[str, Any] = {"rng": 0, "hidden_dropout": 0.2, "weight_l2": 3.0, "hidden_l1": 2.0}
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
