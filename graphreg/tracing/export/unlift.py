"""Turns torch.export's graph and its op record into a graph like those that the symbolic tracer makes.

In torch.export's graph, parameters, buffers and constants are inputs. The graph made here reads them from the model again, under the
model's names. Its inputs are the arguments of the model's forward, and its outputs have the model's own types.
"""

from __future__ import annotations

import operator
import sys
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.fx.node import map_aggregate

from graphreg.ir.buffer_constants import BufferConstants
from graphreg.ir.call_records import Leaf, record_module_calls
from graphreg.ir.metadata import add_label, is_labelled, label_site, own_labels, scope_of
from graphreg.ir.module_calls import STACK
from graphreg.ir.naming import Namer, label_node
from graphreg.ir.operations import IN_PLACE_NAMES, Operations, function_name, is_in_place
from graphreg.ir.shape_guards import ASSERTIONS, describe_nodes
from graphreg.ir.site import Label
from graphreg.ir.source_location import origin_in_trace
from graphreg.torch_internals.modules import buffers_by_name
from graphreg.torch_internals.operators import HigherOrderOperator, OpOverload
from graphreg.tracing.defaults import plain_value
from graphreg.tracing.export.final_state import assign_buffer
from graphreg.tracing.export.inputs import Inputs
from graphreg.tracing.export.op_record import AT, DIFFERENTIATES, RECORDED_OP, Built, Made, OpRecord, ReturnedTensors
from graphreg.tracing.shape_decisions import decided, decided_flag, decided_layout, layout_of
from graphreg.tracing.symbolic.tuple_items import settle_ports
from graphreg.tracing.tensors import tensors_in

DROPPED = {"_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size"}  # they only assert facts about the example
OPAQUE_REASONS = {
    "wrap_with_autocast": "it works under an autocast of its own, and a trace would lose that",
    "_call_custom_autograd_function_in_pre_dispatch": "it calls a torch.autograd.Function, and a trace would lose its backward",
    "_grad_increment_nesting": DIFFERENTIATES,
    "_jvp_increment_nesting": DIFFERENTIATES,
}


LEVELS = {"_add_batch_dim": 2, "_remove_batch_dim": 1}  # the position of the argument that numbers a level of torch.func


