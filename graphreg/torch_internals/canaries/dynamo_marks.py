"""Canaries of the marks that tell Dynamo how to treat a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import graphreg.torch_internals as door
from graphreg.torch_internals import dynamo_marks
from graphreg.torch_internals.canaries.canary import canary, compiled, nothing, raising


@canary("Dynamo skips a function, and compiles what it calls", "the call of a rewritten module", "skip_frame")
def skip_frame() -> None:
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def outer(x: Tensor) -> Tensor:
        return inner(x) * 2

    door.skip_frame(outer)
    compiled(outer, lambda gm, inputs: names.append(door.captured_code(door.translator(), gm).name))(torch.ones(1))
    assert names == ["inner"]


@canary("Dynamo skips a function as the outermost, and follows it elsewhere", "the call of a model that is regularized in place",
        "skip_as_outermost")  # fmt: skip
def skip_as_outermost() -> None:
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def middle(x: Tensor) -> Tensor:
        return inner(x) * 2

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        names.append(door.captured_code(door.translator(), gm).name)

    door.skip_as_outermost(middle)
    compiled(middle, look)(torch.ones(1))
    compiled(lambda x: middle(x) + 1, look, fullgraph=True)(torch.ones(1))
    assert names == ["inner", "<lambda>"]


@canary("Dynamo leaves a function and all that it calls to eager", "what a rewritten module does around its forward", "disable")
def disable() -> None:
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    @door.disable("not now")
    def middle(x: Tensor) -> Tensor:
        return inner(x) * 2

    def outer(x: Tensor) -> Tensor:
        return middle(x + 1) - 1

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        names.append(door.captured_code(door.translator(), gm).name)

    assert compiled(middle, look)(torch.ones(1)) == 4 and not names
    assert compiled(outer, look)(torch.ones(1)) == 5 and names == ["outer", "outer"]  # before the break and after it
    assert compiled(inner, look)(torch.ones(1)) == 2 and names[2:] == ["inner"]
    with raising(torch._dynamo.exc.Unsupported, match="not now"):
        compiled(outer, nothing, fullgraph=True)(torch.ones(1))


@canary("Dynamo takes a function's result as a constant", "what is found out while Dynamo traces", "assume_constant_result")
def assume_constant_result() -> None:
    calls = list[int]()

    @door.assume_constant_result
    def counted() -> int:
        calls.append(1)
        return len(calls)

    function = compiled(lambda x: x + counted(), nothing, fullgraph=True)
    assert function(torch.zeros(1)) == function(torch.zeros(1)) == len(calls)


def _reads_storage(x: Tensor) -> Tensor:
    return x * 2 if x.untyped_storage() else x


@door.assume_constant_result
def _tell() -> None:
    door.allow_in_graph(_reads_storage)


@canary("Dynamo treats a function as one operation", "penalties='attach', penalties on derivatives", "allow_in_graph")
def allow_in_graph() -> None:
    def outer(x: Tensor) -> Tensor:
        _tell()
        return _reads_storage(x) + 1

    targets = list[object]()
    look = compiled(outer, lambda gm, inputs: targets.extend(node.target for node in gm.graph.nodes), fullgraph=True)
    assert look(torch.ones(1)) == 3 and _reads_storage in targets


@canary("Dynamo breaks a graph", "errors for what torch.compile cannot trace", "graph_break")
def graph_break() -> None:
    graphs = list[int]()

    def broken(x: Tensor) -> Tensor:
        y = x + 1
        door.graph_break(msg="here")
        return y * 2

    assert compiled(broken, lambda gm, inputs: graphs.append(1))(torch.ones(1)) == 4 and len(graphs) == 2
    with raising(torch._dynamo.exc.Unsupported, match="here"):
        compiled(broken, nothing, fullgraph=True)(torch.ones(1))


@canary("operators on meta tensors keep Dynamo out", "the time that the first trace takes", "without_importing_dynamo")
def without_importing_dynamo() -> None:
    functions = dynamo_marks._uncompiled()
    assert len(functions) > 50
    for function in functions:
        vars(function).pop(dynamo_marks._REMEMBERED, None)
    torch.relu(torch.empty(1, device="meta"))
    assert any(dynamo_marks._REMEMBERED in vars(function) for function in functions)
    with door.without_importing_dynamo():  # Dynamo has been imported, so this does nothing
        assert not any(vars(function).get(dynamo_marks._REMEMBERED) is function for function in functions)
