"""The graphs of train and eval mode: one for both, in which ``choose`` picks literals that depend on the mode, or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

ModeGraphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """Return the argument for the mode. Emitted code calls this where a literal of the model depends on the mode."""
    return in_train if training else in_eval
