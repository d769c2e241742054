"""What an operation does to storage: every function and method of torch is called, and what it did compared with what is said of it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import get_overridable_functions
from torch.utils import _pytree as pytree

from graphreg.ir.operations import Operations
from graphreg.ir.views_and_writes import ViewsAndWrites

torch.manual_seed(0)
ODD = {
    "backward",
    "register_hook",
    "share_memory_",
    "requires_grad_",
    "retain_grad",
    "to_sparse",
    "__dlpack__",
    "resize_as_sparse_",
    "index",
    "lobpcg",
}
MADE: dict[str, Callable[[], Tensor]] = {  # an argument of a recipe, by its name
    "x": lambda: torch.rand(4, 4) + 0.1,
    "v": lambda: torch.rand(4) + 0.1,
    "n": lambda: torch.rand(()) + 0.1,
    "cube": lambda: torch.rand(4, 4, 4) + 0.1,
    "image": lambda: torch.rand(2, 4, 4, 4) + 0.1,
    "turned": lambda: torch.rand(4, 4).t() + 0.1,
    "i": lambda: torch.tensor([0, 1, 2, 3]),
    "ii": lambda: torch.zeros(4, 4, dtype=torch.int64),
    "m": lambda: torch.eye(4, dtype=torch.bool),
}
ONE = ("x", "cube", "image", "v", "n", "turned")
RECIPES: list[tuple[Any, ...]] = [
    *((name,) for name in ONE), *((name, *more) for name in ONE for more in ((2,), (0,), (1, 2), (0, 1), (0, 1, 2), (-1,), (0.5, False))),
    *(("x", *more) for more in (
        ("x",), ("x", "x"), ("v",), ("v", "v"), ("v", "v", None, None, True), ("v", "v", "v", "v", True), ((4, 4),), ([2, 2],), (16,),
        (4, 4), (2, 8), ((4, 4), (4, 1)), ((2, 8),), (0, "i"), (0, "i", "x"), (0, "i", 2.0), ("i",), ("ii",), ("m",), ("m", 2.0),
        ("m", "x"), (0, "ii", "x"), (0, "ii"), (0, 2, 1), (1, (2, 2)), (0, 1, 1), (0, 0), ((0,),), ((1, 0),), (1.0, 2.0), (2.0,),
        (torch.float32,), ("cpu",), (torch.device("cpu"), torch.float32), (0.5, True), (0.5, False, True), (True,), (1, 1.0, 0),
        (("i",), "v"), (None,), ("x", "x", "x"), (1, "x"), ("ii", "x"), (0, "x"), ([1, 1],), (1, (4, 1)), ([2, 2], 0), (2, 0),
        ([0], [1]), (0, 1, 3),
    )),
    *(("image", *more) for more in (
        ("image",), ([0, 0],), (2, 2), ("image", "image"), ("v", "v"), ("v", "v", "v", "v", True), (2, 2, 0), (4, 4),
    )),
    ("i", "x"), ("i", "x", None, 1.0), ("x", "i"), (["x", "x"],), (["x", "x"], 2.0), (["x", "x"], 0), (["x"], ["x"]),
    (["x"], ["x"], ["x"]), ("ij->ji", "x"), ("ii->i", "x"), ("ij,jk->ik", "x", "x"), ("v", "v"), ("v", "v", "v"), (2, "x"), (2.0, "x"),
    ("cube", "cube", "cube"),
]  # fmt: skip


def torchs() -> dict[str, tuple[str, Any]]:
    """How each is called in a graph: as a method by its name, or as a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = get_overridable_functions()
    found: dict[str, tuple[str, Any]] = {}
    for home, functions in known.items():
        for function in functions:
            name = getattr(function, "__name__", "")
            if name in ODD or (name.startswith(("__", "to_", "set_")) and name != "set_"):
                continue
            if isinstance(function, type):
                continue
            if home is Tensor:
                if getattr(Tensor, name, None) is function:
                    found[f"Tensor.{name}"] = ("call_method", name)
            else:
                found[f"{getattr(home, '__name__', home)}.{name}"] = ("call_function", function)
    return found


def foreach() -> dict[str, tuple[str, Any]]:
    return {f"torch.{name}": ("call_function", getattr(torch, name)) for name in dir(torch) if name.startswith("_foreach_")}


def arithmetic() -> dict[str, tuple[str, Any]]:
    return {f"operator.{name}": ("call_function", value) for name, value in vars(operator).items() if type(value) is type(operator.add)}


def made(recipe: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map_aggregate(recipe, lambda leaf: MADE[leaf]() if isinstance(leaf, str) and leaf in MADE else leaf))


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Given:
    """The arguments of a recipe, which are made again where a call has changed them."""

    def __init__(self, recipe: tuple[Any, ...]) -> None:
        self.recipe = recipe
        self._make()

    def _make(self) -> None:
        self.args = made(self.recipe)
        self.tensors = tensors(self.args)
        self._before = [(tensor.clone(), self._known(tensor)) for tensor in self.tensors]

    def _known(self, tensor: Tensor) -> tuple[Any, ...]:
        return tensor.shape, tensor.stride(), tensor.dtype, storage(tensor), tensor._version, tensor.requires_grad

    def written(self, raised: bool = False) -> set[int]:
        """The tensors, by their place, that are not what they were; they are made again for the next call.

        After a call that raised, the values are not compared: they change with the version.
        """
        writes = set[int]()
        for i, (tensor, (values, known)) in enumerate(zip(self.tensors, self._before, strict=True)):
            if self._known(tensor) != known or not (raised or torch.equal(tensor, values)):
                writes.add(i)
        if writes:
            self._make()
        return writes


