"""A function that a trace cannot see into becomes one value; the module that calls it only if that does not help."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import functions_of_others as others
import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import OtherInputs

X, INDEX = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
INPUTS = (X, INDEX)


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.first, self.last = function, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(self.function(self.first(x) * 2, index))


class Outer(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = Calls(function), Calls(function)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.a(x, index) + self.b(x, index).sum()


def opaque_in(traced: graphreg.types.Traced) -> tuple[list[str], list[str]]:
    """Return the opaque modules, and the names of the opaque functions."""
    functions = [note.split()[2].rpartition(".")[2] for note in traced.notes if note.startswith("opaque function: ")]
    return [*traced.opaque_modules], functions


@pytest.mark.parametrize(("make", "example_inputs"), [(Calls, None), (Outer, INPUTS)], ids=["bare", "inputs"])
@pytest.mark.parametrize("function", ["pool", "written", "shifted", "kept", "negated"])
def test_a_function_of_another_package_is_one_value(make: type[nn.Module], example_inputs: Any, function: str) -> None:
    torch.manual_seed(0)
    called = vars(others)[function]
    model, code = make(called), called.__code__
    traced = graphreg.trace(model, example_inputs, front_end="symbolic")
    # the outermost function of the other package: what the model's author called
    assert opaque_in(traced) == ([], [function])
    assert f"opaque function: functions_of_others.{function}" in str(graphreg.names(traced))
    assert function in [site.name.rpartition(".")[2] for site in traced.values]
    assert called.__code__ is code

    module = graphreg.regularize(model, example_inputs=example_inputs, hidden_dropout=0.0, weight_l2=1e-3)
    for inputs in (INPUTS, (X, torch.tensor([3, 1, 1, 0, 2, 2]))):
        expected = model(*inputs)
        wanted = torch.autograd.grad(expected.square().sum(), [*model.parameters()], allow_unused=True)
        for each in (module, pickle.loads(pickle.dumps(module))):
            output, _ = each(*inputs)
            assert torch.equal(output, expected)
            found = torch.autograd.grad(output.square().sum(), [*each.parameters()], allow_unused=True)
            torch.testing.assert_close(found, wanted)
    assert torch.equal(graphreg.strip(module)(*INPUTS), model(*INPUTS))
    if example_inputs is not None:
        graphreg.verify(model, module, example_inputs=INPUTS)


def test_of_its_own_package_the_innermost_comes_first() -> None:
    traced = graphreg.trace(others.Pools(), INPUTS, front_end="symbolic")
    assert opaque_in(traced) == ([], ["groups"])


class Branches(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(x) if others.is_sorted(index) else self.first(x)


class Loops(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(torch.stack(list(others.rows(x, index))))


@pytest.mark.parametrize("make", [Branches, Loops])
def test_where_no_function_helps_the_module_is_opaque(make: type[nn.Module]) -> None:
    model = nn.Sequential()
    model.inner, model.forward = make(None), lambda x, index: model.inner(x, index) * 2  # type: ignore[method-assign]
    traced = graphreg.trace(model, front_end="symbolic")
    assert opaque_in(traced) == (["inner"], [])


def test_the_next_one_outward_or_inward() -> None:
    # it branches on what the function inside returns
    assert opaque_in(graphreg.trace(Outer(others.sorted_first), front_end="symbolic")) == ([], ["sorted_first"])
    # the outer one reaches a tensor that a graph would not show
    assert opaque_in(graphreg.trace(Outer(others.scaled), front_end="symbolic")) == ([], ["groups"])


class GivesModule(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return others.through_layer(self.last, x, index)


class GivesModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = GivesModule(None)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.inner(x, index) * 2


def test_a_function_that_gets_a_module_is_no_opaque_one() -> None:
    # the function inside it, which gets tensors, is one
    assert opaque_in(graphreg.trace(GivesModules(), front_end="symbolic")) == ([], ["groups"])


class ReadsWhatItChanges(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(others.counted(self.first(x), index)) * others.CALLS


def test_state_that_the_function_changes_and_traced_code_reads() -> None:
    calls = others.CALLS
    with pytest.raises(graphreg.TraceError, match=r"reads what an opaque function changes.*CALLS"):
        graphreg.trace(ReadsWhatItChanges(None), front_end="symbolic")
    assert calls == others.CALLS
    assert opaque_in(graphreg.trace(Calls(others.counted), front_end="symbolic")) == ([], ["counted"])


def test_in_place_and_compiled() -> None:
    torch.manual_seed(0)
    model = Outer(others.halved)
    expected = model(*INPUTS)
    graphreg.regularize_(model, hidden_dropout=0.0)
    assert torch.equal(model(*INPUTS), expected)
    graphreg.strip_(model)
    module = graphreg.regularize(model, hidden_dropout=0.0)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*INPUTS)[0], expected)


class Masks(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        mask = others.mask_of(index, 5)
        return self.first(x) if mask is None else self.last(x) * mask[:, None]


def test_a_result_that_is_none_at_times() -> None:
    """Nothing tells the trace what ``is None`` is asked of: the graph raises where the answer may be another one."""
    model = Masks(None)
    module = graphreg.regularize(model, example_inputs=INPUTS, front_end="symbolic", weight_l2=1e-3)
    assert torch.equal(module(*INPUTS)[0], model(*INPUTS))
    with pytest.raises(OtherInputs, match="mask_of is opaque, and returned None"):
        module(X, INDEX + 3)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor | None:
        return None if x.max() > 9 else x


class Gated(Calls):
    def __init__(self) -> None:
        super().__init__(None)
        self.gate = Gate()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.last(x) if self.gate(x) is None else self.first(x)


def test_an_opaque_module_that_returns_none_at_times() -> None:
    model = Gated()
    module = graphreg.regularize(model, example_inputs=INPUTS, front_end="symbolic", weight_l2=1e-3)
    assert torch.equal(module(*INPUTS)[0], model(*INPUTS))
    with pytest.raises(OtherInputs, match="gate is opaque, and returned None"):
        module(X * 100, INDEX)


class Notes(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        notes = list[Tensor]()
        x = others.noting(self.last(x), notes)
        return x + sum(notes)


def test_a_list_that_the_function_changes() -> None:
    with pytest.raises(graphreg.TraceError, match="control flow"):
        graphreg.trace(Notes(None), INPUTS, front_end="symbolic")


class Reads(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return others.setting(self.last(x)) * others.SETTINGS.factor


def test_an_object_that_the_function_changes() -> None:
    with pytest.raises(graphreg.TraceError, match="reads what an opaque function changes"):
        graphreg.trace(Reads(None), INPUTS, front_end="symbolic")


class Catches(Calls):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        try:
            if x.max() > 3:
                return self.first(x)
        except Exception:
            pass
        return self.last(x)


def test_the_refusal_of_torch_export_that_the_forward_catches() -> None:
    with pytest.raises(graphreg.TraceError, match="catches the error by which torch.export refuses"):
        graphreg.trace(Catches(None), INPUTS, front_end="export")
