"""The graphs of train and eval mode: one for both, in which ``choose`` picks literals that depend on the mode, or one for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import fx
from torch.fx.node import has_side_effect

from graphreg.errors import TraceError

ModeGraphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """Return the argument for the mode. Emitted code calls this where a literal of the model depends on the mode."""
    return in_train if training else in_eval


@has_side_effect
def not_in_eval(why: str) -> NoReturn:
    """Raise TraceError. In a graph of eval mode, this stands for a forward that could not be traced in that mode."""
    raise TraceError(why)


def why_not_in_eval(graphs: ModeGraphs) -> str:
    """Return why the graph of eval mode only raises an error; ``""`` if it computes."""
    graph = graphs.get("eval")
    return "" if graph is None else next((str(node.args[0]) for node in graph.nodes if node.target is not_in_eval), "")
