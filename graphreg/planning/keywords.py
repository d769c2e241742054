"""Turns keywords such as ``hidden_dropout=0.1, weight_l2=0.1`` into regularizers.

The rules are those of ``from_kwargs`` in theanets, but an unknown keyword or a value that is not
allowed raises an error.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from graphreg.errors import NoMatchError, RegularizerError, TraceError, no_number, number_of, shown, suggestions_text
from graphreg.ir.site import ROLES, Site
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.by_depth import has_schedule, read_strength
from graphreg.regularizer.options import option_names, strength_names
from graphreg.regularizer.registry import FAMILIES, OPTIONS, PREFIXED, find, registered
from graphreg.schedules import VaryingStrength
from graphreg.tracing.trace import Traced, trace

log = logging.getLogger("graphreg")


def from_kwargs(model_or_traced: nn.Module | Traced, **keywords: Any) -> list[Regularizer]:
    """Return the regularizers that keywords stand for: dropout first, then noise, then the rest in the order given.

    A value of a keyword may be:

    - a number, the strength or rate; 0, None and False give no regularizer;
    - a schedule (``graphreg.schedules``) or ``by_depth(...)``, in place of any number, also as
      plain data: ``{"linear": [0, 0.5, 1000]}``, ``{"by_depth": [0, 0.2]}``; a schedule gives a
      regularizer even if all its values are 0;
    - a dict of selectors to strengths, which gives one regularizer for each entry, even if the strength
      is 0: ``dropout={"1": 0.0, "3": 0.2}`` gives ``dropout`` and ``dropout_1``;
    - a dict of options, which is recognized by an option among its keys:
      ``weight_l1={"strength": 0.1, "pattern": "fc.*"}``.

    Args:
        model_or_traced: A model, which is traced without example inputs, or what ``graphreg.trace``
            returned.
        **keywords: The keywords, as in ``graphreg.regularize``. ``regularizers=`` takes an
            instance, a sequence of instances, or a dict of further keywords. If a keyword is also
            in this dict, the dict's value is used and a warning is logged.

    Raises:
        NoMatchError: A keyword is unknown.
        RegularizerError: A value is not allowed, or out of range.
        TraceError: The model cannot be traced without example inputs.
    """
    traced = model_or_traced if isinstance(model_or_traced, Traced) else _traced_without_inputs(model_or_traced)
    return from_keywords(keywords, traced.sites)


def _traced_without_inputs(model: nn.Module) -> Traced:
    """Trace a model. If that needs example inputs, which ``from_kwargs`` does not take, the error says how to give them."""
    try:
        return trace(model)
    except TraceError as error:
        if "example_inputs" not in str(error):
            raise
        raise TraceError(
            f"{error} from_kwargs takes no example_inputs. Give it the trace: traced = graphreg.trace(model, example_inputs=x), then "
            "graphreg.from_kwargs(traced, ...)."
        ) from error


def from_keywords(keywords: Mapping[str, Any], sites: Sequence[Site] = ()) -> list[Regularizer]:
    """Return what ``from_kwargs`` returns, for a model with these sites; raise the same errors.

    One rule of theanets needs ``sites``: in ``dropout={...}``, a tuple of selectors that names
    exactly the sites of a role takes the place of that role's keyword, such as ``hidden_dropout``.
    Without sites, as when there is no model yet, this rule does not apply.
    """
    keywords = merged(keywords)
    regularizers = keywords.pop("regularizers", None)
    for keyword in keywords:
        _check_keyword(keyword)
    lower = {keyword.lower(): value for keyword, value in keywords.items()}
    if len(lower) < len(keywords):
        raise RegularizerError(f"a keyword is given twice, in upper and lower case: {', '.join(keywords)}.")
    keywords = lower
    made = [r for family in FAMILIES for r in _family(family, keywords, sites)]
    taken = {*FAMILIES, *PREFIXED}
    made += [r for key, value in keywords.items() if key not in taken for r in _one(key, key, value, sites)]
    return [*made, *instances(regularizers)]


def merged(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return keywords with those that ``regularizers={...}`` holds among them. For a keyword that is given both ways, the log warns."""
    keywords = dict(keywords)
    if isinstance(regularizers := keywords.get("regularizers"), Mapping):
        del keywords["regularizers"]
        _warn_of_both(keywords, regularizers)
        keywords |= regularizers
    return keywords


