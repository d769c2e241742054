"""Canaries of torch's operators, and of the modes that see their calls."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from canary import Seen
from graphreg.torch_internals import fake_tensors, operators, torch_modes
from graphreg.torch_internals import other_threads as other_threads
from graphreg.torch_internals.patching import Changes


@torch.library.custom_op("graphreg_canary::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_kernel("cpu")
def twice_on_a_cpu(x: Tensor) -> Tensor:
    return x + x


@twice.register_fake
def fake_of_twice(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operators_made_in_python() -> None:
    """Which functions a call of such an operator runs. It concerns the state that these change."""
    assert isinstance(twice, operators.CustomOpDef)
    names = {function.__name__ for function in operators.operator_functions(twice)}
    assert names >= {"twice", "twice_on_a_cpu", "fake_of_twice"}
    assert {each.__name__ for each in operators.python_operators()["graphreg_canary::twice"]} == names


def test_operators() -> None:
    """How operators have schemas and names. It concerns the analysis of operations."""
    packet, overload = torch.ops.aten.add_, torch.ops.aten.add_.Tensor
    assert isinstance(packet, operators.OpOverloadPacket) and isinstance(overload, operators.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, operators.HigherOrderOperator)
    first = operators.schema_of(overload).arguments[0]
    assert (first.name, first.alias_info.is_write, operators.schema_of(overload).name) == ("self", True, "aten::add_")
    assert operators.schema_of(overload).arguments[2].kwarg_only and str(operators.schema_of(overload).returns[0].type) == "Tensor"
    assert operators.schema_of(torch.ops.higher_order.cond) is None
    assert (operators.overload_name(overload), operators.qualified_name(packet)) == ("Tensor", "aten::add_")
    assert operators.packet_of(overload) is packet and operators.packet_of(len) is len
    assert operators.is_name_of_namespace("__getattr__") and not operators.is_name_of_namespace("add_")


def test_overloads() -> None:
    """Which overloads an operator has, and that torch tags those that draw. It concerns native dropout."""
    dropout = torch.ops.aten.native_dropout.default
    assert operators.overloads_of(dropout) == [dropout]
    assert dropout in operators.overloads_of(torch.ops.aten.native_dropout) == operators.overloads_of("native_dropout")
    assert operators.overloads_of("no_such_operator") == operators.overloads_of("__getattr__") == operators.overloads_of("a b") == []
    assert torch.Tag.nondeterministic_seeded in dropout.tags and torch.Tag.nondeterministic_seeded not in torch.ops.aten.relu.default.tags


def test_has_kernel() -> None:
    """How operators have kernels. It concerns the analysis of operations."""
    add, matmul = torch.ops.aten.add.Tensor, torch.ops.aten.matmul.default
    assert operators.has_kernel(add) and operators.has_kernel(add, "Meta") and not operators.has_kernel(add, "CompositeImplicitAutograd")
    assert operators.has_kernel(matmul, "CompositeImplicitAutograd")
    assert operators.has_kernel(torch.ops.aten.ones_like.default, "CompositeExplicitAutograd")
    assert not operators.has_kernel(torch.ops.aten.sort.int)  # only TorchScript runs it: it has no kernel


def test_safe_softmax() -> None:
    """How safe_softmax treats a row in which every entry is masked. It concerns native dropout of attention."""
    assert torch.equal(operators.safe_softmax(torch.full((1, 2), -torch.inf), -1), torch.zeros(1, 2))


def test_assert_async() -> None:
    """How a tensor is asserted to be true. It concerns lengths of sequences in compiled graphs."""
    operators.assert_async(torch.ones((), dtype=torch.bool), "fine")
    with pytest.raises(RuntimeError, match="too long"):
        operators.assert_async(torch.zeros((), dtype=torch.bool), "too long")


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = list[Any]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes() -> None:
    """How a mode sees operators. It concerns the check that formulas are pure."""
    x, before = torch.ones(1), torch_modes.operator_modes()
    with Seen() as seen:
        assert torch_modes.operator_modes() == before + 1
        x + 1
        with torch_modes.without_modes():
            x * 2
    assert seen.calls == ["aten.add.Tensor"] and torch_modes.operator_modes() == before


def test_function_modes() -> None:
    """How a mode sees functions. It concerns the tape of the symbolic front end."""
    x = torch.ones(1)
    with Called() as called:
        torch.sin(x)
        with torch_modes.without_functions():
            torch.cos(x)
        assert not any(map(torch_modes.is_gradient_switch, called.calls))
        with torch.no_grad():
            pass
    assert called.calls[0] is torch.sin and torch.cos not in called.calls and any(map(torch_modes.is_gradient_switch, called.calls))


def test_scripted() -> None:
    """How torch.jit.script prepares modules. It concerns models in place that are scripted."""

    class Prepared(nn.Linear):
        def __prepare_scriptable__(self) -> nn.Module:
            found.append(torch_modes.is_scripted_within())
            return nn.Linear(1, 1)

    found: list[bool] = []
    torch.jit.script(Prepared(1, 1))
    torch.jit.script(nn.Sequential(Prepared(1, 1)))
    assert found == [False, True]


def test_jit_trace() -> None:
    """How torch.jit traces. It concerns the quick path of the noise."""
    states = list[Any]()

    def asks(x: Tensor) -> Tensor:
        states.append(torch_modes.jit_trace())
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(asks, torch.ones(1), check_trace=False)  # type: ignore[no-untyped-call]
    assert states[0] is not None and torch_modes.jit_trace() is None


def test_exporting() -> None:
    """How torch.export is distinguished from Dynamo. It concerns recurrent layers and noise in compiled graphs."""

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if torch_modes.is_exporting() else x + 2 if other_threads.is_compiling() else x + 3

    assert float(torch.compile(Asks(), backend="eager")(torch.ones(()))) == 3
    assert float(torch.export.export(Asks(), (torch.ones(()),)).module()(torch.ones(()))) == 2
    assert float(Asks()(torch.ones(()))) == 4
    assert float(torch._dynamo.export(Asks())(torch.ones(())).graph_module(torch.ones(()))) == 2
    compiler = cast(Any, torch.compiler)
    with Changes() as changes, changes:
        changes.put(compiler, "_is_exporting_flag", True)  # as while another thread exports
        changes.put(compiler, "_is_compiling_flag", True)
        assert torch.compiler.is_compiling() and not torch_modes.is_exporting() and not other_threads.is_compiling()


def test_tracers() -> None:
    """How a tracer runs. It concerns the refusals of traces within a tracer."""
    found = list[str]()

    def note(x: Tensor) -> Tensor:
        found.append(torch_modes.tracer_here().partition(" (")[0])
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
    with fake_tensors.FakeTensorMode():
        note(torch.ones(2))
    note(torch.ones(2))
    assert found == ["torch.jit.trace", "torch.export", "a trace of torch.fx", "a transform of torch.func", "FakeTensorMode", ""]
