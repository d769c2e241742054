"""``graphreg.regularize``: trace, plan and rewrite in a row, and compile when asked."""
from __future__ import annotations

import logging
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from graphreg.errors import RegularizerError, TraceError, shown
from graphreg.ir import RULES, Missing
from graphreg.planning import OwnDropout, Plan, check_missing, check_option, from_kwargs, instances, plan
from graphreg.regularizer import Regularizer
from graphreg.rewriting import check_rng, rewrite
from graphreg.runtime import Penalties, Regularized, RewrittenModule, Scale, check_penalties, check_scale, graphs_of, rules_of
from graphreg.torch_internals import Changes, at_rest
from graphreg.tracing import FrontEnd, Traced, check_model, trace
from graphreg.verification import copied, validate

log = logging.getLogger("graphreg")


def regularize(
    model: nn.Module,
    *regularizers: Regularizer | Iterable[Regularizer],
    example_inputs: Any = None,
    rng: int | torch.Generator | None = None,
    front_end: FrontEnd = "auto",
    missing: Missing = "error",
    penalties: Penalties = "return",
    compile: bool | Mapping[str, Any] = False,
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    verify: bool = False,
    **keywords: Any,
) -> RewrittenModule:
    """The model with regularizers at the sites they name: a GraphModule that returns ``(output, penalties)``.

    ``regularizers``: instances or sequences of them; ``keywords``: ``hidden_dropout=0.1``, ``weight_l2=1e-4``, ….
    ``example_inputs``: a tensor, a tuple (positional) or a dict (keyword). ``penalties="attach"`` keeps the model's own
    output type; ``scale`` is then the scale of the loss. ``compile``: True, or a dict of torch.compile options.
    ``own_dropout``: what becomes of the model's own dropout, stochastic depth and attention dropout: ``"keep"``, ``"seeded"`` (drawn
    from graphreg's streams), ``"off"``, or a rate in [0, 1), seeded; or a dict of selectors to these, of which the last counts; ``*``
    reaches the dropouts of every depth, ``!`` excludes. Its rates stay as they are given; a model without dropout is an error.
    ``verify``: compare the result with the model on the example inputs, as ``graphreg.verify`` does.
    The model itself stays as it is, and shares its layers with the result. Raises GraphRegError kinds.
    """
    _check_compile(compile)
    _check_scaled(penalties, scale)
    before = _before(model, example_inputs, verify)
    with Changes() as changes, changes:
        at_rest(changes)
        traced = trace(model, example_inputs, front_end)
        found = plan(traced, [*instances(regularizers), *from_kwargs(traced, **keywords)], missing, own_dropout)
        module = rewrite(traced, found, rng, penalties, scale)
    if before is not None:
        validate(before, model, module, example_inputs)
    _tell(found)
    _warn_of_scale(module, penalties, scale)
    if compile is not False:
        module.compile(**{"fullgraph": True, **(compile if isinstance(compile, Mapping) else {})})
    return module


def _check_compile(compile: object) -> None:
    if not isinstance(compile, (bool, Mapping)):
        raise RegularizerError(f"compile={shown(compile)} is not allowed; give True, False or a dict of torch.compile options.")


def _before(model: nn.Module, example_inputs: Any, verify: bool) -> nn.Module | None:
    """The model as it is before anything looks at it, a copy; None where it need not be compared with."""
    if not isinstance(verify, bool):
        raise RegularizerError(f"verify={shown(verify)} is not allowed; give True or False.")
    if not verify:
        return None
    if example_inputs is None:
        raise RegularizerError("verify=True runs the model, so it needs example_inputs: a tensor, a tuple or a dict.")
    check_model(model)
    return copied(model)


def check_options(rng: Any, missing: Missing, penalties: Penalties, scale: Scale | None, own_dropout: OwnDropout) -> None:
    """Refuse, before there is a graph, what ``regularize`` refuses of these options. Raises RegularizerError."""
    _check_scaled(penalties, scale)
    check_missing(missing)
    check_penalties(penalties)
    check_scale(scale)
    check_rng(rng)
    check_option(own_dropout)


def _check_scaled(penalties: Penalties, scale: Scale | None) -> None:
    if scale is not None and penalties != "attach":
        raise RegularizerError("scale= is for penalties='attach'; returned penalties are scaled with the loss they are added to.")


def _tell(found: Plan) -> None:
    for name, regularizer in found.regularizers.items():
        count = len(found.of(name))
        what = "site" if count == 1 else "sites"
        log.info("%g %s %r: %d %s (%s)", regularizer.weight, type(regularizer).__name__, regularizer.pattern, count, what, name)
    if found.own:
        log.info("own dropout: %d %s", len(found.own), ", ".join(sorted({edit.becomes for edit in found.own})))
    for own in found.stays:
        log.warning("own dropout stays with torch's generator: %s", own.text)


def _warn_of_scale(module: RewrittenModule, penalties: Penalties, scale: Scale | None) -> None:
    if penalties != "attach" or scale is not None:
        return
    in_train = next(iter(graphs_of(module).values()))
    joins = [n for n in in_train.nodes if n.op == "call_module" and n.target == f"{RULES}.attach" and not n.args[2]]
    if joins:
        warnings.warn(
            "penalties='attach': the model returns no loss, so what the loss is scaled by (a GradScaler, gradient "
            "accumulation) cannot be known; penalties join with scale 1. Pass scale=1 if that is right, else the scaler or factor.",
            stacklevel=3,
        )



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
