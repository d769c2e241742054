"""``graphreg.strip``: removes graphreg's additions from the graphs as they are now, so that edits of other passes stay."""

from __future__ import annotations

import logging
from typing import Any

from torch import fx, nn

from graphreg.errors import GraphRegError
from graphreg.ir.metadata import is_marked, is_replaced_call
from graphreg.ir.module_record import RULES, specialized_arguments, state_of
from graphreg.ir.serialize import copied_graph
from graphreg.rewriting.invariants import replaced_by
from graphreg.rewriting.substitute import restore
from graphreg.runtime.result import output_of
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.hosts import graphs_of, rewritten, rules_of
from graphreg.tracing.checkpoints import checkpoints_itself
from graphreg.tracing.proof.proof import MODES, PROVABLE

log = logging.getLogger("graphreg")


def strip(module: nn.Module) -> RewrittenModule:
    """Return the model without any addition. A call returns the model's output alone, bit-equal to the original in eval mode.

    The result shares the layers of ``module``, which stays unchanged. Blocks that checkpoint their own forward still do so. If the graph
    was never compared with the model (the proof), a warning is logged: what is returned has no link to the model.

    Args:
        module: A rewritten module, also compiled or wrapped.

    Raises:
        GraphRegError: graphreg did not rewrite the module; or a later pass made nodes anew without their ``node.meta``, or added nodes
            that read an addition.
    """
    rewritten_module = rewritten(module)
    if unproved := [mode for mode in MODES if rules_of(rewritten_module).unproved.get(mode) in PROVABLE]:
        log.warning(
            "%s is stripped before its graph was compared with the model in %s mode, and what strip returns is never compared. Call the "
            "module once before, or give regularize example_inputs.", type(rewritten_module).__name__, " and ".join(unproved),
        )  # fmt: skip
    return without_additions(rewritten_module)


def without_additions(module: nn.Module) -> RewrittenModule:
    """Do what ``strip`` does, without a warning: to look at the model, not to use it."""
    rewritten_module = rewritten(module)
    graphs = {}
    for mode, graph in graphs_of(rewritten_module).items():
        copy = copied_graph(graph)
        strip_graph(copy)
        copy.lint()
        graphs[mode] = copy
    known = state_of(rewritten_module)
    checkpoints = known.checkpoints if known else {}
    named = known.blocks if known else ()
    blocks = [path for path in named if path in checkpoints or checkpoints_itself(rewritten_module.get_submodule(path))]
    kept: Any = {"structures": known.structures if known else None, "checkpoints": checkpoints}
    return RewrittenModule(rewritten_module, graphs, None, specialized_arguments(rewritten_module), blocks=blocks, **kept)


def strip_graph(graph: fx.Graph) -> None:
    """Remove graphreg's additions from a graph, in place."""
    output = graph.output_node()
    output.args = (output_of(output.args[0]),)
    # From the end, because additions read additions before them.
    for node in reversed(graph.nodes):
        if is_replaced_call(node):
            restore(node)
        elif is_marked(node):
            value = replaced_by(node)
            if value is not None:
                node.replace_all_uses_with(value)
            # What the model reads has been put back, so this reader is not of the model.
            if node.users:
                raise GraphRegError(
                    f"{next(iter(node.users)).name} reads {node.name}, which graphreg added, so {node.name} cannot be removed. A "
                    "later pass added the reader: undo that pass, or run it on what strip returns."
                )
            graph.erase_node(node)
        elif node.op == "call_module" and str(node.target).startswith(f"{RULES}."):
            raise GraphRegError(
                f"{node.name} calls an addition of graphreg and its node.meta no longer says so: a later pass made the nodes anew "
                "(torch.fx.Transformer does). Run graphreg's pass after that pass."
            )