def instances(regularizers: Any) -> list[Regularizer]:
    """Flatten an instance, nested sequences of instances, or None into a list; raise RegularizerError for anything else."""
    if regularizers is None:
        return []
    if isinstance(regularizers, Regularizer):
        return [regularizers]
    if isinstance(regularizers, type) and issubclass(regularizers, Regularizer):
        raise RegularizerError(f"{regularizers.__name__} is a class; make an instance: {regularizers.__name__}('*', 0.1).")
    # A tensor or an array, meant as example_inputs.
    if getattr(regularizers, "dtype", None) is not None:
        raise RegularizerError(
            f"{shown(regularizers)} is no regularizer. Give example inputs by name: graphreg.regularize(model, example_inputs=x)."
        )
    if isinstance(regularizers, (str, bytes, Mapping)) or not isinstance(regularizers, Iterable):
        raise RegularizerError(
            f"{shown(regularizers)} is no regularizer. Give instances, e.g. WeightL2('*', 0.1), or keywords, e.g. weight_l2=0.1."
        )
    return [regularizer for item in regularizers for regularizer in instances(item)]


def _warn_of_both(keywords: Mapping[str, Any], overriding: Mapping[str, Any]) -> None:
    """Log a warning for each keyword that is also in ``regularizers=``. The value in ``regularizers=`` is used, as in theanets."""
    for key in keywords.keys() & overriding.keys():
        log.warning(
            "%s is given twice: %s in regularizers={...} is used, as in theanets, and %s is not used. For two regularizers of one kind "
            "give instances, regularizers=[...], or a dict of selectors to weights.",
            key, shown(overriding[key]), shown(keywords[key]),
        )  # fmt: skip


def _check_keyword(keyword: str) -> None:
    if keyword in OPTIONS:
        raise RegularizerError(f"{keyword!r} is an option of graphreg.regularize, not a regularizer: from_kwargs does not take it.")
    known = registered()
    if keyword not in known:
        options = known.spellings | (OPTIONS - {"model"})
        raise NoMatchError(
            f"{keyword!r} is no option of graphreg.regularize and no key of a regularizer."
            f"{suggestions_text(keyword.lower(), sorted(options), 'Near keys')} graphreg.registered() lists the keys."
        )


def _family(family: str, keywords: Mapping[str, Any], sites: Sequence[Site]) -> Iterator[Regularizer]:
    """Yield the regularizers of a family, e.g. of ``input_dropout``, ``hidden_dropout``, ``output_dropout`` and then ``dropout`` itself."""
    value = read_strength(keywords.get(family))
    entries = _entries(family, value) if _is_map(value, find(family)) else []
    for role in ROLES:
        keyword = f"{role}_{family}"
        pattern = PREFIXED[keyword][1]
        # as in theanets, a tuple that names exactly the sites of a role takes the place of the
        # keyword of that role
        taking = [entry for entry in entries if isinstance(entry[0], tuple) and _names_the_role(entry[0], role, sites)]
        entries = [entry for entry in entries if entry not in taking]
        if taking:
            yield from _mapped(keyword, find(family), [(pattern, weight) for _, weight in taking])
        else:
            yield from _one(keyword, family, keywords.get(keyword), sites, pattern=pattern)
    if _is_map(value, find(family)):
        yield from _mapped(family, find(family), entries)
    else:
        yield from _one(family, family, value, sites)


def _names_the_role(selector: tuple[str, ...], role: str, sites: Sequence[Site]) -> bool:
    """Whether a tuple of selectors names exactly the sites of a role."""
    texts = {str(text).removesuffix(":out") for text in selector}
    of_role = [site for site in sites if site.role == role]
    return len(texts) == len(of_role) and all(not texts.isdisjoint(site.names) for site in of_role)


def like_an_option(cls: type[Regularizer], text: object) -> str:
    """Return a hint if a selector resembles the name of an option, because the user may have meant the option; else ``""``."""
    similar = difflib.get_close_matches(str(text), option_names(cls), n=1, cutoff=0.75) if str(text).isidentifier() else []
    return f" {text!r} was read as a selector; the option that it resembles is {similar[0]!r}." if similar else ""


def _is_map(value: Any, cls: type[Regularizer]) -> bool:
    """Whether a value maps selectors to weights, as a dict or as pairs. A dict that has an option among its keys is a dict of options."""
    return isinstance(value, (list, tuple)) or (isinstance(value, Mapping) and not any(key in option_names(cls) for key in value))


