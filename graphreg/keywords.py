"""The keyword grammar: ``hidden_dropout=0.1, weight_l2=1e-4`` to regularizers. theanets' ``from_kwargs``, made strict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from graphreg.errors import NoMatchError, RegularizerError, near_sentence, shown
from graphreg.registry import OPTIONS, PREFIXED, find, registered
from graphreg.regularizer import Regularizer
from graphreg.sites import ROLES
from graphreg.trace import Traced, trace

FAMILIES = ("dropout", "noise")


def from_kwargs(model_or_traced: nn.Module | Traced, **keywords: Any) -> list[Regularizer]:
    """The regularizers that a set of keywords means, in order: dropout, noise, then the rest as given.

    A scalar 0, None or False is off. ``regularizers=`` takes an instance, a sequence, or a dict of keywords that is
    merged over the others. Raises NoMatchError for an unknown keyword, RegularizerError for a value out of range.
    """
    traced = model_or_traced if isinstance(model_or_traced, Traced) else trace(model_or_traced)
    given = keywords.pop("regularizers", None)
    if isinstance(given, Mapping):
        keywords, given = {**keywords, **given}, None
    for keyword in keywords:
        _check_keyword(keyword)
    lower = {keyword.lower(): value for keyword, value in keywords.items()}
    if len(lower) < len(keywords):
        raise RegularizerError(f"a keyword is given twice, in two cases: {', '.join(keywords)}.")
    keywords = lower
    found = [r for family in FAMILIES for r in _family(family, keywords, traced)]
    taken = {*FAMILIES, *PREFIXED}
    found += [r for key, value in keywords.items() if key not in taken for r in _one(key, key, value)]
    return [*found, *instances(given)]


def instances(given: Any) -> list[Regularizer]:
    """Instances, sequences of them, or nothing; anything else is an error that says what it is."""
    if given is None:
        return []
    if isinstance(given, Regularizer):
        return [given]
    if isinstance(given, type) and issubclass(given, Regularizer):
        raise RegularizerError(f"{given.__name__} is a class; make an instance: {given.__name__}('*', 0.1).")
    if getattr(given, "dtype", None) is not None:
        raise RegularizerError(
            f"{shown(given)} is no regularizer. Example inputs go by name: graphreg.regularize(model, example_inputs=x)."
        )
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise RegularizerError(
            f"{shown(given)} is no regularizer. Give instances, e.g. WeightL2('*', 1e-4), or keywords, e.g. weight_l2=1e-4."
        )
    return [regularizer for item in given for regularizer in instances(item)]


def _check_keyword(keyword: str) -> None:
    known = {*registered(), *PREFIXED, *FAMILIES}
    if keyword in OPTIONS:
        raise RegularizerError(f"{keyword!r} is an option of graphreg.regularize, not a regularizer: from_kwargs does not take it.")
    if keyword.lower() not in known:
        options = known | (OPTIONS - {"model"})
        raise NoMatchError(
            f"{keyword!r} is no option of graphreg.regularize and no key of a regularizer."
            f"{near_sentence(keyword.lower(), sorted(options), 'Near keys')} graphreg.registered() lists the keys."
        )


def _family(family: str, keywords: Mapping[str, Any], traced: Traced) -> Iterator[Regularizer]:
    """``input_dropout``, ``hidden_dropout``, ``output_dropout`` and ``dropout`` itself, in this order."""
    own = keywords.get(family)
    rates = dict(_rates(family, own)) if _is_rates(own) else {}
    for role in ROLES:
        keyword = f"{role}_{family}"
        value = keywords.get(keyword)
        # theanets: a tuple that names exactly a role's sites takes the place of that role's keyword
        for selector in [s for s in rates if isinstance(s, tuple) and _names_the_role(s, role, traced)]:
            value = rates.pop(selector)
        yield from _one(keyword, family, value, pattern="*" if role == "hidden" else f"**#{role}")
    if not _is_rates(own):
        yield from _one(family, family, own)
    for selector, rate in rates.items():
        yield from _one(family, family, rate, pattern=selector)


def _names_the_role(selector: tuple[str, ...], role: str, traced: Traced) -> bool:
    texts = {str(text).removesuffix(":out") for text in selector}
    sites = [site for site in traced.values if site.role == role]
    return len(texts) == len(sites) and all(not texts.isdisjoint(site.names) for site in sites)


def _is_rates(value: Any) -> bool:
    """A dict of selectors to rates, or pairs of them; a dict with ``weight`` is one regularizer's options."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and "weight" not in value)


def _rates(family: str, value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in value):
        return [(tuple(selector) if isinstance(selector, list) else selector, rate) for selector, rate in value]
    raise RegularizerError(f"{family}={shown(value)} is not allowed; give a rate, or a dict of selectors to rates.")


def _one(keyword: str, key: str, value: Any, **options: Any) -> Iterator[Regularizer]:
    if value is None or (not isinstance(value, Mapping) and isinstance(value, (int, float)) and value == 0):
        return
    if isinstance(value, Mapping):
        if "weight" not in value:
            raise RegularizerError(
                f"{keyword}={dict(value)!r} has no 'weight'; write {keyword}={{'weight': 0.1, ...}}"
                + (
                    f" for its own sites, or {key}={{selector: rate}}."
                    if keyword in PREFIXED
                    else ", or a dict of selectors under 'pattern'."
                )
            )
        if "pattern" in value and keyword in PREFIXED:
            raise RegularizerError(f"{keyword} names its own sites; write {key}={{selector: rate}} to choose others.")
        yield find(key)(**{"name": keyword, **options, **value})
    else:
        yield find(key)(weight=value, name=keyword, **options)
