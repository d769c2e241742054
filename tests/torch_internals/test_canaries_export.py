"""Canaries of fake tensors and torch.export."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx, nn
from torch.utils._sympy.functions import IntTrueDiv

from canary import compiled
from graphreg.torch_internals import export, fake_tensors, torch_modes
from graphreg.torch_internals.patching import Changes


def test_fake_tensors() -> None:
    """How fake tensors are made. It concerns shapes at sites."""
    fake, module = fake_tensors.FakeTensorMode(), nn.Linear(2, 3)
    with fake_tensors.FakeCopyMode(fake):
        twin = copy.deepcopy(module)
    with fake:
        assert twin(fake.from_tensor(torch.ones(4, 2))).shape == (4, 3)
    weight: Any = twin.weight
    assert weight.fake_mode is fake and fake.from_tensor(torch.ones(1), static_shapes=True).shape == (1,)
    assert {fake_tensors.FAKE_LOGGER, export.SOLVER_LOGGER, export.SPECIALIZED_LOGGER} <= set(logging.root.manager.loggerDict)


def test_take_assignments() -> None:
    """How a fake tensor is given an attribute. It concerns the export front end, which refuses new attributes of tensors."""
    given = list[tuple[str, Any]]()
    with fake_tensors.FakeTensorMode():
        x = torch.ones(1)
    with Changes() as changes, changes:
        fake_tensors.take_assignments(changes, lambda tensor, name, value: given.append((name, value)))
        x.mark = 3  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and not hasattr(x, "mark")
    x.mark = 4  # type: ignore[attr-defined]
    assert given == [("mark", 3)] and vars(x)["mark"] == 4


def test_function_table() -> None:
    """How Dynamo keeps a table of torch's functions. It concerns the symbolic front end."""
    importlib.import_module("torch._dynamo.trace_rules").get_torch_obj_rule_map.cache_clear()
    assert not fake_tensors.has_function_table()
    fake_tensors.make_function_table()
    assert fake_tensors.has_function_table()


def test_instead_of_importing_dynamo() -> None:
    """That an import of Dynamo asks Python's finders. It concerns the symbolic front end."""
    code = """
import sys
import torch, torch.utils.checkpoint
from graphreg.torch_internals.fake_tensors import instead_of_importing_dynamo
from graphreg.torch_internals.patching import Changes

def refuse():
    raise BrokenPipeError

assert "torch._dynamo" not in sys.modules
finders = list(sys.meta_path)
try:
    with Changes() as changes, changes:
        instead_of_importing_dynamo(changes, refuse)
        torch.utils.checkpoint.checkpoint(torch.sin, torch.ones(2, requires_grad=True), use_reentrant=False)
except BrokenPipeError:
    assert sys.meta_path == finders and "torch._dynamo" not in sys.modules
else:
    raise AssertionError
import torch._dynamo
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fake_mode() -> None:
    """How a compilation keeps its fake tensor mode. It concerns the backend."""
    found = list[Any]()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> None:
        found.append(fake_tensors.fake_mode())
        assert all(mode is found[0] for mode in [each.fake_mode for each in inputs if hasattr(each, "fake_mode")])

    compiled(lambda x: x + 1, look)(torch.ones(1))
    assert isinstance(found[0], fake_tensors.FakeTensorMode) and fake_tensors.fake_mode() is None
    assert fake_tensors.is_fake(fake_tensors.FakeTensorMode().from_tensor(torch.ones(1))) and not fake_tensors.is_fake(torch.ones(1))


class Exported(nn.Module):
    """A model with a condition on a size, and with a layer, which torch.export replaces by the layer's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if x.shape[0] > 2 else y + 1


