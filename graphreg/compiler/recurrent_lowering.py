"""Replaces recurrent layers by the operator ``graphreg::recurrent`` in a copy of the graph, which torch.compile compiles.

The graph that users see, and that eager runs, still calls the layer. Dynamo refuses to read the
layer (``self.lstm``) or an attribute of it (``self.lstm.weight_hh_l0``). So the lowered graph calls
stand-ins instead, which this file defines. A stand-in reads what it needs from ``vars(layer)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from graphreg.compiler.recurrent import recurrent
from graphreg.ir.layer_calls import LAYER, call_with
from graphreg.ir.metadata import Kind, addition_of, is_kind
from graphreg.ir.operations import PACKS, function_name
from graphreg.ir.serialize import freeze, thaw
from graphreg.torch_internals.dynamo import graph_break
from graphreg.torch_internals.fx import share_emitter
from graphreg.torch_internals.modules import CALL_HOOKS, has_global_hook, kernel_weights, modules_by_path, weight_names

KINDS = (nn.RNN, nn.LSTM, nn.GRU)
# the module's attribute for the stand-ins; its value is no module, so no state_dict contains it
LOWERED = "graphreg_recurrent"


def why_not(kind: type, attributes: Mapping[str, Any]) -> str:
    """Return why a recurrent layer cannot be lowered, and what to do; ``""`` if it can be. Torch's unmodified layers can be lowered.

    Dynamo traces this function, so it takes the layer's class and ``vars(layer)`` instead of the
    layer.
    """
    if kind not in KINDS:
        return f"it is a {kind.__name__}, whose code is not torch's own; take nn.RNN, nn.LSTM or nn.GRU itself"
    if "forward" in attributes:
        return "its forward was replaced; restore it (del layer.forward)"
    if any(len(attributes[name]) > 0 for name in CALL_HOOKS) or has_global_hook():
        return "it has hooks, which the operator would not call; remove them"
    parameters = attributes["_parameters"]
    if any(name not in parameters or parameters[name] is not weight for name, weight in kernel_weights(attributes)):
        return "its weights are not parameters of its own (parametrized, or under weight_norm); make them plain parameters"
    return ""


def not_lowered_message(path: str, kind: type, why: str) -> str:
    """Return the message that says that the layer at ``path`` is not lowered, and why."""
    # The quotes are written out: Dynamo of torch 2.10 on Python 3.13 formats ``{path!r}`` without
    # them.
    return (
        f"graphreg does not lower the {kind.__name__} '{path}': {why}, or compile without fullgraph, where the layer runs in eager. "
        "torch.compile(fullgraph=True) refuses a recurrent layer that is not lowered."
    )


class Layer:
    """Stands in for a recurrent layer: calls the operator, or, if the layer cannot be lowered, breaks the graph and says why."""

    def __init__(self, path: str, layer: nn.Module) -> None:
        self.path, self.layer, self.kind, self.attributes = path, layer, type(layer), vars(layer)

    def __call__(self, *args: Any, graphreg_parameters: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Call the layer. ``graphreg_parameters``: tensors that replace parameters of the layer in this call, by name."""
        why, replaced = why_not(self.kind, self.attributes), graphreg_parameters or {}
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            why = why or "its input is a PackedSequence; give it the padded tensor"
        if why:
            graph_break(msg=not_lowered_message(self.path, self.kind, why))
            # without fullgraph, the call continues here in eager
            return call_with(*args, graphreg_layer=self.layer, graphreg_parameters=replaced, **kwargs)
        return _call_operator(self.attributes, replaced, *args, **kwargs)


class Packing:
    """Stands in for a function such as ``pack_padded_sequence``, at which Dynamo breaks the graph. Gives the break a useful message."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.name = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph_break(msg=packing_refusal(self.name))
        return self.function(*args, **kwargs)


def packing_refusal(name: str) -> str:
    """Return the message that says that a packing function is not lowered."""
    return (
        f"graphreg does not lower {name}, and torch.compile(fullgraph=True) takes no PackedSequence: give the recurrent layer the "
        "padded tensor, or compile without fullgraph, where the function and the layer run in eager."
    )


class Read:
    """Stands in for a graph node that reads an attribute or parameter of a recurrent layer."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.attributes = name, vars(layer)

    def __call__(self) -> Any:
        parameters = self.attributes["_parameters"]
        return parameters[self.name] if self.name in parameters else self.attributes[self.name]


StandIn = Layer | Read | Packing


class StandIns:
    """The namespace of the stand-ins, which the lowered code calls as ``self.graphreg_recurrent.<name>``."""


