"""torch.fx: whether a trace is running, functions that it records as one operation, the names of values, and code generation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.distributions import Distribution
from torch.fx._symbolic_trace import _wrapped_fns_to_patch, is_fx_symbolic_tracing
from torch.fx.graph import CodeGen, PythonCode, _illegal_names, _Namespace, _register_custom_builtin, _snake_case
from torch.fx.node import _get_qualified_name

from graphreg.torch_internals.patching import Changes

# Returns whether torch.fx is tracing. Up to torch 2.14, the result is True while any thread traces, because all threads share one flag.
# This is torch's own function, because each call of a rewritten module calls it, and a Python wrapper would be slower.
is_traced: Callable[[], bool] = is_fx_symbolic_tracing
# Converts the name of a module's class to the name of a value, as torch.fx and Dynamo do: ``MaxPool2d`` to ``max_pool2d``. graphreg also
# uses this function for the names of sites.
snake_case: Callable[[str], str] = _snake_case
_TRACE = inspect.unwrap(fx.Tracer.trace).__code__  # Dynamo wraps the method at its first use


def take_checks(changes: Changes, passes: Callable[[fx.Proxy], bool]) -> None:
    """Until the block of ``changes`` ends, ``torch._check`` and its relatives call ``passes`` for a condition that is a proxy.

    Otherwise they would refuse the condition, because it is no bool. If the result is False, they raise the error of the check.
    """
    original = vars(torch)[_CHECK]

    def check(kind: Any, condition: Any, message: Any) -> Any:
        return original(kind, passes(condition) if issubclass(type(condition), fx.Proxy) else condition, message)

    changes.put(torch, _CHECK, check)


_CHECK = "_check_with"


def take_shapes_of_samples(changes: Changes) -> None:
    """Until the block of ``changes`` ends, distributions whose shapes are traced draw samples of traced shapes.

    ``torch.Size(shape)``, which they call, would take the sizes of the trace for those of all calls.
    """
    original = Distribution._extended_shape

    def shape(of: Any, sample_shape: Any = ()) -> Any:
        parts = sample_shape, of._batch_shape, of._event_shape
        sizes = sample_shape if isinstance(sample_shape, tuple) else ()
        if not any(issubclass(type(part), fx.Proxy) for part in (*parts, *sizes)):
            return original(of, torch.Size(sample_shape))
        return (tuple(sample_shape) if sizes else sample_shape) + of._batch_shape + of._event_shape

    changes.put(Distribution, "_extended_shape", shape)


def traces_here() -> bool:
    """Return whether this thread is tracing with torch.fx, which means that ``fx.Tracer.trace`` is on the thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TRACE:
        frame = frame.f_back
    return frame is not None


def wrapped_functions() -> list[tuple[str, str, Any]]:
    """Return the functions registered with ``torch.fx.wrap``, as (module, name, function).

    torch.fx records a call of such a function as one operation; torch.export does not.
    """
    return [(str(names.get("__name__")), name, names.get(name)) for (_, name), names in _wrapped_fns_to_patch.items()]


def take_as_one(tracer: fx.Tracer, functions: Iterable[Any], places: Iterable[Any]) -> None:
    """Make a tracer record each call of one of these functions as one operation.

    During a trace, torch.fx replaces the functions by wrappers that record the call. With the tracer's argument ``autowrap_functions``, it
    does so only in the Python modules that define the traced forwards.

    Args:
        tracer: The tracer.
        functions: The functions to record.
        places: Further Python modules in which torch.fx replaces the functions.
    """
    tracer._autowrap_function_ids.update(map(id, functions))
    tracer._autowrap_search.extend(places)


def share_emitter(graph: fx.Graph, copy: fx.Graph) -> None:
    """Give ``copy`` the code generator of ``graph``, because ``torch.fx.Graph.graph_copy`` does not copy the code generator."""
    copy._codegen = graph._codegen


def value_name(graph: fx.Graph, function_name: str) -> str:
    """Return torch.fx's name for the result of a function, without the number that makes the name unique in the graph."""
    return graph._target_to_str(function_name)


