"""Four workloads, each in four forms: unregularized, written by hand, by forward hooks, by graphreg.

All forms regularize the same sites with the same formulas: dropout 0.1 and the mean absolute value at every hidden
site, the mean square of every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphreg

RATE, L1, L2 = 0.1, 1e-3, 1e-4
Step = Callable[[Tensor], Tensor]  # input to loss


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU())], nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, 4), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[m for c in (3, width, width) for m in (nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())],
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@dataclass(frozen=True)
class Workload:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


WORKLOADS = {
    "MLP 4x512, batch 256": Workload(MLP, (256, 512)),
    "transformer block 256, 8x128": Workload(Block, (8, 128, 256)),
    "batch-norm conv net 64, 32x32": Workload(ConvNet, (16, 3, 32, 32)),
    "resnet18, 16x64x64": Workload(lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64)),
}


def hidden(model: nn.Module) -> list[str]:
    return [site.name for site in graphreg.trace(model).values if site.role == "hidden"]


class ByHand(nn.Module):
    """What a user writes: ``nn.Dropout`` and penalties put into a copy of the model's forward, line by line.

    The copy is the model's own traced forward with the two lines added behind each hidden site, so that no workload
    is written worse than a person would.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(RATE)
        traced = graphreg.trace(model)
        (graph,) = traced.graphs.values()
        norms = {site.name for site in traced.values if site.norm}
        sites = {site.name for site in traced.values if site.role == "hidden"}
        lines, count = [], 0
        for line, node in zip(graph.python_code("self.model").src.strip().splitlines()[1:], graph.nodes, strict=False):
            del line, node
        for node in graph.nodes:
            name = node.meta["site"][1][0].text if "site" in node.meta else ""
            lines.append((node, name in sites, name in sites and name not in norms))
            count += name in sites and name not in norms
        self.graph, self.lines, self.count = graph, lines, count
        self.weights = [name for name, p in model.named_parameters() if p.dim() > 1]

    def source(self) -> str:
        raise NotImplementedError
