"""Takes the graph of a GraphModule that the user gives, and names its values as in the model from which it was traced.

torch.fx writes to each node the stack of module calls in which the node was made. The stacks show
in which module a function was called (``layer1.0.add``), and which value is the output of a module
that has no node of its own (``layer1.0``). A value that a later pass over the graph added has no
stack, so its name is that of its operation.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from graphreg.ir.buffer_constants import BufferConstants
from graphreg.ir.metadata import add_label, is_labelled, label_site, own_labels
from graphreg.ir.module_calls import ModuleCall, blocks
from graphreg.ir.module_record import state_of
from graphreg.ir.naming import Namer, label_node
from graphreg.ir.site import Label
from graphreg.ir.train_eval import ModeGraphs, choose
from graphreg.torch_internals.modules import buffers_by_name


def labelled_graphs(model: fx.GraphModule) -> ModeGraphs:
    """Return copies of the module's graphs in which every node is labelled. Labels that an earlier trace wrote stay."""
    # In place of each submodule that the graph does not call as a whole, a GraphModule has a plain
    # nn.Module. torch.fx leaves it in train mode even if the model is in eval mode, but a splice in
    # the submodule must follow the submodule's own mode: that of its children.
    for module in reversed([m for m in model.modules() if type(m) is nn.Module]):
        within = [child.training for child in module.children()] or [model.training]
        module.training = module.training and any(within)

    state = state_of(model)
    graphs = state.graphs if state is not None else {"both": model.graph}
    copies = {mode: copy.deepcopy(graph) for mode, graph in graphs.items()}
    for graph in copies.values():
        _label(graph, model)
    return copies


def _label(graph: fx.Graph, model: fx.GraphModule) -> None:
    """Label every node that has no labels yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    namer = Namer(modules.keys() - {""})
    constants = BufferConstants({*buffers_by_name(model)})
    # A pass may have copied a node together with its labels: the first of such nodes keeps them.
    named = {
        node for node in graph.nodes
        if is_labelled(node) and all(namer.claim(label.name) for label in own_labels(node) if label.ports == ("out",))
    }  # fmt: skip
    for node in graph.nodes:
        # What reads a mode, or chooses a literal by it, is no value of the model: a trace adds it.
        reads_mode = node.target is choose or (node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training")
        if node in named or node.op == "output" or reads_mode:
            continue

        calls = _calls(node)
        scope = calls[-1].path if calls and node.op != "call_module" else ""
        if constants.take(node):
            label_site(node, scope)
        else:
            label_node(node, scope, modules, namer)
    if not named:  # a graph of torch.fx, not one that graphreg traced
        _label_blocks(graph, namer)


def _calls(node: fx.Node) -> list[ModuleCall]:
    """Return the module calls in which a node was made, outermost first."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return [
        ModuleCall(key, str(path), str(getattr(kind, "__name__", kind)).rpartition(".")[2]) for key, (path, kind) in stack.items() if path
    ]


def _label_blocks(graph: fx.Graph, namer: Namer) -> None:
    """Label the outputs of module calls. If only one value that was made during a call is used outside of it, that value is the output."""

    def calls(node: fx.Node) -> list[ModuleCall]:
        # A node that calls a layer has the layer's label already.
        return [call for call in _calls(node) if node.op != "call_module" or call.path != node.target]

    for block in blocks(graph, calls):
        if len(block.leaving) == 1:
            path = block.call.path
            add_label(block.leaving[0], Label(namer.module(path), block.call.kind, module=path))
