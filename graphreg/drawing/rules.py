"""Finds the regularizers whose selectors a reader can try out on a page, with a strength that acts, and the sites that they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphreg.errors import GraphRegError
from graphreg.planning.matching import matching_sites, refusals
from graphreg.planning.practically_off import FAINTEST
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.registry import build, registered
from graphreg.tracing.trace import Traced

LARGE = 1_000_000  # elements: a parameter of a large model


@dataclass(frozen=True)
class Profiles:
    """Why regularizers refuse sites. Most sites of a model have the same reasons, so the page has each set of reasons once.

    Attributes:
        texts: The sets: for each, by the number of the regularizer, the error with ``{}`` in place
            of the site's name.
        of: The number of a site's set, by the site's name. A site that no regularizer refuses has
            none.
    """

    texts: tuple[Mapping[int, str], ...]
    of: Mapping[str, int]


def tried(traced: Traced) -> tuple[list[dict[str, Any]], Profiles]:
    """Return the regularizers that need only a selector and a weight, and the sites where they cannot act."""
    places = {site.name: i for i, site in enumerate(traced.sites)}
    rules, by_site = dict[type[Regularizer], dict[str, Any]](), dict[str, dict[int, str]]()
    for cls in registered().values():
        key = cls.keys[0] if cls.keys else cls.__name__
        # a usual one, and others in case that it is not allowed
        weights = (0.1 if issubclass(cls, Splice) else 1e-4, 0.0, 0.5, 1.0)
        built = next((one for weight in weights if isinstance(one := _built(key, weight, "**"), Regularizer)), None)
        # A class is registered under each of its keys, and under its name.
        if cls in rules or built is None:
            continue

        options = _options(key, built)
        usual = _built(key, float(built.weight), "*")
        default = matching_sites(traced, usual, "ignore") if isinstance(usual, Regularizer) else ()
        for name, text in refusals(traced, built).items():
            by_site.setdefault(name, {})[len(rules)] = text.replace(name, "{}")
        rules[cls] = {
            "key": key, "cls": cls.__name__, "on": cls.on, "splice": issubclass(cls, Splice), "min_dims": cls.min_dims,
            "weight": float(built.weight), "options": options, "model": traced.title, "usual": cls.usual,
            "default": [places[site.name] for site in default], "needs": "" if isinstance(usual, Regularizer) else usual,
            "raises": issubclass(cls, Splice) and cls.raises_variance,
            "unsure": bool({"steps", "previous"} & set(built.takes) or built.engine_options.share_axes),
        }  # fmt: skip

    # Many sites are refused for the same reasons: each set of reasons is written once.
    numbers: dict[tuple[tuple[int, str], ...], int] = {}
    of = {name: numbers.setdefault(tuple(texts.items()), len(numbers)) for name, texts in by_site.items()}
    return list(rules.values()), Profiles(tuple(map(dict, numbers)), of)


def _built(key: str, weight: float, pattern: str, **options: Any) -> Regularizer | str:
    """Build a regularizer. If it refuses the weight or the selector, or needs another option, return the text of the error."""
    try:
        return build(key, weight=weight, pattern=pattern, **options)
    except GraphRegError as error:
        return str(error)


def _options(key: str, built: Regularizer) -> dict[str, Any]:
    """Return the options with which the weight acts: a penalty that is a mean over all elements of a large parameter is practically off."""
    if not isinstance(built, Penalty):
        return {}
    weight, slope = float(built.weight), built.slope(LARGE)
    if slope is None or weight * slope >= FAINTEST or not isinstance(_built(key, weight, "**", reduction="sum"), Regularizer):
        return {}
    return {"reduction": "sum"}