def test_export() -> None:
    """How torch.export passes modules and values to its tracer. It concerns the export front end."""
    model, seen, decided, outside = Exported(), list[Any](), list[int](), torch.ones(1)

    def around(theirs: Callable[..., Any]) -> Callable[..., Any]:
        def call_module(tracer: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
            if (inner := export.module_behind(module)) is not model.layer:
                value = theirs(tracer, module, forward, args, kwargs)
                decided.append(len(fake_tensors.size_decisions()))
                return value
            decided.append(len(fake_tensors.size_decisions()))
            given, size = (export.proxy_of(each, tracer) for each in (args[0], args[0].shape[0]))
            seen.append((inner, given, size, export.proxy_of(outside, tracer)))
            with torch_modes.without_proxies():
                value = forward(*args, **kwargs)
            proxy = tracer.create_proxy("call_function", torch.ops.aten.relu.default, (given,), {})
            proxy.node.meta["val"] = None
            assert export.give_proxy(value, proxy, tracer) is value and export.proxy_of(value, tracer).node is proxy.node  # type: ignore[union-attr]
            return value

        return call_module

    with Changes() as changes, changes:
        export.take_module_calls(changes, around)
        sizes = {"x": {0: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (torch.ones(3, 2),), dynamic_shapes=sizes, strict=False)
    (inner, given, size, other), *more = seen
    assert not more and inner is model.layer and isinstance(given, fx.Proxy) and given.node.op == "placeholder"
    assert isinstance(size, fx.Proxy) and other is None and decided[0] < decided[-1] and fake_tensors.size_decisions() == []
    batch = next(node.meta["val"].shape[0] for node in program.graph.nodes if node.name == "x")
    assert list(export.example_sizes(batch.node.shape_env).values()) == [3]
    symbol = batch.node.expr
    assert export.excludes_one(sympy.Ne(symbol, 1)) and export.excludes_one(symbol >= 2)
    assert not export.excludes_one(symbol > 2) and not export.excludes_one(sympy.Eq(symbol, 1))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.relu.default" in called and "aten.linear.default" not in called


def test_silence_export() -> None:
    """How torch.export prints its graph when it fails. It concerns the export front end."""
    module = importlib.import_module("torch.export._trace")
    assert "print(" in inspect.getsource(module) and not hasattr(module, "print")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), Changes() as changes, changes:
        export.silence_export(changes)
        exec("print('the graph')", vars(module))
    assert printed.getvalue() == "" and not hasattr(module, "print")


def test_evaluated() -> None:
    """How torch computes conditions on sizes. It concerns inputs of other sizes than the examples."""
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert export.evaluated(sympy.Eq(size * 2, 8), {size: 4}) is True
    proxy = fx.proxy.GraphAppendingTracer(fx.Graph())
    value = fx.Proxy(proxy.graph.placeholder("n"), proxy)
    export.evaluated(sympy.Eq(size + 1, 8), {size: value})
    export.evaluated(sympy.Ne(size, 8), {size: value})
    assert export.evaluated(IntTrueDiv(size, 2) > 1, {size: 3}) is True
    assert [getattr(node.target, "__name__", node.target) for node in proxy.graph.nodes] == ["n", "add", "eq", "ne"]


traced = list[bool]()


def asks(x: Tensor) -> Tensor:
    """Record whether AOTAutograd is tracing. Dynamo does not trace into this function."""
    traced.append(torch_modes.is_functionalized())
    return x + 1


def test_is_functionalized() -> None:
    """How AOTAutograd traces without writes. It concerns attached penalties."""
    torch.compiler.allow_in_graph(asks)  # type: ignore[no-untyped-call]
    torch.compile(lambda x: asks(x) * 2, backend="aot_eager", fullgraph=True)(torch.ones(2, requires_grad=True))
    assert any(traced) and not torch_modes.is_functionalized()


def test_an_export_within_a_compilation() -> None:
    """A backend that exports a model whose sizes vary leaves no guards on these sizes in what is being compiled."""

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        with export.apart_from_compilation():
            torch.export.export(nn.Linear(4, 2), (torch.randn(5, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        return graph.forward

    x = torch.randn(3, 2)
    assert torch.equal(torch.compile(nn.Tanh(), backend=backend)(x), torch.tanh(x))


def test_that_code_decides_by_values_is_told() -> None:
    class Decides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return x if x.sum() > 0 else -x
            except Exception:
                return x

    told = list[set[str]]()
    with Changes() as changes, changes:
        export.on_data_dependence(changes, told.append)
        torch.export.export(Decides(), (torch.ones(2),), strict=False)
    assert told and {"GuardOnDataDependentSymNode", "RuntimeError"} <= told[0]


def test_a_fake_tensor_that_is_a_shape_alone() -> None:
    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        plain, marked, known = mode.from_tensor(torch.ones(1)), mode.from_tensor(torch.ones(1)), torch.tensor(2.0)
        marked.mask = None  # type: ignore[attr-defined]
        assert fake_tensors.is_shape_alone(plain) and fake_tensors.is_shape_alone(plain + 1)
        assert not fake_tensors.is_shape_alone(marked)
        assert known.item() == 2.0 and not fake_tensors.is_shape_alone(known)
    assert not fake_tensors.is_shape_alone(torch.ones(1))