class Unlifter:
    """Makes the graph of one mode from what torch.export returned and what was recorded meanwhile.

    Attributes:
        model: The model.
        program: What torch.export returned.
        record: What was recorded while torch.export ran.
        constants: Filled with the tensors that the forward makes.
        graph: The graph.
        opaque: Filled with the submodules that must become opaque first, with reasons. If there are any, the graph is not complete.
        inputs: The inputs of the graph, with the conditions on their sizes.
        idle: The calls of ``expand`` that would change nothing for a batch of one.
    """

    def __init__(self, model: nn.Module, program: ExportedProgram, record: OpRecord, constants: dict[str, torch.Tensor]) -> None:
        """Prepare the graph; ``run`` makes it."""
        self.model, self.program, self.record, self.constants = model, program, record, constants
        self.graph = fx.Graph()
        self.opaque: dict[str, str] = {}
        self.inputs: Inputs | None = None
        self.idle = set[fx.Node]()
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._paths = {path: first for first, m in model.named_modules() for path, other in self._modules.items() if other is m}
        self._namer = Namer(self._modules.keys() - {""})
        self._buffers = {*buffers_by_name(model)}
        self._made: dict[int, fx.Node] = {}  # the nodes of ``graph``, by ``meta[AT]`` of torch.export's nodes
        self._lifted: dict[int, str] = {}
        self._reads: dict[str, fx.Node] = {}
        self._abandoned = {node.meta[AT] for node in record.abandoned if AT in node.meta}
        self._returns = [(node.meta[AT], *one) for node, returned in record.returns.items() if node is not None for one in returned]
        self._returns.reverse()
        self._outputs: list[tuple[str, str, str, ReturnedTensors]] = []
        self._constants = BufferConstants(self._buffers)
        self._objects: dict[Made, fx.Node] = {}
        self._assigned: dict[str, fx.Node] = {}

    def run(self, wide: bool = False) -> fx.Graph:
        """Make the graph.

        Args:
            wide: Whether the example was a batch of one that was widened to two. If so, the sites get the shapes of the batch of one.
        """
        nodes = list(self.program.graph.nodes)
        self._find_opaque(nodes)
        if self.opaque:  # the caller exports again, with these submodules opaque
            return self.graph

        specs = self.program.graph_signature.input_specs
        lifted = [(node, spec) for node, spec in zip((n for n in nodes if n.op == "placeholder"), specs, strict=True)]
        places = iter(self.record.input_places)  # these do not include the constants that torch.export inserts among the inputs
        for node, spec in lifted:
            node.meta[AT] = id(node) if spec.kind.name in ("CONSTANT_TENSOR", "CUSTOM_OBJ", "TOKEN") else next(places)
            if spec.kind.name != "USER_INPUT":
                self._lifted[node.meta[AT]] = self._name_of(str(spec.target))

        label = partial(label_node, scope="", modules=self._modules, namer=self._namer)
        inputs = self.inputs = Inputs(self.graph, self.model, self.record, label, wide)
        self._made.update(inputs.made)

        for node in nodes:
            if node.op == "call_function":
                if AT in node.meta:
                    self._returned(node.meta[AT])
                node.meta.setdefault(AT, id(node))  # torch.export adds nodes without AT after the trace, to compute sizes
                self._operation(node)
        self._returned(sys.maxsize)  # those that returned after the last operation

        for name, path, kind, tensors in self._outputs:
            for node, ports, default in tensors:
                made = self._made.get(node.meta[AT])
                if made is not None:
                    add_label(made, Label(name, kind, ports, default, module=path))

        self._assert_flags()
        self._assert_answers()
        output = self._value(self.record.output)  # first, because it may read a buffer as it was before
        for name, value in self._assigned.items():
            for node in (buffers := self.graph.get_attr("_buffers"), self.graph.call_function(assign_buffer, (buffers, name, value))):
                label_site(node, "")
        self.graph.output(output)
        self._drop()
        settle_ports(self.graph, Operations(self.model))
        record_module_calls(self.graph, [(key, record.map(self._element)) for key, record in self.record.module_calls])
        if inputs.conditions is not None:
            self.idle = inputs.conditions.idle_expands(self.graph)
        describe_nodes(self.graph, [node for node, _ in inputs.places] if wide else [])
        return self.graph

    def _assert_flags(self) -> None:
        """Make the graph assert ``requires_grad`` of parameters, and how inputs lie in memory, if the forward asked for it."""
        for name, expected in self.record.flags.items():
            read = self.graph.get_attr(name)
            flag = self.graph.call_function(getattr, (read, "requires_grad"))
            for node in (read, flag, self.graph.call_function(decided_flag, (flag, expected, name))):
                label_site(node, "")
        exactly = {self._made.get(node.meta[AT]) for node in self.record.strides if AT in node.meta}
        for node, _ in self.inputs.places if self.record.asks_layout and self.inputs is not None else ():
            if node.meta["val"].layout is torch.strided:
                asked = decided_layout, (node, layout_of(node.meta["val"]), str(node), node in exactly)
                label_site(self.graph.call_function(*asked), "")

    def _assert_answers(self) -> None:
        """Make the graph assert what methods of values answered the model's code, such as whether a value is contiguous."""
        for node, name, args, kwargs, answer in self.record.answers:
            made = self._made.get(node.meta[AT]) if AT in node.meta else None
            if made is None or node.meta[AT] in self._abandoned:
                continue
            after = made if made.op != "placeholder" else [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(after):
                asked = self.graph.call_method(name, (made, *args), kwargs)
            with self.graph.inserting_after(asked):
                for each in (asked, self.graph.call_function(decided, (asked, answer))):
                    label_site(each, "")

    def _find_opaque(self, nodes: list[fx.Node]) -> None:
        """Find the submodules that must become opaque: an operator in them holds a graph of its own, or is one of ``OPAQUE_REASONS``."""
        for node in nodes:
            name = str(node.target) if isinstance(node.target, HigherOrderOperator) else function_name(node)
            if name in OPAQUE_REASONS:
                self.opaque[self._scope(node)] = OPAQUE_REASONS[name]
            elif isinstance(node.target, HigherOrderOperator) and node.target is not RECORDED_OP:
                self.opaque[self._scope(node)] = f"it calls {name}, which holds a graph of its own"

    def _returned(self, before: int) -> None:
        """Choose names for the results of the modules that returned before a place in the graph, and count the reads of sizes before it.

        The caller calls this between operations, because names are numbered in the order of operations, returns and reads.
        """
        while self._returns and self._returns[-1][0] < before:
            place, path, kind, value = self._returns.pop()
            if isinstance(value, list):
                self._outputs.append((self._namer.module(path), path, kind, value))
            elif place not in self._abandoned:
                # A read of a size takes a number, as in a symbolic trace. There, the size of a
                # buffer, or of a value that is computed from buffers alone, is a number of Python
                # and no node.
                read = value.meta.get(AT, -1)
                made = self._made.get(read)
                if not (made in self._constants if made is not None else self._lifted.get(read, "") in self._buffers):
                    self._namer.operation(kind, path)

    def _name_of(self, target: str) -> str:
        """Return the name of a tensor that torch.export made an input: the model's own, or a new one if the forward made the tensor."""
        owner, _, name = target.rpartition(".")
        try:
            if isinstance(getattr(self.model.get_submodule(owner), name, None), torch.Tensor):
                return target
        except AttributeError:  # no module of the model has the tensor: the forward made it
            pass
        value, new = self.program.constants[target], f"_tensor_constant{len(self.constants)}"
        # each mode is exported by itself, and both make this tensor: they share it if it is equal
        same = [n for n, v in self.constants.items() if v.shape == value.shape and v.dtype == value.dtype and torch.equal(v, value)]
        if same:
            return same[0]
        self.constants[new] = value
        return new

    # Operations

    def _operation(self, node: fx.Node) -> None:
        """Add a node for the operation of one of torch.export's nodes."""
        name = function_name(node)
        if name in DROPPED:
            return
        args, kwargs = self._arguments(node)
        if node.target is torch.ops.aten.copy_.default:
            # torch.export ends an assignment to a buffer by a write into the old tensor, which others may have. It also ends
            # ``self.buffer += 1`` by one, of the buffer into itself: that is no assignment, and as another write would make backward fail.
            is_assigned = args[0].op == "get_attr" and args[0].target in self.record.assigned
            if is_assigned or _is_written(args[0], args[1]):
                self._made[node.meta[AT]] = args[1]
                self._assigned |= {args[0].target: args[1]} if is_assigned else {}
                return
        if node.target is RECORDED_OP:
            call = self.record.calls[str(node.args[0])]
            made, scope = self.graph.create_node(call.op, call.target, tuple(args[1]), dict(args[2])), call.scope
            origin = call.origin
        else:
            made = self.graph.create_node("call_function", node.target, args, kwargs, name if isinstance(node.target, OpOverload) else None)
            # an element of a tuple is at the line of the operation that gave the tuple
            scope, origin = self._scope(node), args[0].meta["origin"] if node.target is operator.getitem else None
        made.meta["val"] = node.meta.get("val")
        made.meta["origin"] = origin or origin_in_trace(node.stack_trace)
        made.meta[STACK] = self._stack(node)
        self._made[node.meta[AT]] = made
        self._label(made, scope, node)

    def _label(self, made: fx.Node, scope: str, node: fx.Node) -> None:
        """Label ``made``, the graph's node for torch.export's ``node``. It gets a name if it is a value of the model."""
        no_tensor = next(tensors_in(node.meta.get("val")), None) is None and made.target is not operator.setitem
        if no_tensor or node.meta[AT] in self._abandoned or (made.op != "call_module" and self._constants.take(made)):
            label_site(made, scope)
        else:
            label_node(made, scope, self._modules, self._namer)

    def _scope(self, node: fx.Node) -> str:
        """Return the path of the module in which torch.export made a node."""
        return next((path for path, _ in reversed(self._stack(node).values())), "")

    def _stack(self, node: fx.Node) -> dict[str, tuple[str, Any]]:
        """Return the calls of modules during which torch.export made a node, outermost first: by key, the path and kind of the module.

        A module that is registered twice has two paths, of which it gets the first. The stack of a node that torch.export adds after the
        trace, to compute sizes, may name no module of the model; it counts as empty.
        """
        stack: dict[str, tuple[str, Any]] = node.meta.get(STACK) or {}
        return {key: (self._paths[path], kind) for key, (path, kind) in stack.items() if path in self._paths}

    def _arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the arguments of torch.export's node, with nodes of ``graph`` in place of torch.export's nodes."""
        scope = self.record.calls[str(node.args[0])].scope if node.target is RECORDED_OP else self._scope(node)

        def written(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return self._named(leaf, scope)
            return leaf if (plain := plain_value(leaf)) is None else plain

        args, kwargs = map_aggregate((node.args, node.kwargs), written)
        return args, kwargs

    def _named(self, node: fx.Node, scope: str) -> fx.Node:
        """Return the graph's node for one of torch.export's nodes. A parameter, buffer or constant is read where it is first used."""
        place = node.meta[AT]
        if place in self._made:
            return self._made[place]
        if place not in self._lifted:
            raise KeyError(f"{node.name} has no place in the graph")
        target = self._lifted[place]
        if target not in self._reads:
            read = self._reads[target] = self.graph.get_attr(target)
            read.meta["val"] = node.meta.get("val")
            if self._constants.take(read):
                label_site(read, scope)
            else:
                label_node(read, scope, self._modules, self._namer)
        return self._reads[target]

    def _element(self, value: Any) -> Any:
        """Return the graph's node, or the leaf, for one of torch.export's nodes among what a call takes or returns, if there is one."""
        place = value.meta.get(AT, -1) if isinstance(value, fx.Node) else -1
        return Leaf(read=self._lifted[place]) if place in self._lifted else self._made.get(place, value)

    # Output

    def _value(self, value: Any) -> Any:
        """Return the model's output as the graph returns it."""
        if isinstance(value, fx.Node):
            return self._named(value, "")
        if isinstance(value, Built):
            parts = {key: self._value(part) for key, part in value.parts.items()}
            node = self.graph.call_function(value.kind, (parts,) if value.keyed else (), {} if value.keyed else parts)
            label_site(node, "")
            return node
        if isinstance(value, Made):
            if value not in self._objects:
                self._objects[value] = self.graph.call_function(value.function, tuple(map(self._value, value.values)))
                label_site(self._objects[value], "")
            return self._objects[value]
        if isinstance(value, dict):
            return {key: self._value(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(part) for part in value)
        return value

    def _drop(self) -> None:
        """Erase unread nodes without a name, if they have no effect (such as sizes) or were made before their submodule became opaque."""
        # from the end, because a node that is erased may be the last reader of its arguments
        ours = {made: place for place, made in self._made.items()}
        for node in reversed(self.graph.nodes):
            unnamed = node.op == "call_function" and is_labelled(node) and not own_labels(node)
            if not node.users and unnamed and (ours.get(node) in self._abandoned or not _acts(node)):
                self.graph.erase_node(node)
        self._settle_levels()

    def _settle_levels(self) -> None:
        """Remove the names of nodes within ``torch.vmap``: their values are single rows of a batch and no values of the model.

        An operation that moves a value into or out of a level of torch.func has the number of the level as an argument. At a call, this
        number is different if the caller is itself under a transform. So the argument becomes the node that entered the level, whose
        value is the number.
        """
        entered: list[fx.Node] = []
        for node in self.graph.nodes:
            name = function_name(node)
            if name.endswith("_increment_nesting"):
                entered.append(node)
            elif name.endswith("_decrement_nesting"):
                entered.pop()
            if not entered:
                continue
            if name in LEVELS:
                node.args = tuple(entered[-1] if i == LEVELS[name] else arg for i, arg in enumerate(node.args))
            if is_labelled(node) and (name != "_remove_batch_dim" or len(entered) > 1):
                label_site(node, scope_of(node))


def _is_written(tensor: object, value: object) -> bool:
    """Return whether a value is this tensor itself, as operations that write into it return it."""
    while isinstance(value, fx.Node) and value is not tensor and value.args:
        if not (is_in_place(value) and (function_name(value) in IN_PLACE_NAMES or function_name(value).endswith("_"))):
            return False  # a write by ``out=`` or ``inplace=True`` may be into another argument
        value = value.args[0]
    return value is tensor


def _acts(node: fx.Node) -> bool:
    """Return whether an operation has an effect even if no node reads it: it asserts, writes, or enters or leaves a torch.func level."""
    name = function_name(node)
    if name.endswith("crement_nesting"):  # torch.export records the beginning and the end of ``torch.vmap`` as such operations
        return True
    asserts = node.target in (decided, decided_flag, decided_layout, assign_buffer, *ASSERTIONS)
    return is_in_place(node) or asserts or name.startswith("_assert")
