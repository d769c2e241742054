"""What graphreg shows of a small model: python examples/see.py report, or python examples/see.py diff

docs/report.md and docs/diff.md have what it prints; tests/reporting/test_see.py holds them equal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

import graphreg

IMAGES = torch.zeros(16, 1, 10, 10)


class Digits(nn.Module):
    """A small conv net with two dropouts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.drop1, self.drop2 = nn.Dropout2d(0.1), nn.Dropout(0.5)
        self.hid, self.out = nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        h = self.drop1(torch.max_pool2d(h, 2)).flatten(1)
        return self.out(self.drop2(torch.relu(self.hid(h))))


class Steady(nn.Module):
    """Another structure in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(self.hid(x).relu())
        return h if self.training else h.softmax(-1)


def regularized() -> fx.GraphModule:
    """Dropout and a penalty at the hidden values, another on weights, and one native dropout moved."""
    return graphreg.regularize(
        Digits(),
        example_inputs=IMAGES,
        hidden_dropout=0.1,
        hidden_l1={"strength": 1e-3, "pattern": ["relu*"], "clean": True},
        weight_l2={"strength": 1e-4, "pattern": ["*.weight", "head.*"], "reduction": "sum"},
        own_dropout={"drop2": "seeded"},
        missing="ignore",  # "head.*" matches nothing, which the report says
        rng=0,
    )


def see_report() -> Iterator[str]:
    """At 80 columns and at 160, and of a plan that was made without example inputs."""
    report = graphreg.report(regularized())
    yield report.text(80)
    yield report.text(160)
    plan = graphreg.plan(graphreg.trace(Digits()), graphreg.build("dropout", strength=0.2, pattern="relu*"), own_dropout="seeded")
    yield graphreg.report(plan).text()


def see_diff() -> Iterator[str]:
    """Against the model, between two settings, and of a model that has a forward for each mode. At 88 columns, those of the site."""
    first = regularized()
    yield graphreg.diff(first).text(88)
    stronger = graphreg.build("dropout", strength=0.2, pattern="relu_1", name="hidden_dropout")
    yield graphreg.diff(first, graphreg.regularize(Digits(), stronger, own_dropout={"drop2": "seeded"}, rng=0), context=1).text(88)
    yield graphreg.diff(graphreg.regularize(Steady(), hidden_dropout=0.1)).text(88)


WHAT = {"report": see_report, "diff": see_diff}

if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in WHAT]:
        raise SystemExit(f"python examples/see.py {' | '.join(WHAT)}")
    print("\n\n".join(WHAT[sys.argv[1]]()))
