"""``graphreg.regularize`` runs the whole pipeline: it traces the model, plans the edits, rewrites the graph, and compiles it if asked.

``graphreg.plan`` only makes the plan. ``graphreg.as_pass`` wraps the pipeline as a torch.fx pass.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from graphreg.errors import RegularizerError, TraceError, check_flag, listed, shown, warn
from graphreg.ir.metadata import is_marked
from graphreg.ir.module_record import RULES
from graphreg.ir.selector import Missing, Selector
from graphreg.planning.blocks import check_blocks
from graphreg.planning.kept import Keep, check_keep
from graphreg.planning.keywords import from_keywords, from_kwargs, instances
from graphreg.planning.native_dropout import OwnDropout, log_unmovable, read_option
from graphreg.planning.plan import Plan, check_missing
from graphreg.planning.plan import plan as planned
from graphreg.recipes.arguments import RecipeLike, by_recipe, read_recipe
from graphreg.regularizer.base import Regularizer
from graphreg.rewriting.instantiate import check_rng
from graphreg.rewriting.rewrite import rewrite
from graphreg.runtime.attach import Penalties, Scale, check_penalties, check_scale
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.rewritten_module import OTHER_METHODS, RewrittenModule
from graphreg.session.hosts import backend_host, graphs_of, record_of, rules_of
from graphreg.torch_internals.interpreter import at_rest
from graphreg.torch_internals.patching import Changes
from graphreg.tracing.dynamo_graphs import CapturedGraphs
from graphreg.tracing.trace import NOT_ASSIGNED, FrontEnd, Traced, check_traceable, trace
from graphreg.verification.copies import copied_model
from graphreg.verification.verify import validate

log = logging.getLogger("graphreg")
M = TypeVar("M", bound=nn.Module)


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
    recipe: RecipeLike | None = None,
    blocks: Selector | None = None,
    prove: bool = True,
    keep: Keep | None = None,
    **keywords: Any,
) -> RewrittenModule:
    """Trace a model, and return a module that runs the traced graph with regularizers at the sites that they select.

    The result is a GraphModule that returns ``(output, penalties)``. With ``penalties="attach"``, it returns the output alone, and with
    ``keep=``, ``(output, penalties, values)``. The model itself stays unchanged and shares its layers with the result.

    Args:
        model: The model to regularize.
        *regularizers: Regularizers, or sequences of them.
        example_inputs: The arguments of one call of the model: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        rng: A seed or a generator for the noise. If it is None, the seed is drawn from torch's generator.
        front_end: ``"symbolic"`` traces the model with torch.fx, ``"export"`` with torch.export. ``"auto"`` tries torch.fx first, and then
            torch.export.
        missing: What to do when a selector matches nothing: ``"error"``, ``"warn"`` or ``"ignore"``.
        penalties: ``"return"`` returns the penalties together with the output. ``"attach"`` returns the output alone. If this output
            has a ``loss``, the penalties are added to the loss. Otherwise, the gradients of the penalties are added in the backward pass.
        compile: True, or a dict of options for torch.compile.
        scale: With ``penalties="attach"``, the factor by which your training code multiplies the loss: a number, a 0-d tensor, a
            GradScaler, or a function without arguments that returns the factor. If the output has a ``loss``, it contains
            the penalties, so your code multiplies them, too, and needs no ``scale``. A number given there multiplies the penalties once
            more, as is needed if the loss is a mean over all accumulated items.
        own_dropout: What to do with native dropout, which is the dropout, stochastic depth and attention dropout that the model
            itself contains. ``"keep"`` leaves it unchanged, ``"seeded"`` draws it from graphreg's streams, ``"off"`` turns it off,
            and a rate in [0, 1) sets its rate and draws it from graphreg's streams. A dict maps selectors to these values. If several
            selectors match one dropout, the last one counts. ``*`` matches dropouts at every depth, and ``!`` excludes dropouts. A rate
            may be a schedule. ``set_strength(module, "own_dropout", ...)`` can change such a rate, but not a rate without a schedule. For
            a model without dropout, any value but ``"keep"`` is an error.
        verify: Whether to compare the result with the model on the example inputs, as ``graphreg.verify`` does.
        recipe: The dict that ``graphreg.recipe`` returned, or the path of a recipe's file. The recipe's regularizers come before those of
            the call, and the recipe's strengths are set. An option of the recipe counts only if the call leaves that option at its
            default. A keyword of the call replaces the recipe's regularizers of that name.
        blocks: A selector of modules, such as ``"layers.*"``. The result calls these modules, each with an emitted forward of its own,
            so that FSDP2, activation checkpointing, regional compilation and hooks can act on them.
        prove: Whether to use the graph only after it gave the model's own result: on ``example_inputs``, in both modes, or else at the
            first eager call in each mode. This takes two forwards a mode. ``front_end="auto"`` tries the next front end if it did not.
        keep: A selector of values that a call returns, too, with gradients: it then returns ``Kept(output, penalties, values)``, where
            ``values`` is a dict by the names that the selector found. A value is kept as the model reads it, behind splices. In a dict of
            selectors, ``"clean"`` keeps the value before the splices at its site, and ``"spliced"`` the value behind them; if several
            selectors find one name, the last one counts. The calls of a recurrent cell are stacked to one sequence.
        **keywords: Regularizers by keyword, such as ``hidden_dropout=0.1`` and ``weight_l2=0.1``.

    Returns:
        The rewritten module.

    Raises:
        TraceError: The model cannot be traced, or its graph does not give its result.
        NoMatchError: A keyword is unknown, or a selector matches nothing.
        RegularizerError: An option or a value is not allowed.
        GraphRegError: ``verify=True`` found a difference.
    """
    if recipe is not None:
        # ``locals()`` are the arguments and nothing else, as long as no variable is set before.
        return by_recipe(regularize, locals())

    # A wrong option is refused before the trace, which may take minutes.
    check_compile(compile)
    _check_scaled(penalties, scale)
    check_keep(keep, penalties)
    before = model_before(model, example_inputs, verify)
    with Changes() as changes, changes:
        # Graphs are many objects and little garbage, in which Python's collector searches in vain.
        at_rest(changes)
        traced = trace(model, example_inputs, front_end, prove)
        decided = planned(traced, [*instances(regularizers), *from_kwargs(traced, **keywords)], missing, own_dropout, blocks, keep=keep)
        module = rewrite(traced, decided, rng, penalties, scale)
    if before is not None:
        validate(before, model, module, example_inputs)
    log_plan(decided, record_of(module).notes)
    warn_of_scale(module, penalties, scale)
    return compile_if_asked(module, compile)


def plan(
    traced: Traced | CapturedGraphs | nn.Module,
    regularizers: Regularizer | Iterable[Regularizer] = (),
    missing: Missing = "error",
    own_dropout: OwnDropout = "keep",
    blocks: Selector | None = None,
    recipe: RecipeLike | None = None,
    keep: Keep | None = None,
) -> Plan:
    """Decide which regularizer acts at which sites, without changing anything.

    The function warns if splices of one kind act several times in a row on one value. It also warns if a selector would match values inside
    modules that are opaque because they checkpoint activations.

    Args:
        traced: The result of ``graphreg.trace``; or what ``torch.compile`` made of a model with a backend of graphreg's, or this backend:
            then, the plan is for the graphs that were captured so far, and without regularizers it is the plan of the backend's own.
        regularizers: A regularizer, or a sequence of them.
        missing: What to do when a string of a selector matches nothing: ``"error"``, ``"warn"`` or ``"ignore"``.
        own_dropout: What to do with native dropout, as in ``regularize``.
        blocks: A selector of modules that the rewritten module calls, as in ``regularize``.
        recipe: A recipe, as in ``regularize``. The plan uses only the recipe's regularizers, and the recipe's values of ``missing``,
            ``own_dropout``, ``blocks`` and ``keep``.
        keep: A selector of values that a call of the rewritten module returns, as in ``regularize``.

    Raises:
        NoMatchError: A string of a selector matches nothing, or a selector does not match as many sites as ``expect`` says.
        RegularizerError: An object in ``regularizers`` is not a regularizer, or a penalty selects only frozen parameters.
    """
    captured = backend_host(traced)
    sites: Any = captured.traced() if captured is not None else traced
    given: dict[str, Any] = {"missing": missing, "own_dropout": own_dropout, "blocks": blocks, "keep": keep}
    every: Regularizer | Iterable[Regularizer] = regularizers
    if recipe is not None:
        asked = read_recipe(recipe)
        # Of the recipe's options, those count that the call has left at their defaults.
        given = asked.options_for(plan, given)
        every = [*asked.regularizers, *instances(regularizers), *from_kwargs(sites, **asked.keywords)]
    if captured is None:
        return planned(sites, every, **given)
    if given.pop("blocks") is not None:
        raise RegularizerError("blocks= is for graphs of a whole model, and torch.compile captures a model in parts.")
    if given.pop("keep") is not None:
        raise RegularizerError("keep= is for what graphreg.regularize makes: a model with a backend returns what the model returns.")
    return captured.planned(instances(every), **given)


def check_compile(compile: object) -> None:
    if not isinstance(compile, (bool, Mapping)):
        raise RegularizerError(f"compile={shown(compile)} is not allowed; give True, False or a dict of torch.compile options.")
    known = inspect.signature(torch.compile).parameters.keys() - {"model"}
    if unknown := [name for name in compile if name not in known] if isinstance(compile, Mapping) else []:
        raise RegularizerError(f"compile={shown(compile)}: torch.compile has no option {unknown[0]!r}; it has {listed(sorted(known), 8)}.")


def compile_if_asked(module: M, compile: bool | Mapping[str, Any]) -> M:
    """Call ``module.compile`` with the options of ``compile=``, unless that is False, and return the module.

    torch then compiles the module at its first call.
    """
    if compile is not False:
        # A graph break is then an error, not a slower module.
        module.compile(**{"fullgraph": True, **(compile if isinstance(compile, Mapping) else {})})
    return module


def model_before(model: nn.Module, example_inputs: Any, verify: bool) -> nn.Module | None:
    """Return a copy of the model, made before the trace, with which ``verify`` compares the result; None if ``verify`` is False."""
    check_flag("verify", verify)
    if not verify:
        return None
    if example_inputs is None:
        raise RegularizerError("verify=True runs the model, so it needs example_inputs: a tensor, a tuple or a dict.")
    check_traceable(model)
    return copied_model(model)


def check_options(rng: Any, missing: Missing, penalties: Penalties, scale: Scale | None, blocks: Selector | None = None) -> None:
    """Raise RegularizerError for the options that ``regularize`` would refuse. This check does not trace a model."""
    _check_scaled(penalties, scale)
    check_missing(missing)
    check_penalties(penalties)
    check_scale(scale)
    check_rng(rng)
    if blocks is not None:
        check_blocks(blocks)


def _check_scaled(penalties: Penalties, scale: Scale | None) -> None:
    if scale is not None and penalties != "attach":
        raise RegularizerError("scale= is for penalties='attach'; returned penalties are scaled with the loss they are added to.")


def log_notes(notes: Iterable[str]) -> None:
    """Log those notes on a trace that say what the graph leaves out."""
    for note in notes:
        if note.startswith((NOT_ASSIGNED, OTHER_METHODS)):
            log.info(note)


def log_plan(decided: Plan, notes: Iterable[str]) -> None:
    """Log what a plan does. ``notes``: those on the trace."""
    log_notes(notes)
    for name, regularizer in decided.regularizers.items():
        count = len(decided.of(name))
        what = "site" if count == 1 else "sites"
        kind, weight = type(regularizer).__name__, f"{regularizer.weight:g}"
        log.info("%s %s %r: %d %s (%s)", weight, kind, regularizer.pattern, count, what, name)
    for name, note in decided.faint.items():
        log.warning("%s is %s", name, note)
    for name, note in decided.cautions.items():
        log.warning("%s: %s", name, note)
    for line in (*decided.beside_native, *decided.harms()):
        log.warning("%s", line)
    if decided.native_dropout:
        log.info("native dropout: %d %s", len(decided.native_dropout), ", ".join(sorted({edit.action for edit in decided.native_dropout})))
    log_unmovable(decided.unmovable)
    if decided.kept:
        log.info("kept: %d %s", len(decided.kept), ", ".join(each.name for each in decided.kept))


def warn_of_scale(module: RewrittenModule, penalties: Penalties, scale: Scale | None) -> None:
    if penalties != "attach" or scale is not None:
        return

    in_train = next(iter(graphs_of(module).values()))
    # The third argument says whether the penalties are added to a loss, and scaled with it.
    joins = [n for n in in_train.nodes if n.op == "call_module" and n.target == f"{RULES}.attach" and not n.args[2]]
    if joins:
        warn(
            "penalties='attach': the model returns no loss, so graphreg cannot know how the loss is scaled (by a GradScaler, or for "
            "gradient accumulation); the penalties' gradients get the scale 1. Pass scale=1 if that is right, else the scaler or factor."
        )


def as_pass(
    *regularizers: Regularizer | Iterable[Regularizer],
    example_inputs: Any = None,
    rng: int | torch.Generator | None = None,
    missing: Missing = "error",
    penalties: Penalties = "return",
    scale: Scale | None = None,
    own_dropout: OwnDropout = "keep",
    blocks: Selector | None = None,
    keep: Keep | None = None,
    **keywords: Any,
) -> PassBase:
    """Return ``regularize`` as a torch.fx pass, to run alone or within a PassManager.

    The pass takes a GraphModule and returns ``PassResult(graph_module, modified)``, where ``graph_module`` is the module that
    ``regularize`` makes. The GraphModule that the pass takes stays unchanged. If the pass adds nothing, it returns that GraphModule, and
    ``modified`` is False. A second run of the same pass adds nothing. With ``penalties="attach"``, a pass whose regularizers match no
    site adds nothing, either. Each added node is marked in ``node.meta["graphreg"]``.

    The arguments are those of ``regularize``, without ``compile``, ``front_end``, ``recipe`` and ``verify``. To compile, compile the module
    that the last pass returns.

    Raises:
        RegularizerError: An option or a value is not allowed.
        NoMatchError: A keyword is unknown. If a selector matches nothing, the pass raises this error when it runs, and this function does
            not. Within a PassManager, the error is then the cause of the Exception that the PassManager raises.
    """
    # They would otherwise be refused as regularizers that nobody knows.
    if "compile" in keywords or "front_end" in keywords:
        what = "compile" if "compile" in keywords else "front_end"
        cure = "compile what the last pass gives: module.compile(fullgraph=True)" if what == "compile" else "a pass does not trace"
        raise RegularizerError(f"{what}= is no option of a pass; {cure}.")
    check_options(rng, missing, penalties, scale, blocks)
    check_keep(keep, penalties)
    # A tuple, because an iterator could be read only once, and the pass may run again.
    flat = tuple(instances(regularizers))
    from_keywords(keywords)  # raises for a keyword that is not allowed
    options = {"example_inputs": example_inputs, "rng": rng, "missing": missing, "penalties": penalties, "scale": scale}
    options |= {"own_dropout": read_option(own_dropout), "blocks": blocks, "keep": keep}
    return Regularize(flat, options, keywords)


@dataclass(frozen=True, eq=False)
class Regularize(PassBase):
    """The torch.fx pass that ``as_pass`` returns.

    The pass stores ``mark`` in each module that it makes. If the pass gets a module with this mark, it returns that module unchanged.
    """

    regularizers: tuple[Regularizer, ...]
    options: Mapping[str, Any]
    keywords: Mapping[str, Any]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex, init=False, repr=False)

    def requires(self, graph_module: nn.Module) -> None:
        """Raise TraceError unless ``graph_module`` is a torch.fx.GraphModule."""
        if not isinstance(graph_module, fx.GraphModule):
            raise TraceError(
                f"a pass takes a torch.fx.GraphModule, not {type(graph_module).__name__}. Give it torch.fx.symbolic_trace(model), "
                "or use graphreg.regularize(model), which traces both modes."
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        if getattr(graph_module, RULES, None) is not None and rules_of(graph_module).made_by == self.mark:
            return PassResult(graph_module, False)  # PassManager(steps=n) repeats its passes until no pass changes anything
        module = regularize(graph_module, self.regularizers, **self.options, **self.keywords)

        # A graph that returns penalties is another one, even if no node of it is added.
        graphs = graphs_of(module).values()
        if not any(isinstance(graph.output_node().args[0], (Regularized, Kept)) or any(map(is_marked, graph.nodes)) for graph in graphs):
            return PassResult(graph_module, False)

        rules_of(module).made_by = self.mark
        return PassResult(module, True)
