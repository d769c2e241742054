"""Names for nodes that are still to be made are those that torch.fx gives when it makes them."""

import random

from torch import fx

from graphreg.torch_internals import node_namer

CANDIDATES = [
    "relu", "relu_1", "key", "input", "sum", "x_kept", "x_kept_3", "a.b", "1x", "add", "add_2", "self", "é", "relu_kept_1_2",
]  # fmt: skip


def test_names_are_those_of_torch_fx() -> None:
    for seed in range(300):
        draw, graph, copy = random.Random(seed), fx.Graph(), fx.Graph()
        for _ in range(draw.randint(0, 6)):
            graph.create_node("placeholder", "x", name=draw.choice(CANDIDATES))
        for node in graph.nodes:
            copy.node_copy(node)
        namer = node_namer(node.name for node in graph.nodes)
        for name in draw.choices(CANDIDATES, k=6):
            assert namer(name) == copy.create_node("placeholder", "x", name=name).name, (
                f"seed {seed}: torch changed how fx.Graph names its nodes; the rewrite decides on names before it makes the nodes"
            )
