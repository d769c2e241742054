"""Determines for every value of a graph its role (input, hidden, output), and whether a regularizer can act on it; if not, why."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from torch import fx, nn
from torch.nn.modules import activation

from graphreg.ir.batch_norms import batch_norms_fed
from graphreg.ir.branches import residuals, signals
from graphreg.ir.containers import builds, loss_of
from graphreg.ir.convolution_axes import Channels, channels_of, is_reshape, read_channels, shape_of
from graphreg.ir.dataflow import has_options_only, without_derivative
from graphreg.ir.made_objects import MadeObject
from graphreg.ir.metadata import is_labelled, own_labels, scope_of
from graphreg.ir.operations import (
    PACKS,
    PRODUCTS,
    Operations,
    first_argument,
    function_name,
    is_integer,
    is_port,
    is_size,
    nodes_in,
    port_path,
    source_of,
)
from graphreg.ir.random_ops import is_random
from graphreg.ir.site import READS_PARAMETER, Label, Role, Site
from graphreg.ir.train_eval import ModeGraphs
from graphreg.ir.views_and_writes import ViewsAndWrites
from graphreg.torch_internals.operators import HigherOrderOperator

# functions that recurrent cells call
CELLS = {"rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell"}
# A key of ``node.meta`` at a graph-break boundary. An input that another subgraph computed has this
# key. Its value says whether the input depends on a product of data with weights or, if that is not
# known, whether the input requires a gradient. An output node has this key if its values go on to
# another subgraph.
BOUNDARY = "graph_break_boundary"
# a user's own norm is recognized by the name of its class
NORM_CLASS = re.compile(r"Norm(alization)?(\dd)?$")
PORTS: dict[tuple[int, ...], tuple[str, ...]] = {(0,): ("out", "0"), (1,): ("h_n", "1"), (1, 0): ("h_n", "1.0"), (1, 1): ("c_n", "1.1")}
# of nn.LSTMCell
CELL_PORTS: dict[tuple[int, ...], tuple[str, ...]] = {(0,): ("out", "h", "0"), (1,): ("c", "1")}


def value_sites(model: nn.Module, graphs: ModeGraphs) -> tuple[Site, ...]:
    """Return the value sites of all graphs. A value that several graphs have is one site, with its role in the first of them."""
    operations = Operations(model)
    sites: dict[str, Site] = {}
    for graph in graphs.values():
        for site in _Judge(graph, operations, model).sites():
            sites.setdefault(site.name, site)
    return tuple(sites.values())


def site_nodes(graph: fx.Graph, operations: Operations) -> dict[str, fx.Node]:
    """Return the node of each site of a graph, by the site's name."""
    return {labels[0].text: node for node in graph.nodes if (labels := labels_of(node, operations))}


def labels_of(node: fx.Node, operations: Operations) -> tuple[Label, ...]:
    """Return a node's labels.

    If the node is an element of a tuple, labels made from the tuple's name and the element's place
    come first: ``rnn:h_n`` before ``getitem_1``.
    """
    if not is_labelled(node):
        return ()
    labels = own_labels(node)

    if operations.is_list(node):
        # the module's name stands for its first output; the getitem node of that output has the
        # label, so the tuple has none
        has_first_port = any(function_name(user) == "getitem" and user.args == (node, 0) for user in node.users)
        return () if operations.module(node) is not None and has_first_port else labels

    if not is_port(node, operations):
        return labels

    # A port: the names of the layer that returned the tuple, and the port by its name or its number.
    path, source = port_path(node), node.args[0]
    while isinstance(source, fx.Node) and function_name(source) in ("getitem", "__getitem__") and operations.is_list(source):
        source = source.args[0]
    if not isinstance(source, fx.Node) or not is_labelled(source):
        return labels

    module = operations.module(source)
    of_module = module is not None
    plain = ("out", "0") if path == (0,) and of_module else (".".join(map(str, path)),)
    known = PORTS if isinstance(module, nn.RNNBase) else CELL_PORTS if isinstance(module, nn.LSTMCell) else {}
    ports = known.get(path, plain)
    named = (Label(label.name, label.op, ports, path == (0,) and of_module, label.module) for label in own_labels(source))
    return (*named, *labels)


