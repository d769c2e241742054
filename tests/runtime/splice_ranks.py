"""One of several ranks (gloo) that splice DTensors, which test_splices_on_meshes.py starts.

``main`` returns, by way, what the ranks compute on DTensors, and what one process computes on the whole values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import graphreg

SHAPES = ((4, 6, 8), (5, 7, 3), (9, 3, 2), (1, 2, 3), (3, 1, 2))  # equal parts, unequal ones, and ranks that have nothing
Way = tuple[list[Any], list[Any]]


class Elementwise(nn.Module):
    """Treats each element by itself: what a rank computes for its part does not depend on the other parts."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).tanh() * x


class Rows(nn.Module):
    """Treats each row by itself: so does a rank that has a part of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).sigmoid()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Whole(nn.Module):
    """A linear layer with whole numbers, whose sums are exact in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4, bias=False)
        self.linear.weight.data.random_(-4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2


EACH: dict[str, Any] = {  # draws for each element, row and unit
    "dropout": {"pattern": "add", "weight": 0.3}, "alpha_dropout": {"pattern": "add", "weight": 0.2},
    "noise": {"pattern": "tanh", "weight": 0.2}, "drop_path": {"pattern": "tanh", "weight": 0.3},
    "gaussian_dropout": {"pattern": "mul", "weight": 0.2}, "locked_dropout": {"pattern": "mul", "weight": 0.2, "time_axis": 1},
}  # fmt: skip
NORMS: dict[str, Any] = {"dropout": {"pattern": "norm", "weight": 0.3}, "noise": {"pattern": "sigmoid", "weight": 0.2}}
INNER: dict[str, Any] = {"dropout": {"pattern": ["norm", "tanh", "down", "add"], "weight": 0.3}}


@cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=("a", "b")[: len(shape) or 1])


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))


class Case:
    """A model on a mesh, and the same model in one process."""

    def __init__(
        self, make: Callable[[], nn.Module], keywords: dict[str, Any], way: str, spread: Any = lambda model: model, local: bool = False
    ) -> None:
        """``spread``: distributes the model. ``local``: it gets and returns plain tensors, which are parts along the sequence."""
        self.make, self.keywords, self.way, self.spread, self.local = make, {**keywords, "rng": 7}, way, spread, local

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().double()

    def regularized(self, way: str, x: Tensor) -> Any:
        if way == "in place":
            return graphreg.regularize_(self.model(), example_inputs=x, **self.keywords)
        more: dict[str, Any] = {"front_end": "export", "example_inputs": x} if way == "exported" else {}
        return graphreg.regularize(self.model(), **self.keywords, **more)

    def on_ranks(self, x: Tensor, on: DeviceMesh, placements: tuple[Any, ...]) -> list[Any]:
        torch.compiler.reset()
        if self.way == "backend":
            model: Any = self.spread(self.model())
            run = torch.compile(model, backend=graphreg.backend(inner="aot_eager", **self.keywords), fullgraph=True)
        else:
            model = self.spread(self.regularized(self.way, x))
            run = torch.compile(model, backend="aot_eager", fullgraph=True) if self.way == "compiled" else model
        if self.local:
            graphreg.set_ranks(model, mesh=on, tensor="a")
        return self.steps(model, run, distribute_tensor(x, on, placements))

    def alone(self, x: Tensor) -> list[Any]:
        module = self.regularized(self.way, x)
        graphreg.set_ranks(module, "same")  # as one process without ranks
        return self.steps(module, module, x)

    def steps(self, model: nn.Module, run: Any, x: Any) -> list[Any]:
        """Of two calls the output and the gradients. The loss weighs each element of the output by itself."""
        found, x = [], x.detach().requires_grad_()
        for _ in range(2):
            x.grad = None
            model.zero_grad()
            result = run(x.to_local() if self.local and isinstance(x, DTensor) else x)
            output = getattr(result, "output", result)
            if self.local and isinstance(x, DTensor):
                output = DTensor.from_local(output, x.device_mesh, x.placements)
            weights: Tensor = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)
            if isinstance(output, DTensor):
                weights = distribute_tensor(weights, output.device_mesh, output.placements)
            (output * weights).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([whole(output).detach(), whole(x.grad), [whole(gradient).clone() for gradient in gradients]])
        return found


def placements(few: bool) -> list[tuple[DeviceMesh, tuple[Any, ...]]]:
    """In which ways the ranks divide a value of three axes; ``few``: without those that compile for long."""
    if dist.get_world_size() == 2:
        return [(mesh(), (Shard(axis),)) for axis in (0, 1)]
    pairs = [(0, 0)] if few else [(0, 0), (1, 1), (0, 1), (1, 0)]  # two dimensions of the mesh divide one axis, or each divides one
    found: list[tuple[DeviceMesh, tuple[Any, ...]]] = [(mesh(2, 2), (Shard(first), Shard(second))) for first, second in pairs]
    return found if few else [*found, (mesh(2, 2), (Replicate(), Shard(1))), (mesh(), (Shard(0),)), (mesh(), (Shard(1),))]


