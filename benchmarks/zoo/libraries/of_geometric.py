"""torch_geometric: models of nodes and edges, and of whole graphs, on one small graph."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from zoo.libraries.made import Entry, provider
from zoo.providers import Inputs, numbers

NODES, WIDTH, HIDDEN, CLASSES = 10, 6, 8, 3
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 2, 4, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 5, 7, 9, 1]])
HALVES = torch.tensor([0] * 5 + [1] * 5)  # which of two graphs a node is of


class Convolved(nn.Module):
    """Two layers of one kind, as the library's examples have them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.drop = first, second, nn.Dropout(0.5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        found: Tensor = self.second(self.drop(torch.relu(self.first(x, edge_index))), edge_index)
        return found


class Graphs(nn.Module):
    """A class for each graph: layers, the mean over its nodes, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pyg.GraphConv(WIDTH, HIDDEN), pyg.GraphConv(HIDDEN, HIDDEN)
        self.norm, self.head = pyg.BatchNorm(HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x, edge_index)))
        h = torch.relu(self.second(h, edge_index))
        found: Tensor = self.head(pyg.global_mean_pool(h, batch))
        return found


def graph() -> Inputs:
    return numbers(NODES, WIDTH), EDGES


def graphs() -> Inputs:
    return numbers(NODES, WIDTH), EDGES, HALVES


def convolved(kind: Any, **options: Any) -> nn.Module:
    return Convolved(kind(WIDTH, HIDDEN, **options), kind(HIDDEN, CLASSES, **options))


def basic(kind: Any, **options: Any) -> nn.Module:
    return kind(WIDTH, HIDDEN, num_layers=2, out_channels=CLASSES, dropout=0.1, **options)  # type: ignore[no-any-return]


def isomorphic() -> nn.Module:
    return Convolved(pyg.GINConv(pyg.MLP([WIDTH, HIDDEN, HIDDEN])), pyg.GINConv(pyg.MLP([HIDDEN, HIDDEN, CLASSES])))


def molecule() -> Inputs:
    return torch.tensor([1, 6, 8, 1, 6, 7, 1, 1, 6, 8]), numbers(NODES, 3), HALVES


def entries() -> dict[str, Entry]:
    layers = {
        "GCNConv": {},
        "SAGEConv": {},
        "GATConv": {},
        "GATv2Conv": {},
        "GraphConv": {},
        "TransformerConv": {},
        "ChebConv": {"K": 2},
        "TAGConv": {},
        "SGConv": {},
        "ARMAConv": {},
        "LEConv": {},
        "ClusterGCNConv": {},
        "FiLMConv": {},
        "ResGatedGraphConv": {},
    }
    models: dict[str, Any] = {
        "GCN": {},
        "GraphSAGE": {},
        "GIN": {},
        "GAT": {},
        "GAT v2": {"v2": True, "jk": "cat"},
        "EdgeCNN": {},
        "GraphSAGE with norms": {"norm": "BatchNorm", "jk": "lstm"},
    }
    of_layers = {
        f"two of {name}": Entry(partial(convolved, getattr(pyg, name), **options), graph, "layers") for name, options in layers.items()
    }
    basics = {
        name: Entry(partial(basic, getattr(pyg, name.partition(" ")[0]), **options), graph, "models") for name, options in models.items()
    }
    return (
        basics
        | of_layers
        | {
            "two of GINConv": Entry(isomorphic, graph, "layers"),
            "graph classifier": Entry(Graphs, graphs, "graphs"),
            "GraphUNet": Entry(lambda: pyg.GraphUNet(WIDTH, HIDDEN, CLASSES, depth=2), graph, "models"),
            "DeepGCN": Entry(
                lambda: pyg.Sequential(
                    "x, edge_index",
                    [
                        (nn.Linear(WIDTH, HIDDEN), "x -> x"),
                        (
                            pyg.DeepGCNLayer(pyg.GENConv(HIDDEN, HIDDEN), pyg.LayerNorm(HIDDEN), nn.ReLU(), dropout=0.1),
                            "x, edge_index -> x",
                        ),
                        (nn.Linear(HIDDEN, CLASSES), "x -> x"),
                    ],
                ),
                graph,
                "models",
            ),
            "LINKX": Entry(lambda: pyg.LINKX(NODES, WIDTH, HIDDEN, CLASSES, num_layers=2), graph, "models"),
            "MLP": Entry(lambda: pyg.MLP([WIDTH, HIDDEN, CLASSES], dropout=0.1), lambda: (numbers(NODES, WIDTH),), "models"),
            "AttentiveFP": Entry(
                lambda: pyg.AttentiveFP(WIDTH, HIDDEN, CLASSES, edge_dim=2, num_layers=2, num_timesteps=2),
                lambda: (numbers(NODES, WIDTH), EDGES, numbers(EDGES.shape[1], 2, seed=1), HALVES),
                "graphs",
            ),
            "SchNet": Entry(
                lambda: pyg.SchNet(HIDDEN, num_filters=HIDDEN, num_interactions=2, num_gaussians=5, interaction_graph=near),
                molecule,
                "graphs",
            ),
            "GAE encoder": Entry(lambda: pyg.GAE(pyg.GCN(WIDTH, HIDDEN, 2)), graph, "models"),
            "PMLP": Entry(lambda: pyg.PMLP(WIDTH, HIDDEN, CLASSES, num_layers=2), graph, "models"),
            "SGFormer": Entry(lambda: pyg.SGFormer(WIDTH, HIDDEN, CLASSES), graphs, "models"),
            "Polynormer": Entry(lambda: pyg.Polynormer(WIDTH, HIDDEN, CLASSES, local_layers=2, global_layers=1), graphs, "models"),
            "RECT_L": Entry(lambda: pyg.RECT_L(WIDTH, HIDDEN), graph, "models"),
            "NeuralFingerprint": Entry(lambda: pyg.models.NeuralFingerprint(WIDTH, HIDDEN, CLASSES, num_layers=2), graphs, "graphs"),
            "LightGCN": Entry(lambda: pyg.LightGCN(NODES, HIDDEN, 2), lambda: (EDGES,), "models"),
        }
    )


def near(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """SchNet's own search for neighbours needs a library that is compiled."""
    source, target = EDGES
    return EDGES, (positions[source] - positions[target]).norm(dim=-1)


PROVIDER = provider(entries)
