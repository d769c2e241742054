"""``check_regularizer``: checks the properties that every regularizer must have. Call it in the tests of your own regularizer."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, first_line, listed, shown
from graphreg.ir.module_record import RULES
from graphreg.ir.selector import Selector
from graphreg.ir.site import shape_text
from graphreg.pipeline import plan, regularize
from graphreg.recipes.recipe import recipe
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.regularizer.options import option_names, required, strength_names
from graphreg.rewriting.strip import without_additions
from graphreg.runtime.owned_state import states_in
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.controls import noise_off, rng_state, set_rng_state, set_strength, strengths
from graphreg.testing.models import Example, examples
from graphreg.torch_internals import pytree
from graphreg.tracing.fake_inputs import arguments
from graphreg.tracing.trace import trace
from graphreg.verification.verify import verify

STEP = 1e-6  # the step of the finite difference that is compared with a gradient
DRAWS = 50  # a splice must change the output in at least one of this many calls


def check_regularizer(
    cls: type[Regularizer],
    pattern: Selector = "*",
    weight: float | None = None,
    *,
    strength: float | None = None,
    model: nn.Module | None = None,
    inputs: Any = None,
    wrong: Mapping[str, Sequence[Any]] | None = None,
    backend: str | None = "aot_eager",
    gradients: bool = True,
    **options: Any,
) -> None:
    """Check a class of regularizers on a small model, which stays unchanged. These properties are checked:

    - The regularizer acts in train mode: a splice changes the output; a penalty is finite, and has a gradient that is not 0 everywhere.
    - Two runs from the same state of the noise have the same results, and no run draws from a global random generator.
    - The module compiled with ``fullgraph=True`` has the outputs, penalties and gradients of eager mode, in train mode and in eval mode.
    - Gradients agree with finite differences, in float64.
    - At strength 0, the penalty and its gradient are 0, and a splice changes nothing, unless its class has ``off_at_zero = False``.
    - The model is not changed: ``graphreg.verify`` accepts the module, and the result of ``graphreg.strip`` has the model's outputs.
    - A copy of the module, and a module made from the module's recipe, have the module's results.
    - Wrong options raise RegularizerError, with the names of the class and of the option.
    - For an option that is annotated ``ModelInput`` and has the default None: the formula works without the input.

    Args:
        cls: The class, a subclass of ``Splice`` or ``Penalty``.
        pattern: The selector of the sites to act on.
        weight: The strength; None for 0.5.
        strength: Another name of ``weight``.
        model: A model that the regularizer can act on; None for the first of ``graphreg.testing.examples()`` that it can act on.
        inputs: The arguments of a call of the model, as ``example_inputs`` of ``graphreg.regularize``.
        wrong: A dict. Each key is the name of an option; the value is a list of values of this option that the class must refuse.
        backend: The backend of torch.compile; None to leave out the check of compiled code.
        gradients: Whether to compare gradients with finite differences. Give False for a formula whose gradient is not its derivative,
            such as a straight-through estimator.
        **options: Further options of the class. An option that is annotated ``ModelInput`` names an input of the model; one of
            ``graphreg.testing.examples()`` has the inputs ``x``, ``mask``, ``lengths`` and ``labels``.

    Raises:
        AssertionError: The regularizer lacks a property; the message says which.
        RegularizerError: An argument of this function is not allowed, the regularizer can act on none of the examples, or graphreg refuses
            the class.
    """
    if not isinstance(cls, type) or not issubclass(cls, Regularizer):
        raise RegularizerError(f"check_regularizer takes a class of regularizers, not {shown(cls)}. Give a subclass of Splice or Penalty.")
    if (model is None) != (inputs is None):
        raise RegularizerError("check_regularizer takes model and inputs together. Give both, or neither.")

    if strength is not None and weight is not None:
        raise RegularizerError(f"check_regularizer: strength={strength} and weight={weight} are two names of one option. Give one of them.")
    weight = next(each for each in (strength, weight, 0.5) if each is not None)

    check_refusals(cls, pattern, weight, wrong or {}, options)
    regularizer: Any = cls(pattern, weight, **options)
    example = _example(regularizer) if model is None else Example(model, inputs)
    subject = Subject(cls.__name__, regularizer, example)
    try:
        # The first check to run the formula, whose own errors get a note on the shapes.
        check_action(subject)
    except (GraphRegError, AssertionError):
        raise
    except Exception as error:  # of the formula
        error.add_note(_where(subject))
        raise

    check_purity(subject)
    check_zero(subject)
    check_inputs(subject)
    check_model(subject)
    check_copies(subject)
    if gradients:
        check_gradients(subject)
    if backend is not None:
        check_compiled(subject, backend)


def _where(subject: Subject) -> str:
    """Say on which model a regularizer is checked, and on values or parameters of which shapes it acts there."""
    model, inputs = subject.example.model, subject.example.inputs
    sites = [edit.site for edit in plan(trace(copy.deepcopy(model), inputs), subject.regularizer).edits]
    shapes = listed([f"{site.name} ({shape_text(site)})" for site in sites])
    return (
        f"check_regularizer ran {subject.name} on {type(model).__name__}, where it acts at {shapes}. If the formula takes no such shapes, "
        "give check_regularizer another pattern, or model= and inputs=."
    )


def _example(regularizer: Regularizer) -> Example:
    refusals = []
    for example in examples():
        try:
            if plan(trace(copy.deepcopy(example.model), example.inputs), regularizer).edits:
                return example
        except GraphRegError as error:
            refusals.append(first_line(error))
    raise RegularizerError(
        f"{type(regularizer).__name__} can act on none of the models of graphreg.testing. Give check_regularizer model= and inputs=. "
        f"The last model was refused, because {refusals[-1] if refusals else 'nothing is selected'}"
    )


@dataclass(frozen=True)
class Subject:
    """The subject of a check: a regularizer, the name of its class, and the model to act on."""

    name: str
    regularizer: Any
    example: Example

    def made(self, dtype: torch.dtype | None = None) -> RewrittenModule:
        """Return a regularized copy of the model. Its parameters are changed after the regularization.

        Without the change, a penalty such as ``L2SP``, which measures the distance from the parameters at the start, would be 0.
        """
        model, inputs = copy.deepcopy(self.example.model), self.example.inputs
        if dtype is not None:
            model.to(dtype)
            inputs = _to(inputs, dtype)
        module = regularize(model, self.regularizer, example_inputs=inputs, rng=7)
        with torch.no_grad():
            for i, (name, parameter) in enumerate(module.named_parameters()):
                if not name.startswith(f"{RULES}."):
                    parameter.add_(_numbers(parameter, i), alpha=0.1)
        return module

    def require(self, condition: bool, sentence: str) -> None:
        """Raise AssertionError with a sentence about the class unless the condition holds."""
        if not condition:
            raise AssertionError(f"{self.name}: {sentence}")


@dataclass(frozen=True)
class Outcome:
    """The results of several calls.

    Attributes:
        values: For each call, the tensors in the output and the penalties.
        gradients: A dict. Each key is the name of a parameter; the value is the gradient of the sum of ``weighted(result)`` over all calls.
    """

    values: list[list[Tensor]]
    gradients: dict[str, Tensor]


def outcome(module: nn.Module, run: Any, inputs: Any) -> Outcome:
    """Call ``run`` twice with ``module`` in train mode and once in eval mode, and return the results.

    ``run``: the module, or the compiled module.
    """
    args, kwargs = arguments(inputs) or ((), {})
    values, total = [], torch.zeros(())
    for mode in (True, True, False):
        module.train(mode)
        result = run(*args, **kwargs)
        values.append(pytree.tree_tensors(result))
        total = total + weighted(result)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return Outcome([[tensor.detach() for tensor in each] for each in values], dict(zip(parameters, found, strict=True)))


def weighted(result: Regularized) -> Tensor:
    """Return a 0-d tensor that depends on each element of the output and on each penalty: a weighted sum."""
    # Each element has another weight, so that a permutation or a shift of elements shows.
    outputs = [tensor for tensor in pytree.tree_tensors(result.output) if tensor.is_floating_point()]
    return sum((tensor * _numbers(tensor, 3)).sum() for tensor in outputs) + sum(result.penalties.values())  # type: ignore[return-value]


def _numbers(like: Tensor, seed: int) -> Tensor:
    """Return a tensor of numbers between -1 and 1, with the shape and dtype of ``like``. The same arguments give the same numbers."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.sin(numbers * 1.7 + seed).view(like.shape).to(like.dtype)


