"""Makes regularizers from the options of a command: ``--hidden-dropout 0.1 --hidden-l1 'layer4*=1e-3'``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graphreg.cli.errors import UsageError
from graphreg.errors import NoMatchError, suggestions_text
from graphreg.ir import ROLES
from graphreg.planning import CHOICES, FAMILIES, OwnDropout, from_kwargs
from graphreg.regularizer import PREFIXED, Regularizer, registered
from graphreg.tracing import Traced

Keywords = Sequence[tuple[str, str]]
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
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"""{option} {text!r} is no JSON ({error}); write '{{"weight": 1e-4, "pattern": "fc.*"}}'.""") from None
    glob, equals, strength = text.rpartition("=")
    try:
        weight = float(strength)
    except ValueError:
        raise UsageError(f"{option} {text!r}: {strength!r} is no number; write STRENGTH or GLOB=STRENGTH, e.g. 'layer4*=1e-3'.") from None
    if not equals:
        return weight
    if keyword_of(option) in PREFIXED:
        family = option.rpartition("-")[2]
        raise UsageError(f"{option} names its own sites; write --{family} {text!r} to choose others.")
    return {"weight": weight, "pattern": glob}


def own_dropout(texts: Sequence[str] | None) -> OwnDropout:
    """Parse the values of ``--own-dropout`` for ``regularize``: a word, a rate, or a dict from selectors to words and rates."""
    choices = {glob or "*": _choice(text, choice) for text in texts or () for glob, _, choice in [text.rpartition("=")]}
    if not texts:
        return "keep"
    return choices["*"] if len(choices) == 1 and "=" not in texts[0] else choices


def _choice(text: str, choice: str) -> Any:
    if choice in CHOICES:
        return choice
    try:
        return float(choice)
    except ValueError:
        raise UsageError(f"--own-dropout {text!r}: {choice!r} is no choice; it is {', '.join(CHOICES)} or a rate in [0, 1).") from None


def none_given(keywords: Keywords, native_dropout: OwnDropout) -> bool:
    """Return whether the command line gives no regularizer and leaves native dropout as it is."""
    return not keywords and not isinstance(native_dropout, Mapping) and native_dropout == "keep"
