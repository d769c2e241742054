"""The table of strengths: regularizer × site → a number or a schedule.

Each row is a regularizer. It has what the plan gives and what was set since, and is the only place that knows what a strength is. What
graphs read (a tensor of each regularizer, the clock's result, the inputs of a backend's graphs) is written from it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

from graphreg.errors import NoMatchError, RegularizerError, listed, shown, suggestions_text
from graphreg.ir.selector import select_among
from graphreg.ir.site import Site
from graphreg.planning.native_dropout import OWN_DROPOUT, OwnDropout, is_rate
from graphreg.planning.repeats import Strengths
from graphreg.regularizer.base import Regularizer
from graphreg.regularizer.by_depth import ByDepth, own_strength
from graphreg.schedules import Schedule

OWN = ""  # among names of sites: stands for all other sites
EVERYWHERE = "**"  # the selector of all sites


class Row:
    """The strengths of one regularizer, or the rates of native dropout that have a schedule.

    Attributes:
        name: The regularizer's name, or ``own_dropout``.
        regularizer: The regularizer; None for ``own_dropout``.
        own: The planned strength that belongs to no particular site.
        sites: The sites that are known, by name.
        planned: The strength that the plan has for each of them.
        given: What was set since the plan, by ``OWN``, site or selector, in the order in which it counts.
        chosen: Of this, the strengths at the known sites.
        awaited: Those selectors in ``given`` that must match a site as soon as the sites are known.
    """

    def __init__(self, name: str, regularizer: Regularizer | None, own: float) -> None:
        self.name, self.regularizer, self.own = name, regularizer, own
        self.sites: dict[str, Site] = {}
        self.planned: dict[str, float] = {}
        self.given: dict[str, float] = {}
        self.chosen: dict[str, float] = {}
        self.awaited: tuple[str, ...] = ()

    def as_it_is(self) -> Row:
        """Return a copy of the row, which does not follow what is set and learned later."""
        twin = copy.copy(self)
        twin.sites, twin.planned, twin.given, twin.chosen = dict(self.sites), dict(self.planned), dict(self.given), dict(self.chosen)
        return twin

    @property
    def by_site(self) -> bool:
        """Whether each site may have a strength of its own."""
        return self.regularizer is None or self.regularizer.by_site

    @property
    def has_clock(self) -> bool:
        """Whether the regularizer was made with a schedule, so that graphs read its strengths from a clock."""
        return self.regularizer is None or self.regularizer.is_scheduled

    @property
    def others(self) -> float:
        """The strength of a site that has none of its own, unless the plan has one for it."""
        return self.given.get(OWN, self.own)

    def at(self, site: str, planned: float) -> float:
        """Return the strength at a site. ``planned``: that in the plan of the graph that asks."""
        # What was set for the site, else what was set for all, else the plan.
        return self.chosen.get(site, self.given.get(OWN, planned))

    def elements(self, planned: Mapping[str, float]) -> list[float]:
        """Return the strengths that a graph reads: one for each of its sites, or one for all if it has none of its own.

        ``planned``: the sites of the graph, each with the strength in its plan.
        """
        return [self.at(site, each) for site, each in planned.items()] or [self.others]

    def furthest(self, call: int) -> float:
        """Return, of the strengths at the known sites, that which is the furthest from 0, as the number that it is in a call."""
        return max((number(each, call) for each in self.elements(self.planned)), key=abs)

    def numbers(self, call: int) -> dict[str, float]:
        """Return the strength at each known site, as the number that it is in a call."""
        return {site: number(self.at(site, each), call) for site, each in self.planned.items()}

    @property
    def is_scheduled(self) -> bool:
        """Whether a strength is a schedule now."""
        values = (self.others, *self.elements(self.planned), *self.changed().values())
        return any(isinstance(value, Schedule) for value in values)

    def learn(self, sites: Mapping[str, Site], planned: Mapping[str, float]) -> None:
        """Take the sites of a graph, with the strengths in its plan. What was set for selectors counts at the new ones, too."""
        # Its formula takes all sites at once, and has one strength.
        if not self.by_site:
            return
        self.planned |= planned
        new = {name: site for name, site in sites.items() if name not in self.sites}
        self.sites |= new
        for site in new.values():
            self._choose(site)

    def set(self, values: Mapping[str, float], may_wait: bool) -> None:
        """Set strengths by site, selector or ``OWN``.

        Raises:
            NoMatchError: A selector matches no known site, and it may not wait for others.
        """
        matched = {selector: [name for name, site in self.sites.items() if self._selects(selector, site)] for selector in values}
        if not may_wait and (lost := next((selector for selector, names in matched.items() if not names), None)) is not None:
            raise NoMatchError(self.no_site(lost))
        for selector, value in values.items():
            # Before any site is known, ``**`` means all that will come.
            if selector == EVERYWHERE and not matched[selector]:
                self.set_all(value)
                continue
            self.given.pop(selector, None)  # so that it comes last
            self.given[selector] = value
            self.chosen |= dict.fromkeys(matched[selector], value)
            if not matched[selector] and selector not in self.awaited:
                self.awaited += (selector,)

    def set_all(self, value: float) -> None:
        """Set the strength at all sites."""
        self.given, self.chosen, self.awaited = {OWN: value}, {}, ()

    def keep_sites(self) -> None:
        """Let selectors stand for the sites that they have matched, and not for those of later graphs."""
        self.given = self.changed()

    def restore(self, given: Mapping[str, float]) -> None:
        """Set what ``changed`` returned, and reset everything else to the plan. Sites need not be known."""
        self.given, self.chosen, self.awaited = dict(given), {}, ()
        for site in self.sites.values():
            self._choose(site)

    def _choose(self, site: Site) -> None:
        """Find what was set for a site: the last key that means it counts."""
        if matching := [value for selector, value in self.given.items() if self._selects(selector, site)]:
            self.chosen[site.name] = matching[-1]

    def changed(self) -> dict[str, float]:
        """Return what was set, by ``OWN`` and site; a selector that matches no site yet stands in place of a site."""
        others = {OWN: self.given[OWN]} if OWN in self.given else {}
        waiting = {selector: value for selector, value in self.given.items() if selector != OWN and not self._matches(selector)}
        # Sites last: for a site, the last key that means it counts.
        return others | waiting | self.chosen

    def lost(self) -> list[str]:
        """Return the awaited selectors that match no site, and forget that they are awaited."""
        awaited, self.awaited = self.awaited, ()
        return [selector for selector in awaited if not self._matches(selector)]

    def _matches(self, selector: str) -> bool:
        return any(self._selects(selector, site) for site in self.sites.values())

    def _selects(self, selector: str, site: Site) -> bool:
        """Whether a key of ``given`` means a site. A site's name means this site alone, also where it would match others."""
        if selector in self.sites or selector == OWN:
            return selector == site.name
        return selector == site.name or bool(select_among(selector, [site]))

    def no_site(self, selector: str) -> str:
        """Return the text of the error for a selector that matches no site."""
        known = listed(list(self.sites), 6) or "none yet"
        return f"{selector!r} matches no site of {self.name}.{suggestions_text(selector, self.sites)} Its sites: {known}."

    def checked(self, value: float) -> float:
        """Return a new strength as a float or a schedule; raise RegularizerError if it is out of range, or no number."""
        if self.regularizer is None:
            if not is_rate(value):
                raise RegularizerError(f"{self.name}: {shown(value)} is not allowed; give a rate in [0, 1), or a schedule of rates.")
            return value if isinstance(value, Schedule) else float(value)
        checked = dataclasses.replace(self.regularizer, weight=value).weight
        if isinstance(checked, ByDepth):
            raise RegularizerError(
                f"set_strength takes a number or a dict of selectors to numbers, not {value!r}: only a plan can have a strength by depth. "
                "To change it, scale the strengths in graphreg.site_strengths(module), and set them by site."
            )
        return checked

    def require_by_site(self) -> None:
        """Raise RegularizerError if the formula takes all sites at once."""
        if not self.by_site:
            raise RegularizerError(
                f"{self.name} takes all its sites at once ({type(self.regularizer).__name__}), so they have one strength. Give a number."
            )


def strength_table(regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout) -> dict[str, Row]:
    """Return a row for each regularizer, and one for the rates of native dropout if one of them has a schedule."""
    rows = {name: Row(name, regularizer, own_strength(regularizer.weight)) for name, regularizer in regularizers.items()}
    rates = own_dropout.values() if isinstance(own_dropout, Mapping) else (own_dropout,)
    if scheduled := [rate for rate in rates if isinstance(rate, Schedule)]:
        rows[OWN_DROPOUT] = Row(OWN_DROPOUT, None, max(scheduled, key=float))
    return rows


def number(strength: float, call: int) -> float:
    """Return a strength as the number that it is in a call."""
    return float(strength.at(call)) if isinstance(strength, Schedule) else float(strength)


def strength_text(name: str, now: Strengths) -> str:
    """Return the strength of a regularizer as text: a number, or a range such as ``0 to 0.2`` if it differs by site."""
    by_site = [value for key, value in now.items() if isinstance(key, tuple) and key[0] == name]
    return f"{min(by_site):g} to {max(by_site):g}" if by_site else f"{now[name]:g}"