def _entries(keyword: str, value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in value):
        # JSON and YAML have a list where Python has a tuple of selectors.
        return [(tuple(selector) if isinstance(selector, list) else selector, weight) for selector, weight in value]
    number = "rate" if keyword in FAMILIES else "weight"
    raise RegularizerError(f"{keyword}={shown(value)} is not allowed; give a {number}, or a dict of selectors to {number}s.")


def _mapped(keyword: str, cls: type[Regularizer], entries: Sequence[tuple[Any, Any]]) -> Iterator[Regularizer]:
    """Yield a regularizer for each entry, even for weight 0.

    An entry with None or False is skipped, but still counted for the names of later entries: the
    third entry is ``dropout_2``.
    """
    left_out = False
    for place, (selector, weight) in enumerate(entries):
        if weight is None or weight is False:
            left_out = True
            continue
        given = _strength_option(cls, weight) if isinstance(weight, Mapping) else None
        options = dict(weight) if given else {"weight": weight}
        cure = f"Write {keyword}={{{selector!r}: 0.1}}.{like_an_option(cls, selector)}"
        name = given or "weight"
        options[name] = _number(f"{cls.__name__}: {name}", options[name], cure)
        # Without a gap before it, ``named_once`` gives the entry its number.
        yield cls(selector, **{"name": f"{keyword}_{place}" if place and left_out else keyword, **options})


def _strength_option(cls: type[Regularizer], options: Mapping[Any, Any]) -> str | None:
    """Return the name by which a dict of options has the strength, ``weight`` or ``strength``; None if it has neither."""
    return next((name for name in strength_names(cls) if name in options), None)


def _number(what: str, value: Any, cure: str) -> float:
    value = read_strength(value)
    if (number := number_of(value)) is None:
        raise RegularizerError(no_number(what, value, cure))
    return value if isinstance(value, VaryingStrength) else number


def _one(keyword: str, key: str, value: Any, sites: Sequence[Site], **options: Any) -> Iterator[Regularizer]:
    """Yield the regularizers that one keyword stands for: none, one, or one for each selector.

    A keyword that has a role in its name, such as ``hidden_dropout``, takes no selectors.
    """
    cls, value = find(key), read_strength(value)
    # A schedule of zeros may still be replaced by another, so it is no absence of a regularizer.
    if value is None or value is False or (number_of(value) == 0 and not has_schedule(value)):
        return
    # An empty dict is refused below, as one of options without a weight.
    if keyword not in PREFIXED and value != {} and _is_map(value, cls):
        yield from _mapped(keyword, cls, _entries(keyword, value))
    elif isinstance(value, Mapping):
        _check_map_of_options(keyword, key, value, sites)
        given = _strength_option(cls, value) or "weight"
        cure = f"Write {keyword}={{{given!r}: 0.1, ...}}."
        yield cls(**{"name": keyword, **options, **value, given: _number(f"{cls.__name__}: {given}", value[given], cure)})
    else:
        yield cls(weight=_number(f"{cls.__name__}: weight", value, f"Write {keyword}=0.1."), name=keyword, **options)


def _check_map_of_options(keyword: str, key: str, value: Mapping[Any, Any], sites: Sequence[Site]) -> None:
    """Raise RegularizerError if a dict of options has no strength, or if it has a selector and the keyword has a role in its name."""
    names = {name for site in sites for name in site.names}
    cls = find(key)
    if _strength_option(cls, value) is None:
        prefixed, needed = keyword in PREFIXED, strength_names(cls)[-1]
        known = option_names(cls)
        unknown = [f" {name!r} is no option.{suggestions_text(str(name), known, 'Near options')}" for name in value if name not in known]
        by_selector = f"for its own sites, or {key}={{selector: rate}}" if prefixed else f"or {keyword}={{selector: strength}}"
        meant = [name for name in value if name in names and not prefixed]
        raise RegularizerError(
            f"{keyword}={dict(value)!r} has no {needed!r}; write {keyword}={{{needed!r}: 0.1, ...}} {by_selector}."
            + (f" {meant[0]!r} is the name of an option and of a site; for the site write {{({meant[0]!r},): 0.1}}." if meant else "")
            + "".join(() if prefixed else unknown[:1])
        )
    if "pattern" in value and keyword in PREFIXED:
        raise RegularizerError(f"{keyword} names its own sites; write {key}={{selector: rate}} to choose others.")
