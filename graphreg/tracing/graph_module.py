"""A GraphModule that the user brings: its graph is taken as it is, and its values are named as those of the model it came from.

torch.fx writes to each node the stack of module calls it was made in. From it come the paths of functions
(``layer1.0.add``) and the blocks whose values they are (``layer1.0``); a value that a later pass made has no stack
and is named by its operation.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from graphreg.ir import (
    BufferConstants,
    Graphs,
    Label,
    ModuleCall,
    Namer,
    add_label,
    blocks,
    choose,
    is_labelled,
    label_node,
    label_site,
    own_labels,
    state_of,
)


def given_graphs(model: fx.GraphModule) -> Graphs:
    """Copies of the module's graphs, every node labelled; labels that an earlier trace wrote are kept."""
    _settle_modes(model)
    state = state_of(model)
    graphs = state.graphs if state is not None else {"both": model.graph}
    copies = {mode: copy.deepcopy(graph) for mode, graph in graphs.items()}
    for graph in copies.values():
        _label(graph, model)
    return copies


def _settle_modes(model: fx.GraphModule) -> None:
    """Give the empty modules that torch.fx makes in place of the model's blocks the mode of what is in them.

    torch.fx leaves them in train mode when it traces a model in eval mode, and a splice in the block would follow.
    """
    for module in reversed([m for m in model.modules() if type(m) is nn.Module]):
        within = [child.training for child in module.children()] or [model.training]
        module.training = module.training and any(within)


def _label(graph: fx.Graph, model: fx.GraphModule) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    namer = Namer(modules.keys() - {""})
    constants = BufferConstants({name for name, _ in model.named_buffers(remove_duplicate=False)})
    named = {node for node in graph.nodes if _claims(node, namer)}
    for node in graph.nodes:
        if node in named or node.op == "output" or _reads_mode(node):
            continue
        calls = _calls(node)
        scope = calls[-1].path if calls and node.op != "call_module" else ""
        if constants.take(node):
            label_site(node, scope)
        else:
            label_node(node, scope, modules, namer)
    if not named:  # a graph of torch.fx, not one that graphreg traced
        _label_blocks(graph, namer)


def _claims(node: fx.Node, namer: Namer) -> bool:
    """Whether the node keeps its labels: it has some, and no node before it has the same (a pass may have copied it)."""
    return is_labelled(node) and all(namer.claim(label.name) for label in own_labels(node) if label.ports == ("out",))


def _reads_mode(node: fx.Node) -> bool:
    """What graphreg's own trace put in place of ``training=`` literals, which is no value of the model."""
    return node.target is choose or (node.op == "get_attr" and str(node.target).rpartition(".")[2] == "training")


def _calls(node: fx.Node) -> list[ModuleCall]:
    """The module calls that the node was made in, outermost first."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return [
        ModuleCall(key, str(path), str(getattr(kind, "__name__", kind)).rpartition(".")[2]) for key, (path, kind) in stack.items() if path
    ]


def _label_blocks(graph: fx.Graph, namer: Namer) -> None:
    """The value that alone leaves a module call is the module's."""

    def calls(node: fx.Node) -> list[ModuleCall]:
        return [call for call in _calls(node) if node.op != "call_module" or call.path != node.target]  # that is labelled already

    for block in blocks(graph, calls):
        if len(block.leaving) == 1:
            path = block.call.path
            add_label(block.leaving[0], Label(namer.module(path), block.call.kind, module=path))
