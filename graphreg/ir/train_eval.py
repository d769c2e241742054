"""How the graphs of train and eval mode are held: one for both, or one for each, with ``choose`` for literals that depend on the mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

Graphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """Pick an argument by mode. Emitted code calls this where a literal of the model depends on the mode."""
    return in_train if training else in_eval