def _in_output(value: object) -> Iterator[fx.Node]:
    """Yield the nodes whose values a graph returns, also those in a container that a node builds, such as a dataclass.

    What an object within a container holds, such as the keys and values in a cache, is no output.
    """
    for node in nodes_in(value):
        if node is value or not isinstance(node.target, MadeObject):
            yield from _in_output((node.args, node.kwargs)) if builds(node) else (node,)


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


_JOINS = {"cat", "concat", "concatenate", "stack", "hstack"}
_PROBABILITIES = {"softmax", "logsoftmax", "sigmoid"}
# a probability is no activation: a penalty that takes logits refuses it and says so
_ACTIVATIONS = {_plain(name) for name in activation.__all__ if not re.search("softmax|softmin|^sigmoid|attention", name.lower())} | {"exp"}
_MOST_OF_OUTPUT = 200  # so many operations after the last layer are looked at


def acts_as_opaque(node: fx.Node) -> bool:
    """Return whether the node calls one of ``CELLS`` or an operator that contains a graph. Both count as products, like opaque modules."""
    return is_region(node) or function_name(node) in CELLS


def is_region(node: fx.Node) -> bool:
    """Return whether the node calls a higher-order operator: one that contains a graph, such as the operator for checkpointing."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def deep_nodes(graph: fx.Graph, operations: Operations, model: nn.Module) -> set[fx.Node]:
    """Return the nodes that depend on a product of data with weights."""
    return _Judge(graph, operations, model).deep


def signal_nodes(graph: fx.Graph, operations: Operations, model: nn.Module) -> set[fx.Node]:
    """Return the nodes that depend on a floating-point input or on a product. Masks, positions and parameters are not among them."""
    judge = _Judge(graph, operations, model)
    return signals(graph, judge.sizes, judge.products, judge.filled)


def _has_tensor(known: Any) -> bool:
    """Return whether ``node.meta["value"]`` is a tuple with a tensor in it, and not a shape or the like."""
    return isinstance(known, tuple) or (isinstance(known, list) and any(map(_has_tensor, known)))


class _Judge:
    """Walks a graph once, in order, and classifies each node by the kind of its value and by what it depends on."""

    def __init__(self, graph: fx.Graph, operations: Operations, model: nn.Module) -> None:
        self.graph, self.operations, self.effects = graph, operations, ViewsAndWrites(operations)
        held = ((path, name, value) for path, module in operations.modules.items() for name, value in module._parameters.items())
        self.parameters = {f"{path}.{name}" if path else name for path, name, value in held if value is not None}

        self.sizes: set[fx.Node] = set()  # numbers, shapes, flags
        # depends on an input through tensors, not only through sizes; or on a draw, such as the noise that a generator begins with
        self.data: set[fx.Node] = set()
        self.weights: set[fx.Node] = set()  # computed from parameters, and not from data
        self.queries: set[fx.Node] = set()  # those of the weights that a layer computes, such as learned queries of attention
        self.deep: set[fx.Node] = set()  # depends on a product of data with weights
        # data was written into the value, so a later node that reads it is data, too
        self.filled: set[fx.Node] = set()
        # a deep value was written into it, so a later node that reads it is deep, too
        self.filled_deep: set[fx.Node] = set()
        self.hidden: set[fx.Node] = set()  # deep, and read by another product
        self.integers: set[fx.Node] = set()
        # a PackedSequence, also one that a recurrent layer returns
        self.packed: set[fx.Node] = set()
        self.channels: dict[fx.Node, Channels] = {}
        self.products: set[fx.Node] = set()  # products of data with weights
        # for each embedding: the name of the model's input that has the indices
        self.reads: dict[fx.Node, str] = {}

        for node in graph.nodes:
            self._walk(node)
        self.channels |= read_channels(graph, operations, self.channels)
        self.reads = {self._scaled(node): name for node, name in self.reads.items()}

        end = graph.output_node()
        self.returned = set() if BOUNDARY in end.meta else set(_in_output(end.args[0]))
        self.loss = loss_of(end)

        # A node is used if the output depends on it, or if it writes into something.
        self.used, self.passed_on, self.underived = {graph.output_node()}, set[fx.Node](), without_derivative(graph)
        for node in reversed(graph.nodes):
            if not self.used.isdisjoint(node.users) or node.target is operator.setitem:
                self.used.add(node)
            # a product of two values reads embeddings, and not logits
            if any(user in self.products or user in self.passed_on or function_name(user) in PRODUCTS for user in node.users):
                self.passed_on.add(node)
        # each read of a field of what an opaque module returned is a node
        reads: dict[str, set[fx.Node]] = {}
        for node in (each for each in graph.nodes if function_name(each) in ("getattr", "getitem")):
            reads.setdefault(f"{node.target} {node.args}", set()).add(node)
        self.passed_on.update(*(alike for alike in reads.values() if not self.passed_on.isdisjoint(alike)))

    def _walk(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.data.add(node)
            if node.meta.get(BOUNDARY):
                self.deep.add(node)
            return
        if node.op == "get_attr":
            if str(node.target) in self.parameters:
                self.weights.add(node)
            elif str(node.target).rpartition(".")[2] == "training":
                self.sizes.add(node)
            return
        if node.op == "output":
            return
        if is_size(node, self.sizes.__contains__):
            self.sizes.add(node)
            return

        if function_name(node) in PACKS or (self._of_packed(node) and port_path(node) in ((), (0,))):
            self.packed.add(node)
            lengths = node.args[1] if len(node.args) > 1 else node.kwargs.get("lengths")
            if function_name(node) == "pack_padded_sequence" and isinstance(lengths, fx.Node):
                self.integers.add(lengths)
        if is_integer(node):
            self.integers.add(node)

        tensors = [n for n in node.all_input_nodes if n not in self.sizes and not has_options_only(node)]
        data = [n for n in tensors if n in self.data or n in self.filled]
        of_weights = any(n in self.weights for n in tensors)
        is_drawn = is_random(node) and not of_weights and not self.operations.is_dropout(node)
        if data or is_drawn or (not tensors and node.op == "call_module"):
            self.data.add(node)
        elif of_weights:
            self.weights.add(node)
            is_layer = self.operations.is_product(node) and (node.op == "call_module" or function_name(node) == "linear")
            if is_layer or not self.queries.isdisjoint(tensors):
                self.queries.add(node)

        is_product = bool(data) and (self.operations.is_product(node) or acts_as_opaque(node))
        weights = self.weights.intersection(tensors)
        if is_product and (node.op == "call_module" or weights):
            # a model may compute the kernel, which is no value that a layer reads
            has_kernel = node.op == "call_function" and function_name(node).startswith(("conv", "linear")) and len(node.args) > 1
            kernel = node.args[1] if has_kernel else node.kwargs.get("weight")
            # nor are keys that are multiplied by learned queries
            if node.op == "call_module" or has_kernel or not weights <= self.queries:
                self.hidden.update(origin for n in data if n is not kernel and (origin := self._origin(n)) in self.deep)
            self.products.add(node)
            self.deep.add(node)
            self._note_indices(node, data)
        elif any(n in self.deep or n in self.filled_deep for n in data):
            self.deep.add(node)
        self._fill(node)

        if channels := channels_of(node, self.operations, self.channels):
            self.channels[node] = channels

    def _note_indices(self, node: fx.Node, data: list[fx.Node]) -> None:
        """If the node looks up embeddings, note that its input is indices, in whatever dtype, and which input of the model they are."""
        is_embedding = isinstance(self.operations.module(node), (nn.Embedding, nn.EmbeddingBag))
        if is_embedding or function_name(node) in ("embedding", "embedding_bag"):
            indices = [self._origin(n) for n in data]
            self.integers.update(indices)
            # of joined indices, as a history of items and the next item, the first ones count
            joined = (next(nodes_in(each.args), each) if function_name(each) in _JOINS else each for each in indices)
            given = (each for each in map(self._origin, joined) if each.op == "placeholder" and BOUNDARY not in each.meta)
            self.reads.update((node, str(each.target)) for each in given)

    def _scaled(self, node: fx.Node) -> fx.Node:
        """Return the output of the embedding layer that a look-up is a part of: a subclass may multiply what it looks up by a factor."""
        scope, later = scope_of(node), node
        while isinstance(self.operations.modules.get(scope), nn.Embedding) and later.op != "output" and scope_of(later) == scope:
            if any(label.module == scope for label in own_labels(later)):
                return later
            later = later.next
        return node

    def _fill(self, node: fx.Node) -> None:
        """If the node's value is data, mark each value that the node writes into as filled with data.

        Also mark every value that a marked value may be a view of. If the node's value is deep,
        mark all of these as filled with a deep value, too.
        """
        waiting = list(self.effects.writes(node)) if node in self.data else []
        seen = set(waiting)
        while waiting:
            written = waiting.pop()
            self.filled.add(written)
            if node in self.deep:
                self.filled_deep.add(written)
            waiting += [n for n in self.effects.shares(written) if n not in seen]
            seen.update(waiting)

    def _of_packed(self, node: fx.Node) -> bool:
        if not self.packed:
            return False
        recurrent = isinstance(self.operations.module(node), nn.RNNBase) or is_port(node, self.operations)
        return recurrent and bool(node.args) and node.args[0] in self.packed

    def _origin(self, node: fx.Node) -> fx.Node:
        while self.operations.passes_through(node) and node.args and isinstance(node.args[0], fx.Node) and not acts_as_opaque(node.args[0]):
            # a tensor that the forward creates has no site name, but a view of it may have one:
            # stop at the view
            if is_labelled(node.args[0]) and not own_labels(node.args[0]):
                break
            node = node.args[0]
        return node

    def sites(self) -> list[Site]:
        sites, flow = list[Site](), signals(self.graph, self.sizes, self.products, self.filled)
        self.residuals = residuals(self.graph, self.operations, self.sizes, flow, self.products, self._learned())
        self.norms = batch_norms_fed(self.graph, self.operations, flow, self.products)
        heads = set[fx.Node]()
        for node in self.graph.nodes:
            labels = labels_of(node, self.operations)
            if not labels:
                continue
            sites.append(self._site(node, labels))
            if sites[-1].role == "output" and sites[-1].prediction and sites[-1].shape is not None:
                # a reshaped copy of logits that are an output, too, would count them twice
                head = self._reshaped_from(node)
                sites[-1] = replace(sites[-1], prediction=head not in heads)
                heads.add(head)
        # probabilities beside logits, such as attention weights, are no predictions
        if any(site.prediction and site.role == "output" and not site.probability for site in sites):
            sites = [replace(site, prediction=False) if site.probability else site for site in sites]
        return sites

    def _reshaped_from(self, node: fx.Node) -> fx.Node:
        """Return the value of which the node's value is a reshaped or converted copy, with all elements in their order."""
        count = math.prod(shape_of(node) or ())
        while is_reshape(node, self.operations) or function_name(node) in ("ravel", "float", "to", "contiguous", "squeeze", "unsqueeze"):
            if not (given := first_argument(node)) or math.prod(shape_of(given[0]) or ()) != count:
                break
            (node,) = given
        return node

    def _site(self, node: fx.Node, labels: tuple[Label, ...]) -> Site:
        why_not, known = self._why_not(node), node.meta.get("value")
        shape, dtype = known if isinstance(known, tuple) else (None, None)
        facts: dict[str, Any] = {"module": scope_of(node), "shape": shape, "dtype": dtype, "used": node in self.used}
        if why_not:
            return Site(labels, selectable=False, why_not=why_not, **facts)
        named = any(label.module is not None and NORM_CLASS.search(label.op) for label in labels)
        # a layer or a block may have such a name: Tacotron's LinearNorm, PreNorm of vit_pytorch
        origin = self._origin(node)
        norm = self.operations.is_norm(node) or (named and (origin not in self.products or self.operations.is_opaque(origin)))
        role = self._role(node)
        loss = node is self.loss or self.operations.is_loss(node) or (role == "output" and shape == ())
        channels = self.channels.get(node)
        # of a value of unknown shape, only [batch, channels, ...] is sure to be read rightly
        spatial = channels.spatial if channels and (shape is not None or channels.axes[0] == 1) else 0
        axis = channels.axes[0] if channels and shape is not None and len(channels.axes) == 1 else None
        facts |= {"prediction": self._may_predict(node), "spatial": spatial, "channels": axis, "reads": self.reads.get(node, "")}
        first = self.residuals.trunk.get(node)
        trunk = "" if first is None else (labels_of(first, self.operations) or (first,))[0]
        if role == "output":
            facts["probability"] = self._probability(node)
        facts |= {"branch": node in self.residuals.branches, "normed": self.norms.get(node, "")}
        facts["trunk"] = trunk.text if isinstance(trunk, Label) else str(trunk)
        return Site(labels, role=role, norm=norm, loss=loss, sequence=self._sequence(node), **facts)

    def _sequence(self, node: fx.Node) -> Literal["", "batch first", "time first", "state"]:
        """Return whether the value is the output sequence of a recurrent layer, and with which order of axes, or a state of such a layer.

        ``"batch first"`` or ``"time first"`` if it is the layer's output sequence, also after
        dropout or ``pad_packed_sequence``; ``"state"`` if it is another output of the layer; else
        ``""``.
        """
        if function_name(node) not in ("getitem", "__getitem__") and not self.operations.is_dropout(node):
            return ""
        port: Any = node
        while isinstance(port, fx.Node) and self.operations.is_dropout(port) and port.args:
            port = port.args[0]
        source: Any = source_of(port, self.operations) if isinstance(port, fx.Node) else port
        layer = self.operations.module(source) if source is not port and isinstance(source, fx.Node) else None
        if isinstance(source, fx.Node) and function_name(source) == "pad_packed_sequence" and port_path(port) == (0,):
            batch_first = source.args[1] if len(source.args) > 1 else source.kwargs.get("batch_first", False)
            return "batch first" if batch_first is True else "time first"
        if not isinstance(layer, nn.RNNBase):
            return ""
        if port_path(port) != (0,):
            return "state" if port is node else ""
        return "batch first" if layer.batch_first else "time first"

    def _learned(self) -> set[fx.Node]:
        """Return the nodes that are computed from parameters alone and that layers read, such as queries, and what these give."""
        found = set[fx.Node]()
        for node in (each for each in self.graph.nodes if each in self.weights):
            layers = (user for user in node.users if user.op == "call_module")
            is_read = any(self.operations.is_product(each) or self.operations.is_norm(each) for each in layers)
            if is_read or not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def _may_predict(self, node: fx.Node) -> bool:
        """Return whether the value may be a prediction, see ``Site``."""
        origin = self._origin(node)
        labels, source = labels_of(origin, self.operations), source_of(origin, self.operations)
        module = self.operations.module(source)
        name = function_name(source) if module is None else type(module).__name__
        is_state = bool(self._sequence(origin)) or isinstance(module, nn.RNNCellBase) or name in CELLS
        is_weights = bool(labels) and not labels[0].default and name not in ("max", "min")
        is_passed_on = node in self.passed_on or node in self.underived or node not in self.deep
        return not (is_passed_on or is_state or is_weights or _plain(name) in _ACTIVATIONS)

    def _probability(self, node: fx.Node) -> str:
        """Return the name of the operation if the value is computed from probabilities (or their logarithms) alone; else ``""``."""
        waiting, seen, made = [node], {node}, set[str]()
        while waiting:
            each = waiting.pop()
            module = self.operations.module(each)
            name = function_name(each) if module is None else type(module).__name__.lower()
            if _plain(name) in _PROBABILITIES:
                made.add(name)
                continue
            operands = [n for n in each.all_input_nodes if n in self.data and n not in seen]
            is_layer = each in self.products or (module is not None and not self.operations.passes_through(each))
            if is_layer or each.op == "placeholder" or name in ("log", "logit") or len(seen) > _MOST_OF_OUTPUT:
                return ""
            seen.update(operands)
            waiting += operands
        return min(made, default="")

    def _role(self, node: fx.Node) -> Role:
        labels = own_labels(node)
        # an element of an argument that is a tuple or dict
        is_element = node.op != "placeholder" and labels and labels[0].op == "input"
        if is_element or (node.op == "placeholder" and BOUNDARY not in node.meta):
            return "input"
        if node in self.hidden:
            return "hidden"
        return "output" if node in self.returned else ""

    def _why_not(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return READS_PARAMETER if node in self.weights else "a constant"
        if node in self.packed and not self.operations.is_list(node):
            return "a packed sequence"
        if "value" in node.meta:
            known = node.meta["value"]
            if not isinstance(known, tuple):
                return "a tuple" if _has_tensor(known) else "no tensor"
            return "" if known[1].is_floating_point else "complex numbers" if known[1].is_complex else "integers"
        if node in self.sizes:
            return "no tensor"
        if self.operations.is_list(node):
            guessed = "assumed to be a tuple, because it is only indexed; give example_inputs to find out whether it is one"
            return guessed if self.operations.guesses_list(node) else "a tuple"
        return "integers" if node in self.integers else ""