def _to(inputs: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs)


def _in_mode(module: nn.Module, training: bool) -> nn.Module:
    """Set the mode of a module and return the module; a model's own ``train`` may return nothing."""
    module.train(training)
    return module


def _call(module: nn.Module, inputs: Any) -> Regularized:
    args, kwargs = arguments(inputs) or ((), {})
    result: Regularized = module(*args, **kwargs)
    return result


# The checks


def check_refusals(
    cls: type[Any], pattern: Selector, weight: float, wrong: Mapping[str, Sequence[Any]], options: Mapping[str, Any]
) -> None:  # fmt: skip
    """Check that wrong options raise RegularizerError, with the names of the class and of the option."""
    names = option_names(cls)
    if unknown := [name for name in wrong if name not in names]:
        raise RegularizerError(f"wrong={{{unknown[0]!r}: ...}} names no option of {cls.__name__}. Its options: {', '.join(sorted(names))}.")
    cases = [(name, value) for name, values in wrong.items() for value in values]
    # An option that must be given is tried with the mark that it has if it is left out.
    cases += [("weight", float("nan")), ("weight", "much"), *((f.name, required()) for f in fields(cls) if f.default is required())]
    for name, value in cases:
        given = {"pattern": pattern, **({} if name in strength_names(cls) else {"weight": weight}), **options, name: value}
        if sentence := _not_refused(cls, given, name):
            raise AssertionError(f"{cls.__name__}: {name}={shown(value)} {sentence}")


