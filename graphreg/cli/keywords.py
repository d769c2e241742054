"""Makes regularizers from the options of a command: ``--hidden-dropout 0.1 --hidden-l1 'layer4*=1e-3'``."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphreg.cli.errors import UsageError
from graphreg.errors import NoMatchError, suggestions_text
from graphreg.ir import ROLES
from graphreg.planning import CHOICES, FAMILIES, OwnDropout, from_kwargs
from graphreg.regularizer import PREFIXED, Regularizer, registered
from graphreg.schedules import cosine, linear, of_plain, piecewise
from graphreg.tracing import Traced

Keywords = Sequence[tuple[str, str]]
_KINDS = {"linear": linear, "cosine": cosine, "piecewise": piecewise}
_SCHEDULE = re.compile(rf"({'|'.join(_KINDS)})\(.*\)$", re.DOTALL)
ORDER = [name for family in FAMILIES for name in (*(f"{role}_{family}" for role in ROLES), family)]


def regularizers(traced: Traced, keywords: Keywords) -> list[Regularizer]:
    """Make the regularizers that the options name, in the order of ``from_kwargs``; an option given twice makes two regularizers."""
    pairs = [(keyword_of(option), _value(option, text)) for option, text in keywords]
    pairs.sort(key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER))
    return [regularizer for keyword, value in pairs for regularizer in from_kwargs(traced, **{keyword: value})]


def keyword_of(option: str) -> str:
    """Return the keyword of an option: ``hidden_dropout`` for ``--hidden-dropout``."""
    return option.removeprefix("--").replace("-", "_").lower()


def check_options(keywords: Keywords, known: Iterable[str], command: str) -> None:
    """Check the options that may name regularizers. This happens before the model is loaded, because loading may take long.

    Raises:
        NoMatchError: An option is neither an option of the command nor the key of a regularizer.
        UsageError: An option has a wrong value.
    """
    keys = {*registered(), *PREFIXED, *FAMILIES}
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
        try:
            options = json.loads(text)
        except ValueError as error:
            raise UsageError(f"""{option} {text!r} is no JSON ({error}); write '{{"weight": 0.1, "pattern": "fc.*"}}'.""") from None
        return {name: value if (schedule := of_plain(value)) is None else schedule for name, value in options.items()}
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


def _parts(text: str) -> tuple[str, str, str]:
    """Split GLOB=STRENGTH at its last ``=``, except those in the arguments of a schedule. Without ``=``, the first two parts are empty."""
    schedule = _SCHEDULE.search(text)
    strength = schedule[0] if schedule else text.rpartition("=")[2]
    glob = text.removesuffix(strength)
    return glob.removesuffix("="), glob[-1:], strength


def _strength(option: str, text: str, strength: str) -> float:
    """Return a number, or a schedule that is written as in Python: ``linear(0, 0.5, 1000)``. Raises ValueError if it is neither."""
    if _SCHEDULE.fullmatch(strength) is None:
        return float(strength)
    try:
        call: Any = ast.parse(strength, mode="eval").body
        arguments = map(ast.literal_eval, call.args)
        named = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        make: Any = _KINDS[call.func.id]
        schedule: float = make(*arguments, **named)
    except (SyntaxError, ValueError, TypeError) as error:
        raise UsageError(
            f"{option} {text!r}: {strength!r} is no schedule ({error}); write linear(0, 0.5, 1000), cosine(0, 0.5, 1000) or "
            "piecewise({0: 0.0, 1000: 0.1})."
        ) from None
    return schedule


def own_dropout(texts: Sequence[str] | None) -> OwnDropout:
    """Turn the values of ``--own-dropout`` into one for ``own_dropout=``: a word (``off``), a rate, or a dict of selectors to these."""
    choices = {glob or "*": _choice(text, choice) for text in texts or () for glob, _, choice in [_parts(text)]}
    if not texts:
        return "keep"
    return choices["*"] if len(choices) == 1 and not _parts(texts[0])[1] else choices


def _choice(text: str, choice: str) -> Any:
    if choice in CHOICES:
        return choice
    try:
        return _strength("--own-dropout", text, choice)
    except ValueError:
        raise UsageError(f"--own-dropout {text!r}: {choice!r} is no choice; it is {', '.join(CHOICES)} or a rate in [0, 1).") from None


def none_given(keywords: Keywords, native_dropout: OwnDropout) -> bool:
    """Return whether the command line gives no regularizer and leaves native dropout as it is."""
    return not keywords and not isinstance(native_dropout, Mapping) and native_dropout == "keep"
