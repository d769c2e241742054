"""The report says which parameters a penalty and an optimizer's weight decay both act on."""

from __future__ import annotations

import torch
from torch import nn

import graphreg


def notes(module: nn.Module) -> list[str]:
    return [note for note in graphreg.report(module, cost=False).notes if note.startswith("decayed, too")]


def test_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module = graphreg.regularize(net, weight_l2=0.1, weight_l1={"weight": 0.1, "pattern": "0.*"}, hidden_dropout=0.1)
    assert notes(module) == []
    optimizer = torch.optim.AdamW(graphreg.param_groups(module, {"1.*": {"weight_decay": 0.0}}, default={"weight_decay": 0.05}), lr=0.1)
    assert notes(module) == [
        "decayed, too: AdamW has weight_decay=0.05 for 1 of the parameters that weight_l2, weight_l1 penalizes (0.weight). If one of the "
        "two is enough, graphreg.param_groups(module, {selector: {'weight_decay': 0}}) leaves these without decay"
    ]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0
    assert notes(module) == []