def _not_refused(cls: type[Any], given: Mapping[str, Any], name: str) -> str:
    """Make a regularizer with a wrong value of the option ``name``. Return how the class fails to refuse it; ``""`` if it refuses it."""
    try:
        cls(**given)
    except RegularizerError as error:
        named = cls.__name__ in str(error) and name in str(error)
        return "" if named else f"raises an error that does not name the class and the option: {error}"
    except Exception as error:
        return f"raises {first_line(error)}, and not a RegularizerError."
    return "is accepted. Refuse it in check(), by self.require(...)."


def check_action(subject: Subject) -> None:
    """Check that a splice changes the output in train mode, and that a penalty is finite and has a finite gradient that is not 0."""
    module, inputs = _in_mode(subject.made(), True), subject.example.inputs
    if isinstance(subject.regularizer, Splice):
        with noise_off(module), torch.no_grad():
            plain = pytree.tree_tensors(_call(module, inputs).output)
        with torch.no_grad():
            # At a low rate, a call may drop nothing.
            changes = any(not _equal(pytree.tree_tensors(_call(module, inputs).output), plain) for _ in range(DRAWS))
        subject.require(changes, f"the output is that of the model in {DRAWS} calls in train mode. Give another weight or model.")
    if type(subject.regularizer).has_penalty():
        (penalty,) = _call(module, inputs).penalties.values()
        subject.require(bool(penalty.isfinite()), f"the penalty is {float(penalty.detach())}.")
        subject.require(penalty.requires_grad, "the penalty carries no gradient, so it would train nothing.")
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
        subject.require(all(bool(g.isfinite().all()) for g in found), "a gradient of the penalty is not finite.")
        subject.require(any(bool(g.any()) for g in found), "all gradients of the penalty are 0 on this model. Give another model.")


