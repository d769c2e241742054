"""Shapes and dtypes at the sites, from example inputs, without running the model on data."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphreg.errors import TraceError, first_line
from graphreg.ir import Graphs
from graphreg.torch_internals import FAKE_LOGGER, FakeCopyMode, FakeTensorMode, pytree, quiet
from graphreg.tracing.context import recorded

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(example_inputs: Any, called: str = "example_inputs") -> Arguments | None:
    """Inputs as a call: a tensor, a tuple (positional) or a dict (keyword)."""
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if not isinstance(example_inputs, (Mapping, tuple, list)):
        raise TraceError(
            f"{called}={type(example_inputs).__name__} is not allowed; give a tensor, a tuple (positional) or a dict (keyword)."
            + (" torch.as_tensor makes a tensor of an array." if hasattr(example_inputs, "__array__") else "")
        )
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    if any(hasattr(value, "__array__") and not isinstance(value, torch.Tensor) for value in values):
        raise TraceError(f"{called} carry an array that is no tensor. torch.as_tensor makes one of it.")
    return ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def propagate(model: nn.Module, graphs: Graphs, bound: Mapping[str, Any], call: Arguments, constants: Mapping[str, torch.Tensor]) -> None:
    """Write ``node.meta["value"] = (shape, dtype)`` at every tensor; None at what is no tensor."""
    for mode, graph in graphs.items():
        values = [bound[str(n.target).lstrip("*")] for n in graph.nodes if n.op == "placeholder"]
        if _runs_on_fakes(model, mode, graph, values, constants):
            continue
        twin = run_itself(model, call, constants)
        with torch.set_grad_enabled(recorded(graph)):
            _run(twin, graph, values)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a lock, a generator, an open file
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and graphreg runs a copy of it on the example_inputs. "
            "Regularize it without them, or give its class a __deepcopy__."
        ) from error


def run_itself(model: nn.Module, call: Arguments, constants: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy in eval mode that has run on the example; the model's own error, with a note that says so, where it does not run."""
    first: Exception | None = None
    for grad in (False, True):  # some cannot run without
        twin = _copied(model).eval()
        twin.__dict__.update(constants)
        try:
            with torch.set_grad_enabled(grad):
                twin(*copy.deepcopy(call[0]), **copy.deepcopy(call[1]))
            return twin
        except Exception as error:
            first = first or error
    assert first is not None
    first.add_note(f"This is {type(model).__name__}'s own error: graphreg ran it on the example_inputs.")
    raise first


def _runs_on_fakes(model: nn.Module, mode: str, graph: fx.Graph, values: list[Any], constants: Mapping[str, torch.Tensor]) -> bool:
    """Fake tensors cannot follow everything (data-dependent sizes), nor a model that fails: the model itself is asked then."""
    try:
        fake = FakeTensorMode()
        with FakeCopyMode(fake):
            twin = copy.deepcopy(model)
            twin.__dict__.update({name: fake.from_tensor(value) for name, value in constants.items()})
        inputs = pytree.tree_map_only(torch.Tensor, fake.from_tensor, values)
        with fake, torch.set_grad_enabled(recorded(graph)), quiet(FAKE_LOGGER, logging.CRITICAL):
            _Recorder(_in_mode(twin, mode), graph).run(*inputs, enable_io_processing=False)
    except Exception:
        return False
    return True


def _run(twin: nn.Module, graph: fx.Graph, values: list[Any]) -> None:
    try:
        _Recorder(twin, graph).run(*copy.deepcopy(values), enable_io_processing=False)
    except Exception as error:
        raise TraceError(
            f"{type(twin).__name__} cannot be traced symbolically: it runs on the example_inputs, and its trace does not "
            f"({first_line(error)}). Its forward takes a decision that a trace cannot, as by isinstance of a value. Move that step into "
            "a submodule of its own (graphreg keeps a submodule it cannot trace whole)."
        ) from error


def _in_mode(model: nn.Module, mode: str) -> nn.Module:
    return model.eval() if mode == "eval" else model


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument's value; torch.fx takes what is left of the values for ``*args``, and here they are one tuple."""
        return next(self.args_iter) if str(target).startswith("*") else super().placeholder(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["value"] = _described(value)
        return value


def _described(value: Any) -> tuple[tuple[int, ...], torch.dtype] | Sequence[Any] | None:
    if isinstance(value, torch.Tensor):
        return tuple(int(n) for n in value.shape), value.dtype
    return [_described(item) for item in value] if isinstance(value, (tuple, list)) else None
