"""``graphreg.regularize``: trace, plan and rewrite in a row, and compile when asked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from graphreg.attach import Penalties, Scale, check_penalties, check_scale
from graphreg.changes import Changes
from graphreg.collector import at_rest
from graphreg.errors import RegularizerError, shown
from graphreg.inside import graphs_of
from graphreg.keywords import from_kwargs, instances
from graphreg.leaves import check_rng
from graphreg.module import RewrittenModule
from graphreg.own_choice import OwnDropout, check_option
from graphreg.plan import Plan, check_missing, plan
from graphreg.regularizer import Regularizer
from graphreg.rewrite import rewrite
from graphreg.selector import Missing
from graphreg.state import RULES
from graphreg.trace import FrontEnd, check_model, trace
from graphreg.validation import copied, validate

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
    if not isinstance(compile, (bool, Mapping)):
        raise RegularizerError(f"compile={shown(compile)} is not allowed; give True, False or a dict of torch.compile options.")
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
    if penalties == "attach" and scale is None:
        _warn_of_scale(module)
    if compile is not False:
        options = {"fullgraph": True} | (dict(compile) if isinstance(compile, Mapping) else {})
        module.compile(**options)
    return module


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


def _warn_of_scale(module: RewrittenModule) -> None:
    in_train = next(iter(graphs_of(module).values()))
    joins = [n for n in in_train.nodes if n.op == "call_module" and n.target == f"{RULES}.attach" and not n.args[2]]
    if joins:
        warnings.warn(
            "penalties='attach': the model returns no loss, so what the loss is scaled by (a GradScaler, gradient "
            "accumulation) cannot be known; penalties join with scale 1. Pass scale=1 if that is right, else the scaler or factor.",
            stacklevel=3,
        )