def node_namer(taken: Iterable[str]) -> Callable[[str], str]:
    """Return a function that predicts the name of a new node: it takes a candidate, and returns the name that torch.fx would choose.

    ``fx.Graph`` chooses a name only when it makes the node. graphreg needs the names of several new nodes before it makes the first.
    So the function treats each name that it has returned as taken.

    Args:
        taken: The names of the nodes of the graph, in the order in which torch.fx chose them.
    """
    names_taken, names = dict.fromkeys(taken), list[_Namespace]()

    def name(candidate: str) -> str:
        free = candidate not in names_taken and candidate not in _illegal_names and candidate.isascii() and candidate.isidentifier()
        if names:
            free_name = names[0].create_name(candidate, None)
        elif free:
            free_name = candidate
        else:  # torch.fx appends a number that depends on all earlier names; replaying them takes long, so only this branch does so
            names.append(_Namespace())
            for each in names_taken:
                names[0].create_name(each, None)
            free_name = names[0].create_name(candidate, None)
        names_taken[free_name] = None
        return free_name

    return name


class _Probe(NamedTuple):
    value: Any


@cache
def defines_named_tuples() -> bool:
    """Return whether the code that torch.fx generates defines the classes of the named tuples that a graph returns.

    Up to torch 2.11, the code uses the name of such a class without defining it.
    """
    graph = fx.Graph()
    graph.output(_Probe(graph.placeholder("x")))
    return _Probe in graph.python_code("self").globals.values()


def define_named_tuples(graph: fx.Graph) -> None:
    """Make the code of a graph define the classes of the named tuples and enums that the graph returns, if torch.fx does not do so.

    torch.fx (up to 2.13 at least) writes what is in a dict or a named tuple by ``repr``, and that of a member of an enum is no Python.
    """
    if type(graph._codegen) is CodeGen and (not defines_named_tuples() or _has_enum(graph.output_node().args[0])):
        emitter = Defining()
        vars(emitter).update(vars(graph._codegen))
        graph.set_codegen(emitter)


def _has_enum(value: Any) -> bool:
    if isinstance(value, dict):
        return _has_enum((*value.keys(), *value.values()))
    return any(map(_has_enum, value)) if isinstance(value, (tuple, list)) else isinstance(value, Enum)


def define_in_copies(kind: type) -> None:
    """Make the code of every graph define the named tuple class ``kind``, if torch.fx does not do so.

    ``define_named_tuples`` changes the code generator of one graph. If torch.fx copies or splits this graph, the copies do not have the
    changed code generator.
    """
    if not defines_named_tuples():
        _register_custom_builtin(kind.__name__, f"from {kind.__module__} import {kind.__name__}", kind)


class Defining(CodeGen):
    """Generates the return statement of a graph. The classes of named tuples and enums are globals of the code."""

    _namespace: Any = None

    def _gen_python_code(self, nodes: Any, root_module: str, namespace: Any, **options: Any) -> PythonCode:
        self._namespace, self._names = namespace, dict[type, str]()
        try:
            code: PythonCode = super()._gen_python_code(nodes, root_module, namespace, **options)
            code.globals.update({name: kind for kind, name in self._names.items()})
        finally:
            del self._namespace, self._names
        return code

    def generate_output(self, output_args: Any, **options: Any) -> str:
        return f"return {self._written(output_args)}"

    def _written(self, value: Any) -> str:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._name(type(value))}({', '.join(map(self._written, value))})"
        if isinstance(value, Enum):
            return f"{self._name(type(value))}" + (f"[{value.name!r}]" if value.name in type(value).__members__ else f"({value.value!r})")
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self._written(key)}: {self._written(each)}' for key, each in value.items())}}}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._written, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._written, value))}{',' * (len(value) == 1)})"
        return repr(value)

    def _name(self, kind: type) -> str:
        if kind not in self._names:
            self._names[kind] = self._namespace.create_name(_get_qualified_name(kind), None)
        return self._names[kind]
