"""Turns a graph that Dynamo captured into one like those of ``tracing/``: it reads parameters by name, and its values have labels.

In Dynamo's graph, parameters are inputs, and a layer appears as the functions that it calls. Each node has the stack of module calls in
which it was made. These stacks show which value is the output of a module. As in a trace, the output of one of torch's layers is a site,
and the values inside the layer are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graphreg.dynamo_backend.capture_place import Place
from graphreg.dynamo_backend.wrappers import module_itself
from graphreg.errors import TraceError
from graphreg.ir.aliasing import of_body
from graphreg.ir.buffer_constants import BufferConstants
from graphreg.ir.metadata import add_label, label_draw, label_site, own_labels
from graphreg.ir.module_calls import ModuleCall, blocks
from graphreg.ir.naming import COUNTED, Namer
from graphreg.ir.operations import IN_PLACE_NAMES, is_drop_path
from graphreg.ir.random_ops import is_random
from graphreg.ir.roles import BOUNDARY, CELL_PORTS, is_region
from graphreg.ir.site import Label
from graphreg.ir.views_and_writes import REGION
from graphreg.torch_internals.dynamo import input_source
from graphreg.torch_internals.fx import snake_case
from graphreg.torch_internals.modules import buffers_by_name
from graphreg.tracing.settled_reads import settle_reads


@dataclass(frozen=True)
class Known:
    """What is known of a value that crosses from one graph to another.

    Attributes:
        path: The path of the module that made the value.
        labels: The labels of the value: the names of its site.
        deep: Whether the value depends on a product of data with weights, such as a linear layer computes. Only such a value can be hidden.
    """

    path: str
    labels: tuple[Label, ...]
    deep: bool


@dataclass(frozen=True)
class Captured:
    """A captured graph with labels.

    Attributes:
        graph: The graph.
        claimed: The site names that this graph uses. Later graphs of the call must not give them to other values.
        at_boundary: The site names of those inputs that another graph computed, before a graph break.
        constants: The attributes that the graph reads and that are no parameters or buffers of the model, such as the bodies of Dynamo's
            higher-order operators.
    """

    graph: fx.Graph
    claimed: tuple[str, ...]
    at_boundary: frozenset[str]
    constants: Mapping[str, Any] = field(default_factory=dict)


class Capture:
    """Makes a ``Captured`` from a graph that Dynamo captured."""

    def __init__(self, gm: fx.GraphModule, root: nn.Module, place: Place, paths: Mapping[int, str], tensors: Mapping[int, str]) -> None:
        """Prepare to label a graph.

        Args:
            gm: The graph that Dynamo captured.
            root: The model.
            place: The code that the graph was captured from.
            paths: The paths of the model's modules by id.
            tensors: The names of the model's parameters and buffers by id.
        """
        self.root = root
        self.gm, self.place, self.paths, self.tensors = gm, place, paths, tensors
        self.modules = {path: module_itself(module) for path, module in root.named_modules(remove_duplicate=False)}
        self.buffers = {*buffers_by_name(root)}
        self.graph = fx.Graph()
        self.at_boundary: set[str] = set()

    def captured(self, inputs: Iterable[Any], known: Mapping[int, Known], taken: Iterable[str]) -> Captured:
        """Copy the graph and label its values.

        Args:
            inputs: The example inputs from Dynamo.
            known: What is known of the inputs that earlier graphs of the call computed, by the id of the input.
            taken: The site names that earlier graphs of the call use.
        """
        namer = Namer(self.modules.keys() - {""})
        # One name is one site in all graphs of a call.
        for name in taken:
            namer.claim(name)
        self._copy(list(inputs), known, namer)
        settle_reads(self.graph, self.root, labels=False)
        self._label_functions(namer)
        self._label_modules(namer)
        end = self.graph.output_node()
        # The graph ends at a break: what it returns is a value within the model, not the model's
        # output.
        if not self.place.last:
            end.meta[BOUNDARY] = True
        names = tuple(label.name for node in self.graph.nodes if BOUNDARY not in node.meta for label in own_labels(node))
        reads = {str(n.target) for n in self.graph.nodes if n.op == "get_attr" and str(n.target) not in self.tensors.values()}
        return Captured(self.graph, names, frozenset(self.at_boundary), {name: getattr(self.gm, name) for name in reads})

    def _copy(self, inputs: list[Any], known: Mapping[int, Known], namer: Namer) -> None:
        twins: dict[fx.Node, fx.Node] = {}
        values = iter(inputs)
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                twins[node] = self._input(node, next(values), known, namer)
            else:
                twins[node] = self.graph.node_copy(node, twins.__getitem__)
                # A checkpointed region is one node: what it shares and writes is what its body
                # does.
                if is_region(node) and (body := self._body(node)) is not None:
                    twins[node].meta[REGION] = of_body(body)
            twins[node].meta["value"] = shape_and_dtype(node.meta.get("example_value"))

    def _input(self, node: fx.Node, value: Any, known: Mapping[int, Known], namer: Namer) -> fx.Node:
        path = self.tensors.get(id(value))
        if path is not None:
            read = self.graph.create_node("get_attr", path, name=node.name)
            label_site(read, "")
            return read
        name, ports = self._argument(node)
        is_argument = self.place.first and name != ""
        twin = self.graph.create_node("placeholder", name if is_argument and not ports else node.name, name=node.name)
        label_site(twin, self.place.path)
        if not isinstance(value, torch.Tensor):
            return twin
        if is_argument:
            label = Label(name, "input", ports or ("out",), not ports)
            namer.claim(name)
            label_site(twin, "", label)
        else:
            made = known.get(id(value))
            # A value that no graph made counts as computed with weights if it needs a gradient.
            twin.meta[BOUNDARY] = made.deep if made is not None else value.requires_grad
            if made is not None and made.labels:
                label_site(twin, made.path, *made.labels)
                self.at_boundary.add(made.labels[0].text)
        return twin

    def _argument(self, node: fx.Node) -> tuple[str, tuple[str, ...]]:
        """Return the name of the forward's argument that an input is or belongs to, and the keys that lead from the argument to the input.

        The name is ``""`` if there is no such argument. The keys are joined by dots to one string, in a tuple. The tuple is empty if the
        input is the argument itself.
        """
        name, keys = input_source(node)
        # The arguments of ``forward(*args, **kwargs)`` of a wrapper are those of the model's
        # forward.
        if self.place.passes and name in ("args", "inputs", "kwargs") and keys:
            names = list(inspect.signature(self.modules[""].forward).parameters)
            key = keys.pop(0)
            name = key if name == "kwargs" else names[min(int(key), len(names) - 1)]
        return name, (".".join(keys),) if keys else ()

    def calls(self, node: fx.Node, in_layers: bool = False) -> list[ModuleCall]:
        """Return the module calls in which the node was made, outermost first; calls inside a layer (``is_layer``) only if asked."""
        stack: list[ModuleCall] = []
        for key in (self._made_by(node) or node).meta.get("nn_module_stack") or {}:
            # A key is the module's id; from the module's second call on, ``@`` and a number follow.
            number = str(key).partition("@")[0]
            path = self.paths.get(int(number)) if number.isdigit() else None
            if path:
                module = self.modules[path]
                stack.append(ModuleCall(str(key), path, type(module).__name__))
                if is_layer(module) and not in_layers:
                    break
        return stack

    def _made_by(self, node: fx.Node) -> fx.Node | None:
        """If the node is an output of a checkpointed region, return the node inside the region that computes this output; else None.

        In Dynamo's graph, a checkpointed region is one operator, whose body is another graph.
        """
        region = node.args[0] if node.op == "call_function" and base_and_operation(node)[1] == "getitem" else None
        if not isinstance(region, fx.Node) or not is_region(region) or not isinstance(node.args[1], int):
            return None
        body = self._body(region)
        values: Any = body.graph.output_node().args[0] if body is not None else ()
        made = values[node.args[1]] if node.args[1] < len(values) else None
        return made if isinstance(made, fx.Node) else None

    def _body(self, region: fx.Node) -> fx.GraphModule | None:
        body = getattr(self.gm, str(getattr(region.args[0], "target", "")), None)
        return body if isinstance(body, fx.GraphModule) else None

    def _label_functions(self, namer: Namer) -> None:
        constants = BufferConstants(self.buffers)
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            calls = self.calls(node)
            scope = calls[-1].path if calls else self.place.path
            label_site(node, scope)
            # A layer is one operation in a trace, so values inside it have no names here, either.
            if not constants.take(node) and node.op != "get_attr" and not (calls and is_layer(self.modules[scope])):
                base, op = base_and_operation(node)
                label_site(node, scope, Label(namer.operation(scope, base), op))

    def _label_modules(self, namer: Namer) -> None:
        """For each call of a module, label the value that leaves the call with the module's name.

        If several values leave the call, they get labels only if the module is an LSTMCell.
        """
        named = dict[ModuleCall, Label]()
        for block in blocks(self.graph, lambda node: () if node.op in ("placeholder", "get_attr", "output") else self.calls(node)):
            path = block.call.path
            # The cell returns h and c. In a trace, they are the ports of one call.
            if type(self.modules[path]) is nn.LSTMCell:
                self._label_cell(path, [n for n in block.nodes if base_and_operation(n)[1] == "getitem"], namer)
            elif len(block.leaving) == 1:
                named[block.call] = Label(namer.module(path), block.call.kind, module=path)
                add_label(block.leaving[0], named[block.call])
        self._label_frame(namer)
        self._label_draws(named, namer)

    def _label_draws(self, named: dict[ModuleCall, Label], namer: Namer) -> None:
        """Label random operations inside layers, whose values are no sites, by the module that calls them, as a trace labels the module.

        ``named``: the labels of modules' outputs. If several operations draw in one call, the first of them takes the module's label.
        """
        for node in self.graph.nodes:
            if is_random(node) and not own_labels(node) and (calls := self.calls(node, in_layers=True)):
                path, kind = calls[-1].path, calls[-1].kind
                label_draw(node, named.pop(calls[-1]) if calls[-1] in named else Label(namer.module(path), kind, module=path))

    def _label_cell(self, path: str, outputs: list[fx.Node], namer: Namer) -> None:
        name = namer.module(path)
        for output in outputs:
            index = output.args[1]
            if isinstance(index, int) and (ports := CELL_PORTS.get((index,))) is not None:
                add_label(output, Label(name, "LSTMCell", ports, index == 0, module=path))

    def _label_frame(self, namer: Namer) -> None:
        """If the graph ends where the forward of a submodule returns, label the returned value with the name of the submodule."""
        values = self.graph.output_node().all_input_nodes
        if self.place.returns and len(values) == 1 and values[0].op not in ("placeholder", "get_attr"):
            path = self.place.path
            add_label(values[0], Label(namer.module(path), type(self.modules[path]).__name__, module=path))


def is_layer(module: nn.Module) -> bool:
    """Return whether a trace records a call of the module as one operation: whether it is a layer of torch or stochastic depth."""
    home = type(module).__module__
    return (home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)) or is_drop_path(module)


def base_and_operation(node: fx.Node) -> tuple[str, str]:
    """Return the name that a trace would give a node, without the number at its end, and the name of the node's operation.

    The node's present name is no help, because Dynamo names nodes after the variables in the user's code.
    """
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", None) or node.name
    op = name.strip("_") or name
    base = COUNTED.sub("", snake_case(name[2:-2] if name.startswith("__") and name.endswith("__") else name))
    if node.op == "call_function" and op in IN_PLACE_NAMES:  # as in a trace, ``+=`` is named like ``+``
        base, op = base.removeprefix("i"), op[1:]
    return base, op


def shape_and_dtype(value: Any) -> Any:
    """Return the shape and dtype of a fake tensor, with dynamic sizes at their present values; a size without a value is -1.

    For a tuple or list, return the list of the results for its items; for anything else, None.
    """
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            raise TraceError("the model computes with a nested tensor, which a backend cannot take. Pad it first: x.to_padded_tensor(0.0).")
        return tuple(_size(n) for n in value.shape), value.dtype
    return [shape_and_dtype(item) for item in value] if isinstance(value, (tuple, list)) else None


def _size(n: Any) -> int:
    hint = n.node.hint if isinstance(n, torch.SymInt) else n  # int(n) would specialize the graph to this size
    return int(hint) if hint is not None else -1
