"""Three workloads, each unregularized, written by hand and by graphreg: the same sites, the same formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import graphreg

RATE, L1, L2 = 0.1, 1e-3, 1e-4
Outcome = tuple[Tensor, Tensor]  # the output and the sum of the penalties


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU())], nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        blocks = [m for c in (3, width, width) for m in (nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 4x512, batch 256": (MLP, (256, 512)),
    "batch-norm conv net 64, 16x32x32": (ConvNet, (16, 3, 32, 32)),
    "resnet18, 16x64x64": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64)),
}


def weights(model: nn.Module) -> Tensor:
    return L2 * torch.stack([w.square().mean() for w in model.parameters() if w.dim() > 1]).mean()


class ByHand(nn.Module):
    """What a user writes into a copy of the forward: ``nn.Dropout`` and the mean absolute value behind each hidden site."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Outcome:
        found: list[Tensor] = []

        def site(z: Tensor) -> Tensor:
            z = self.dropout(z)
            found.append(z.abs().mean())
            return z

        output = resnet(self.model, x, site) if isinstance(self.model, ResNet) else layers(self.model, x, site)
        return output, L1 * torch.stack(found).mean() + weights(self.model)


def layers(model: nn.Module, x: Tensor, site: Callable[[Tensor], Tensor]) -> Tensor:
    sequence = list(next(model.children()))  # type: ignore[call-overload]
    for i, layer in enumerate(sequence):
        x = layer(x)
        pooled_next = i + 1 < len(sequence) and isinstance(sequence[i + 1], nn.AdaptiveAvgPool2d)
        if (isinstance(layer, nn.ReLU) and not pooled_next) or isinstance(layer, nn.AdaptiveAvgPool2d):
            x = site(x)
    return x


def resnet(model: ResNet, x: Tensor, site: Callable[[Tensor], Tensor]) -> Tensor:
    x = site(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    blocks = [b for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for b in layer]
    for block in blocks:
        y = site(block.relu(block.bn1(block.conv1(x))))
        y = block.bn2(block.conv2(y))
        x = block.relu(y + (x if block.downsample is None else block.downsample(x)))
        x = x if block is blocks[-1] else site(x)
    return model.fc(torch.flatten(site(model.avgpool(x)), 1))


class ByGraphreg(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = graphreg.regularize(model, hidden_dropout=RATE, hidden_l1=L1, weight_l2=L2, rng=0)

    def forward(self, x: Tensor) -> Outcome:
        output, penalties = self.module(x)
        return output, penalties["hidden_l1"] + penalties["weight_l2"]


class Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Outcome:
        output = self.model(x)
        return output, output.new_zeros(())


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"unregularized": Plain, "by hand": ByHand, "graphreg": ByGraphreg}
