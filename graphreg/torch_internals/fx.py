"""torch.fx: whether it is tracing, which functions it records as one operation, how it names values and generates code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

from torch import fx
from torch.fx._symbolic_trace import _wrapped_fns_to_patch, is_fx_symbolic_tracing
from torch.fx.graph import CodeGen, PythonCode, _register_custom_builtin, _snake_case
from torch.fx.node import _get_qualified_name

# Returns whether torch.fx is tracing: up to torch 2.14 in any thread, because all threads share one flag. Each call of a module calls this,
# so it is torch's own function.
is_traced: Callable[[], bool] = is_fx_symbolic_tracing
# Makes the name of a value from the name of a module's class, as torch.fx and Dynamo do: ``max_pool2d`` from ``MaxPool2d``. The names of
# sites are made with it, too.
snake_case: Callable[[str], str] = _snake_case
_TRACE = fx.Tracer.trace.__code__


def traces_here() -> bool:
    """Return whether this thread is tracing with torch.fx. The frames on its stack show this."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _TRACE:
        frame = frame.f_back
    return frame is not None


def wrapped_functions() -> list[tuple[str, str, Any]]:
    """Return the functions registered with ``torch.fx.wrap``, as (module, name, function).

    torch.fx records a call of each as one operation; torch.export does not.
    """
    return [(str(names.get("__name__")), name, names.get(name)) for (_, name), names in _wrapped_fns_to_patch.items()]


def take_as_one(tracer: fx.Tracer, functions: Iterable[Any], places: Iterable[Any]) -> None:
    """Have a tracer record a call of any of these functions as one operation.

    ``places``: the Python modules in which the functions are replaced, in addition to those that define the traced forwards. The tracer's
    argument ``autowrap_functions`` covers only the latter.
    """
    tracer._autowrap_function_ids.update(map(id, functions))
    tracer._autowrap_search.extend(places)


def share_emitter(graph: fx.Graph, copy: fx.Graph) -> None:
    """Give a copy of a graph the code generator of the original, which ``torch.fx.Graph.graph_copy`` does not copy."""
    copy._codegen = graph._codegen


def value_name(graph: fx.Graph, function_name: str) -> str:
    """Return the name that torch.fx gives the result of a function with this name, without the number that makes it unique."""
    return graph._target_to_str(function_name)


class _Probe(NamedTuple):
    value: Any


@cache
def defines_named_tuples() -> bool:
    """Return whether torch.fx's code defines the class of a named tuple that a graph returns. Up to torch 2.11 it only uses the name."""
    graph = fx.Graph()
    graph.output(_Probe(graph.placeholder("x")))
    return _Probe in graph.python_code("self").globals.values()


def define_named_tuples(graph: fx.Graph) -> None:
    """Make the graph's code define the classes of the named tuples that it returns, if torch.fx does not do so."""
    if not defines_named_tuples() and type(graph._codegen) is CodeGen:
        emitter = _Defining()
        vars(emitter).update(vars(graph._codegen))
        graph.set_codegen(emitter)


def define_in_copies(kind: type) -> None:
    """Make the code of every graph define a class of named tuples, if torch.fx does not do so.

    torch.fx's functions that copy or split a graph drop what ``define_named_tuples`` added to it.
    """
    if not defines_named_tuples():
        _register_custom_builtin(kind.__name__, f"from {kind.__module__} import {kind.__name__}", kind)


class _Defining(CodeGen):
    """Writes what a graph returns as torch 2.12 does: the class of a named tuple is a global of the code."""

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
            kind = type(value)
            if kind not in self._names:
                self._names[kind] = self._namespace.create_name(_get_qualified_name(kind), None)
            return f"{self._names[kind]}{tuple(value)!r}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._written, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self._written, value))}{',' * (len(value) == 1)})"
        return repr(value)
