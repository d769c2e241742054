"""Runs the commands: ``names``, ``plan``, ``report``, ``diff``, ``draw``, ``groups`` and ``audit`` on a model, ``doctor`` also on torch.

``graphreg.report``, ``diff`` and ``draw`` are imported on first use, so a command imports only what
it calls.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import graphreg
from graphreg.cli.errors import UsageError, raised
from graphreg.cli.keywords import check_option_texts, keyword_of, own_dropout, regularizers
from graphreg.cli.load import example_inputs, json_object, load
from graphreg.diagnosis.front_ends import try_front_ends
from graphreg.errors import GraphRegError
from graphreg.ir.site import Names
from graphreg.optimizers.param_groups import ParamGroups
from graphreg.planning.native_dropout import OwnDropout
from graphreg.recipes.arguments import read_recipe
from graphreg.recipes.asked_groups import FROZEN, AskedGroups
from graphreg.recipes.files import write
from graphreg.recipes.recipe import Recipe
from graphreg.tracing.listing import names, trace_to_show
from graphreg.tracing.proof.proof import MODEL_RAISES
from graphreg.tracing.trace import Traced
from graphreg.verification.copies import copied_model
from graphreg.verification.verify import validate


@dataclass(frozen=True)
class Drawn:
    """The result of ``graphreg draw``: the title of the model and the path of the file."""

    title: str
    path: Path

    def __str__(self) -> str:
        return f"{self.title} is drawn in {self.path}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data for ``--json``."""
        return {"title": self.title, "path": str(self.path)}


def run(args: Namespace) -> Any:
    """Run a command other than ``demo`` and ``completion``. Return the result; it prints as text and has ``to_dict()``."""
    if args.command == "doctor":
        if args.torch == (args.model is not None):
            raise UsageError("give doctor a model, or --torch: graphreg doctor models.py:make --input 2x3x32x32.")
        return graphreg.doctor() if args.torch else try_front_ends(*_model_and_inputs(args))
    if args.command == "names":
        return _names(args)
    if args.command == "groups":
        return _groups(args)
    if args.command == "audit":
        return graphreg.audit(_traced(args, *_model_and_inputs(args)))
    return _drawn(args) if args.command == "draw" else _regularized(args)


def _model_and_inputs(args: Namespace) -> tuple[nn.Module, Any]:
    return load(args.model, args.kwargs), example_inputs(args.input, args.inputs)


def _traced(args: Namespace, model: nn.Module, inputs: Any) -> Traced:
    inputs_text = f" with {' '.join(args.input or [args.inputs])}" if inputs is not None else ""
    try:
        traced = trace_to_show(model, inputs, args.front_end)
    except GraphRegError:
        raise
    except Exception as error:  # the model's own error, of any kind
        file = getattr(sys.modules.get(type(model).__module__), "__file__", None)
        raise UsageError(f"{args.model} cannot run{inputs_text}: {raised(error, file)}") from error
    reasons = list(traced.unproved.values())
    # an error that shapes do not show: a dtype, or an id beyond an embedding
    if reasons and all(reason.startswith(MODEL_RAISES) for reason in reasons):
        raise UsageError(f"{args.model} cannot run{inputs_text}: {reasons[0].removeprefix(MODEL_RAISES)}")
    return traced


def _names(args: Namespace) -> Names:
    if args.on is not None and not args.select:
        raise UsageError("--on limits what --select can select; give --select, too.")
    traced = _traced(args, *_model_and_inputs(args))
    return names(traced, select=args.select, on=args.on, all=args.all, source=args.source)


