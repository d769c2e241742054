"""Finds the gradient reach of each penalty in the present graph: the parameters that get its gradient, or would if they were not frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx, nn

from graphreg.ir.dataflow import reached, without_derivative
from graphreg.ir.metadata import Kind, addition_of
from graphreg.ir.operations import Operations
from graphreg.reporting.entries import Trained
from graphreg.runtime.stateful import owned_by
from graphreg.torch_internals.modules import parameters_by_name


def trained(module: nn.Module, graphs: Mapping[str, fx.Graph]) -> dict[str, Trained]:
    """Return, for each penalty, the names of the parameters in its gradient reach: those that are trained, and those that are frozen.

    The keys are the names of regularizers. A splice is among them if it has a method ``penalty``. A
    parameter is frozen if its ``requires_grad`` is False. The names of parameters are in the order
    of ``module.named_parameters()``.
    """
    operations = Operations(module)
    names = {id(parameter): name for name, parameter in parameters_by_name(module, once=True).items()}
    by_penalty: dict[str, set[str]] = {}
    for graph in graphs.values():
        passes = set(graph.nodes) - without_derivative(graph)
        for node in graph.nodes:
            added = addition_of(node)
            if added is not None and added.kind == Kind.TOTAL and added.regularizer is not None:
                before = {node, *reached(node.all_input_nodes, lambda each: each.all_input_nodes, passes.__contains__)}
                by_penalty.setdefault(added.regularizer, set()).update(names[id(p)] for n in before for p in _read(n, module, operations))
    needs = {name: parameter.requires_grad for name, parameter in parameters_by_name(module, once=True).items()}
    return {
        penalty: (tuple(n for n in needs if n in reach and needs[n]), tuple(n for n in needs if n in reach and not needs[n]))
        for penalty, reach in by_penalty.items()
    }


def _read(node: fx.Node, module: nn.Module, operations: Operations) -> Iterable[nn.Parameter]:
    """Return the parameters that a node reads: those of the module that it calls or fetches, or the parameter that it fetches."""
    if (called := operations.module(node)) is not None:
        return (*called.parameters(), *owned_by(called))
    if node.op != "get_attr":
        return ()
    layer: nn.Module | None = operations.modules.get(str(node.target))
    if layer is not None:  # another node calls this layer, with replaced parameters
        return layer.parameters()
    owner, _, name = str(node.target).rpartition(".")
    parameter = operations.modules[owner]._parameters.get(name) if owner in operations.modules else None
    return () if parameter is None else (parameter,)
