"""The mark ``#normed``: which values every reader takes into a batch norm, judged by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphreg

X = torch.randn(3, 4)


class Model(nn.Module):
    """Layers for the forwards below: ``forward`` calls the function that it was made with."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn, self.wide, self.ln, self.loose = nn.BatchNorm1d(4), nn.BatchNorm1d(8), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False)
        self.untracked, self.drop, self.scale = nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(0.1), nn.Parameter(torch.ones(4))
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def normed(model: nn.Module, inputs: Any = None, **options: Any) -> dict[str, str]:
    return {site.name: site.normed for site in graphreg.trace(model, inputs, **options).values if site.normed}


CASES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "at once": (lambda m, x: m.b(m.bn(x)), {"x": "bn"}),
    "a layer": (lambda m, x: m.bn(m.a(x)), {"x": "bn", "a": "bn"}),
    "views": (lambda m, x: m.bn(m.a(x.view(-1, 4)).reshape(-1, 4)), {"x": "bn", "view": "bn", "a": "bn", "reshape": "bn"}),
    "two layers": (lambda m, x: m.bn(m.b(m.a(x))), {"x": "bn", "a": "bn", "b": "bn"}),
    "a function before the layer": (lambda m, x: m.bn(m.a(F.relu(x))), {"x": "bn", "relu": "bn", "a": "bn"}),
    "a function behind the layer": (lambda m, x: m.bn(F.relu(m.a(m.drop(x)))), {"x": "bn", "drop": "bn", "a": "bn", "relu": "bn"}),
    "a function between two layers": (lambda m, x: m.bn(m.b(F.relu(m.a(x)))), {"a": "bn", "relu": "bn", "b": "bn"}),
    "scaled by a parameter": (lambda m, x: m.bn(x * m.scale + 1), {"x": "bn", "mul": "bn", "add": "bn"}),
    "beside another": (lambda m, x: m.wide(torch.cat([x, F.relu(x)], 1)), {"x": "wide", "relu": "wide", "cat": "wide"}),
    "without scale and shift": (lambda m, x: m.loose(x), {"x": "loose"}),
    "as a function": (lambda m, x: F.batch_norm(m.a(x), m.bn.running_mean, m.bn.running_var), {"x": "batch_norm", "a": "batch_norm"}),
    "two norms": (lambda m, x: m.bn(m.a(x)) + m.loose(m.b(x)), {"x": "bn", "a": "bn", "b": "loose"}),
    # elsewhere
    "another norm": (lambda m, x: m.bn(m.ln(x)), {"ln": "bn"}),
    "one of two readers": (lambda m, x: x + m.bn(m.a(x)), {"a": "bn"}),
    "a sum": (lambda m, x: m.bn(m.a(x) + x), {"add": "bn"}),
    "returned, too": (lambda m, x: (m.bn(x), x), {}),
    "no running variance": (lambda m, x: m.untracked(x), {}),
    "a gate": (lambda m, x: m.bn(x * torch.sigmoid(m.a(x))), {"mul": "bn"}),
    "only its size is read otherwise": (lambda m, x: m.bn(x) + x.shape[0], {"x": "bn"}),
}  # fmt: skip


BY_EXPORT = ("views", "as a function", "two norms", "one of two readers", "only its size is read otherwise")


@pytest.mark.parametrize("name", CASES)
def test_what_every_reader_takes_into_a_batch_norm(name: str) -> None:
    call, expected = CASES[name]
    model = Model(call)
    assert normed(model) == expected
    if name in BY_EXPORT:  # where its operators, or the names of the norms, are other ones
        assert list(normed(model, X, front_end="export").values()) == list(expected.values())


def test_of_a_block_of_resnet() -> None:
    resnet = torchvision.models.resnet18(num_classes=3)
    hidden = {site.name: site for site in graphreg.trace(resnet).values if site.role == "hidden"}
    assert [name for name, site in hidden.items() if not site.marks] == ["avgpool"]
    # inside a block; what a block hands on to the next; what the first block of a stage reads: there the shortcut has a batch norm, too
    marks = {name: hidden[name].marks for name in ("layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu_1", "maxpool")}
    assert marks == {
        "layer1.0.relu": ("normed",), "layer1.0.relu_1": ("trunk",), "layer1.1.relu_1": ("trunk", "normed"), "maxpool": ("trunk",),
    }  # fmt: skip
    assert hidden["layer4.1.relu"].normed == "layer4.1.bn2" and hidden["layer4.0.relu_1"].trunk == "maxpool"
