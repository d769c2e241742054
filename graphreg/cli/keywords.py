"""Makes regularizers from the options of a command: ``--hidden-dropout 0.1 --hidden-l1 'layer4*=1e-3'``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from graphreg import schedules
from graphreg.cli.errors import UsageError
from graphreg.errors import NoMatchError, suggestions_text
from graphreg.planning.keywords import from_kwargs
from graphreg.planning.native_dropout import CHOICES, OwnDropout, read_option
from graphreg.recipes.files import of_json
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.by_depth import by_depth
from graphreg.regularizer.registry import FAMILIES, PREFIXED, registered
from graphreg.tracing.trace import Traced

KeywordTexts = Sequence[tuple[str, str]]
_KINDS: Mapping[str, Callable[..., Any]] = {kind: vars(schedules)[kind] for kind in schedules.KINDS} | {"by_depth": by_depth}
_SCHEDULE = re.compile(rf"({'|'.join(_KINDS)})\(.*\)$", re.DOTALL)
ORDER = [name for family in FAMILIES for name in (*(keyword for keyword, (key, _) in PREFIXED.items() if key == family), family)]


def regularizers(traced: Traced, keywords: KeywordTexts) -> list[Regularizer]:
    """Make the regularizers that the options name, in the order of ``from_kwargs``; an option given twice makes two regularizers."""
    pairs = [(keyword_of(option), _value(option, text)) for option, text in keywords]
    # The sort is stable: options of one name keep the order of the command line.
    pairs.sort(key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER))
    # A call for each option, because a call cannot have the same keyword twice.
    return [regularizer for keyword, value in pairs for regularizer in from_kwargs(traced, **{keyword: value})]


def keyword_of(option: str) -> str:
    """Return the keyword of an option: ``hidden_dropout`` for ``--hidden-dropout``."""
    return option.removeprefix("--").replace("-", "_").lower()


def check_option_texts(keywords: KeywordTexts, known: Iterable[str], command: str) -> None:
    """Check the options that may name regularizers. This happens before the model is loaded, because loading may take long.

    Raises:
        NoMatchError: An option is neither an option of the command nor the key of a regularizer.
        UsageError: An option has a wrong value.
    """
    keys = registered().spellings
    options = {*known, *(f"--{key.replace('_', '-')}" for key in keys)}
    for option, text in keywords:
        if keyword_of(option) not in keys:
            suggestions = suggestions_text(option, sorted(options), "Near options")
            raise NoMatchError(
                f"{option} is no option of graphreg {command} and no key of a regularizer.{suggestions} "
                f"graphreg {command} --help lists both."
            )
        _value(option, text)


def _value(option: str, text: str) -> Any:
    """Parse the value of an option for ``from_kwargs``: a strength, or a dict of options."""
    if text.lstrip().startswith("{"):
        return _json(option, text, '{"strength": 0.1, "pattern": "fc.*"}')
    glob, equals, strength = _parts(text)
    try:
        weight = _strength(option, text, strength)
    except ValueError:
        raise UsageError(f"{option} {text!r}: {strength!r} is no number; write STRENGTH or GLOB=STRENGTH, e.g. 'layer4*=1e-3'.") from None
    if not equals:
        return weight
    if keyword_of(option) in PREFIXED:
        family = option.rpartition("-")[2]
        raise UsageError(f"{option} names its own sites; write --{family} {text!r} to choose others.")
    return {"weight": weight, "pattern": glob}


def _json(option: str, text: str, example: str) -> Any:
    try:
        return of_json(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no JSON ({str(error).rstrip('.')}); write '{example}'.") from None


def _parts(text: str) -> tuple[str, str, str]:
    """Split GLOB=STRENGTH at its last ``=``, except those in the arguments of a schedule. Without ``=``, the first two parts are empty."""
    schedule = _SCHEDULE.search(text)
    strength = schedule[0] if schedule else text.rpartition("=")[2]
    # What is left is empty, or ends in the ``=``.
    glob = text.removesuffix(strength)
    return glob.removesuffix("="), glob[-1:], strength


def _strength(option: str, text: str, strength: str) -> float:
    """Return a number, or a strength that is written as in Python: ``linear(0, 0.5, 1000)``. Raises ValueError if it is neither."""
    if _SCHEDULE.fullmatch(strength) is None:
        return float(strength)
    try:
        schedule: float = _evaluated(ast.parse(strength, mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise UsageError(
            f"{option} {text!r}: {strength!r} is no schedule ({error}); write linear(0, 0.5, 1000), cosine(0, 0.5, 1000), "
            "piecewise({0: 0.0, 1000: 0.1}) or by_depth(0, 0.2)."
        ) from None
    return schedule


def _evaluated(node: ast.expr) -> Any:
    """Evaluate a literal, or a call of a function in ``_KINDS`` whose arguments are literals or such calls."""
    # No ``eval``: a strength must not be able to run code.
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if (name := ast.unparse(node.func)) not in _KINDS:
        raise ValueError(f"there is no {name}")
    return _KINDS[name](*map(_evaluated, node.args), **{str(each.arg): _evaluated(each.value) for each in node.keywords})


def own_dropout(texts: Sequence[str] | None) -> OwnDropout:
    """Turn the values of ``--own-dropout`` into one for ``own_dropout=``: a word (``off``), a rate, or a dict of selectors to these."""
    options: list[OwnDropout] = [_own_dropout(text) for text in texts or ["keep"]]
    if len(options) == 1:
        return options[0]
    # If a selector is given twice, its last choice counts.
    return {selector: choice for option in options for selector, choice in (option if isinstance(option, dict) else {"*": option}).items()}


def _own_dropout(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return read_option(_json("--own-dropout", text, '{"layer4.*": "off"}'))
    glob, equals, choice = _parts(text)
    return {glob: _choice(text, choice)} if equals else _choice(text, choice)


def _choice(text: str, choice: str) -> Any:
    if choice in CHOICES:
        return choice
    try:
        return _strength("--own-dropout", text, choice)
    except ValueError:
        raise UsageError(f"--own-dropout {text!r}: {choice!r} is no choice; it is {', '.join(CHOICES)} or a rate in [0, 1).") from None
