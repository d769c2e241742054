"""How the strengths of one regularizer at its sites lie in one tensor, from which its runtime modules read them.

Element 0 of the tensor is the regularizer's own strength or, if strengths differ by site, the strength furthest from 0. If there are
several sites, one element for each site follows: for a splice the strength at the site, for a penalty that strength divided by element 0.
So a penalty that has one strength at all sites multiplies its measurements by 1, which changes no bit of them.

A strength that has a schedule has no such tensor. Its elements are in what the clock returns (``clock.py``), and are never divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OWN = ""  # in dicts of strengths by site, the key of the strength for all other sites


@dataclass(frozen=True)
class Places:
    """The sites of a regularizer in a graph, in the order of the elements of its tensor.

    Attributes:
        sites: The names of the sites; empty for a formula that takes all of them at once. A single site has no element of its own.
        planned: The strength that the plan has for each site.
        relative: Whether the elements after the first are divided by the first, as for a penalty.
        own: The strength in the plan that belongs to no particular site. If strengths go by depth, it is that of the first or of the last
            block, whichever is further from 0.
    """

    sites: tuple[str, ...] = ()
    planned: tuple[float, ...] = ()
    relative: bool = False
    own: float = 0.0

    def values(self, chosen: Mapping[str, float]) -> list[float]:
        """Return the strength at each site. ``chosen``: the strengths that were set since the plan, by site; ``OWN`` means all others."""
        return [chosen.get(site, chosen.get(OWN, planned)) for site, planned in zip(self.sites, self.planned, strict=True)]

    def elements(self, own: float, values: Sequence[float]) -> list[float]:
        """Return the elements of the tensor. ``own``: the regularizer's own strength; ``values``: the strengths at the sites."""
        first = max(values, key=abs, default=own)
        if len(self.sites) < 2:
            return [first]
        return [first, *((value / first if first else 1.0) if self.relative else value for value in values)]

    def read(self, elements: Sequence[float]) -> dict[str, float]:
        """Compute the strength at each site from the elements of the tensor.

        For a penalty, the strength is the product of the first element and the site's element, rounded to 15 significant digits.
        """
        first, *others = elements
        if not others:
            return dict.fromkeys(self.sites, first)
        if not self.relative:
            return dict(zip(self.sites, others, strict=True))
        return {site: first if share == 1 else float(f"{first * share:.15g}") for site, share in zip(self.sites, others, strict=True)}
