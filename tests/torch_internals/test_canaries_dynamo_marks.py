"""Canaries of the marks that tell Dynamo how to treat a function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from canary import compiled, nothing
from graphreg.torch_internals import dynamo, dynamo_marks


def test_skip_frame() -> None:
    """How Dynamo skips a function, and compiles what it calls. It concerns the call of a rewritten module."""
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def outer(x: Tensor) -> Tensor:
        return inner(x) * 2

    dynamo_marks.skip_frame(outer)
    compiled(outer, lambda gm, inputs: names.append(dynamo.captured_code(dynamo.translator(), gm).name))(torch.ones(1))
    assert names == ["inner"]


def test_skip_as_outermost() -> None:
    """How Dynamo skips a function as the outermost, and follows it elsewhere. It concerns the call of a model in place."""
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    def middle(x: Tensor) -> Tensor:
        return inner(x) * 2

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        names.append(dynamo.captured_code(dynamo.translator(), gm).name)

    dynamo_marks.skip_as_outermost(middle)
    compiled(middle, look)(torch.ones(1))
    compiled(lambda x: middle(x) + 1, look, fullgraph=True)(torch.ones(1))
    assert names == ["inner", "<lambda>"]


def test_disable() -> None:
    """How Dynamo leaves a function and all that it calls to eager. It concerns what a rewritten module does around its forward."""
    names = list[str]()

    def inner(x: Tensor) -> Tensor:
        return x + 1

    @dynamo_marks.disable("not now")
    def middle(x: Tensor) -> Tensor:
        return inner(x) * 2

    def outer(x: Tensor) -> Tensor:
        return middle(x + 1) - 1

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        names.append(dynamo.captured_code(dynamo.translator(), gm).name)

    assert compiled(middle, look)(torch.ones(1)) == 4 and not names
    assert compiled(outer, look)(torch.ones(1)) == 5 and names == ["outer", "outer"]  # before the break and after it
    assert compiled(inner, look)(torch.ones(1)) == 2 and names[2:] == ["inner"]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="not now"):
        compiled(outer, nothing, fullgraph=True)(torch.ones(1))


def test_assume_constant_result() -> None:
    """How Dynamo takes a function's result as a constant. It concerns what is found out while Dynamo traces."""
    calls = list[int]()

    @dynamo_marks.assume_constant_result
    def counted() -> int:
        calls.append(1)
        return len(calls)

    function = compiled(lambda x: x + counted(), nothing, fullgraph=True)
    assert function(torch.zeros(1)) == function(torch.zeros(1)) == len(calls)


def _reads_storage(x: Tensor) -> Tensor:
    return x * 2 if x.untyped_storage() else x


@dynamo_marks.assume_constant_result
def _tell() -> None:
    dynamo_marks.allow_in_graph(_reads_storage)


def test_allow_in_graph() -> None:
    """How Dynamo treats a function as one operation. It concerns penalties='attach', penalties on derivatives."""

    def outer(x: Tensor) -> Tensor:
        _tell()
        return _reads_storage(x) + 1

    targets = list[object]()
    look = compiled(outer, lambda gm, inputs: targets.extend(node.target for node in gm.graph.nodes), fullgraph=True)
    assert look(torch.ones(1)) == 3 and _reads_storage in targets


def test_graph_break() -> None:
    """How Dynamo breaks a graph. It concerns errors for what torch.compile cannot trace."""
    graphs = list[int]()

    def broken(x: Tensor) -> Tensor:
        y = x + 1
        dynamo.graph_break(msg="here")
        return y * 2

    assert compiled(broken, lambda gm, inputs: graphs.append(1))(torch.ones(1)) == 4 and len(graphs) == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="here"):
        compiled(broken, nothing, fullgraph=True)(torch.ones(1))


def test_without_importing_dynamo() -> None:
    """How operators on meta tensors keep Dynamo out. It concerns the time that the first trace takes."""
    functions = dynamo_marks._uncompiled()
    assert len(functions) > 50
    for function in functions:
        vars(function).pop(dynamo_marks._REMEMBERED, None)
    torch.relu(torch.empty(1, device="meta"))
    assert any(dynamo_marks._REMEMBERED in vars(function) for function in functions)
    with dynamo_marks.without_importing_dynamo():  # Dynamo has been imported, so this does nothing
        assert not any(vars(function).get(dynamo_marks._REMEMBERED) is function for function in functions)
