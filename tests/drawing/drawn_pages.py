"""Pages that several tests open, each drawn once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torchvision.models as tv
from torch import nn

import graphreg
from drawn_nets import GPT, Again, Blocks, Tagger

IDS = torch.zeros(2, 7, dtype=torch.long)
IMAGE = torch.zeros(1, 3, 64, 64)


def regularized(name: str) -> nn.Module:
    if name == "resnet50":
        return graphreg.regularize(tv.resnet50(), example_inputs=IMAGE, rng=0, hidden_dropout=0.1, hidden_l1=1e-3, weight_l2=1e-4)
    if name == "gpt":
        return graphreg.regularize(GPT(12), example_inputs=IDS, rng=0, hidden_dropout=0.1, weight_l2=1e-4, own_dropout="seeded")
    if name == "masked":
        return graphreg.regularize(Blocks(12), example_inputs=torch.zeros(2, 8), rng=0, hidden_dropout=0.1)
    if name == "lstm":
        penalty = {"weight": 1.0, "pattern": "rnn"}
        return graphreg.regularize(Tagger(), example_inputs=IDS, rng=0, recurrent_norm=penalty, dropout={"rnn:*": 0.2}, weight_l1=1e-3)
    return graphreg.regularize(Again(), hidden_dropout=0.1, contractive={"weight": 0.1, "pattern": "twice"}, rng=0)


@cache
def drawn(folder: Path, name: str) -> Path:
    return graphreg.draw(regularized(name), folder / f"{name}.html")