def did(op: str, target: Any, given: Given) -> tuple[set[int], set[int]] | None:
    """The tensors, by their place, whose storage the result shares, and those that were written into; None where the call raises."""
    args = given.args
    try:
        with torch.no_grad():
            result = getattr(args[0], target)(*args[1:]) if op == "call_method" else target(*args)
    except Exception:
        given.written(raised=True)
        return None
    theirs = {storage(tensor) for tensor in tensors(result) if tensor.numel()}
    shares = {i for i, tensor in enumerate(given.tensors) if storage(tensor) in theirs}
    return shares, given.written()


def said(op: str, target: Any, args: tuple[Any, ...], root: nn.Module | None = None) -> tuple[set[int], set[int]]:
    """What the analysis says of the same call, knowing nothing of its tensors."""
    graph, inputs = fx.Graph(), list[fx.Node]()

    def unknown(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        inputs.append(graph.placeholder(f"x{len(inputs)}"))
        return inputs[-1]

    node = graph.create_node(op, target, map_aggregate(args, unknown))
    effects = ViewsAndWrites(Operations(root or nn.Module()))
    return {inputs.index(n) for n in effects.shares(node)}, {inputs.index(n) for n in effects.writes(node)}


def calls(which: dict[str, tuple[str, Any]]) -> Iterator[tuple[str, str, Any, tuple[Any, ...], set[int], set[int]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipes = [Given(recipe) for recipe in RECIPES]
        for name, (op, target) in which.items():
            for given in recipes:
                if op == "call_method" and not isinstance(given.recipe[0], str):
                    continue
                if (found := did(op, target, given)) is not None:
                    yield f"{name}{given.recipe}", op, target, given.args, *found


@pytest.mark.parametrize(("part", "which"), [*((part, torchs) for part in range(4)), (0, foreach), (0, arithmetic)])
def test_no_view_and_no_write_is_denied(part: int, which: Callable[[], dict[str, tuple[str, Any]]]) -> None:
    denied, ran, share, write = [], set[str](), set[str](), set[str]()
    functions = which()
    for text, op, target, args, shares, writes in calls(dict(list(functions.items())[part:: 4 if which is torchs else 1])):
        name = text.partition("(")[0]
        ran.add(name)
        if not shares and not writes:
            continue
        share |= {name} if shares else set()
        write |= {name} if writes else set()
        claimed = said(op, target, args)
        if not shares <= claimed[0] or not writes <= claimed[1]:
            denied.append(f"{text}: shares {shares}, writes {writes}, said {claimed}")
    assert not denied, "\n".join(denied[:20])
    assert len(ran) > {torchs: 225, foreach: 60, arithmetic: 40}[which] and write and (share or which is foreach)


# Layers


SETTINGS: list[tuple[Any, ...]] = [(), (4,), (1,), (2,), (0,), (4, 4), (4, 4, 1), (1, 4), (1, (2, 2)), ((4, 4),), (0.0,)]
INPUTS: list[tuple[Any, ...]] = [("x",), ("cube",), ("image",), ("v",), ("i",), ("x", "x"), ("cube", "cube", "cube")]
LAYERS = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module) and "Lazy" not in kind.__name__]


def layers(kind: type[nn.Module]) -> Iterator[nn.Module]:
    for settings in SETTINGS:
        for more in ({}, {"inplace": True}):
            try:
                yield kind(*settings, **more)
            except Exception:
                continue


def test_no_view_and_no_write_of_a_layer_is_denied() -> None:
    denied, share, write = [], set[str](), set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = [Given(recipe) for recipe in INPUTS]
        for layer in (layer for kind in LAYERS for layer in layers(kind)):
            root = nn.Module()
            root.layer = layer
            for given in (given for mode in (True, False) if layer.train(mode) for given in inputs):
                found = did("call_function", layer, given)
                if found is None or found == (set(), set()):
                    continue
                share |= {type(layer).__name__} if found[0] else set()
                write |= {type(layer).__name__} if found[1] else set()
                claimed = said("call_module", "layer", given.args, root)
                if not found[0] <= claimed[0] or not found[1] <= claimed[1]:
                    denied.append(f"{layer} of {[tuple(t.shape) for t in given.tensors]}: {found}, said {claimed}")
    assert not denied, "\n".join(denied[:20])
    assert share > {"Identity", "Flatten", "Dropout", "ReLU", "AlphaDropout"}
    assert write > {"ReLU", "Dropout", "SiLU", "CELU"}


def test_layers_that_compute_share_nothing() -> None:
    root = nn.ModuleDict(
        {
            "linear": nn.Linear(48, 10), "conv": nn.Conv2d(3, 8, 7, 4), "depthwise": nn.Conv2d(48, 48, 7, padding=3, groups=48),
            "norm": nn.BatchNorm2d(24), "layer_norm": nn.LayerNorm(48), "groups": nn.GroupNorm(8, 48), "lstm": nn.LSTM(5, 7),
            "cell": nn.GRUCell(5, 7), "relu": nn.ReLU(), "gelu": nn.GELU(), "pool": nn.MaxPool2d(3, 2, 1), "mean": nn.AdaptiveAvgPool2d(1),
            "embedding": nn.Embedding(50, 8), "shuffle": nn.PixelShuffle(3), "up": nn.Upsample(scale_factor=2),
            "pad": nn.ReflectionPad2d(9), "attention": nn.MultiheadAttention(48, 4), "encoder": nn.TransformerEncoderLayer(48, 4),
        }
    )  # fmt: skip
    graph, effects = fx.Graph(), ViewsAndWrites(Operations(root))
    x = graph.placeholder("x")
    for name in root:
        args = (x, x, x) if name == "attention" else (x, x) if name == "cell" else (x,)
        node = graph.call_module(name, args)
        assert not effects.shares(node) and not effects.writes(node) and effects.is_dense(node), name
