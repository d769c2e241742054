"""Ten real models, with random weights, at small input sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn


class Mixed(nn.Module):
    """A functional dropout, tied weights, a layer called twice, two inputs and a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(20, 64)
        self.again = nn.Linear(64, 64)
        self.other = nn.Linear(8, 64)
        self.head = nn.Linear(64, 5)
        self.twin = nn.Linear(64, 5)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.encode(x))
        h = F.dropout(h, 0.2, self.training)
        h = torch.tanh(self.again(h))
        h = torch.tanh(self.again(h) + self.other(y))
        back = F.linear(h, self.encode.weight.t())
        return {"class": self.head(h), "twin": self.twin(h), "back": back}


def image(size: int, batch: int = 2) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)),)


TEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "resnet18": (lambda: tv.resnet18(num_classes=10), lambda: image(64)),
    "densenet121": (lambda: tv.densenet121(num_classes=10), lambda: image(64)),
    "mobilenet_v3_small": (lambda: tv.mobilenet_v3_small(num_classes=10), lambda: image(64)),
    "efficientnet_b0": (lambda: tv.efficientnet_b0(num_classes=10), lambda: image(64)),
    "googlenet": (lambda: tv.googlenet(num_classes=10, init_weights=False), lambda: image(96)),
    "swin_t": (lambda: tv.swin_t(num_classes=10), lambda: image(64)),
    "vit_b_16": (lambda: tv.vit_b_16(num_classes=10, image_size=32), lambda: image(32)),
    "vgg11_bn": (lambda: tv.vgg11_bn(num_classes=10), lambda: image(32)),
    "deeplabv3_resnet50": (
        lambda: tv.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5),
        lambda: image(64),
    ),
    "mixed_mlp": (Mixed, lambda: (torch.randn(32, 20), torch.randn(32, 8))),
}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = TEN[name]
    return make(), inputs()


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, dict) else output
    return [tensor for item in items if item is not None for tensor in tensors(item)]
