"""graphreg as a pass of torch.fx: a callable from GraphModule to PassResult, fit for its PassManager."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from graphreg.attach import Penalties, Scale
from graphreg.errors import RegularizerError, TraceError
from graphreg.inside import graphs_of, rules_of
from graphreg.keywords import from_kwargs, instances
from graphreg.module import Regularized
from graphreg.own_choice import OwnDropout
from graphreg.pipeline import check_options, regularize
from graphreg.regularizer import Regularizer
from graphreg.selector import Missing
from graphreg.state import RULES
from graphreg.trace import Traced


def as_pass(
    *regularizers: Regularizer | Iterable[Regularizer],
    example_inputs: Any = None,
    rng: int | torch.Generator | None = None,
    missing: Missing = "error",
    penalties: Penalties = "return",
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    **keywords: Any,
) -> PassBase:
    """``regularize`` as a pass of torch.fx, with its options; ``compile`` comes after the last pass.

    The pass takes a GraphModule and gives ``PassResult(graph_module, modified)`` with the module that ``regularize``
    gives; the given one stays as it is. ``modified`` is False, and the module the given one, where nothing is added:
    ``penalties="attach"`` with no site, or a second round of the same pass. Every node that was added says so in
    ``node.meta["graphreg"]``. Raises, for options that are not allowed, RegularizerError and NoMatchError at once; for a
    selector that selects nothing, NoMatchError when the pass runs (within a PassManager as the cause of its Exception).
    """
    if "compile" in keywords or "front_end" in keywords:
        what = "compile" if "compile" in keywords else "front_end"
        cure = "compile what the last pass gives: module.compile(fullgraph=True)" if what == "compile" else "a pass takes a graph as it is"
        raise RegularizerError(f"{what}= is no option of a pass; {cure}.")
    check_options(rng, missing, penalties, scale, own_dropout)
    given = tuple(instances(regularizers))
    from_kwargs(Traced(nn.Module(), {}, ()), **keywords)  # for its errors
    options = {"example_inputs": example_inputs, "rng": rng, "missing": missing, "penalties": penalties, "scale": scale}
    options["own_dropout"] = own_dropout
    return Regularize(given, options, keywords)


@dataclass(frozen=True, eq=False)
class Regularize(PassBase):
    """What ``as_pass`` gives. ``mark`` goes to the modules it makes, by which a second round knows them."""

    regularizers: tuple[Regularizer, ...]
    options: Mapping[str, Any]
    keywords: Mapping[str, Any]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex, init=False, repr=False)

    def requires(self, graph_module: nn.Module) -> None:
        """Raise TraceError for what is no GraphModule."""
        if not isinstance(graph_module, fx.GraphModule):
            raise TraceError(
                f"a pass takes a torch.fx.GraphModule, not {type(graph_module).__name__}. Give it torch.fx.symbolic_trace(model), "
                "or use graphreg.regularize(model), which traces both modes."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if getattr(graph_module, RULES, None) is not None and rules_of(graph_module).made_by == self.mark:
            return PassResult(graph_module, False)  # PassManager(steps=n) goes on until nothing changes
        module = regularize(graph_module, self.regularizers, **self.options, **self.keywords)
        if not any(_adds(graph) for graph in graphs_of(module).values()):
            return PassResult(graph_module, False)
        rules_of(module).made_by = self.mark
        return PassResult(module, True)


def _adds(graph: fx.Graph) -> bool:
    return isinstance(graph.output_node().args[0], Regularized) or any("graphreg" in node.meta for node in graph.nodes)