def _groups(args: Namespace) -> ParamGroups:
    selectors: dict[str, Any] = {}
    for text in args.group:
        selector, equals, options = text.rpartition("=")
        if not equals or not selector:
            usage = "write --group 'head.*={\"lr\": 0.01}' or --group 'embed.*=frozen'"
            raise UsageError(f"--group {text!r} is no SELECTOR=OPTIONS; {usage}.")
        selectors[selector] = options if options == FROZEN else json_object(f"--group {selector}", options, '{"lr": 0.01}')
    asked = AskedGroups.of_plain({
        "selectors": selectors, "default": json_object("--default", args.default, '{"lr": 0.001}'), "decay": args.decay,
    })  # fmt: skip
    model = load(args.model, args.kwargs)
    groups = graphreg.param_groups(model, asked.selectors, default=asked.default, decay=asked.decay, recipe=args.recipe)
    if args.save is not None:
        write(args.save, groups.recipe())
    return groups


@dataclass(frozen=True)
class Given:
    """What the command line says about regularizers.

    Attributes:
        native_dropout: The value of ``--own-dropout``, as ``regularize`` takes it.
        recipe: The recipe, without the regularizers that options replace; None if there is none.
        nothing: Whether there is no recipe, and no option gives a regularizer or changes native
            dropout.
    """

    native_dropout: OwnDropout
    recipe: Recipe | None
    nothing: bool

    @classmethod
    def of(cls, args: Namespace) -> Given:
        """Read the options, and check them before the model is loaded."""
        check_option_texts(args.keywords, args.known, args.command)
        native_dropout = own_dropout(args.own_dropout)
        recipe = read_recipe(args.recipe).without([keyword_of(option) for option, _ in args.keywords]) if args.recipe else None
        return cls(native_dropout, recipe, recipe is None and not args.keywords and not args.keep and native_dropout == "keep")

    def option(self, name: str, given: Any, default: Any) -> Any:
        """Return the value of an option: the given one, or the recipe's, if the given one is the default and the recipe has the option."""
        return self.recipe.options.get(name, given) if self.recipe is not None and given == default else given


def _planned(args: Namespace, given: Given, model: nn.Module, inputs: Any) -> tuple[Traced, graphreg.Plan]:
    # Stored in ``args``, from which --save writes it into the new recipe.
    args.front_end = given.option("front_end", args.front_end, "auto")
    traced = _traced(args, model, inputs)
    every = regularizers(traced, args.keywords)
    return traced, graphreg.plan(traced, every, args.missing, given.native_dropout, recipe=given.recipe, keep=args.keep)


def _regularized(args: Namespace) -> Any:
    given = Given.of(args)
    if given.nothing:
        raise UsageError(f"no regularizer is given; write e.g. graphreg {args.command} {args.model} --hidden-dropout 0.1.")
    model, inputs = _model_and_inputs(args)
    if args.command == "plan":
        plan = _planned(args, given, model, inputs)[1]
        if args.save is not None:
            # Without --recipe, an empty recipe: the file then says what the plan has.
            asked = given.recipe or read_recipe({})
            write(args.save, asked.of_plan(plan, rng=args.rng, front_end=args.front_end))
        return plan
    if args.verify and inputs is None:
        raise UsageError("--verify runs the model, so it needs --input or --inputs.")

    # Copied before the trace, so that ``validate`` also sees what the trace has changed.
    before = copied_model(model) if args.verify else None
    traced, plan = _planned(args, given, model, inputs)
    module = graphreg.rewrite(traced, plan, given.option("rng", args.rng, None))
    if given.recipe is not None:
        given.recipe.set_strengths(module)
    if before is not None:
        validate(before, model, module, inputs)
    return graphreg.report(module) if args.command == "report" else graphreg.diff(module)


def _drawn(args: Namespace) -> Drawn:
    given = Given.of(args)
    traced, plan = _planned(args, given, *_model_and_inputs(args))
    applied = None if given.nothing else plan
    other = None if args.against is None else graphreg.plan(traced, (), args.missing, recipe=read_recipe(args.against))
    path = graphreg.draw(traced, args.path, plan=applied, level=args.level, mode=args.mode, against=other, values=args.values)
    return Drawn(plan.title, path)
