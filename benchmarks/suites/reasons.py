"""Why a test that passes on plain models fails on models regularized in place: what each of them asserts that regularizing must change."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Tests by a regular expression of their names, and of what they say when they fail."""

    test: str
    message: str
    text: str


REASONS: tuple[Reason, ...] = (
    Reason(
        r"_fx", r"torch\.fx cannot trace this \w+ where it runs the graph of graphreg",
        "torchvision's `create_feature_extractor` has torch.fx trace the model in both modes. In train mode a model in place runs a graph "
        "of graphreg, which torch.fx cannot trace; the error says so, and what to do",
    ),
)  # fmt: skip


def reason(test: str, message: str) -> str | None:
    """The reason of a difference; None if nobody has found one yet."""
    name = test.rpartition("::")[2]
    return next((each.text for each in REASONS if re.search(each.test, name) and re.search(each.message, message)), None)
