"""Training, the same for every network of the study: Adam, and a rate that falls to 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphreg

LEARNED = 10  # what a regularizer learns has this multiple of the learning rate

Draw = Callable[[torch.Generator], tuple[Tensor, Any]]  # a batch: what the network gets, and what the loss compares its output with
Loss = Callable[[Any, Any], Tensor]
Outcome = dict[str, float]


@dataclass(frozen=True)
class Fitted:
    """A trained network, the rewritten module that shares its weights, in eval mode, and the losses of all steps, without penalties."""

    net: nn.Module
    module: nn.Module
    losses: list[float]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x).output
        return output


def minibatch(x: Tensor, y: Tensor, batch: int) -> Draw:
    """Batches of ``batch`` rows, drawn without replacement within a batch."""

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(x), generator=generator)[:batch]
        return x[rows], y[rows]

    return draw


def fit(
    net: nn.Module, keywords: Mapping[str, Any], draw: Draw, seed: int, *, steps: int, rate: float, loss: Loss = cross_entropy
) -> Fitted:
    """Train. The batches depend on the seed alone, so that networks with the same seed see the same ones."""
    generator = torch.Generator().manual_seed(seed)
    module = graphreg.regularize(net, example_inputs=draw(torch.Generator().manual_seed(0))[0], rng=seed, **keywords)
    own = {id(p) for p in net.parameters()}
    groups = [([p for p in module.parameters() if (id(p) in own) is mine], rate * (1 if mine else LEARNED)) for mine in (True, False)]
    optimizer = torch.optim.Adam([{"params": group, "lr": at} for group, at in groups if group], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(steps):
        x, target = draw(generator)
        output, penalties = module(x)
        task = loss(output, target)
        optimizer.zero_grad()
        (task + sum(penalties.values())).backward()
        optimizer.step()
        schedule.step()
        losses.append(task.item())
    return Fitted(net, module.eval(), losses)
