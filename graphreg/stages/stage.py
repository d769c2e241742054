"""``graphreg.regularize_stage`` regularizes one stage of a pipeline as the whole model would be regularized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from graphreg.errors import RegularizerError, check_flag, shown
from graphreg.ir.selector import Missing, Selector
from graphreg.pipeline import check_compile, compile_if_asked, log_plan
from graphreg.planning.kept import refuse_keep
from graphreg.planning.keywords import from_kwargs, instances
from graphreg.planning.native_dropout import OwnDropout
from graphreg.planning.plan import Plan
from graphreg.planning.plan import plan as planned
from graphreg.recipes.arguments import RecipeLike, by_recipe
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.rewriting.rewrite import rewrite
from graphreg.runtime.attach import Scale, check_scale
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.hosts import rules_of
from graphreg.stages.calls import StageCalls, StageScale
from graphreg.stages.stage_plan import plan_of_stage
from graphreg.stages.stage_trace import named_as_in_whole
from graphreg.torch_internals.interpreter import at_rest
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.trace import FrontEnd, Traced, trace


def regularize_stage(
    stage: nn.Module,
    *regularizers: Regularizer | Iterable[Regularizer],
    whole: nn.Module | Traced,
    microbatches: int,
    scale_grads: bool = True,
    names: Mapping[str, str | None] | None = None,
    example_inputs: Any = None,
    rng: int | None = None,
    front_end: FrontEnd = "auto",
    missing: Missing = "error",
    compile: bool | Mapping[str, Any] = False,
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    recipe: RecipeLike | None = None,
    blocks: Selector | None = None,
    **keywords: Any,
) -> RewrittenModule:
    """Return a stage of a pipeline with its part of the whole model's regularizers.

    Call it for each stage with the same regularizers and options. Together the stages then do what ``regularize`` would do to the whole
    model: the same masks, and the same penalties, each at the stage that has the site. Penalties are attached (``penalties="attach"``),
    because only the last stage has a loss. The stage itself stays unchanged and shares its layers with the result.

    Args:
        stage: A part of the model: a module that runs some of the model's operations, with the model's own modules.
        *regularizers: The regularizers of the whole model, or sequences of them.
        whole: The whole model, which may be on the meta device; or what ``graphreg.trace`` returned for it.
        microbatches: The number of microbatches in a step: ``n_microbatches`` of the schedule.
        scale_grads: Whether the gradients are divided by ``microbatches`` at the end of a step: ``scale_grads`` of the schedule.
        names: If modules or tensors of the stage have other names in the whole model: their names there, such as
            ``{"0": "layers.4"}``. An entry for a module also holds for what is inside it. A key may also name a value of the stage; its
            entry is None if the whole model has no such value. Modules that the stage shares with ``whole`` need no entry.
        example_inputs: The arguments of one call of the stage, as in ``regularize``.
        rng: The seed of the noise, which must be the same number for all stages.
        front_end: As in ``regularize``; ``"auto"`` takes that of ``whole``.
        missing: What to do when a selector matches nothing in the whole model.
        compile: As in ``regularize``.
        scale: As in ``regularize``. Leave out the number of microbatches: ``regularize_stage`` accounts for it.
        own_dropout: As in ``regularize``.
        recipe: As in ``regularize``.
        blocks: As in ``regularize``, for the modules of the whole model.
        **keywords: Regularizers of the whole model by keyword.

    Returns:
        The rewritten stage. Its parameters have the names of the whole model.

    Raises:
        TraceError: The stage or the whole model cannot be traced.
        NoMatchError: A keyword is unknown, or a selector matches nothing in the whole model; or the stage has a value that the whole model
            does not have.
        RegularizerError: An option or a value is not allowed, or a regularizer cannot act in several stages.
        GraphRegError: It is not certain which values of the whole model the stage has.
    """
    if recipe is not None:
        return by_recipe(regularize_stage, locals())
    refuse_keep(keywords, "graphreg.regularize_stage", "a schedule passes on what a stage returns")
    _check(whole, microbatches, scale_grads, names, rng)
    check_compile(compile)
    check_scale(scale)
    with Changes() as changes, changes:
        at_rest(changes)
        traced_whole = whole if isinstance(whole, Traced) else trace(whole, None, front_end)
        # The plan is the whole model's, so that selectors and strengths by depth mean the same in
        # each stage.
        every = [*instances(regularizers), *from_kwargs(traced_whole, **keywords)]
        plan = planned(traced_whole, every, missing, own_dropout, blocks)
        _require_seed(plan, rng)
        # another front end than that of the whole model would name some values differently
        if front_end == "auto" and example_inputs is not None:
            front_end = "export" if traced_whole.front_end == "export" else "symbolic"
        found = named_as_in_whole(trace(stage, example_inputs, front_end), traced_whole, names or {})
        decided = plan_of_stage(plan, traced_whole, found, blocks)

        # the penalties of a step's microbatches add up, and only a schedule with scale_grads
        # divides their gradients
        shared = StageScale(scale, microbatches) if microbatches > 1 and not scale_grads else 1 if scale is None else scale
        module = rewrite(found.traced, decided, rng, "attach", shared)

    # the model's parameters, or those that a splice has learned
    of_parameters = tuple(
        name
        for name in decided.penalties
        if decided.of(name) and ((r := decided.regularizers[name]).on == "parameters" or isinstance(r, Splice))
    )
    rules_of(module).stage_calls = StageCalls(microbatches, scale_grads, of_parameters)
    log_plan(decided, found.traced.notes)
    return compile_if_asked(module, compile)


def _check(whole: object, microbatches: object, scale_grads: object, names: object, rng: object) -> None:
    if not isinstance(whole, (nn.Module, Traced)):
        raise RegularizerError(f"whole={shown(whole)} is not allowed; give the whole model, or what graphreg.trace returned for it.")
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise RegularizerError(f"microbatches={shown(microbatches)} is not allowed; give the schedule's n_microbatches, 1 or more.")
    check_flag("scale_grads", scale_grads)
    is_names = isinstance(names, Mapping) and all(isinstance(k, str) and isinstance(v, str | None) for k, v in names.items())
    if names is not None and not is_names:
        raise RegularizerError(f"names={shown(names)} is not allowed; give a dict from names in the stage to names in the whole model.")
    if rng is not None and (isinstance(rng, bool) or not isinstance(rng, int)):
        raise RegularizerError(f"rng={shown(rng)} is not allowed; give an int, the same for all stages.")


def _require_seed(plan: Plan, rng: int | None) -> None:
    """Raise RegularizerError if something draws and no seed was given: each process would draw a seed of its own."""
    drawing = [name for name, r in plan.regularizers.items() if isinstance(r, Splice) and r.rng is None]
    if rng is None and (drawing or any(edit.draws for edit in plan.native_dropout)):
        raise RegularizerError(
            f"{drawing[0] if drawing else 'own_dropout'} draws, and rng= was not given: each stage would draw a seed by itself. Give all "
            "stages the same number, such as rng=0."
        )
