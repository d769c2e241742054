"""Factories: which of the tensors that a forward makes a graph makes again at each call, and their nodes.

A tensor that nobody can write into after it was made stays a constant, made once. All others are made anew: what writes into them
does so at each call, and what a call returns is the caller's own.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from graphreg.errors import TraceError
from graphreg.ir import Aliases, Effects, nodes_in
from graphreg.tracing.symbolic.tape import CURE, Entry, Tape, attribute_of
from graphreg.tracing.tensors import Key, key_of, parts_of, tensors_in

_OPERATORS: dict[str, Callable[..., Any]] = {"__getitem__": operator.getitem, "__setitem__": operator.setitem}


def settle_factories(graph: fx.Graph, tape: Tape) -> None:
    """Put what must be made at each call into the graph, in the place of the constants that torch.fx made of it."""
    there = set(graph.nodes)
    tape.look()
    reads = {node: tensor for node, tensor in tape.known.read.items() if node in there}
    if not reads:
        return
    again = _again(graph, tape, reads)
    _refuse_unseen(tape, reads.values(), again)
    chosen = {node: tensor for node, tensor in reads.items() if id(tensor) in tape.known.made and key_of(tensor) in again}
    if not chosen:
        return
    entries = _needed(tape, chosen.values())
    _refuse_unseen(tape, [t for entry in entries for t in (*entry.tensors, *tensors_in(entry.result))], again)
    _refuse(tape, entries, again)
    _Making(graph, tape).run([entry for entry in tape.entries if entry in entries], chosen)
    unread = {node.target for node in chosen} - {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in unread:
        vars(tape.tracer.root).pop(str(name), None)


def _again(graph: fx.Graph, tape: Tape, reads: dict[fx.Node, Tensor]) -> set[Key]:
    """The storages that are made at each call: somebody may write into them, or what they are made of changes between calls."""
    known, effects = tape.known, Effects(tape.tracer.operations)
    parameters = {key_of(tensor) for entry in tape.entries for tensor in entry.tensors if isinstance(tensor, nn.Parameter)}
    again = _made_of(tape, parameters | set(tape.owned)) | set(known.traced) | set(known.rewritten)
    _refuse_decisions(tape, _made_of(tape, {key for key in known.traced if key in tape.owned}))
    aliases, returned = Aliases(graph, tape.tracer.operations), set(nodes_in(graph.output_node().args))
    for node, tensor in reads.items():
        key = key_of(tensor)
        if key in known.fresh and key not in again and (aliases.written_later(node) or _escapes(node, returned, effects)):
            again.add(key)
    return again


def _made_of(tape: Tape, changing: set[Key]) -> set[Key]:
    """These storages, which are the model's, and what is made of them."""
    found = set(changing)
    for entry in tape.entries:
        if not found.isdisjoint(map(key_of, entry.tensors)):
            found.update(map(key_of, tensors_in(entry.result)))
    return found


def _refuse_decisions(tape: Tape, changing: set[Key]) -> None:
    for keys, place in tape.known.asked.values():
        if not changing.isdisjoint(keys):
            raise TraceError(
                f"the forward decides something{place} on a tensor of the model's that it also writes into, and a graph would decide it "
                "once for all calls. Make it a buffer, in a submodule of its own that decides: graphreg keeps that whole."
            )


def _escapes(node: fx.Node, returned: set[fx.Node], effects: Effects) -> bool:
    """Whether the caller may be given the storage of a node."""
    found, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        if current in returned:
            return True
        for user in current.users:
            if user not in found and (current in effects.shares(user)):
                found.add(user)
                waiting.append(user)
    return False


def _needed(tape: Tape, tensors: Iterable[Tensor]) -> set[Entry]:
    """What makes these tensors, and all that is written into their storages and into those of what they are made of."""
    makers, by_key = tape.known.made, defaultdict[Key, list[Entry]](list)
    for entry in tape.entries:
        for key in entry.wrote:
            by_key[key].append(entry)
    found, waiting, seen = set[Entry](), list(tensors), set[int]()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        maker = [makers[id(tensor)][0]] if id(tensor) in makers else []
        for entry in (*maker, *by_key[key_of(tensor)]):
            if entry not in found:
                found.add(entry)
                waiting += entry.tensors
    return found


