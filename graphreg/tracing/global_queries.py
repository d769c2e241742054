"""Answers a forward's queries of global state (``torch.is_grad_enabled()``) during a trace, and finds those that the graph depends on.

A graph is made for one answer to a query. So a forward that makes a query is traced with another answer, too. If that gives another
graph and a submodule makes the query, the submodule becomes opaque and makes the query at each call. If it does so in train mode alone,
or if the model itself makes the query, or if the query is for the default dtype, the graph asserts the answer: few calls in train mode
are under ``torch.no_grad``, and a graph with sites inside the submodule is worth more.

Queries that have the same answer in every ordinary run are not asserted: ``torch.jit.is_scripting()``,
``torch.compiler.is_compiling()``, ``torch.onnx.is_in_onnx_export()``. Neither is ``torch.is_autocast_enabled()``, which decides on
precision alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect

from graphreg.errors import GraphRegError
from graphreg.ir.contents import called_by_foreign_code, calling_module
from graphreg.ir.metadata import label_site
from graphreg.torch_internals.modules import modules_by_path
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.frames import is_foreign

QUERIES: dict[str, Callable[[], Any]] = {
    name: getattr(torch, name)
    for name in ("is_grad_enabled", "is_inference_mode_enabled", "are_deterministic_algorithms_enabled", "get_default_dtype")
}
# During a trace by torch.export, these functions return True to installed libraries, which expect that, and False to the user's code.
_COMPILING = (torch.compiler.is_compiling, torch.compiler.is_exporting, torch.compiler.is_dynamo_compiling)
_ASKED = frozenset(map(id, (*QUERIES.values(), *_COMPILING)))  # by identity: the model's code may have imported one under another name
Answers = Mapping[str, Any]  # answers by the name of the query
_TRACERS = ("graphreg.", "torch.fx.")


def includes_query(ids: Iterable[int]) -> bool:
    """Return whether a query is among the objects with these ids."""
    return not _ASKED.isdisjoint(ids)


@dataclass
class ModeReads:
    """Which modes (``training``) a forward reads while it is traced.

    Attributes:
        readers: A dict. Each key is the path of a module whose mode another module reads; the value is the path of that other module.
        any: Whether the forward reads the mode of any module. If not, it computes the same in both modes.
        paths: The paths of all modules whose modes it reads, in order, as the keys of a dict.
    """

    readers: dict[str, str] = field(default_factory=dict)
    any: bool = False
    paths: dict[str, None] = field(default_factory=dict)

    def add(self, other: ModeReads) -> None:
        """Add the reads of another trace."""
        self.readers.update(other.readers)
        self.any = self.any or other.any
        self.paths.update(other.paths)


@has_side_effect
def surrounded(name: str, expected: Any) -> None:
    """Raise unless ``torch.<name>()`` returns the value that it returned when the forward was traced."""
    now = getattr(torch, name)()
    if now != expected:
        raise GraphRegError(
            f"the model's forward calls torch.{name}() and branches on the result. It was traced with {expected}; now the result is {now}. "
            "A model of transformers that checkpoints activations asks because of its cache: give use_cache=False. Otherwise, call the "
            f"module where it is {expected}, or move that step into a submodule of its own, which then becomes opaque in eval mode."
        )


class EnvironmentQueries:
    """Records which queries of global state a forward makes, and in which modules. It can answer them differently from torch.

    Attributes:
        queries: A dict. Each key is the name of a query; the value has the paths of the modules that make the query.
        mode_reads: The modes that the forward reads.
    """

    def __init__(self, path: Callable[[], str | None], answers: Answers, refusal: type[BaseException] = RuntimeError) -> None:
        """Prepare to record.

        Args:
            path: Returns the path of the module whose code runs, or None if no traced code runs.
            answers: Answers that replace torch's own, by the name of the query.
            refusal: The exception to raise when traced code sets the mode of a module.
        """
        self.queries: dict[str, dict[str, None]] = {}
        self.mode_reads = ModeReads()
        self._path, self._answers, self._refusal, self._thread = path, answers, refusal, threading.get_ident()

    def intercept(self, changes: Changes, model: nn.Module, places: Iterable[dict[str, Any]]) -> None:
        """Intercept the queries until the block of ``changes`` ends. ``places``: the namespaces that have a query among their variables."""
        asking = [
            (place, name, query)
            for place in (vars(torch), vars(torch.compiler), *places)
            for name, query in compress(list(place.items()), map(_ASKED.__contains__, map(id, list(place.values()))))
        ]
        for place, name, query in asking:
            changes.put(place, name, self._answering(query))
        paths = {id(vars(module)): path for path, module in modules_by_path(model, once=True).items()}
        changes.put(nn.Module, "training", self._training_property(paths))

    def _training_property(self, paths: Mapping[int, str]) -> property:
        """Return a property that replaces ``nn.Module.training`` and records which module reads the mode of another one.

        Traced code that changes a mode gets the exception ``refusal``.

        Args:
            paths: The modules' paths by the id of their ``__dict__``. torch.export's proxy of a module has the same ``__dict__``.
        """

        def get(module: nn.Module) -> Any:
            attributes = vars(module)
            path = paths.get(id(attributes))
            is_known = self.mode_reads.any and path in self.mode_reads.paths
            # what a tracer reads does not decide what the forward computes
            if not is_known and threading.get_ident() == self._thread and not calling_module(2).startswith(_TRACERS):
                self.mode_reads.any = True
                self.mode_reads.paths |= {} if path is None else {path: None}

            if "training" not in attributes:  # after the error, Python calls __getattr__, by which a module of torch.jit gives its mode
                raise AttributeError(f"{type(module).__name__!r} object has no attribute 'training'")
            reader = self._current_path()
            if reader is not None and path and path != reader and not called_by_foreign_code():
                self.mode_reads.readers[path] = reader
            return attributes["training"]

        def set_(module: nn.Module, mode: bool) -> None:
            attributes = vars(module)
            if self._current_path() is not None and id(attributes) in paths and attributes.get("training") != mode:
                raise self._refusal(f"it sets the mode of {paths[id(attributes)] or 'the model'}, which a graph cannot do")
            attributes["training"] = mode

        def delete(module: nn.Module) -> None:
            if vars(module).pop("training", None) is None:
                raise AttributeError("training")

        return property(get, set_, delete)

    def _current_path(self) -> str | None:
        """Return the path of the module whose code runs; None in other threads and if no traced code runs."""
        return self._path() if threading.get_ident() == self._thread else None

    def _answering(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that replaces a query. It records which module asks, and returns the answer in ``answers`` or else torch's."""
        name = next((name for name, each in QUERIES.items() if each is function), None)

        def ask() -> Any:
            frame = sys._getframe(1)
            if threading.get_ident() != self._thread or is_foreign(frame):
                return function()
            if name is None:
                return function() and "-packages" in frame.f_code.co_filename
            self.queries.setdefault(name, {})[self._path() or ""] = None
            return self._answers.get(name, function())

        return ask


