"""Finds the shapes and dtypes of a graph's values from example inputs, on fake tensors where possible."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from graphreg.errors import OtherInputs, TraceError, first_line
from graphreg.ir.train_eval import ModeGraphs, modes_asked, why_not_in_eval
from graphreg.torch_internals import pytree
from graphreg.torch_internals.fake_tensors import FAKE_LOGGER, FakeTensorMode
from graphreg.torch_internals.random_state import quiet
from graphreg.torch_internals.torch_modes import uncompiled
from graphreg.tracing.global_queries import needs_gradients
from graphreg.tracing.proof.copies import copied_call, tensor_copies
from graphreg.tracing.proof.first_difference import GraphRun
from graphreg.tracing.tensors import fake_copy, with_attributes, with_their_attributes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class GivenCall:
    """The arguments of a call of which some can be given by position only, and others are given by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(example_inputs: Any, called: str = "example_inputs") -> Arguments | None:
    """Turn example inputs into positional and keyword arguments. Return None for None.

    Args:
        example_inputs: A tensor, a tuple (positional), a dict (keyword), or None; within graphreg
            also a ``GivenCall``.
        called: The name of the option, for errors.

    Raises:
        TraceError: The example inputs have another type, or hold arrays that are not tensors.
    """
    if example_inputs is None:
        return None
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, GivenCall):
        return example_inputs.args, example_inputs.kwargs
    if not isinstance(example_inputs, (Mapping, tuple, list)):
        raise TraceError(
            f"{called}={type(example_inputs).__name__} is not allowed; give a tensor, a tuple (positional) or a dict (keyword)."
            + (" torch.as_tensor converts an array to a tensor." if hasattr(example_inputs, "__array__") else "")
        )
    values = example_inputs.values() if isinstance(example_inputs, Mapping) else example_inputs
    for value in values:
        # A number of numpy cannot change, and is specialized as a number of Python is.
        is_number = any(base.__module__ == "numpy" and base.__name__ == "generic" for base in type(value).__mro__)
        if hasattr(value, "__array__") and not isinstance(value, torch.Tensor) and not is_number:
            raise TraceError("the inputs carry an array that is not a tensor. Convert it with torch.as_tensor.")
    return ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})


def no_shape(call: Arguments) -> str:
    """Return a hint for an error message if example inputs are numbers alone, as a shape would be; ``""`` for any others."""
    values = (*call[0], *call[1].values())
    if not values or not all(isinstance(value, int) for value in values):
        return ""
    return f" They are the arguments of a call, such as torch.randn({', '.join(map(str, values))}), and not the shape of one."


def propagate(
    model: nn.Module,
    graphs: ModeGraphs,
    bound: Mapping[str, Any],
    call: Arguments,
    constants: Mapping[str, torch.Tensor],
    known: Callable[[fx.Graph], Mapping[fx.Node, Any] | None] = lambda graph: None,
) -> None:
    """Write ``node.meta["value"]`` in every node: (shape, dtype) for a tensor, a list of these for a tuple, None for anything else.

    Args:
        model: The model.
        graphs: The model's graphs by mode.
        bound: The example inputs by argument name.
        call: The example inputs as positional and keyword arguments.
        constants: The tensors that the graphs read and the model does not have, by name.
        known: Returns the value of each node of a graph, if the trace has found them; else None.

    Raises:
        TraceError: A graph does not run on the example inputs although the model does.
    """
    for mode, graph in graphs.items():
        if mode == "eval" and why_not_in_eval(graphs):
            continue
        if (found := known(graph)) is not None:
            for node in graph.nodes:
                value = map_arg(node.args[0], found.__getitem__) if node.op == "output" else found[node]
                node.meta["value"] = _shape_and_dtype(value)
            continue
        # fake tensors come first: they need no memory, and no copy of the parameters
        values = [bound[str(n.target).lstrip("*")] for n in graph.nodes if n.op == "placeholder"]
        if _propagate_on_fakes(model, mode, graph, values, constants):
            continue
        # if the model does not run either, its own error is raised, and not one about its graph
        twin, grad = run_model(model, call, constants)
        if any(node.target is modes_asked for node in graph.nodes):  # other graphs run in eval mode, where a batch norm takes one row
            _take_modes(twin, model, mode)
        for is_on in {grad or needs_gradients(graph), True}:  # a forward may switch gradients on for itself, and its graph does not
            try:
                with torch.set_grad_enabled(is_on):
                    _propagate_on_copy(twin, graph, values)
                break
            except TraceError:
                if is_on:
                    raise