def elementwise(way: str, *shapes: tuple[int, ...]) -> Way:
    ours, theirs = [], []
    case = Case(Elementwise, EACH, way)
    for shape in shapes:
        x = numbers(shape)
        for on, placed in placements(few=way in ("compiled", "backend")):
            ours.append(case.on_ranks(x, on, placed))
            theirs.append(case.alone(x))
    return ours, theirs


def norms(way: str, local: bool = False) -> Way:
    """``SequenceParallel``: ranks divide the sequence."""
    x, style = numbers((4, 8 if local else 6, 8)), SequenceParallel(use_local_output=local)  # plain values are equal parts
    case = Case(Rows, NORMS, way, lambda model: parallelize_module(model, mesh(), {"norm": style}), local)
    return case.on_ranks(x, mesh(), (Shard(1),)), case.alone(x)


def block(way: str) -> Way:
    """Its norms and its sums divide the sequence, its linear layers the features."""
    x = numbers((4, 6, 8))
    styles = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Shard(1), use_local_output=False),
    }
    case = Case(Block, INNER, way, lambda model: parallelize_module(model, mesh(), styles))
    return case.on_ranks(x, mesh(), (Shard(1),)), case.alone(x)


def partial_sums(way: str) -> Way:
    """Each rank has a summand of the value; the splice acts on the sum."""
    x = numbers((4, 6, 8)).mul(4).round()
    style = RowwiseParallel(input_layouts=Shard(2), output_layouts=Partial(), use_local_output=False)
    keywords = {"dropout": {"pattern": "linear", "weight": 0.5}}
    case = Case(Whole, keywords, way, lambda model: parallelize_module(model, mesh(), {"linear": style}))
    return case.on_ranks(x, mesh(), (Shard(2),)), case.alone(x)


def examples(way: str) -> Way:
    """A formula that treats each example by itself."""
    x = numbers((5, 7, 3))
    case = Case(Elementwise, {"neftune": {"pattern": "add", "weight": 5.0}}, way)
    return case.on_ranks(x, mesh(), (Shard(0),)), case.alone(x)


WAYS: dict[str, Callable[[], Way]] = {
    "elements": partial(elementwise, "", *SHAPES),
    "elements, in place": partial(elementwise, "in place", (5, 7, 3)),
    "examples": partial(examples, ""),
    "partial sums": partial(partial_sums, ""),
    "partial sums, compiled": partial(partial_sums, "compiled"),
    "norms": partial(norms, ""),
    "norms, in place": partial(norms, "in place"),
    "norms, plain values": partial(norms, "", True),
    "norms, plain values, in place": partial(norms, "in place", True),
    "block": partial(block, ""),
    "block, in place": partial(block, "in place"),
    # the sweep
    "elements, exported": partial(elementwise, "exported", (5, 7, 3)),
    "examples, compiled": partial(examples, "compiled"),
    "norms, compiled": partial(norms, "compiled"),
    "norms, exported": partial(norms, "exported"),
    "norms, backend": partial(norms, "backend"),
    "elements, compiled": partial(elementwise, "compiled", (5, 7, 3)),
    "elements, backend": partial(elementwise, "backend", (5, 7, 3), (1, 2, 3)),
    "norms, plain values, compiled": partial(norms, "compiled", True),
    "block, compiled": partial(block, "compiled"),
    "block, exported": partial(block, "exported"),
    "block, backend": partial(block, "backend"),
}


def error_of(keywords: dict[str, Any], *placed: Any) -> str:
    x = numbers((4, 6, 8))
    spread = DTensor.from_local(x, mesh(), placed, run_check=False)
    try:
        graphreg.regularize(Elementwise(), **keywords, rng=7)(spread)
    except graphreg.GraphRegError as error:
        return str(error)
    return ""


def errors() -> dict[str, str]:
    return {
        "strided": error_of({"dropout": {"pattern": "add", "weight": 0.3}}, _StridedShard(0, split_factor=2)),
        "one example": error_of({"neftune": {"pattern": "add", "weight": 5.0}}, Shard(1)),
        "whole": error_of({"drop_block": {"pattern": "add", "weight": 0.1, "block_size": 2}}, Shard(2)),
    }


def main(*ways: str) -> dict[str, Any]:
    """Compute in these ways; ``errors``: find what is refused, too."""
    return {way: errors() if way == "errors" else WAYS[way]() for way in ways}
