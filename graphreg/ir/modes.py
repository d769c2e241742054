"""Both modes of a model: one graph for both, or one for each, and the literals that depend on the mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

Graphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """The argument that belongs to the mode; stands in emitted code where a literal depends on it."""
    return in_train if training else in_eval