def _copy_of(model: nn.Module) -> nn.Module:
    """Return a deep copy of the model; raise TraceError if it cannot be copied."""
    try:
        # a value that a forward kept (``self.last = h``) has a graph of autograd, and torch copies none
        held = pytree.tree_leaves([[*vars(module).values()] for module in model.modules()])
        kept = tensor_copies(each for each in held if isinstance(each, torch.Tensor) and not each.is_leaf)
        return with_their_attributes(copy.deepcopy(model, dict[int, Any](kept)), model)
    except Exception as error:  # the model holds a lock, a generator or an open file
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and graphreg runs a copy of it on the example_inputs. "
            "Regularize it without them, or give its class a __deepcopy__."
        ) from error


def _take_modes(twin: nn.Module, model: nn.Module, mode: str) -> None:
    """Put each module of a copy into the mode for which a graph was traced: that of the model's own module, if the model is in ``mode``."""
    is_present = mode == "both" or model.training == (mode == "train")
    for copied, module in zip(twin.modules(), model.modules(), strict=True):
        copied.training = module.training if is_present else mode == "train"


def run_model(model: nn.Module, call: Arguments, constants: Mapping[str, torch.Tensor]) -> tuple[nn.Module, bool]:
    """Run a copy of the model in eval mode on the example inputs. Return the copy, and whether the model needs gradient mode to run.

    Add a note to an error that the model raises.
    """
    first: Exception | None = None
    for grad in (False, True):  # some models cannot run without gradients
        twin = _copy_of(model)
        twin.eval()  # the model's own, which may return nothing
        twin.__dict__.update(constants)
        try:
            with torch.set_grad_enabled(grad):
                args, kwargs = copied_call(call, {})
                twin(*args, **kwargs)
            return twin, grad
        except Exception as error:
            first = first or error
    assert first is not None
    first.add_note(f"This is {type(model).__name__}'s own error: graphreg ran it on the example_inputs.{no_shape(call)}")
    raise first


def _propagate_on_fakes(model: nn.Module, mode: str, graph: fx.Graph, values: list[Any], constants: Mapping[str, torch.Tensor]) -> bool:
    """Run a graph on fake tensors and write ``node.meta["value"]``. Return False if that fails, for example because sizes depend on data.

    If it fails, the caller runs the graph on real tensors, with a copy of the model.
    """
    try:
        fake = FakeTensorMode()
        twin = fake_copy(model, fake)
        twin.__dict__.update({name: fake.from_tensor(value) for name, value in constants.items()})
        _take_modes(twin, model, mode)
        inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: with_attributes(fake.from_tensor(tensor), tensor), values)
        # a graph that asserts grad mode raises without it
        with uncompiled(), fake, torch.set_grad_enabled(needs_gradients(graph)), quiet(FAKE_LOGGER, logging.CRITICAL):
            _ShapeRecorder(twin, graph).on(inputs)
    except Exception:
        return False
    return True


def _propagate_on_copy(twin: nn.Module, graph: fx.Graph, values: list[Any]) -> None:
    """Run a graph on real tensors, with ``twin``, a copy of the model, and write ``node.meta["value"]``."""
    try:
        with uncompiled():
            _ShapeRecorder(twin, graph).on(copied_call((tuple(values), {}), {})[0])
    except OtherInputs as error:  # asserted of the graph: a mode that the trace did not have, or what another trace found
        raise TraceError(
            f"{type(twin).__name__} cannot be traced symbolically: its forward decides something that its trace cannot follow, and the "
            f"graph does not take the example_inputs. {str(error)[:1].upper()}{str(error)[1:]}"
        ) from error
    except Exception as error:
        raise TraceError(
            f"{type(twin).__name__} cannot be traced symbolically: it runs on the example_inputs, and its trace does not "
            f"({first_line(error)}). Its forward takes a decision that a trace cannot follow, such as isinstance on a value. Move that "
            "step into a submodule of its own, which then becomes an opaque module."
        ) from error


class _ShapeRecorder(GraphRun):
    """Runs a graph and writes ``node.meta["value"]``."""

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and write the shape and dtype of its value to ``node.meta``."""
        value = super().run_node(n)
        # a nested tensor has rows of several lengths, so its shape is not known
        if not any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in pytree.tree_leaves(value)):
            n.meta["value"] = _shape_and_dtype(value)
        return value


def _shape_and_dtype(value: Any) -> tuple[tuple[int, ...], torch.dtype] | Sequence[Any] | None:
    """Return (shape, dtype) for a tensor, a list with an entry for each item of a tuple or list, None for anything else."""
    if isinstance(value, torch.Tensor):
        return tuple(int(n) for n in value.shape), value.dtype
    return [_shape_and_dtype(item) for item in value] if isinstance(value, (tuple, list)) else None
