"""Canaries of torch's operators, and of the modes that see their calls.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes
from graphreg.torch_internals.canaries.canary import canary, raising


@canary("operators have schemas and names", "the analysis of operations", "OpOverload", "OpOverloadPacket", "HigherOrderOperator",
        "schema_of", "overload_name", "qualified_name", "packet_of", "is_name_of_namespace")  # fmt: skip
def operators() -> None:
    packet, overload = torch.ops.aten.add_, torch.ops.aten.add_.Tensor
    assert isinstance(packet, door.OpOverloadPacket) and isinstance(overload, door.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, door.HigherOrderOperator)
    first = door.schema_of(overload).arguments[0]
    assert (first.name, first.alias_info.is_write, door.schema_of(overload).name) == ("self", True, "aten::add_")
    assert door.schema_of(overload).arguments[2].kwarg_only and str(door.schema_of(overload).returns[0].type) == "Tensor"
    assert door.schema_of(torch.ops.higher_order.cond) is None
    assert (door.overload_name(overload), door.qualified_name(packet)) == ("Tensor", "aten::add_")
    assert door.packet_of(overload) is packet and door.packet_of(len) is len
    assert door.is_name_of_namespace("__getattr__") and not door.is_name_of_namespace("add_")


@canary("operators have kernels", "the analysis of operations", "has_kernel")
def has_kernel() -> None:
    add, matmul = torch.ops.aten.add.Tensor, torch.ops.aten.matmul.default
    assert door.has_kernel(add) and door.has_kernel(add, "Meta") and not door.has_kernel(add, "CompositeImplicitAutograd")
    assert door.has_kernel(matmul, "CompositeImplicitAutograd")
    assert door.has_kernel(torch.ops.aten.ones_like.default, "CompositeExplicitAutograd")
    assert not door.has_kernel(torch.ops.aten.sort.int)  # an operator on lists that only TorchScript runs: no kernel is registered for it


@canary("safe_softmax treats a row in which every entry is masked", "native dropout of attention", "safe_softmax")
def safe_softmax() -> None:
    assert torch.equal(door.safe_softmax(torch.full((1, 2), -torch.inf), -1), torch.zeros(1, 2))


@canary("a tensor is asserted to be true", "lengths of sequences in compiled graphs", "assert_async")
def assert_async() -> None:
    door.assert_async(torch.ones((), dtype=torch.bool), "fine")
    with raising(RuntimeError, match="too long"):
        door.assert_async(torch.zeros((), dtype=torch.bool), "too long")


class Seen(door.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = list[Any]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@canary("a mode sees operators", "the check that formulas are pure", "TorchDispatchMode", "operator_modes", "without_modes")
def dispatch_modes() -> None:
    x, before = torch.ones(1), door.operator_modes()
    with Seen() as seen:
        assert door.operator_modes() == before + 1
        x + 1
        with door.without_modes():
            x * 2
    assert seen.calls == ["aten.add.Tensor"] and door.operator_modes() == before


@canary("a mode sees functions", "the tape of the symbolic front end", "without_functions", "is_gradient_switch")
def function_modes() -> None:
    x = torch.ones(1)
    with Called() as called:
        torch.sin(x)
        with door.without_functions():
            torch.cos(x)
        assert not any(map(door.is_gradient_switch, called.calls))
        with torch.no_grad():
            pass
    assert called.calls[0] is torch.sin and torch.cos not in called.calls and any(map(door.is_gradient_switch, called.calls))


@canary("torch.jit.script prepares modules", "models in place that are scripted", "is_scripted_within")
def scripted() -> None:
    class Prepared(nn.Linear):
        def __prepare_scriptable__(self) -> nn.Module:
            found.append(door.is_scripted_within())
            return nn.Linear(1, 1)

    found: list[bool] = []
    torch.jit.script(Prepared(1, 1))
    torch.jit.script(nn.Sequential(Prepared(1, 1)))
    assert found == [False, True]


@canary("torch.jit traces", "the quick path of the noise", "jit_trace")
def jit_trace() -> None:
    states = list[Any]()

    def asks(x: Tensor) -> Tensor:
        states.append(door.jit_trace())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(asks, torch.ones(1), check_trace=False)  # type: ignore[no-untyped-call]
    assert states[0] is not None and door.jit_trace() is None


@canary("torch.export is distinguished from Dynamo", "recurrent layers and noise in compiled graphs", "is_exporting",
        "is_compiling")
def exporting() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if door.is_exporting() else x + 2 if door.is_compiling() else x + 3

    assert float(torch.compile(Asks(), backend="eager")(torch.ones(()))) == 3
    assert float(torch.export.export(Asks(), (torch.ones(()),)).module()(torch.ones(()))) == 2
    assert float(Asks()(torch.ones(()))) == 4
    assert float(torch._dynamo.export(Asks())(torch.ones(())).graph_module(torch.ones(()))) == 2
    compiler = cast(Any, torch.compiler)
    with Changes() as changes, changes:
        changes.put(compiler, "_is_exporting_flag", True)  # as while another thread exports
        changes.put(compiler, "_is_compiling_flag", True)
        assert torch.compiler.is_compiling() and not door.is_exporting() and not door.is_compiling()


@canary("a tracer runs", "the refusals of traces within a tracer", "tracer_here")
def tracers() -> None:
    found = list[str]()

    def note(x: Tensor) -> Tensor:
        found.append(door.tracer_here().partition(" (")[0])
        return x + 1

    class Notes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return note(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        cast(Any, torch.jit.trace)(note, torch.ones(2), check_trace=False)
    torch.export.export(Notes(), (torch.ones(2),))
    make_fx(note)(torch.ones(2))
    torch.vmap(note)(torch.ones(2))
    with door.FakeTensorMode():
        note(torch.ones(2))
    note(torch.ones(2))
    assert found == ["torch.jit.trace", "torch.export", "a trace of torch.fx", "a transform of torch.func", "FakeTensorMode", ""]