def check_purity(subject: Subject) -> None:
    """Check that two runs from the same state of the noise have the same results, and that a call uses no global random generator."""
    module, inputs = subject.made(), subject.example.inputs
    state, globally = rng_state(module), (torch.get_rng_state(), random.getstate())
    first = outcome(module, module, inputs)
    moved = not torch.equal(globally[0], torch.get_rng_state()) or globally[1] != random.getstate()
    subject.require(not moved, "a call draws from a global random generator. Draw from noise.")
    set_rng_state(module, state)
    _require_same(subject, outcome(module, module, inputs), first, "a second run from the same state of the noise")


def check_zero(subject: Subject) -> None:
    """Check that at strength 0 the penalty and its gradient are 0, and that a splice with ``off_at_zero`` changes nothing."""
    module, inputs = _in_mode(subject.made(), True), subject.example.inputs
    set_strength(module, next(iter(strengths(module))), 0.0)
    result = _call(module, inputs)
    for penalty in result.penalties.values():
        found = torch.autograd.grad(
            penalty, [p for p in module.parameters() if p.requires_grad], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        subject.require(float(penalty.detach()) == 0, f"at strength 0 the penalty is {float(penalty.detach())}, not 0.")
        subject.require(not any(bool(g.any()) for g in found), "at strength 0 the penalty has a gradient.")
    if getattr(subject.regularizer, "off_at_zero", False):
        with noise_off(module):
            plain = _call(module, inputs)
        subject.require(
            _equal(pytree.tree_tensors(result.output), pytree.tree_tensors(plain.output)),
            "at strength 0 it changes the output. If this is meant, say off_at_zero = False in the class.",
        )


def check_inputs(subject: Subject) -> None:
    """Check that the formula works where an option that names an input of the model has its default None."""
    regularizer, inputs = subject.regularizer, subject.example.inputs
    defaults = {field.name: field.default for field in fields(regularizer)}
    for option in regularizer.model_inputs:
        if defaults[option] is not None:
            continue
        try:
            module = regularize(copy.deepcopy(subject.example.model), replace(regularizer, **{option: None}), example_inputs=inputs, rng=7)
            _call(_in_mode(module, True), inputs)
        except GraphRegError:  # the class or the engine refuses it
            continue
        except Exception as error:
            raise AssertionError(
                f"{subject.name}: without {option}=, its formula gets None for {option} and raises {first_line(error)}. Handle None, or "
                f"let the option be required: {option}: ModelInput = graphreg.required()."
            ) from error


def check_model(subject: Subject) -> None:
    """Check that regularizing leaves the model unchanged, that ``verify`` accepts the module, and that ``strip`` gives back the model."""
    model, inputs = copy.deepcopy(subject.example.model), subject.example.inputs
    before = copy.deepcopy(model.state_dict())
    module = regularize(model, subject.regularizer, example_inputs=inputs, rng=7)
    verify(model, module, example_inputs=inputs)
    args, kwargs = arguments(inputs) or ((), {})
    after = model.state_dict()
    same = list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    subject.require(same, "it changes the parameters or buffers of the model.")
    stripped = without_additions(module)
    subject.require(list(stripped.state_dict()) == list(before), "the stripped module has other keys than the model.")
    with torch.no_grad():
        plain, ours = (pytree.tree_tensors(_in_mode(each, False)(*args, **kwargs)) for each in (model, stripped))
    subject.require(_equal(plain, ours), "the stripped module is not the model.")


def check_copies(subject: Subject) -> None:
    """Check that a copy of the module has the same results, and so has a module made from its recipe, if it can have a recipe.

    A recipe needs a class with a key (a keyword of ``regularize``), and a selector that is no function.
    """
    module, inputs = subject.made(), subject.example.inputs
    twin = copy.deepcopy(module)
    _require_same(subject, outcome(twin, twin, inputs), outcome(module, module, inputs), "a copy of the module")
    if type(subject.regularizer).keys and not callable(subject.regularizer.pattern):
        # Not ``made``, which changes the parameters: the second module begins with the model's own.
        module = regularize(copy.deepcopy(subject.example.model), subject.regularizer, example_inputs=inputs, rng=7)
        again = regularize(copy.deepcopy(subject.example.model), recipe=recipe(module), example_inputs=inputs)
        _require_same(subject, outcome(again, again, inputs), outcome(module, module, inputs), "the module that its recipe makes")


def check_gradients(subject: Subject) -> None:
    """Compare gradients with finite differences along two directions in the space of all parameters, in float64."""
    module, inputs = _in_mode(subject.made(torch.float64), True), _to(subject.example.inputs, torch.float64)
    state = rng_state(module)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def value() -> Tensor:
        # Each value is computed with the same draws.
        set_rng_state(module, state)
        try:
            return weighted(_call(module, inputs))
        except GraphRegError:
            raise
        except Exception as error:  # of the formula: the checks in float32 have called the model
            raise AssertionError(
                f"{subject.name}: for a model in float64 the formula raises {first_line(error)}. Let it make tensors in the dtype of its "
                "arguments, such as z.new_zeros(3)."
            ) from error

    found = torch.autograd.grad(value(), parameters, allow_unused=True, materialize_grads=True)
    # Along a direction, one difference tests the gradients of all parameters together.
    for direction in range(2):
        along = [_numbers(p, 11 * direction + i) for i, p in enumerate(parameters)]
        ours = float(sum((g * d).sum() for g, d in zip(found, along, strict=True)))
        both = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, along, strict=True):
                    p.add_(d, alpha=sign * STEP)
                both.append(float(value()))
                for p, d in zip(parameters, along, strict=True):
                    p.sub_(d, alpha=sign * STEP)
        theirs = (both[0] - both[1]) / (2 * STEP)
        # The rounding of a difference grows with the numbers that it is made of.
        size = max(1.0, abs(theirs), *(float(g.abs().max()) for g in found))
        subject.require(
            abs(ours - theirs) <= 1e-5 * size,
            f"the gradient along a direction is {ours:.6g}, and the difference {theirs:.6g}. "
            + (_narrow(module) or "If this is meant, give gradients=False."),
        )


