"""What is told to Inductor: passes on its graphs, which splices are recomputed, recurrent layers as one operator, settings."""

from graphreg.compiler.inductor_passes import with_our_pass
from graphreg.compiler.recompute import kept, recomputed
from graphreg.compiler.recurrent_lowering import LOWERED, Lowering
from graphreg.compiler.settings import Setting, changed, defaults, given, setting, snapshot

__all__ = [
    "LOWERED", "Lowering", "Setting", "changed", "defaults", "given", "kept", "recomputed", "setting", "snapshot", "with_our_pass",
]  # fmt: skip
