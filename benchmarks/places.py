"""What dropout does to train mode and eval mode where it feeds a batch norm or lies on the trunk: the figures of docs/where.md.

``python benchmarks/places.py`` prints the table and draws ``docs/places.svg``; five minutes of one core. Nothing is trained: each model
runs in train mode on random inputs, as often as its batch norms need to know their variances, and then in both modes on the same inputs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn

import graphreg

RATE, CALLS, EXAMPLES = 0.1, 60, 32
PLACES: dict[str, Any] = {"none": None, "all hidden": "*", "!#normed, !#trunk": ("!#normed", "!#trunk")}


class Model(nn.Module):
    """A model in two parts, its blocks and what stands behind them. It returns what the last block returns, too."""

    def __init__(self, blocks: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last = self.blocks(x)
        last = last if isinstance(last, Tensor) else last.last_hidden_state
        return last, self.head(last)


def resnet18() -> Model:
    *blocks, pool, head = torchvision.models.resnet18().children()
    return Model(nn.Sequential(*blocks), nn.Sequential(pool, nn.Flatten(), head))


def vit() -> Model:
    model = torchvision.models.VisionTransformer(64, 8, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    head = nn.Sequential(model.encoder.ln, model.heads)
    model.encoder.ln = model.heads = nn.Identity()
    return Model(model, head)


def convnext() -> Model:
    # As after training: at first, the scales of the branches are 1e-6, and the trunk is all there is.
    settings = [torchvision.models.convnext.CNBlockConfig(*widths) for widths in ((48, 96, 3), (96, 192, 3), (192, 384, 9), (384, None, 3))]
    model = torchvision.models.ConvNeXt(settings, layer_scale=0.5)
    return Model(model.features, nn.Sequential(model.avgpool, model.classifier))


def gpt2() -> Model:
    from transformers import GPT2Config, GPT2Model  # noqa: PLC0415

    own = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": 12, "n_embd": 192, "n_head": 3, "vocab_size": 500}
    model = GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False, **own))
    head = nn.Sequential(model.ln_f, nn.Linear(192, 500))
    model.ln_f = nn.Identity()
    return Model(model, head)


MODELS: dict[str, Callable[[], Model]] = {"resnet18": resnet18, "ViT": vit, "ConvNeXt": convnext, "GPT-2": gpt2}


def inputs(name: str) -> Tensor:
    return torch.randint(500, (EXAMPLES, 64)) if name == "GPT-2" else torch.randn(EXAMPLES, 3, 64, 64)


@torch.no_grad()
def measured(name: str, pattern: Any) -> tuple[int, float, float]:
    """The number of sites, and the RMS of the last block's output in train mode and in eval mode."""
    torch.manual_seed(0)
    keywords = {} if pattern is None else {"dropout": {pattern: RATE}}
    module = graphreg.regularize(MODELS[name](), example_inputs=inputs(name), rng=0, **keywords)
    has_batch_norm = any(isinstance(each, nn.BatchNorm2d) for each in module.modules())
    for _ in range(CALLS * has_batch_norm):
        module(inputs(name))
    given = inputs(name)
    train, evaluated = (module.train(mode)(given).output[0].square().mean().sqrt().item() for mode in (True, False))
    return len(graphreg.report(module).sites), train, evaluated


def drawn(ratios: Mapping[str, Sequence[float]]) -> Figure:
    """Bars of train / eval, for each model and place. The ground is white, so that it reads the same on a dark page."""
    figure = Figure(figsize=(7, 3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for number, (place, shade) in enumerate(zip(PLACES, ("#c5c9d1", "#c4552d", "#0f6fb0"), strict=True)):
        places = [row + (number - 1) * 0.27 for row in range(len(ratios))]
        bars = axes.barh(places, [of[number] - 1 for of in ratios.values()], 0.25, left=1, color=shade, label=place)
        axes.bar_label(bars, [f"{of[number]:.2f}" for of in ratios.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set(xlabel=f"RMS behind the last block, train mode / eval mode, dropout {RATE:g}", xlim=(0.97, None))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure


def main() -> int:
    logging.getLogger("graphreg").setLevel(logging.ERROR)  # it would say what is measured here
    print(f"| model | dropout {RATE:g} at | sites | train | eval | train / eval |\n|---|---|---|---|---|---|")
    ratios = dict[str, list[float]]()
    for name in MODELS:
        for place, pattern in PLACES.items():
            count, train, evaluated = measured(name, pattern)
            print(f"| {name} | {place} | {count} | {train:.3g} | {evaluated:.3g} | {train / evaluated:.2f} |", flush=True)
            ratios.setdefault(name, []).append(train / evaluated)
    matplotlib.rcParams |= {"svg.hashsalt": "places", "svg.fonttype": "none"}
    drawn(ratios).savefig(Path(__file__).parents[1] / "docs" / "places.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