def _refuse_unseen(tape: Tape, tensors: Iterable[Tensor], again: set[Key]) -> None:
    """What must be made at each call, and came to be, or to hold what it holds, by what torch shows to no mode of functions."""
    known = tape.known
    for tensor in tensors:
        key = key_of(tensor)
        moved = tape.moved.get(id(tensor))
        if moved is not None or (key in again and key in known.unseen):
            place = known.unseen[key] if moved is None else moved
            raise TraceError(
                "the forward gives a tensor another storage, or writes into it, by what torch does not show to a trace"
                f"{place and f', noticed{place}'}: Tensor.set_, torch.utils.swap_tensors, t.real = ... Copy instead: t.copy_(other), "
                f"torch.complex(real, imag). {CURE}"
            )
        if key in again and key in known.fresh and id(tensor) not in known.made:
            raise TraceError(
                f"the forward makes a {type(tensor).__name__} in the memory of another tensor by what torch does not show to a trace: "
                f"as_subclass, torch.Tensor(t), nn.Parameter(t). Use t itself, or a view: t.view_as(t). {CURE}"
            )


def _refuse(tape: Tape, entries: set[Entry], again: set[Key]) -> None:
    """What cannot be made again."""
    for entry in entries:
        given = [*entry.tensors, *tensors_in(entry.result)]
        others = [t for t in given if isinstance(t, nn.Parameter) and key_of(t) not in tape.owned]
        grad, *rest = zip(entry.region, tape.tracer.region, strict=True)
        if others:
            why = "computes with a parameter that is not registered with any module"
        elif getattr(entry.function, "__name__", "") == "__set__":
            why = "assigns an attribute of a tensor that it makes"
        elif any(a != b for a, b in rest) or (grad[0] != grad[1] and any(t.requires_grad for t in given)):
            why = "makes a tensor under torch.no_grad, autocast or the like"
        elif shown := next((tape.known.shown[key] for key in map(key_of, given) if key in tape.known.shown), None):
            why = f"makes a tensor, hands its memory out by {shown}() and writes into it"
        else:
            continue
        raise TraceError(f"the forward {why}{entry.place}, and a graph cannot do so at each call. {CURE}")


class _Making:
    """Writes entries of the tape into the graph, each where it ran."""

    def __init__(self, graph: fx.Graph, tape: Tape) -> None:
        self.graph, self.tape = graph, tape
        self._nodes: dict[int, fx.Node] = {}  # by id of the tensor
        self._last: dict[fx.Node | None, fx.Node] = {}  # by the node behind which an entry ran: what was put there last
        self._new: dict[fx.Node, Entry] = {}

    def run(self, entries: Iterable[Entry], read: dict[fx.Node, Tensor]) -> None:
        """Make the entries, and let the graph read what comes of them in the place of the constants in ``read``."""
        for entry in entries:
            behind = self._last.get(entry.after, entry.after)
            with self.graph.inserting_before(behind.next if behind is not None else next(iter(self.graph.nodes))):
                self._last[entry.after] = self._make(entry)
        for node, tensor in read.items():
            node.replace_all_uses_with(self._nodes[id(tensor)])
            self.graph.erase_node(node)
        for node, entry in reversed(self._new.items()):
            if not node.users and not entry.wrote:
                self.graph.erase_node(node)

    def _make(self, entry: Entry) -> fx.Node:
        try:
            made = self._operation(entry)
        except NotImplementedError as error:
            raise TraceError(f"the forward makes a tensor{entry.place} by what no graph can hold ({error}). {CURE}") from None
        made = last = self._told(made, entry)
        for path, tensor in parts_of(entry.result):
            if self.tape.known.made.get(id(tensor), (None,))[0] is entry:
                part = made
                for index in path:
                    part = last = self._told(self.graph.call_function(operator.getitem, (part, index)), entry)
                self._nodes[id(tensor)] = part
        return last

    def _operation(self, entry: Entry) -> fx.Node:
        function, name = entry.function, str(getattr(entry.function, "__name__", ""))
        if entry.copy is not None:
            return self.graph.call_method("clone", (self._value(entry.copy),))
        args, kwargs = self._value(entry.args), self._value(entry.kwargs)
        if name == "__get__":
            return self.graph.call_function(getattr, (args[0], attribute_of(function)))
        if name in _OPERATORS:
            return self.graph.call_function(_OPERATORS[name], args)
        if is_tensor_method_or_property(function):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(function, args, kwargs)

    def _told(self, node: fx.Node, entry: Entry) -> fx.Node:
        node.meta["site"] = (entry.scope, ())  # nobody's value: it has no name, and takes none
        node.meta["origin"], node.meta["nn_module_stack"] = entry.origin, entry.stack
        self._new[node] = entry
        return node

    def _value(self, value: Any) -> Any:
        """Nodes in place of tensors; what the forward did not make is read from the model, or is a constant."""
        if isinstance(value, Tensor):
            return self._nodes[id(value)] if id(value) in self._nodes else fx.Tracer.create_arg(self.tape.tracer, value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._value, value))
        if isinstance(value, dict):
            return {key: self._value(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._value, (value.start, value.stop, value.step)))
        return fx.Tracer.create_arg(self.tape.tracer, value)
