"""Decides which of the tensors that a forward makes must be made anew at each call, and adds nodes that make them.

Such a tensor stays a constant of the graph unless one of these holds: the forward writes into it
after the graph first reads it; the caller gets it as an output; or it is computed from a tensor of
the model, or from a tensor that must be made anew. As constants, these tensors would keep what
earlier calls wrote into them, and all calls would return the same tensor.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from graphreg.errors import TraceError
from graphreg.ir.aliasing import Aliases
from graphreg.ir.metadata import label_site
from graphreg.ir.operations import nodes_in
from graphreg.ir.views_and_writes import ViewsAndWrites
from graphreg.tracing.symbolic.factory_tape import CURE, Tape, accessed_attribute
from graphreg.tracing.symbolic.tape_records import TapeEntry
from graphreg.tracing.tensors import StorageKey, storage_key, tensors_by_path, tensors_in

_OPERATORS: dict[str, Callable[..., Any]] = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


def settle_factories(graph: fx.Graph, tape: Tape) -> None:
    """Find the constants of the graph that must be made anew at each call, and replace each of them by nodes that make it.

    Raises:
        TraceError: A tensor must be made at each call, but a graph cannot make it.
    """
    there = set(graph.nodes)
    tape.check_states()  # what the forward did after its last operation of torch, no operation has shown
    reads = {node: tensor for node, tensor in tape.known.read.items() if node in there}
    if not reads:
        return
    remade = _remade_storages(graph, tape, reads)
    _refuse_unseen(tape, reads.values(), remade)
    chosen = {node: tensor for node, tensor in reads.items() if id(tensor) in tape.known.made and storage_key(tensor) in remade}
    if not chosen:
        return
    entries = _needed(tape, chosen.values())
    _refuse_unseen(tape, [t for entry in entries for t in (*entry.tensors, *tensors_in(entry.result))], remade)
    _refuse(tape, entries)
    _FactoryWriter(graph, tape).run([entry for entry in tape.entries if entry in entries], chosen)
    # torch.fx keeps constants as attributes of the model: those that are now made by nodes go
    unread = {node.target for node in chosen} - {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in unread:
        vars(tape.tracer.root).pop(str(name), None)


def _remade_storages(graph: fx.Graph, tape: Tape, reads: dict[fx.Node, Tensor]) -> set[StorageKey]:
    """Return the storages that must be made at each call: code may write into them, or they get their content from storages that change."""
    known, effects = tape.known, ViewsAndWrites(tape.tracer.operations)
    # an optimizer changes parameters between calls, also those that are registered nowhere
    parameters = {storage_key(tensor) for entry in tape.entries for tensor in entry.tensors if isinstance(tensor, nn.Parameter)}
    remade = tape.computed_from(parameters | set(tape.owned)) | set(known.traced) | set(known.rewritten)
    _refuse_decisions(tape, tape.computed_from({key for key in known.traced if key in tape.owned}))
    aliases, returned = Aliases(graph, tape.tracer.operations), set(nodes_in(graph.output_node().args))
    for node, tensor in reads.items():
        key = storage_key(tensor)
        if key in known.fresh and key not in remade and (aliases.written_later(node) or _escapes(node, returned, effects)):
            remade.add(key)
    return remade


def _refuse_decisions(tape: Tape, changing: set[StorageKey]) -> None:
    """Raise TraceError if the forward has read the content of a storage in ``changing`` as a Python value, as ``bool(t)`` does."""
    for keys, place in tape.known.python_reads.values():
        if not changing.isdisjoint(keys):
            raise TraceError(
                f"the forward decides something{place} on a tensor of the model that it also writes into, and a graph would decide it "
                "once for all calls. Make the tensor a buffer of a submodule that makes the decision, which then becomes an opaque module."
            )


def _escapes(node: fx.Node, returned: set[fx.Node], effects: ViewsAndWrites) -> bool:
    """Return whether the forward may return a tensor that shares the storage of a node's value."""
    sharing, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current in returned:
            return True
        for user in current.users:
            if user not in sharing and current in effects.shares(user):
                sharing.add(user)
                waiting.append(user)
    return False


def _needed(tape: Tape, tensors: Iterable[Tensor]) -> set[TapeEntry]:
    """Return the entries that make the tensors or write into their storages and, recursively, those that do so for their arguments."""
    makers, by_key = tape.known.made, defaultdict[StorageKey, list[TapeEntry]](list)
    for entry in tape.entries:
        for key in entry.written_storages:
            by_key[key].append(entry)
    entries, waiting, seen = set[TapeEntry](), list(tensors), set[int]()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = [makers[id(tensor)][0]] if id(tensor) in makers else []
        for entry in (*maker, *by_key[storage_key(tensor)]):
            if entry not in entries:
                entries.add(entry)
                waiting += entry.tensors
    return entries


