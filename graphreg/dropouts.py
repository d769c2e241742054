"""What is dropout, by the names of functions and modules."""

from __future__ import annotations

from torch import nn

DROPOUTS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "stochastic_depth", "drop_path", "dropout_", "drop_block2d", "drop_block3d",
}  # fmt: skip
DROP_PATHS = {"timm.layers.drop.DropPath", "timm.models.layers.drop.DropPath"}  # by name: timm need not be there


def is_drop_path(module: nn.Module) -> bool:
    """timm's stochastic depth. The tracer keeps it whole: within, its trace would differ by mode."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in DROP_PATHS


def is_dropout_module(module: nn.Module) -> bool:
    """torch's dropouts, their subclasses, and timm's stochastic depth."""
    return isinstance(module, nn.modules.dropout._DropoutNd) or is_drop_path(module)
