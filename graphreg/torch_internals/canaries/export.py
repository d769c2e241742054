"""Canaries of fake tensors and torch.export.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import logging
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.utils._sympy.functions import IntTrueDiv

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes
from graphreg.torch_internals.canaries.canary import canary, compiled


@canary("fake tensors are made", "shapes at sites", "FakeTensorMode", "FakeCopyMode", "FAKE_LOGGER", "SOLVER_LOGGER",
        "SPECIALIZED_LOGGER")  # fmt: skip
def fake_tensors() -> None:
    fake, module = door.FakeTensorMode(), nn.Linear(2, 3)
    with door.FakeCopyMode(fake):
        twin = copy.deepcopy(module)
    with fake:
        assert twin(fake.from_tensor(torch.ones(4, 2))).shape == (4, 3)
    weight: Any = twin.weight
    assert weight.fake_mode is fake and fake.from_tensor(torch.ones(1), static_shapes=True).shape == (1,)
    assert {door.FAKE_LOGGER, door.SOLVER_LOGGER, door.SPECIALIZED_LOGGER} <= set(logging.root.manager.loggerDict)


@canary("a fake tensor is given an attribute", "the export front end, which refuses new attributes of tensors", "take_assignments")
def take_assignments() -> None:
    given = list[tuple[str, Any]]()
    with door.FakeTensorMode():
        x = torch.ones(1)
    with Changes() as changes, changes:
        door.take_assignments(changes, lambda tensor, name, value: given.append((name, value)))
        x.mark = 3  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and not hasattr(x, "mark")
    x.mark = 4  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and vars(x)["mark"] == 4


@canary("Dynamo keeps a table of torch's functions", "the symbolic front end", "has_function_table", "make_function_table")
def function_table() -> None:
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map.cache_clear()
    assert not door.has_function_table()
    door.make_function_table()
    assert door.has_function_table()


@canary("a compilation keeps its fake tensor mode", "the backend", "fake_mode", "is_fake")
def fake_mode() -> None:
    found = list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found.append(door.fake_mode())
        assert all(mode is found[0] for mode in [each.fake_mode for each in inputs if hasattr(each, "fake_mode")])

    compiled(lambda x: x + 1, look)(torch.ones(1))
    assert isinstance(found[0], door.FakeTensorMode) and door.fake_mode() is None
    assert door.is_fake(door.FakeTensorMode().from_tensor(torch.ones(1))) and not door.is_fake(torch.ones(1))


class Exported(nn.Module):
    """A model with a condition on a size, and with a layer, which torch.export replaces by the layer's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if x.shape[0] > 2 else y + 1


@canary("torch.export passes modules and values to its tracer", "the export front end", "take_module_calls", "module_behind", "proxy_of",
        "give_proxy", "without_proxies", "size_decisions", "example_sizes", "excludes_one")  # fmt: skip
def export() -> None:
    model, seen, decided, outside = Exported(), list[Any](), list[int](), torch.ones(1)

    def around(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def call_module(tracer: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            if (inner := door.module_behind(module)) is not model.layer:
                value = theirs(tracer, module, forward, args, kwargs)
                decided.append(len(door.size_decisions()))
                return value
            decided.append(len(door.size_decisions()))
            given, size = (door.proxy_of(each, tracer) for each in (args[0], args[0].shape[0]))
            seen.append((inner, given, size, door.proxy_of(outside, tracer)))
            with door.without_proxies():
                value = forward(*args, **kwargs)
            proxy = tracer.create_proxy("call_function", torch.ops.aten.relu.default, (given,), {})
            proxy.node.meta["val"] = None
            assert door.give_proxy(value, proxy, tracer) is value and door.proxy_of(value, tracer).node is proxy.node  # type: ignore[union-attr]
            return value

        return call_module

    with Changes() as changes, changes:
        door.take_module_calls(changes, around)
        sizes = {"x": {0: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (torch.ones(3, 2),), dynamic_shapes=sizes, strict=False)
    (inner, given, size, other), *more = seen
    assert not more and inner is model.layer and isinstance(given, fx.Proxy) and given.node.op == "placeholder"
    assert isinstance(size, fx.Proxy) and other is None and decided[0] < decided[-1] and door.size_decisions() == []
    batch = next(node.meta["val"].shape[0] for node in program.graph.nodes if node.name == "x")
    assert list(door.example_sizes(batch.node.shape_env).values()) == [3]
    symbol = batch.node.expr
    assert door.excludes_one(sympy.Ne(symbol, 1)) and door.excludes_one(symbol >= 2)
    assert not door.excludes_one(symbol > 2) and not door.excludes_one(sympy.Eq(symbol, 1))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.relu.default" in called and "aten.linear.default" not in called


@canary("torch.export prints its graph when it fails", "the export front end", "silence_export")
def silence_export() -> None:
    module = importlib.import_module("torch.export._trace")
    assert "print(" in inspect.getsource(module) and not hasattr(module, "print")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), Changes() as changes, changes:
        door.silence_export(changes)
        exec("print('the graph')", vars(module))
    assert printed.getvalue() == "" and not hasattr(module, "print")


@canary("torch computes conditions on sizes", "inputs of other sizes than the examples", "evaluated")
def evaluated() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert door.evaluated(sympy.Eq(size * 2, 8), {size: 4}) is True
    proxy = fx.proxy.GraphAppendingTracer(fx.Graph())
    value = fx.Proxy(proxy.graph.placeholder("n"), proxy)
    door.evaluated(sympy.Eq(size + 1, 8), {size: value})
    door.evaluated(sympy.Ne(size, 8), {size: value})
    assert door.evaluated(IntTrueDiv(size, 2) > 1, {size: 3}) is True
    assert [getattr(node.target, "__name__", node.target) for node in proxy.graph.nodes] == ["n", "add", "eq", "ne"]


traced = list[bool]()


def asks(x: Tensor) -> Tensor:
    """Record whether AOTAutograd is tracing. Dynamo does not trace into this function."""
    traced.append(door.is_functionalized())
    return x + 1


@canary("AOTAutograd traces without writes", "attached penalties", "is_functionalized")
def is_functionalized() -> None:
    torch.compiler.allow_in_graph(asks)  # type: ignore[no-untyped-call]
    torch.compile(lambda x: asks(x) * 2, backend="aot_eager", fullgraph=True)(torch.ones(2, requires_grad=True))
    assert any(traced) and not door.is_functionalized()
