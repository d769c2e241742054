"""The pictures of docs/drawing.md, docs/page.md and the README: ``python examples/drawings.py`` makes them anew, ``make drawings`` too.

The picture of the page needs Chromium (Debian: chromium and chromium-driver) and selenium; without them it is left as it is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphreg

DOCS = Path(__file__).parents[1] / "docs"


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.ln1, self.ln2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


def resnet(depth: int) -> nn.Module:
    """A residual network with the regularizers of the first example in docs/start.md."""
    make = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}[depth]
    return graphreg.regularize(
        make(num_classes=10),
        example_inputs=torch.zeros(2, 3, 64, 64),
        dropout={("!#normed", "!#trunk"): 0.2},
        hidden_l1={"strength": 0.1, "pattern": "layer[34].*"},
        weight_l2={"strength": 1e-4, "pattern": "fc.*", "reduction": "sum"},
        rng=0,
    )


def before_and_after(folder: Path) -> list[Path]:
    """The README's pictures: a block of resnet18 by itself, and with regularizers."""
    block, x = torchvision.models.resnet.BasicBlock(64, 64), torch.zeros(2, 64, 16, 16)
    module = graphreg.regularize(
        block,
        example_inputs=x,
        drop_path=0.1,
        hidden_l1={"strength": 0.1, "pattern": "relu_1"},
        weight_l2={"strength": 1e-4, "pattern": "conv*.weight", "reduction": "sum"},
        rng=0,
    )
    return [
        graphreg.draw(graphreg.trace(block, x), folder / "block_before.svg"),
        graphreg.draw(module, folder / "block_after.svg"),
    ]


def drawings(folder: Path) -> list[Path]:
    """resnet18 with its layers folded, and a transformer's block in full."""
    block = graphreg.regularize(
        Block(),
        example_inputs=torch.zeros(2, 10, 64),
        hidden_dropout=0.1,
        weight_l2={"strength": 1e-4, "pattern": "mlp.*", "reduction": "sum"},
        rng=0,
    )
    return [graphreg.draw(resnet(18), folder / "resnet18.svg", level=1), graphreg.draw(block, folder / "block.svg", level=9)]


def page(folder: Path, chrome: Any, depth: int = 50) -> Path:
    """The page of a residual network with a selector tried on it, as a browser shows it."""
    with tempfile.TemporaryDirectory() as work:
        chrome.get(graphreg.draw(resnet(depth), Path(work) / "resnet.html").as_uri())
        chrome.find_element("id", "selector").send_keys("layer[34].*@ReLU")
        for step in ("go('layer4.1/')", "toggle('layer4.1/')", "go('layer4.1.relu')", "scene.zoom(0.8)"):
            chrome.execute_script(f"graphreg.{step}")
        chrome.save_screenshot(str(folder / "page.png"))
    return folder / "page.png"


def main() -> int:
    made = [*before_and_after(DOCS), *drawings(DOCS)]
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser and driver:
        from selenium import webdriver  # noqa: PLC0415

        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,860"):
            options.add_argument(argument)
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
            made.append(page(DOCS, chrome))
    print("\n".join(str(path.relative_to(DOCS.parent)) for path in made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
