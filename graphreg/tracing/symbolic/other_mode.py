"""Traces a model in the other mode along the graph of the first, which takes half the time of a trace.

Most forwards perform the same operations in both modes, and only pass other literals to them
(``training=``). ``ModeFollower`` runs the forward in the other mode, and compares each operation
with the next node of the graph, in place of making a node. As soon as anything is different or out
of the ordinary, it gives up, and the caller traces the other mode from the beginning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from graphreg.ir.comparison import Literals, flat, literals_apart, name_of
from graphreg.ir.metadata import scope_of
from graphreg.ir.random_ops import FUNCTIONS
from graphreg.torch_internals.patching import raise_interrupt
from graphreg.torch_internals.random_state import randomness, regions
from graphreg.tracing.shape_decisions import needed
from graphreg.tracing.side_effects.opaque_modules import untraced_modules
from graphreg.tracing.side_effects.retrace import model_restored
from graphreg.tracing.side_effects.snapshot import Snapshot
from graphreg.tracing.symbolic.factory_tape import FACTS, has_proxy, operation_name
from graphreg.tracing.symbolic.proxies import Value
from graphreg.tracing.symbolic.tracer import SiteTracer, unwrap_functions
from graphreg.tracing.tensors import LEFT_IN_TENSORS, tensors_in


class Departs(BaseException):
    """Ends a trace that follows a graph. A BaseException, so that no ``except Exception`` of the forward catches it."""


def literals_in_other_mode(model: nn.Module, graph: fx.Graph, leader: SiteTracer, before: Snapshot) -> dict[str, Literals] | None:
    """Return the literals that differ in the model's present mode from those of a graph, by name of the node that takes them.

    Return None unless it is certain that a trace in the present mode would give the same graph but
    for these literals, and would have left nothing behind.

    Args:
        model: The model, in another mode than that in which the graph was traced.
        graph: The graph.
        leader: The tracer of the latest trace.
        before: A snapshot of the model, since which nothing but modes has changed.
    """
    if not before.serves_again() or before.code.clocks or untraced_modules(model, leader.opaque):
        return None
    # nodes that were added after the forward, and tensors that it made, have no counterpart here
    if leader.graph is not graph or not leader.is_plain():
        return None

    with model_restored(model, before):
        follower = ModeFollower(leader)
        try:
            follower.trace(model)
            if before.drawn_generators() or before.registered() or before.changed() or before.assigned_tensors():
                return None
            before.nothing_ran()
        except Departs:
            return None
        except Exception as error:
            # the trace from the beginning finds out whether this is an error
            raise_interrupt(error)
            return None
        finally:
            # torch.fx notes at a node, here one of the graph, that it has wrapped its function
            unwrap_functions(graph)
    return None if follower.departed or follower.environment.queries or follower.environment.mode_reads.readers else follower.literals


class _NothingMade(TorchFunctionMode):
    """Gives up where the forward makes a tensor, or computes with one that is no traced value."""

    def __init__(self, depart: Callable[[], NoReturn]) -> None:
        super().__init__()
        self._depart = depart

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values, name = (args, kwargs or {}), operation_name(func)
        computes = not has_proxy(values) or next(tensors_in(values), None) is not None
        if name.startswith("__set") or (computes and (name not in FACTS or name in LEFT_IN_TENSORS)):
            self._depart()
        return func(*args, **(kwargs or {}))


class ModeFollower(SiteTracer):
    """Runs a forward, and compares what it does with a graph that another tracer has made of the same forward in another mode.

    Attributes:
        literals: The literals that differ: by node name, then by position, the literal of the graph
            and that of the present mode.
        departed: Whether the forward did something that the graph does not have.
    """

    def __init__(self, leader: SiteTracer) -> None:
        """Prepare to follow the graph of ``leader``."""
        shares = leader.shares if leader.notes_leaves else None
        super().__init__(leader.opaque, leader.specialized, leader.examples, {}, False, shares, leader.asked, leader.tried)
        self.literals: dict[str, Literals] = {}
        self.departed = False
        # these describe the model and the graph, and are the same in both modes
        self.operations, self.sizes, self._places = leader.operations, leader.sizes, leader._places
        self._buffers, self._parameters = leader._buffers, leader._parameters
        self._leader, self._unlike = leader, dict[fx.Node, bool]()
        self._expected: Iterator[fx.Node] = iter(leader.graph.nodes)
        self._returns = iter(leader._outputs)
        self.tape: Any = _NothingMade(self._depart)

    def _depart(self, *args: Any) -> NoReturn:
        """Give up."""
        self.departed = True
        raise Departs

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """Follow the graph to its end. Raises Departs if the forward does anything else."""
        drawn = randomness()
        with self._answering(root):
            graph = fx.Tracer.trace(self, root)
        rest = next(self._expected, None), next(self._returns, None)
        if randomness() != drawn or rest != (None, None) or self.refused:
            self._depart()
        return graph

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        """Return a proxy of the graph's next node. torch.fx calls this method for each operation."""
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        return self._as_its_kind(Value(node, self))

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        """Return the graph's next node after comparing it with this one."""
        node = next(self._expected, None)
        if node is None or node.op != kind or node.target != target or regions() != self.region:
            self._depart()
        self._leader.note_autocast()
        if kind != "output" and scope_of(node) != self._scopes[-1]:
            self._depart()
        if not (_are_alike(args, node.args) and _are_alike(kwargs, node.kwargs)):
            self._note_literals(node, args, kwargs)
        return node

    def _note_literals(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        now: list[Any] = []
        map_aggregate((args, kwargs), now.append)
        apart = literals_apart(flat(node), now) if node.kwargs.keys() == kwargs.keys() else None
        if apart is None or not apart[1]:
            self._depart()
        if apart[0]:
            self.literals[name_of(node)] = apart[0]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a call of a module. torch.fx calls this method."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:
            return forward(*args, **kwargs)

        self._scopes.append(path)
        if self.is_leaf_module(m, path):
            value: Any = self.create_proxy("call_module", path, args, kwargs)
        else:
            try:
                value = forward(*args, **kwargs)
            except Exception as error:
                raise_interrupt(error)
                self._depart()
            returned = next(self._returns, None)
            # an assigned buffer makes a module opaque, which only a full trace can do
            if returned is None or returned[1] != path or any(issubclass(type(each), fx.Proxy) for each in m._buffers.values()):
                self._depart()
        self._scopes.pop()
        return value

    def create_arg(self, a: Any) -> Any:
        """Turn an argument of an operation into an argument of a node."""
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            self._depart()
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return Value(node, self)

    def _add_unnamed(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """Return the graph's next node, which asserts something."""
        return self.create_node("call_function", function, args, {})

    def _value(self, node: fx.Node) -> Any:
        """Return the value of a node for the examples, as it was in the other mode; give up if it may be another one in this mode.

        Of what the modes do differently, a dropout alone is certain to leave sizes, types and lengths as they are.
        """
        for each in needed(node, self._unlike):
            itself = name_of(each) in self.literals and each.target not in FUNCTIONS
            self._unlike[each] = itself or any(self._unlike[source] for source in each.all_input_nodes)
        if node not in self._leader.values or self._unlike[node]:
            self._depart()
        return self._leader.values[node]

    alias = _depart  # type: ignore[assignment]


def _are_alike(a: Any, b: Any) -> bool:
    """Return whether two arguments of nodes are certainly the same."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_are_alike, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(map(_are_alike, a.values(), b.values()))
    return type(a) is type(b) and type(a) in (int, float, str) and bool(a == b)
