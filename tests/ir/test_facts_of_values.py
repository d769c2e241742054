"""Which sites have the axes of a convolution's output, and which embeddings read an input of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.Conv1d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.max_pool2d(F.relu(self.norm(self.conv(x))) + 1, 2)
        lines = torch.tanh(self.line(maps.flatten(2)))
        return self.head(lines.mean(2))


def test_values_with_the_axes_of_a_convolution() -> None:
    spatial = {site.name: site.spatial for site in graphreg.trace(Maps()).values}
    assert spatial == {
        "x": 2, "conv": 2, "norm": 2, "relu": 2, "add": 2, "max_pool2d": 2, "flatten": 1, "line": 1, "tanh": 1, "mean": 0, "head": 0,
    }  # fmt: skip


class Parts(nn.Module):
    """Takes the first part of what ``way`` returns."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.conv, self.way, self.weight = nn.Conv2d(3, 4, 3, padding=1), way, nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.way(self.conv(x))
        first = parts if isinstance(parts, Tensor) else parts[0]
        return torch.tensordot(first, self.weight, 0)


@pytest.mark.parametrize(("way", "name"), [
    (nn.MaxPool2d(2, return_indices=True), "way"), (nn.AdaptiveMaxPool2d(2, return_indices=True), "way"),
    (lambda h: F.max_pool2d(h, 2, return_indices=True), "max_pool2d_with_indices:0"),
    (lambda h: F.fractional_max_pool2d(h, 2, output_size=2, return_indices=True), "fractional_max_pool2d_with_indices:0"),
    (lambda h: torch.std_mean(h, 1), "std_mean:0"), (lambda h: torch.cummax(h, 1), "cummax:0"), (lambda h: h.hsplit(2), "hsplit:0"),
    (lambda h: h.frexp(), "frexp:0"), (lambda h: torch.gradient(h, dim=(1, 2)), "gradient:0"), (torch.linalg.svd, "linalg_svd:0"),
    (lambda h: h.nanmedian(-1), "nanmedian:0"), (lambda h: torch.sort(h, stable=True, dim=-1), "sort:0"),
    (lambda h: F.adaptive_max_pool2d(h, 2), "adaptive_max_pool2d"),
    (lambda h: F.fractional_max_pool2d(h, 2, output_size=2), "fractional_max_pool2d"),
    (lambda h: h.max(), "max"), (lambda h: h.max(2), "max:0"), (lambda h: (h.max(2).values,), "max:0"),
    (lambda h: (torch.linalg.svd(h).S,), "linalg_svd:1"), (lambda h: (h.topk(2).values, 0), "topk:0"),
])  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_a_part_of_what_an_operation_returns_is_hidden(way: Any, name: str, known: bool) -> None:
    """torch's schemas and annotations say which operations return several tensors, so that names are the same without inputs."""
    example: dict[str, Any] = {"example_inputs": torch.randn(2, 3, 8, 8)} if known else {}
    assert [site.name for site in graphreg.trace(Parts(way), **example).values if site.role == "hidden"] == [name]


class LinearNorm(nn.Module):
    """Of Tacotron: a Linear with weights of a certain norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class RowNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


def test_a_layer_is_no_norm_for_its_name() -> None:
    sites = graphreg.trace(nn.Sequential(LinearNorm(), PreNorm(), RowNorm(), nn.Linear(4, 4))).values
    assert [site.name for site in sites if site.norm] == ["1.norm", "2.truediv"]


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.out = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        places = self.position(torch.arange(ids.shape[1]))
        again = F.embedding(kinds[:, :3], self.token.weight)
        return self.out(self.token(ids.view(-1, ids.shape[-1]).to(torch.int64)) + places + again.mean(1, keepdim=True))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_embeddings_that_read_an_input(front_end: Any) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    sites = graphreg.trace(Embeds(), (ids, ids), front_end=front_end).values
    assert {site.name: site.reads for site in sites if site.reads} == {"token": "ids", "embedding": "kinds"}
