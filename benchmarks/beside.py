"""Draws four models with torchview, torchinfo and graphreg, and writes docs/beside.md: ``make beside``.

It needs torchview and torchinfo, which are no dependencies of graphreg.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pygraphviz
import torch
import torchinfo
import torchview
import torchvision
from torch import Tensor, nn

import graphreg

DOCS = Path(__file__).parents[1] / "docs"
SCREEN = 1920  # pixels
PAGE = DOCS / "beside.md"


class Tagger(nn.Module):
    """An LSTM that tags words, and a head that it calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(100, 16), nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, words: Tensor) -> Tensor:
        out, (h, c) = self.rnn(self.embed(words))
        return self.head(out) + self.head(h[-1] * c[-1]).unsqueeze(1)


def gpt2() -> nn.Module:
    """GPT-2 with its twelve blocks and narrow layers: a drawing is the same for any width."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 (seconds, for this model alone)

    config = GPT2Config(n_embd=48, vocab_size=100, n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False)
    return GPT2LMHeadModel(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "resnet50": (torchvision.models.resnet50, torch.zeros(1, 3, 224, 224), {"hidden_dropout": 0.1, "weight_l2": 1e-4}),
    "swin_t": (torchvision.models.swin_t, torch.zeros(1, 3, 224, 224), {"hidden_dropout": 0.1, "weight_l2": 1e-4}),
    "gpt2": (gpt2, {"input_ids": torch.zeros(1, 16, dtype=torch.long)}, {"hidden_dropout": 0.1, "weight_l2": 1e-4}),
    "lstm": (Tagger, torch.zeros(2, 7, dtype=torch.long), {"recurrent_norm": {"weight": 0.1, "pattern": "rnn"}, "weight_l2": 1e-4}),
}


@dataclass(frozen=True)
class Drawn:
    """A drawing of one library: its file, its size in pixels, its smallest text on a screen in points, and the seconds that it took."""

    path: Path
    width: float
    height: float
    points: float
    seconds: float

    def row(self, who: str) -> str:
        return (
            f"| {who} | {self.width:,.0f} × {self.height:,.0f} | {self.points:.1f} | {self.path.stat().st_size / 1000:,.0f} kB | "
            f"{self.seconds:.1f} s |"
        )


def measured(path: Path, seconds: float) -> Drawn:
    """Read the size of an SVG, and of its smallest text if the drawing is as wide as a screen at most."""
    text = path.read_text()
    found = re.search(r'<svg[^>]*?width="([\d.]+)(pt|px|)"\s+height="([\d.]+)', text)
    assert found is not None
    unit = 4 / 3 if found[2] == "pt" else 1.0
    box = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+)', text)
    width, scale = float(found[1]) * unit, float(found[1]) * unit / float(box[1] if box else found[1])
    sizes = [float(size) for size in re.findall(r'font-size[=:]"?\s*([\d.]+)', text)]
    shown = min(1.0, SCREEN / width)
    return Drawn(path, width, float(found[3]) * unit, min(sizes) * scale * shown * 0.75, seconds)


def by_torchview(name: str, model: nn.Module, inputs: Any, folder: Path) -> Drawn:
    start = time.perf_counter()
    graph = torchview.draw_graph(model, input_data=inputs, expand_nested=True, device="cpu")
    path = folder / f"{name}_torchview.svg"
    pygraphviz.AGraph(graph.visual_graph.source).draw(str(path), prog="dot", format="svg")
    return measured(path, time.perf_counter() - start)


def by_graphreg(name: str, model: nn.Module, inputs: Any, keywords: dict[str, Any], folder: Path) -> Drawn:
    start = time.perf_counter()
    module = graphreg.regularize(model, example_inputs=inputs, rng=0, **keywords)
    path = graphreg.draw(module, folder / f"{name}_graphreg.svg")
    return measured(path, time.perf_counter() - start)


def section(name: str, folder: Path) -> str:
    """The outputs for one model."""
    make, inputs, keywords = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    summary = str(torchinfo.summary(model, input_data=inputs, depth=3, verbose=0, col_width=16)).splitlines()
    theirs = by_torchview(name, make().eval(), inputs, folder)
    ours = by_graphreg(name, model, inputs, keywords, folder)
    shown = "\n".join(line.rstrip() for line in summary[:30])
    rest = f"\n... {len(summary) - 30} more lines" if len(summary) > 30 else ""
    where = theirs.path.parent.name
    return (
        f"## {name}\n\n| drawing | pixels | smallest text on a screen, in points | file | time |\n|---|---|---|---|---|\n"
        f"{theirs.row('torchview')}\n{ours.row('graphreg')}\n\n"
        f"graphreg, with {', '.join(f'`{keyword}`' for keyword in keywords)}:\n\n![{name} by graphreg]({where}/{ours.path.name})\n\n"
        f"torchview:\n\n![{name} by torchview]({where}/{theirs.path.name})\n\n"
        f"torchinfo, {len(summary)} lines:\n\n```text\n{shown}{rest}\n```\n"
    )


def main() -> None:
    folder = DOCS / "beside"
    folder.mkdir(exist_ok=True)
    head = PAGE.read_text().split("\n## resnet50")[0].rstrip()
    head = re.sub(r"torchview [\d.]+ and torchinfo [\d.]+", f"torchview {version('torchview')} and torchinfo {version('torchinfo')}", head)
    PAGE.write_text(f"{head}\n\n" + "\n".join(section(name, folder) for name in MODELS))
    print(PAGE.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
