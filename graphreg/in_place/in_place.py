"""``graphreg.regularize_`` and ``graphreg.strip_``: regularize a model in place, and undo it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from graphreg.errors import GraphRegError, RegularizerError, TraceError, check_flag
from graphreg.in_place.placed import Placed
from graphreg.in_place.placed_class import generated_class, strip
from graphreg.in_place.shared_session import SharedSession
from graphreg.in_place.structure import InPlaceOptions, bare, owner_refused
from graphreg.ir.module_record import ORIGINAL, PLACED
from graphreg.ir.selector import Missing, Selector
from graphreg.pipeline import check_compile, check_options, compile_if_asked, model_before
from graphreg.planning.kept import refuse_keep
from graphreg.planning.keywords import from_keywords, instances
from graphreg.planning.matching import matching_sites
from graphreg.planning.native_dropout import OwnDropout, read_option
from graphreg.planning.plan import named_once
from graphreg.recipes.arguments import RecipeLike, by_recipe
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.rewriting.instantiate import device_of, seed
from graphreg.runtime.attach import Penalties, Scale
from graphreg.session.streams import GrowingStreams
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.versions import warn_if_untested
from graphreg.tracing.fake_inputs import arguments
from graphreg.tracing.trace import FrontEnd, Traced, check_traceable
from graphreg.verification.verify import validate

M = TypeVar("M", bound=nn.Module)


def regularize_(
    model: M,
    *regularizers: Regularizer | Iterable[Regularizer],
    example_inputs: Any = None,
    rng: int | torch.Generator | None = None,
    front_end: FrontEnd = "auto",
    missing: Missing = "error",
    penalties: Penalties = "attach",
    compile: bool | Mapping[str, Any] = False,
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    verify: bool = False,
    eval_penalties: bool = False,
    recipe: RecipeLike | None = None,
    blocks: Selector | None = None,
    prove: bool = True,
    **keywords: Any,
) -> M:
    """Regularize a model in place, and return the same object. Its methods, parameters and ``state_dict`` stay the same.

    The model's class becomes a generated subclass of its own class, with the same name, so that ``isinstance`` still holds.

    In train mode, a call runs the graph that ``regularize`` would make. In eval mode, a call runs the model's own forward.

    The first call in train mode traces the model. A later call traces the model again if its arguments have another structure (an
    optional argument is added or left out, a tensor has another dtype or number of dimensions, or an argument that is no tensor has
    another value), or if the model has changed (a layer is replaced, or a configuration value is set). All graphs share the noise and the
    strengths. If the model cannot be traced, the call raises; no call in train mode runs the plain forward.

    ``graphreg.strip_`` restores the model. A copy or pickle of the model is regularized, too, and has its own strengths and noise.

    Args:
        model: The model to regularize.
        *regularizers: Regularizers, or sequences of them.
        example_inputs: Arguments of one call, as in ``regularize``. If they are given, ``regularize_`` traces the model for them at once.
        rng: As in ``regularize``.
        front_end: As in ``regularize``.
        missing: As in ``regularize``, for the graph of each structure of arguments.
        penalties: ``"attach"`` adds the penalties to the loss in the output. If the output has no loss, the backward pass adds their
            gradients. So a training loop needs no change. ``"return"`` makes a call in train mode return ``(output, penalties)``.
        compile: As in ``regularize``.
        scale: As in ``regularize``.
        own_dropout: As in ``regularize``.
        verify: As in ``regularize``; it needs ``example_inputs``.
        eval_penalties: Run the graph in eval mode, too, so that a call in eval mode also has penalties.
        recipe: As in ``regularize``.
        blocks: A selector of modules, such as ``"layers.*"``. In train mode the graphs call these modules of the model, so that FSDP2,
            activation checkpointing, ``module.compile()`` and hooks act on the calls. The modules then run code that graphreg generates.
        prove: Whether to use a graph only after it gave the model's own result on the arguments of the call that it was traced for. This
            takes two forwards for each structure of arguments.
        **keywords: Regularizers by keyword, as in ``regularize``.

    Returns:
        The model.

    Raises:
        TraceError: The model cannot be regularized in place, or cannot be traced.
        NoMatchError: A keyword is unknown, or a selector matches nothing.
        RegularizerError: An option or a value is not allowed.
        GraphRegError: ``verify=True`` found a difference.
    """
    if recipe is not None:
        return cast("M", by_recipe(regularize_, locals()))
    warn_if_untested()
    refuse_keep(keywords, "graphreg.regularize_", "in eval mode, the model's own forward runs, which returns no values")
    check_compile(compile)
    check_options(rng, missing, penalties, scale, blocks)
    own_dropout = read_option(own_dropout)
    check_flag("eval_penalties", eval_penalties)
    check_flag("prove", prove)
    _check_model(model, penalties)
    named, seeds = _seeded(named_once([*instances(regularizers), *from_keywords(keywords)]), rng)
    _check_splices(named, eval_penalties)
    # ``verify`` compares with the model as it is before it gets another class.
    before = model_before(model, example_inputs, verify)
    options = InPlaceOptions(named, front_end, missing, penalties, scale, own_dropout, eval_penalties, blocks, prove)
    session = SharedSession(named, GrowingStreams(seeds, device_of(model)), own_dropout)
    _make_states(session, model, missing)
    placed = Placed(options, session)
    _install(model, placed, example_inputs, before)
    return compile_if_asked(model, compile)


def _install(model: nn.Module, placed: Placed, example_inputs: Any, before: nn.Module | None) -> None:
    """Give the model its generated class and its ``Placed`` object, and trace the model for the example inputs if there are any.

    If a step fails, the model gets its own class back. ``before``: a copy of the model to compare the graph with; None for no comparison.
    """
    with Changes() as changes, changes:
        changes.if_raised(partial(strip, model))
        object.__setattr__(model, "__class__", generated_class(model, type(model)))
        model.__dict__[PLACED] = placed
        if (call := arguments(example_inputs)) is not None:
            placed.trace_example(model, *call)
            if before is not None:
                with bare(model):
                    validate(before, model, placed.current(), example_inputs)


def strip_(model: M) -> M:
    """Undo ``regularize_``: the model gets its own class back, and loses all that graphreg added. Its parameters do not change.

    Args:
        model: The model that ``regularize_`` returned, without a wrapper around it.

    Returns:
        The model.

    Raises:
        GraphRegError: The model is not regularized in place, or another library has changed its class since ``regularize_``.
    """
    if not isinstance(model, nn.Module) or PLACED not in vars(model):
        raise GraphRegError(
            f"{type(model).__name__} is not regularized in place. Give strip_ the model that graphreg.regularize_ returned, without a "
            "wrapper; graphreg.strip is for what graphreg.regularize returned."
        )
    if ORIGINAL not in vars(type(model)):
        raise GraphRegError(
            f"another library has changed the class of this model to {type(model).__name__} since it was regularized. Undo that first."
        )
    strip(model)
    return model


def _check_model(model: nn.Module, penalties: Penalties) -> None:
    if not isinstance(model, nn.Module) or PLACED in vars(model):
        check_traceable(model)  # always raises here
    with bare(model):
        check_traceable(model)
    # By its name, because PEFT need not be installed.
    if any(kind.__name__ == "PeftModel" for kind in type(model).__mro__):
        raise TraceError(
            f"{type(model).__name__} passes its calls on to the model inside it. Regularize the inner model, with the adapters in it: "
            "graphreg.regularize_(model.base_model.model, ...)."
        )
    if isinstance(model, fx.GraphModule):
        raise TraceError(
            f"{type(model).__name__.removesuffix('Impl')} is a torch.fx.GraphModule, which has a graph already, and torch.fx would "
            "replace the new forward whenever the graph is recompiled. Use graphreg.regularize, or graphreg.as_pass."
        )
    if "forward" in vars(model):
        raise TraceError(
            f"the forward of this {type(model).__name__} was replaced on the object (by accelerate's prepare, or by hand), but regularize_ "
            "traces the forward of the class. Regularize first, prepare after. If the class has no forward, define it there."
        )
    if penalties == "attach" and hasattr(model, "penalties"):
        raise TraceError(
            f"{type(model).__name__} has something called 'penalties', but with penalties='attach', model.penalties() must return the last "
            "values. Rename it in the model, or give penalties='return'."
        )


def _check_splices(regularizers: Mapping[str, Regularizer], eval_penalties: bool) -> None:
    """Raise RegularizerError for a splice that keeps a state.

    Also raise RegularizerError for a splice that has ``in_eval``, unless ``eval_penalties`` makes the model run the graph in eval mode.
    """
    for name, regularizer in regularizers.items():
        if isinstance(regularizer, Splice) and "state" in regularizer.takes:
            raise owner_refused(name, regularizer)
        if isinstance(regularizer, Splice) and regularizer.takes_in_eval and not eval_penalties:
            raise RegularizerError(
                f"{name}: {type(regularizer).__name__} acts in eval mode, too, but in eval mode a model that is regularized in place runs "
                "its own forward. Give eval_penalties=True, so that it runs the graph in both modes, or use graphreg.regularize."
            )


def _make_states(session: SharedSession, model: nn.Module, missing: Missing) -> None:
    """Make the states of penalties from the present parameters of the model.

    Otherwise the first call would make the states, from the values that the parameters have then.
    """
    traced = Traced.untraced(model)
    for state in session.states.values():
        for site in matching_sites(traced, state.regularizer, missing) if state.regularizer.on == "parameters" else ():
            state.place(site.name, model.get_parameter(site.name))
        if state.owns_parameters:
            raise owner_refused(state.name, state.regularizer)
    session.follow(model)


def _seeded(regularizers: Mapping[str, Regularizer], rng: Any) -> tuple[dict[str, Regularizer], dict[str, int]]:
    """Return the regularizers with seeds in place of generators, and a dict of seeds.

    In the dict, the value for the key ``""`` is the model's seed. For each splice that has an ``rng`` of its own, there is a key with its
    name; the value is the seed made from that ``rng``.
    """
    seeds, named = {"": seed(rng)}, dict[str, Regularizer]()
    for name, regularizer in regularizers.items():
        named[name] = regularizer
        if isinstance(regularizer, Splice) and regularizer.rng is not None:
            seeds[name] = seed(regularizer.rng)
            named[name] = dataclasses.replace(regularizer, rng=seeds[name])
    return named, seeds
