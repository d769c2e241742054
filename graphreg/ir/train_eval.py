"""The graphs of train and eval mode: one for both, in which ``choose`` picks literals that depend on the mode, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import fx
from torch.fx.node import has_side_effect

from graphreg.errors import OtherInputs, TraceError

ModeGraphs = Mapping[str, fx.Graph]  # {"both": graph} or {"train": graph, "eval": graph}


def choose(training: bool, in_train: Any, in_eval: Any) -> Any:
    """Return the argument for the mode. Emitted code calls this where a literal of the model depends on the mode."""
    return in_train if training else in_eval


@has_side_effect
def modes_asked(modes: Sequence[bool], expected: Sequence[bool], names: Sequence[str]) -> None:
    """Raise if one of the submodules on whose modes the graph depends has another mode than the graph assumes."""
    for mode, assumed, name in zip(modes, expected, names, strict=True):
        if mode != assumed:
            raise OtherInputs(
                f"the model's forward branches on self.{name}.training, which is {mode} now. The graph was traced with {assumed}. Put "
                f"{name} back into that mode; or regularize the model with {name} in the other one; or regularize it in place, where it is "
                "traced again (graphreg.regularize_)."
            )


@has_side_effect
def not_in_eval(why: str) -> NoReturn:
    """Raise TraceError. In a graph of eval mode, this stands for a forward that could not be traced in that mode."""
    raise TraceError(why)


def why_not_in_eval(graphs: ModeGraphs) -> str:
    """Return why the graph of eval mode only raises an error; ``""`` if it computes."""
    graph = graphs.get("eval")
    return "" if graph is None else next((str(node.args[0]) for node in graph.nodes if node.target is not_in_eval), "")
