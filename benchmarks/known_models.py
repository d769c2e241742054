"""Models that people train, each unregularized, by hand, by forward hooks and by graphreg: the same sites, the same formulas.

The sites are the outputs of modules that a pattern names. By hand, each of these modules is replaced by one that also has dropout and the
penalty, as a user would write it into the model's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from memory import kept_bytes
from torch import Tensor, nn

import graphreg
from workloads import L1, L2, RATE, Block, Outcome, Plain, weights


class GPT(nn.Module):
    """A decoder as GPT-2 is one, of twelve layers, with tied words."""

    def __init__(self, layers: int = 12, width: int = 384, heads: int = 6, words: int = 4096, length: int = 512) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("at", torch.arange(length), persistent=False)
        self.at: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(tokens) + self.places(self.at))))  # type: ignore[no-any-return]


class CausalBlock(Block):
    def context(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class LSTM(nn.Module):
    """Two layers of 512 units over 100 steps."""

    def __init__(self, features: int = 128, units: int = 512) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(features, units, num_layers=2, batch_first=True), nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        return self.head(out[:, -1])  # type: ignore[no-any-return]


class Residual(nn.Module):
    """The block of a diffusion U-Net: two convolutions behind group normalizations, and the time added between them."""

    def __init__(self, before: int, after: int, times: int) -> None:
        super().__init__()
        self.norm_1, self.act_1, self.conv_1 = nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(times, after)
        self.norm_2, self.act_2, self.conv_2 = nn.GroupNorm(8, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        z = self.conv_1(self.act_1(self.norm_1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv_2(self.act_2(self.norm_2(z)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over the places of an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.GroupNorm(8, width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        z = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj(z.transpose(1, 2).unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """The U-Net of a diffusion model (Ho et al. 2020): 32x32, 16x16 and 8x8, attention at 8x8; it predicts the noise of an image."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        times, wide = 4 * width, 2 * width
        self.stem, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Sequential(nn.Linear(width, times), nn.SiLU(), nn.Linear(times, times))
        self.down_1, self.pool_1 = Residual(width, width, times), nn.Conv2d(width, width, 3, 2, 1)
        self.down_2, self.pool_2 = Residual(width, wide, times), nn.Conv2d(wide, wide, 3, 2, 1)
        self.middle_1, self.attention, self.middle_2 = Residual(wide, wide, times), Attention(wide), Residual(wide, wide, times)
        self.up_2, self.up_1 = Residual(2 * wide, width, times), Residual(2 * width, width, times)
        self.norm, self.act, self.head = nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("rates", rates, persistent=False)
        self.rates: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        time = self.time(torch.cat((angles.sin(), angles.cos()), 1))
        one = self.down_1(self.stem(x), time)
        two = self.down_2(self.pool_1(one), time)
        z = self.middle_2(self.attention(self.middle_1(self.pool_2(two), time)), time)
        z = self.up_2(torch.cat((F.interpolate(z, scale_factor=2.0), two), 1), time)
        z = self.up_1(torch.cat((F.interpolate(z, scale_factor=2.0), one), 1), time)
        return self.head(self.act(self.norm(z)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Model:
    """A model with its inputs, the modules at whose outputs the regularizers act, and the goal of the compiled step."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    modules: str  # a glob of module paths
    selector: str  # what graphreg calls their outputs
    goal: float = 1.05


def _images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


MODELS = {
    "resnet50, 2x224x224": Model(
        torchvision.models.resnet50, _images(2, 3, 224, 224), "layer?.*.relu", "layer?.*.relu*"
    ),
    "timm vit_tiny_patch16_224, 4x224x224": Model(
        lambda: timm.create_model("vit_tiny_patch16_224"), _images(4, 3, 224, 224), "blocks.*.mlp.act", "blocks.*.mlp.act", 1.03
    ),
    "GPT of 12 layers, 384 wide, 1x512": Model(
        GPT, lambda: (torch.randint(4096, (1, 512)),), "blocks.*.act", "blocks.*.act", 1.03
    ),
    "LSTM 2x512, 16x100": Model(LSTM, _images(16, 100, 128), "rnn", "rnn:out"),
    "diffusion U-Net, 4x32x32": Model(
        UNet, lambda: (torch.randn(4, 3, 32, 32), torch.rand(4) * 1000), "*.act_?", "*.act_?"
    ),
}  # fmt: skip


class Log:
    """The measurements of one forward."""

    def __init__(self) -> None:
        self.values = list[Tensor]()


class Sited(nn.Module):
    """A module with dropout and a penalty behind it."""

    def __init__(self, module: nn.Module, log: Log) -> None:
        super().__init__()
        self.module, self.dropout, self.log = module, nn.Dropout(RATE), log

    def forward(self, *args: Tensor) -> Any:
        result = self.module(*args)
        z = self.dropout(result[0] if isinstance(result, tuple) else result)
        self.log.values.append(z.abs().mean())
        return (z, *result[1:]) if isinstance(result, tuple) else z


class Measured(nn.Module):
    """The output of a model and the sum of the penalties that its forward has put into a log."""

    def __init__(self, model: nn.Module, log: Log) -> None:
        super().__init__()
        self.model, self.log = model, log

    def forward(self, *args: Tensor) -> Outcome:
        self.log.values = []
        output = self.model(*args)
        return output, L1 * torch.stack(self.log.values).mean() + weights(self.model)


def sites(model: nn.Module, of: Model) -> Iterator[tuple[str, nn.Module]]:
    return ((name, each) for name, each in list(model.named_modules()) if fnmatchcase(name, of.modules))


def by_hand(model: nn.Module, of: Model) -> nn.Module:
    log = Log()
    for name, each in sites(model, of):
        model.set_submodule(name, Sited(each, log))
    return Measured(model, log)


def by_hooks(model: nn.Module, of: Model) -> nn.Module:
    log, dropout = Log(), nn.Dropout(RATE)

    def hook(_: nn.Module, __: Any, result: Any) -> Any:
        z = dropout(result[0] if isinstance(result, tuple) else result)
        log.values.append(z.abs().mean())
        return (z, *result[1:]) if isinstance(result, tuple) else z

    for _, each in sites(model, of):
        each.register_forward_hook(hook)
    measured = Measured(model, log)
    measured.dropout = dropout  # a submodule, so that it follows the mode
    return measured


class Summed(nn.Module):
    """A rewritten module whose penalties are summed. Compiled as a user does it: the module compiles itself."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def compile(self, *args: Any, **options: Any) -> None:
        self.module.compile(*args, **options)

    def forward(self, *args: Tensor) -> Outcome:
        output, penalties = self.module(*args)
        return output, sum(penalties.values(), output.new_zeros(()))


def by_graphreg(model: nn.Module, of: Model) -> nn.Module:
    here: dict[str, Any] = {name: {"weight": weight, "pattern": of.selector} for name, weight in (("dropout", RATE), ("hidden_l1", L1))}
    return Summed(graphreg.regularize(model, rng=0, **here, weight_l2=L2))


class AsItIs(Plain):
    def forward(self, *args: Tensor) -> Outcome:
        output = self.model(*args)
        return output, output.new_zeros(())


FORMS: dict[str, Callable[[nn.Module, Model], nn.Module]] = {
    "unregularized": lambda model, of: AsItIs(model), "by hand": by_hand, "hooks": by_hooks, "graphreg": by_graphreg,
}  # fmt: skip


def compiled_in_place(form: nn.Module, whole: bool) -> None:
    """Compile a form; ``whole``: as one graph. Dynamo takes no ``nn.LSTM``, so other forms of it run in parts."""
    form.compile(fullgraph=whole)


def built(name: str, form: str, compiled: bool, warm: int = 2) -> tuple[Callable[[], None], dict[str, float]]:
    """For ``alternate.py``: a step of a model in a form, and the megabytes that its forward keeps for backward."""
    of = MODELS[name]
    torch.manual_seed(0)
    inputs = of.inputs()
    module = FORMS[form](of.make(), of)
    if compiled:
        compiled_in_place(module, whole=form == "graphreg" or "LSTM" not in name)

    def step() -> None:
        module.zero_grad()
        output, penalty = module(*inputs)
        (output.square().mean() + penalty).backward()

    for _ in range(warm):
        step()
    return step, {"kept": kept_bytes(module, *inputs) / 1e6}
