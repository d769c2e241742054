"""Random models that are valid by construction, from NNSmith, as plain modules: what it keeps for itself is left away."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnsmith.graph_gen import model_gen
from nnsmith.materialize import Model
from nnsmith.narrow_spec import auto_opset
from torch import Tensor, nn


@dataclass
class Drawn:
    """A model, what it is called with, and its forward as text."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    text: str


@functools.cache
def _operators() -> Any:
    """The operators and dtypes that this torch runs, which NNSmith tries out; it reports each that it cannot."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return auto_opset(Model.init("torch"))


def drawn(seed: int, nodes: int = 12) -> Drawn:
    """The model of a seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    graph = model_gen(opset=_operators(), method="symbolic-cinit", seed=seed % 2**31, max_nodes=nodes).make_concrete()
    net = Model.init("torch").from_gir(graph).torch_model
    torch.manual_seed(seed)
    inputs = {name: _input(kind.shape, kind.dtype.torch()) for name, kind in net.input_like.items()}
    return _plain(net, inputs)


def _input(shape: list[int], dtype: torch.dtype) -> Tensor:
    value = torch.randn(shape) * 2.0
    if dtype == torch.bool:
        return value > 0
    return value.to(dtype) if dtype.is_floating_point or dtype.is_complex else value.round().to(dtype)


def _called(function: Any, number: int) -> str:
    return f"self.layer{number}" if isinstance(function, nn.Module) else f"step{number}"


def _plain(net: Any, inputs: dict[str, Tensor]) -> Drawn:
    """A module whose forward is the instructions, one line each. They run once here: some give a list, and some a tensor."""
    model = nn.Module()
    space: dict[str, Any] = {}
    values: dict[str, Tensor] = dict(inputs)
    lines = [f"def forward(self, {', '.join(inputs)}):"]
    for number, (function, reads, writes, operator) in enumerate(net.instructions):
        if isinstance(function, nn.Module):
            model.add_module(f"layer{number}", function)
        else:
            space[f"step{number}"] = function
        called = f"{_called(function, number)}({', '.join(reads)})"
        if isinstance(function, types.MethodDescriptorType):  # torch.Tensor.flatten, which takes no stand-ins
            called = f"{reads[0]}.{function.__name__}({', '.join(reads[1:])})"
        found = function(*(values[name] for name in reads))
        left = ", ".join(writes) + "," * isinstance(found, (list, tuple))
        values.update(zip(writes, found if isinstance(found, (list, tuple)) else [found], strict=True))
        lines.append(f"    {left} = {called}  # {operator}")
    lines.append(f"    return ({', '.join(net.output_like)},)")
    exec("\n".join(lines), space)
    cls = type("NNSmith", (nn.Module,), {"forward": space["forward"]})
    plain = cls()
    for name, child in model.named_children():
        plain.add_module(name, child)
    return Drawn(plain, tuple(inputs.values()), "\n".join(lines))
