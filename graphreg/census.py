"""The census: how many sites a model has, and how many elements they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from graphreg.sites import Site
from graphreg.trace import Traced


@dataclass(frozen=True)
class Count:
    """Of sites of one kind: how many, and their elements together; None where a shape is not known."""

    sites: int = 0
    elements: int | None = 0


@dataclass(frozen=True)
class Census:
    """The floating-point values of a model, and its parameters."""

    values: Count = Count()
    parameters: Count = Count()

    def of(self, on: str) -> Count:
        return self.parameters if on == "parameters" else self.values


def census(traced: Traced) -> Census:
    return Census(*(counted(site for site in sites if site.selectable) for sites in (traced.values, traced.parameters)))


def counted(sites: Iterable[Site]) -> Count:
    """Each site counts once."""
    shapes = [site.shape for site in {site.name: site for site in sites}.values()]
    known = [math.prod(shape) for shape in shapes if shape is not None]
    return Count(len(shapes), sum(known) if len(known) == len(shapes) else None)
