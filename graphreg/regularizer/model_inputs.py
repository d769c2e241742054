"""The inputs of the model that a formula takes. An option that is annotated ``ModelInput`` has the name of such an input.

The option ``lengths`` names an input, too. Unlike others, its input is checked and converted before
the formula gets it (``ir/time_steps.py``).
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Annotated, Any, TypeAlias, get_args, get_type_hints

from graphreg.errors import RegularizerError, shown
from graphreg.regularizer.options import NotGiven

ModelInput: TypeAlias = Annotated[str | None, "the name of an input of the model"]
"""The annotation of an option that names an argument of the model's forward. The formula takes the argument's tensor by the option's name.

    class MaskedL1(Penalty, keys=("masked_l1",)):
        mask: ModelInput = None

        def __call__(self, z: Tensor, mask: Tensor | None) -> Tensor: ...

    MaskedL1("encoder.*", 0.1, mask="attention_mask")
"""

LENGTHS = "lengths"
# names that mean something else: what the engine supplies to a formula, or passes to a runtime
# module
RESERVED = (
    "z", "w", "values", "weight", "noise", "units", "state", "module_input", "previous", "steps", "counted", "vjp", "pull", "clock",
    "places", "of", "self",
)  # fmt: skip


def input_options(cls: Any) -> tuple[str, ...]:
    """Return the names of a class's options that are annotated ``ModelInput``, without ``lengths``."""
    found: dict[str, bool] = {}
    # A subclass may annotate an inherited option anew, so its own annotation comes last.
    for base in reversed(cls.__mro__):
        for name, annotation in _annotations(base).items():
            found[name] = _names_input(annotation, base)
    return tuple(name for name, names_input in found.items() if names_input and name != LENGTHS)


def _annotations(cls: type) -> dict[str, Any]:
    try:
        return inspect.get_annotations(cls)
    except NameError:  # from Python 3.14 on, annotations are evaluated here
        return {}


def _names_input(annotation: Any, cls: type) -> bool:
    """Whether an annotation in the body of ``cls`` is ``ModelInput``, also within a union, or as a string."""
    if isinstance(annotation, str):
        if "ClassVar" in annotation or "KW_ONLY" in annotation:
            return False
        # Under ``from __future__ import annotations``, an annotation is text, which means something
        # only among the names of the class and its module.
        holder, names = SimpleNamespace(__annotations__={"option": annotation}), dict(vars(sys.modules.get(cls.__module__, sys)))
        try:
            annotation = get_type_hints(holder, globalns=names, localns=dict(vars(cls)), include_extras=True)["option"]
        except Exception:  # a name that only the body of a function has; it may be anything
            return "ModelInput" in annotation
    return annotation == ModelInput or any(each == ModelInput for each in get_args(annotation))


def check_input_options(cls: Any) -> None:
    """Raise RegularizerError if a class has a ``ModelInput`` that its formula does not take, or whose name means something else."""
    for name in cls.input_options:
        if name in RESERVED:
            raise RegularizerError(
                f"{cls.__name__}: the option {name} is a ModelInput, and a formula's argument {name} already means something else. Give "
                "the option another name."
            )
        if cls.takes and name not in cls.takes:
            raise RegularizerError(
                f"{cls.__name__} has the option {name}, a ModelInput, but its __call__ does not take {name}: the option would do nothing."
            )


def check_given_inputs(regularizer: Any) -> None:
    """Raise RegularizerError unless each option that is a ``ModelInput`` is a name, or None."""
    kind, key = type(regularizer).__name__, (*regularizer.keys, "key")[0]
    for name in regularizer.input_options:
        value = getattr(regularizer, name)
        if value is NotGiven.OPTION:
            raise RegularizerError(
                f"{kind}: {name} was not given; it must be the name of an input of the model. Write {kind}(..., {name}='...'), or "
                f"{key}={{'{regularizer.strength_option}': ..., '{name}': '...'}}, with the name of an argument of the model's forward."
            )
        if value is not None and not (isinstance(value, str) and value):
            raise RegularizerError(
                f"{kind}: {name}={shown(value)} is not allowed; give the name of an input of the model, an argument of its forward: "
                f"{name}='...'. The call of the model passes the tensor."
            )


def named_inputs(regularizer: Any) -> dict[str, str]:
    """Return the inputs of the model that a formula takes: for each argument of the formula, the name of the input."""
    named = {name: getattr(regularizer, name) for name in regularizer.input_options}
    if not {"steps", LENGTHS, "counted"}.isdisjoint(regularizer.takes):
        named[LENGTHS] = regularizer.engine_options.lengths
    return {name: value for name, value in named.items() if value is not None}


def inputs_text(regularizer: Any) -> str:
    """Describe, for a table, which inputs of the model the formula takes; ``""`` for none."""
    return ", ".join(f"{option} is the input {name}" for option, name in regularizer.model_inputs.items())
