"""What graphreg does to make a rewritten module compile well with torch.compile.

The room has extra passes on Inductor's graphs, the decision which splices backward recomputes, a
custom operator that runs recurrent layers, and the compiler settings that affect random operations.
Open ``inductor_passes.py`` first: while Dynamo traces a penalty, its passes are added to Inductor's
options for this one graph.
"""

from graphreg.compiler.inductor_passes import improve_derivatives, improve_graph, with_our_passes
from graphreg.compiler.recompute import recompute_in_backward, recomputed
from graphreg.compiler.recurrent_lowering import LOWERED, LayerLowering
from graphreg.compiler.settings import Setting, changed, defaults, patched_settings, setting, snapshot

__all__ = [
    "LOWERED", "LayerLowering", "Setting", "changed", "defaults", "improve_derivatives", "improve_graph", "patched_settings",
    "recompute_in_backward", "recomputed", "setting", "snapshot", "with_our_passes",
]  # fmt: skip