def _refuse_unseen(tape: Tape, tensors: Iterable[Tensor], remade: set[StorageKey]) -> None:
    """Raise TraceError if the tape has not seen how a tensor was made or changed.

    This concerns tensors that must be made at each call, and tensors of the model that have got
    another storage.
    """
    known = tape.known
    for tensor in tensors:
        key = storage_key(tensor)
        moved_at = tape.moved.get(id(tensor))
        if moved_at is not None or (key in remade and key in known.untracked):
            place = known.untracked[key] if moved_at is None else moved_at
            raise TraceError(
                "the forward gives a tensor another storage, or writes into it, in a way that a trace cannot see"
                f"{place and f', noticed{place}'}: by Tensor.set_, torch.utils.swap_tensors or an assignment to t.real. Copy instead: "
                f"t.copy_(other), torch.complex(real, imag). {CURE}"
            )
        if key in remade and key in known.fresh and id(tensor) not in known.made:
            raise TraceError(
                f"the forward makes a {type(tensor).__name__} in the memory of another tensor in a way that a trace cannot see: "
                f"by as_subclass, torch.Tensor(t) or nn.Parameter(t). Use t itself, or a view: t.view_as(t). {CURE}"
            )


def _refuse(tape: Tape, entries: set[TapeEntry]) -> None:
    """Raise TraceError if a graph cannot repeat the operation of one of the entries."""
    for entry in entries:
        tensors = [*entry.tensors, *tensors_in(entry.result)]
        parameters = [t for t in tensors if isinstance(t, nn.Parameter) and storage_key(t) not in tape.owned]
        # that grad mode differs matters only if an argument or the result requires gradients, and not in the model's own forward
        grad, *rest = zip(entry.region, tape.tracer.region, strict=True)
        if parameters:
            why = "computes with a parameter that is not registered with any module"
        elif getattr(entry.function, "__name__", "") == "__set__":
            why = "assigns an attribute of a tensor that it makes"
        elif any(a != b for a, b in rest) or (
            entry.scope and grad[0] != grad[1] and any(t.requires_grad for t in tensors)
        ):
            why = "makes a tensor under torch.no_grad, autocast or the like"
        elif exposing := next((tape.known.exposed[key] for key in map(storage_key, tensors) if key in tape.known.exposed), None):
            why = f"makes a tensor, gives its memory away by {exposing}() and writes into it"
        else:
            continue
        raise TraceError(f"the forward {why}{entry.place}, and a graph cannot do so at each call. {CURE}")


class _FactoryWriter:
    """Adds nodes to the graph that repeat operations of the tape, each at the place in the graph where the operation ran."""

    def __init__(self, graph: fx.Graph, tape: Tape) -> None:
        self.graph, self.tape = graph, tape
        self._nodes: dict[int, fx.Node] = {}  # the node of each tensor, by the tensor's id
        # for each node after which operations ran: the last node added there
        self._last: dict[fx.Node | None, fx.Node] = {}
        self._new: dict[fx.Node, TapeEntry] = {}

    def run(self, entries: Iterable[TapeEntry], read: dict[fx.Node, Tensor]) -> None:
        """Add nodes for the entries, and make the graph read them instead of the constants in ``read``."""
        for entry in entries:
            # several operations may have run behind one node: they keep their order
            previous = self._last.get(entry.after, entry.after)
            with self.graph.inserting_before(previous.next if previous is not None else next(iter(self.graph.nodes))):
                self._last[entry.after] = self._make(entry)
        for node, tensor in read.items():
            node.replace_all_uses_with(self._nodes[id(tensor)])
            self.graph.erase_node(node)
        # an entry may give several tensors, of which the graph reads only some
        for node, entry in reversed(self._new.items()):
            if not node.users and not entry.written_storages:
                self.graph.erase_node(node)

    def _make(self, entry: TapeEntry) -> fx.Node:
        """Add the nodes of an entry, and return the last one."""
        try:
            made = self._operation(entry)
        except NotImplementedError as error:
            raise TraceError(f"the forward makes a tensor{entry.place} from something that a graph cannot hold ({error}). {CURE}") from None
        made = last = self._annotated(made, entry)
        for path, tensor in tensors_by_path(entry.result):
            if self.tape.known.made.get(id(tensor), (None,))[0] is entry:
                part = made
                for index in path:
                    part = last = self._annotated(self.graph.call_function(operator.getitem, (part, index)), entry)
                self._nodes[id(tensor)] = part
        return last

    def _operation(self, entry: TapeEntry) -> fx.Node:
        """Add and return the node that repeats an entry's operation; if the entry has a copy of the result, the node clones this copy."""
        function, name = entry.function, str(getattr(entry.function, "__name__", ""))
        if entry.copy is not None:
            return self.graph.call_method("clone", (self._value(entry.copy),))
        args, kwargs = self._value(entry.args), self._value(entry.kwargs)
        if name == "__get__":
            return self.graph.call_function(getattr, (args[0], accessed_attribute(function)))
        if name in _OPERATORS:
            return self.graph.call_function(_OPERATORS[name], args)
        if is_tensor_method_or_property(function):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(function, args, kwargs)

    def _annotated(self, node: fx.Node, entry: TapeEntry) -> fx.Node:
        """Write the entry's line of code and its stack of module calls to a node."""
        # the node gets no label, so that the labels of other values stay as they are
        label_site(node, entry.scope)
        node.meta["origin"], node.meta["nn_module_stack"] = entry.origin, entry.stack
        self._new[node] = entry
        return node

    def _value(self, value: Any) -> Any:
        """Replace tensors in arguments by nodes. For a tensor that no entry made, torch.fx makes a ``get_attr`` node."""
        if isinstance(value, Tensor):
            return self._nodes[id(value)] if id(value) in self._nodes else fx.Tracer.create_arg(self.tape.tracer, value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._value, value))
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._value, (value.start, value.stop, value.step)))
        return fx.Tracer.create_arg(self.tape.tracer, value)
