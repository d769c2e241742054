"""Four workloads, each unregularized, by hand, by forward hooks and by graphreg: the same sites, the same formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import graphreg

RATE, L1, L2 = 0.1, 1e-3, 1e-4
Outcome = tuple[Tensor, Tensor]  # the output and the sum of the penalties
Site = Callable[[Tensor], Tensor]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(512, 512), nn.ReLU())], nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    """A transformer's: attention and an MLP of four times the width, each behind its normalization."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def context(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.context(self.norm_1(x)).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm_2(x))))


class ConvNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        blocks = [m for c in (3, width, width) for m in (nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 4x512, batch 256": (MLP, (256, 512)),
    "transformer block 256, 16x128": (Block, (16, 128, 256)),
    "batch-norm conv net 64, 16x32x32": (ConvNet, (16, 3, 32, 32)),
    "resnet18, 16x64x64": (lambda: torchvision.models.resnet18(num_classes=10), (16, 3, 64, 64)),
}


def weights(model: nn.Module) -> Tensor:
    return L2 * torch.stack([w.square().mean() for w in model.parameters() if w.dim() > 1]).mean()


class Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Outcome:
        output = self.model(x)
        return output, output.new_zeros(())


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

        output = written(self.model, x, site, self.dropout)
        return output, L1 * torch.stack(found).mean() + weights(self.model)


def written(model: nn.Module, x: Tensor, site: Site, dropout: Site) -> Tensor:
    if isinstance(model, ResNet):
        return _resnet(model, x, site)
    return _block(model, x, site, dropout) if isinstance(model, Block) else _layers(model, x, site)


def _layers(model: nn.Module, x: Tensor, site: Site) -> Tensor:
    sequence = list(next(model.children()))  # type: ignore[call-overload]
    for i, layer in enumerate(sequence):
        x = layer(x)
        x = site(x) if _is_site(sequence, i) else x
    return x


def _is_site(sequence: list[nn.Module], i: int) -> bool:
    """ReLUs and pooled features; not a ReLU that is pooled next."""
    pooled_next = i + 1 < len(sequence) and isinstance(sequence[i + 1], nn.AdaptiveAvgPool2d)
    return (isinstance(sequence[i], nn.ReLU) and not pooled_next) or isinstance(sequence[i], nn.AdaptiveAvgPool2d)


def _block(model: Block, x: Tensor, site: Site, dropout: Site) -> Tensor:
    x = x + model.proj(site(model.context(model.norm_1(x))).transpose(1, 2).flatten(2))
    return x + model.down(site(model.act(model.up(dropout(model.norm_2(x))))))


def _resnet(model: ResNet, x: Tensor, site: Site) -> Tensor:
    x = site(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    blocks = [b for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for b in layer]
    for block in blocks:
        y = site(block.relu(block.bn1(block.conv1(x))))
        y = block.bn2(block.conv2(y))
        x = block.relu(y + (x if block.downsample is None else block.downsample(x)))
        x = x if block is blocks[-1] else site(x)
    return model.fc(torch.flatten(site(model.avgpool(x)), 1))


class ByHooks(nn.Module):
    """Forward hooks on the modules whose outputs are the sites; the attention's context by a hook before its projection."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dropout, self.found = model, nn.Dropout(RATE), list[Tensor]()
        if isinstance(model, Block):
            model.proj.register_forward_pre_hook(lambda _, given: (self.site(given[0]),))
            model.norm_2.register_forward_hook(lambda _, __, z: self.dropout(z))
            model.act.register_forward_hook(lambda _, __, z: self.site(z))
        elif isinstance(model, ResNet):
            for name, layer in model.named_modules():
                if name in ("maxpool", "avgpool") or (isinstance(layer, nn.ReLU) and name not in ("relu", "layer4.1.relu")):
                    layer.register_forward_hook(lambda _, __, z: self.site(z))
            # of the two calls of the last block's ReLU only the first is a site: the other is pooled
            model.layer4[1].conv2.register_forward_pre_hook(lambda _, given: (self.site(given[0]),))
        else:
            sequence = list(next(model.children()))  # type: ignore[call-overload]
            for i, layer in enumerate(sequence):
                if _is_site(sequence, i):
                    layer.register_forward_hook(lambda _, __, z: self.site(z))

    def site(self, z: Tensor) -> Tensor:
        z = self.dropout(z)
        self.found.append(z.abs().mean())
        return z

    def forward(self, x: Tensor) -> Outcome:
        self.found = []
        output = self.model(x)
        return output, L1 * torch.stack(self.found).mean() + weights(self.model)


class ByGraphreg(nn.Module):
    """Compiled as a user does it: the module compiles itself, and the penalties are summed outside."""

    def __init__(self, model: nn.Module, keywords: dict[str, float] | None = None) -> None:
        super().__init__()
        self.module = graphreg.regularize(model, **(keywords or {"hidden_dropout": RATE, "hidden_l1": L1, "weight_l2": L2}), rng=0)

    def compile(self, *args: Any, **options: Any) -> None:
        self.module.compile(*args, **options)

    def forward(self, x: Tensor) -> Outcome:
        output, penalties = self.module(x)
        return output, sum(penalties.values(), output.new_zeros(()))


class Compiled(ByGraphreg):
    """As a user compiles it who writes ``torch.compile(module)``, also with ``mode=`` or other options."""

    def compile(self, *args: Any, **options: Any) -> None:
        self.module = torch.compile(self.module, *args, **options)


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"unregularized": Plain, "by hand": ByHand, "hooks": ByHooks, "graphreg": ByGraphreg}
