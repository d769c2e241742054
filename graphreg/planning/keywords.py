"""The keyword grammar: ``hidden_dropout=0.1, weight_l2=1e-4`` to regularizers. theanets' ``from_kwargs``, made strict."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from graphreg.errors import NoMatchError, RegularizerError, near_sentence, no_number, number_of, shown
from graphreg.ir import ROLES
from graphreg.regularizer import OPTIONS, PREFIXED, Regularizer, find, registered
from graphreg.tracing import Traced, trace

FAMILIES = ("dropout", "noise")
log = logging.getLogger("graphreg")


def from_kwargs(model_or_traced: nn.Module | Traced, **keywords: Any) -> list[Regularizer]:
    """The regularizers that a set of keywords means, in order: dropout, noise, then the rest as given.

    A scalar 0, None or False is off. A dict of selectors to weights is a regularizer for each entry, with weight 0 too, in order:
    ``dropout={"1": 0.0, "3": 0.2}`` is ``dropout`` and ``dropout_1``. A dict with an option among its keys is options.
    ``regularizers=`` takes an instance, a sequence, or a dict of keywords beside the others; of a keyword that is given both ways the
    dict's holds, and a warning is logged. Raises NoMatchError for an unknown keyword, RegularizerError for a value out of range.
    """
    traced = model_or_traced if isinstance(model_or_traced, Traced) else trace(model_or_traced)
    given = keywords.pop("regularizers", None)
    if isinstance(given, Mapping):
        _warn_of_both(keywords, given)
        keywords, given = {**keywords, **given}, None
    for keyword in keywords:
        _check_keyword(keyword)
    lower = {keyword.lower(): value for keyword, value in keywords.items()}
    if len(lower) < len(keywords):
        raise RegularizerError(f"a keyword is given twice, in two cases: {', '.join(keywords)}.")
    keywords = lower
    found = [r for family in FAMILIES for r in _family(family, keywords, traced)]
    taken = {*FAMILIES, *PREFIXED}
    found += [r for key, value in keywords.items() if key not in taken for r in _one(key, key, value, traced)]
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


def _warn_of_both(keywords: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Log a warning of a keyword that stands among the keywords and in ``regularizers=`` as well: the latter holds, as in theanets."""
    for key in keywords.keys() & given.keys():
        log.warning(
            "%s is given twice: %s in regularizers={...} is taken, as theanets does, and %s is not used. For two regularizers of one kind "
            "give instances, regularizers=[...], or a dict of selectors to weights.",
            key, shown(given[key]), shown(keywords[key]),
        )  # fmt: skip


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
    entries = _entries(family, own) if _is_map(own, find(family)) else []
    for role in ROLES:
        keyword = f"{role}_{family}"
        pattern = "*" if role == "hidden" else f"**#{role}"
        # theanets: a tuple that names exactly a role's sites takes the place of that role's keyword
        taking = [entry for entry in entries if isinstance(entry[0], tuple) and _names_the_role(entry[0], role, traced)]
        entries = [entry for entry in entries if entry not in taking]
        if taking:
            yield from _mapped(keyword, find(family), [(pattern, weight) for _, weight in taking])
        else:
            yield from _one(keyword, family, keywords.get(keyword), traced, pattern=pattern)
    if _is_map(own, find(family)):
        yield from _mapped(family, find(family), entries)
    else:
        yield from _one(family, family, own, traced)


def _names_the_role(selector: tuple[str, ...], role: str, traced: Traced) -> bool:
    texts = {str(text).removesuffix(":out") for text in selector}
    sites = [site for site in traced.values if site.role == role]
    return len(texts) == len(sites) and all(not texts.isdisjoint(site.names) for site in sites)


def _options(cls: type[Regularizer]) -> list[str]:
    return [field.name for field in fields(cls)]


def like_an_option(cls: type[Regularizer], text: object) -> str:
    """A sentence for what was read as a selector, and may have been meant as the key of a dict of options."""
    near = difflib.get_close_matches(str(text), _options(cls), n=1, cutoff=0.75) if str(text).isidentifier() else []
    return f" {text!r} was read as a selector; the option that it resembles is {near[0]!r}." if near else ""


def _is_map(value: Any, cls: type[Regularizer]) -> bool:
    """A dict of selectors to weights, or pairs of them; a dict with an option among its keys is one regularizer's options."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and not any(key in _options(cls) for key in value))


def _entries(keyword: str, value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in value):
        return [(tuple(selector) if isinstance(selector, list) else selector, weight) for selector, weight in value]
    number = "rate" if keyword in FAMILIES else "weight"
    raise RegularizerError(f"{keyword}={shown(value)} is not allowed; give a {number}, or a dict of selectors to {number}s.")


def _mapped(keyword: str, cls: type[Regularizer], entries: Sequence[tuple[Any, Any]]) -> Iterator[Regularizer]:
    """A regularizer for each entry, also for 0; None and False leave theirs out, and its number with it. An entry may have options."""
    left_out = False
    for place, (selector, weight) in enumerate(entries):
        if weight is None or weight is False:
            left_out = True
            continue
        options = dict(weight) if isinstance(weight, Mapping) and "weight" in weight else {"weight": weight}
        cure = f"Write {keyword}={{{selector!r}: 0.1}}.{like_an_option(cls, selector)}"
        options["weight"] = _number(f"{cls.__name__}: weight", options["weight"], cure)
        yield cls(selector, **{"name": f"{keyword}_{place}" if place and left_out else keyword, **options})


def _number(what: str, value: Any, cure: str) -> float:
    if (number := number_of(value)) is None:
        raise RegularizerError(no_number(what, value, cure))
    return number


def _one(keyword: str, key: str, value: Any, traced: Traced, **options: Any) -> Iterator[Regularizer]:
    """What a keyword means: nothing, a regularizer, or one for each entry of a map, which ``hidden_dropout`` and its kin do not take."""
    cls = find(key)
    if value is None or value is False or number_of(value) == 0:
        return
    if keyword not in PREFIXED and value != {} and _is_map(value, cls):
        yield from _mapped(keyword, cls, _entries(keyword, value))
    elif isinstance(value, Mapping):
        _check_map_of_options(keyword, key, value, traced)
        cure = f"Write {keyword}={{'weight': 0.1, ...}}."
        yield cls(**{"name": keyword, **options, **value, "weight": _number(f"{cls.__name__}: weight", value["weight"], cure)})
    else:
        yield cls(weight=_number(f"{cls.__name__}: weight", value, f"Write {keyword}=0.1."), name=keyword, **options)


def _check_map_of_options(keyword: str, key: str, value: Mapping[Any, Any], traced: Traced) -> None:
    names = {name for site in traced.sites for name in site.names}
    if "weight" not in value:
        prefixed = keyword in PREFIXED
        known = _options(find(key))
        unknown = [f" {name!r} is no option.{near_sentence(str(name), known, 'Near options')}" for name in value if name not in known]
        by_selector = f"for its own sites, or {key}={{selector: rate}}" if prefixed else f"or {keyword}={{selector: weight}}"
        sites = [name for name in value if name in names and not prefixed]
        raise RegularizerError(
            f"{keyword}={dict(value)!r} has no 'weight'; write {keyword}={{'weight': 0.1, ...}} {by_selector}."
            + (f" {sites[0]!r} is an option, and a site, too; the site is {{({sites[0]!r},): 0.1}}." if sites else "")
            + "".join(() if prefixed else unknown[:1])
        )
    if "pattern" in value and keyword in PREFIXED:
        raise RegularizerError(f"{keyword} names its own sites; write {key}={{selector: rate}} to choose others.")