def _narrow(module: nn.Module) -> str:
    """Name the tensors of a state that are not in float64, as all other tensors of the check are; ``""`` if there are none."""
    held = [item for state in states_in(module) for item in (*state.named_parameters(), *state.named_buffers())]
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in held if tensor.is_floating_point()}
    narrow = [f"{name!r} is {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items() if dtype != torch.float64]
    if not narrow:
        return ""
    return (
        f"This check is in float64, and of the state {listed(narrow)}, which rounds: let init_state make it in the dtype of its argument, "
        "such as like.new_zeros(3)."
    )


def check_compiled(subject: Subject, backend: str) -> None:
    """Check that the compiled module has the results of eager mode."""
    # Both are made with one seed, so that they draw the same masks.
    eager, module, inputs = subject.made(), subject.made(), subject.example.inputs
    torch.compiler.reset()
    run = torch.compile(module, backend=backend, fullgraph=True)
    _require_same(subject, outcome(module, run, inputs), outcome(eager, eager, inputs), f"the module compiled with {backend}")


def _equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _require_same(subject: Subject, ours: Outcome, expected: Outcome, what: str) -> None:
    """Raise AssertionError unless two outcomes are close. ``what`` describes the module that ``ours`` is from, for the message."""
    for names, one, other in (
        ("outputs or penalties", ours.values, expected.values), ("gradients", ours.gradients, expected.gradients),
    ):  # fmt: skip
        try:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        except AssertionError as error:
            raise AssertionError(f"{subject.name}: {what} has other {names}: {first_line(error)}") from error