class LayerLowering:
    """Finds the recurrent layers of a module and makes the lowered copies of its graphs.

    Attributes:
        layers: the recurrent layers by path.
        stand_ins: the namespace that the lowered code reads.
        packs: the names of packing functions that the graphs call.
        called: the paths of the modules that the graphs call.
    """

    def __init__(self, root: nn.Module, graphs: Iterable[fx.Graph]) -> None:
        self.layers = {path: m for path, m in modules_by_path(root).items() if path and isinstance(m, KINDS)}
        self.graphs = list(graphs) if self.layers else []
        self.stand_ins, self.names = StandIns(), dict[str, str]()
        self.packs = dict.fromkeys(name for graph in self.graphs for n in graph.nodes if (name := function_name(n)) in PACKS)
        self.called = {path for graph in self.graphs for n in graph.nodes if (path := _called(n))}

    def report_lines(self) -> list[str]:
        """Return the report's lines: for each layer and packing function, whether it is lowered when compiled, and if not, why."""
        lines = [f"{name}: not lowered when compiled: torch.compile(fullgraph=True) takes no PackedSequence" for name in self.packs]
        for path, layer in self.layers.items():
            why = self._why(path, layer)
            lines.append(
                f"{path}: {type(layer).__name__}, "
                + (f"not lowered when compiled: {why}" if why else "lowered to graphreg::recurrent when compiled")
            )
        return lines

    def refused(self) -> str:
        """Return the message for the first packing function or called layer that is not lowered; ``""`` if all are lowered."""
        layers = ((path, self.layers[path]) for path in self.layers if path in self.called)
        refusals = (not_lowered_message(path, type(layer), why) for path, layer in layers if (why := self._why(path, layer)))
        return next(map(packing_refusal, self.packs), "") or next(refusals, "")

    def _why(self, path: str, layer: nn.Module) -> str:
        uncalled = "no operation of the graph calls it, only an opaque module"
        return why_not(type(layer), vars(layer)) if path in self.called else uncalled

    def lowered(self, graph: fx.Graph) -> fx.Graph:
        """Return a copy of the graph in which stand-ins replace the layers, the packing functions, and reads of layers' attributes."""
        copy = thaw(freeze(graph))
        share_emitter(graph, copy)
        for node in copy.nodes:
            stand_in = self._stand_in(node)
            if stand_in is not None:
                node.op, node.target = "call_module", f"{LOWERED}.{self._name(_called(node) or str(node.target), stand_in)}"
                node.kwargs = {name: value for name, value in node.kwargs.items() if name != LAYER}
        for node in reversed(copy.nodes):
            # Dynamo refuses to read a recurrent layer
            if is_kind(node, Kind.LAYER) and not node.users:
                copy.erase_node(node)
        return copy

    def _stand_in(self, node: fx.Node) -> StandIn | None:
        target, called = str(node.target), _called(node)
        if node.op == "call_function" and callable(node.target) and function_name(node) in PACKS:
            return Packing(node.target)
        if called in self.layers:
            return Layer(called, self.layers[called])
        owner, _, name = target.rpartition(".")
        layer = self.layers.get(owner) if node.op == "get_attr" else None
        return Read(name, layer) if layer is not None and (name in layer._parameters or name in vars(layer)) else None

    def _name(self, target: str, stand_in: StandIn) -> str:
        if target not in self.names:
            name = stand_in.name if isinstance(stand_in, Packing) else target.replace(".", "_")
            # ``a.b`` and ``a_b`` would have one name.
            while name in self.names.values():
                name += "_"
            self.names[target] = name
            setattr(self.stand_ins, name, stand_in)
        return self.names[target]


def _called(node: fx.Node) -> str:
    """Return the path of the module that a node calls, also if by ``call_with``; ``""`` for a node that calls no module."""
    addition = addition_of(node)
    op, target = addition.was if addition is not None and addition.kind == Kind.CALL and addition.was else (node.op, node.target)
    return str(target) if op == "call_module" else ""


def _call_operator(layer: Mapping[str, Any], replaced: Mapping[str, Tensor], input: Tensor, hx: Any = None) -> Any:
    """Call the operator with the arguments that the layer's forward would give its kernel.

    ``layer``: ``vars`` of the layer. ``replaced``: the weights to use instead of the layer's own,
    by name.
    """
    # The kernel takes [time, batch, features], with a batch of 1 for an input without a batch.
    lstm, unbatched = layer["mode"] == "LSTM", input.dim() == 2
    sides = 2 if layer["bidirectional"] else 1
    x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if layer["batch_first"] else input

    if hx is None:
        # The states are zeros. With ``proj_size``, the h of an LSTM is smaller than its c.
        sizes = [layer["proj_size"] or layer["hidden_size"], layer["hidden_size"]][: 1 + lstm]
        states = [torch.zeros(layer["num_layers"] * sides, x.shape[1], size, dtype=x.dtype, device=x.device) for size in sizes]
    else:
        states = [state.unsqueeze(1) if unbatched else state for state in (hx if lstm else [hx])]

    weights = [replaced[name] if name in replaced else layer["_parameters"][name] for name in weight_names(layer)]
    records = torch.is_grad_enabled()
    # Under no_grad, the operator need not keep what backward would read.
    wanted = [records and t.requires_grad for t in (x, *states, *weights)]
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # ``torch.empty(0)`` is the argument ``call``, which must be a new tensor in each call.
    out, h, c, _, _ = recurrent(
        x, states, weights, torch.empty(0, device="cpu"), layer["mode"], layer["num_layers"], layer["bias"], layer["dropout"],
        layer["training"], layer["bidirectional"], wanted, autocast,
    )  # fmt: skip

    if unbatched:
        out, h, c = out.squeeze(1), h.squeeze(1), c.squeeze(1) if lstm else c
    elif layer["batch_first"]:
        out = out.transpose(0, 1)
    return (out, (h, c)) if lstm else (out, h)