def settle_queries(
    model: nn.Module, graph: fx.Graph, queries: Mapping[str, Iterable[str]], same: Callable[[Answers], bool], opaque: dict[str, str],
    modes: ModeReads,
) -> None:  # fmt: skip
    """Find the queries on whose answers the graph depends. Make submodules with such a query opaque, or make the graph assert the answer.

    The graph asserts the answer if no submodule in eval mode makes the query, or if the query is for the default dtype.

    Args:
        model: The model, in the mode of the trace.
        modes: The modes that the forward reads. Only if it reads any, another trace follows, in eval mode.
        graph: The graph, traced with the present answers.
        queries: A dict. Each key is the name of a query; the value has the paths of the modules that make the query.
        same: Returns whether a trace with other answers gives the same graph.
        opaque: The opaque modules by path, with reasons. This function may add some.
    """
    for name, paths in queries.items():
        now = QUERIES[name]()
        other = (torch.float32 if now is torch.float64 else torch.float64) if name == "get_default_dtype" else not now
        if same({name: other}):
            continue

        submodules = [path for path in paths if path not in ("", *opaque) and not (modes.any and model.get_submodule(path).training)]
        if submodules and name != "get_default_dtype":  # all modules share the default dtype, so the graph asserts it
            opaque.update(dict.fromkeys(submodules, f"it calls torch.{name}() at each call"))
        else:
            # before all operations, so that a call under another answer computes nothing
            first = next((node for node in graph.nodes if node.op != "placeholder"), graph.output_node())
            with graph.inserting_before(first):
                label_site(graph.call_function(surrounded, (name, now)), "")


def needs_gradients(graph: fx.Graph) -> bool:
    """Return whether the graph asserts that gradients are enabled. Such a graph must run with gradients enabled."""
    return any(node.target is surrounded and node.args == ("is_grad_enabled", True) for node in graph.nodes)
