"""What graphreg does to make a rewritten module compile well with torch.compile.

The room has extra passes on Inductor's graphs, the decision which splices backward recomputes, a custom operator that runs recurrent
layers, and the compiler settings that affect random operations. Open ``inductor_passes.py`` first: ``module.compile()`` and
``graphreg.backend`` add its passes to Inductor's options.
"""

from graphreg.compiler.inductor_passes import with_our_pass
from graphreg.compiler.recompute import recompute_in_backward, recomputed
from graphreg.compiler.recurrent_lowering import LOWERED, Lowering
from graphreg.compiler.settings import Setting, changed, defaults, patched_settings, setting, snapshot

__all__ = [
    "LOWERED", "Lowering", "Setting", "changed", "defaults", "patched_settings", "recompute_in_backward", "recomputed", "setting",
    "snapshot", "with_our_pass",
]  # fmt: skip
