"""The strengths of a backend: one for each regularizer, and others at the sites for which they were set.

The sites become known as Dynamo captures graphs. So a dict of selectors is kept, and is applied to each site that a later graph has.
A graph gets the strengths of a regularizer as one tensor, which has an element for each of its sites in this graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import NoMatchError, listed, suggestions_text, warn
from graphreg.ir import Missing, Site, brought, select_among
from graphreg.regularizer import Penalty, Regularizer
from graphreg.runtime import EVERYWHERE, OWN, checked_strength, one_for_all
from graphreg.schedules import Schedule

BySite = dict[str, dict[str, float]]  # by regularizer, then by site: a number or a schedule


class CallStrengths:
    """The strengths in one call of the model, as numbers.

    Attributes:
        own: By regularizer, the strength at all sites that have none of their own.
        chosen: The strengths at single sites.
        number: Returns a strength, which may be a schedule, as the number that it is in this call.
        known: By regularizer, the sites that are known so far.
        regularizers: The regularizers by name.
    """

    def __init__(self, strengths: Strengths, call: int) -> None:
        self._source, self.number = strengths, partial(_number, call=call)
        self.known, self.regularizers = strengths.sites, strengths.regularizers
        self.own = {name: self.number(value) for name, value in strengths.own.items()}
        self.chosen = {name: {site: self.number(value) for site, value in sites.items()} for name, sites in strengths.chosen.items()}
        self._made: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def learn(self, acting: Iterable[tuple[str, Site]]) -> None:
        """Note sites of a graph that is captured in this call, each with the name of a regularizer that acts there."""
        for name, sites in self._source.learn(acting).items():
            self.chosen[name] |= {site: self.number(value) for site, value in sites.items()}
        self._made.clear()

    def at(self, name: str, site: str) -> float:
        """Return the strength of a regularizer at a site."""
        return self.chosen[name].get(site, self.own[name])

    def furthest(self, name: str) -> float:
        """Return the strength of a regularizer that is the furthest from 0, among those at its sites."""
        return max((self.at(name, site) for site in self.known[name]), key=abs, default=self.own[name])

    def by_site(self, name: str) -> dict[str, float]:
        """Return the strength at each known site of a regularizer; empty if its formula takes all sites at once."""
        return {site: self.at(name, site) for site in self.known[name]}

    def differ(self, name: str) -> bool:
        """Whether a site of the regularizer has a strength of its own."""
        return bool(self.chosen[name])

    def tensor(self, name: str, sites: tuple[str, ...], device: torch.device) -> Tensor:
        """Return the strengths at some sites of a regularizer, [1 + sites], float64 (float32 where the device has no float64).

        Element 0 is the strength furthest from 0. The others are, for a splice, the strengths at the sites; for a penalty, these divided by
        element 0, so that equal strengths change no bit of a mean.
        """
        if (name, sites) not in self._made:
            first, values = self.furthest(name), [self.at(name, site) for site in sites]
            if isinstance(self.regularizers[name], Penalty):
                values = [value / first if first else 1.0 for value in values]
            self._made[name, sites] = torch.tensor([first, *values], dtype=torch.float64, device="cpu")
        return brought(self._made[name, sites], device)


class Strengths:
    """The strengths that the user of a backend has set: numbers or schedules.

    Attributes:
        regularizers: The regularizers by name.
        own: By regularizer, the strength at all sites that have none of their own.
        selected: By regularizer, the strengths that were set by selector, in the order in which they count.
        chosen: The strengths at single sites. A site may be unknown, if its strength is from a checkpoint.
        sites: By regularizer, then by name: the sites that are known so far. Empty for a formula that takes all sites at once.
    """

    def __init__(self, regularizers: Mapping[str, Regularizer]) -> None:
        self.regularizers = regularizers
        self.own: dict[str, float] = {name: regularizer.weight for name, regularizer in regularizers.items()}
        self.selected: BySite = {name: {} for name in regularizers}
        self.chosen: BySite = {name: {} for name in regularizers}
        self.sites: dict[str, dict[str, Site]] = {name: {} for name in regularizers}
        self._numbers: CallStrengths | None = None  # those of every call, as long as nothing changes and nothing has a schedule

    def now(self, call: int) -> CallStrengths:
        """Return the strengths as numbers. ``call``: the number of a call in train mode, which schedules follow."""
        if any(map(self.is_scheduled, self.own)):
            return CallStrengths(self, call)
        if self._numbers is None:
            self._numbers = CallStrengths(self, call)
        return self._numbers

    def is_scheduled(self, name: str) -> bool:
        """Whether a strength of the regularizer has a schedule."""
        return any(isinstance(value, Schedule) for value in (self.own[name], *self.chosen[name].values(), *self.selected[name].values()))

    def learn(self, acting: Iterable[tuple[str, Site]]) -> BySite:
        """Note sites that a graph has, each with the name of a regularizer that acts there. Return the strengths chosen for new ones."""
        found: BySite = {}
        for name, site in acting:
            if not self.regularizers[name].by_site or site.name in self.sites[name]:
                continue
            self.sites[name][site.name] = site
            values = [value for selector, value in self.selected[name].items() if _selects(selector, site)]
            if values:
                found.setdefault(name, {})[site.name] = values[-1]
        for name, sites in found.items():
            self.chosen[name] |= sites
        self._numbers = None
        return found

    def set(self, name: str, value: float | Mapping[str, float], complete: bool) -> None:
        """Change a regularizer's strength.

        Args:
            name: The regularizer's name.
            value: The strength at all sites, or a dict of selectors to strengths.
            complete: Whether the first call has ended. Before that, a selector may match a site that is not yet known.

        Raises:
            NoMatchError: No regularizer has this name, or a selector matches none of its sites.
            RegularizerError: A strength is not allowed, or the formula takes all sites at once and the value is a dict.
        """
        if name not in self.regularizers:
            known = ", ".join(self.regularizers) or "none"
            raise NoMatchError(f"no regularizer is named {name!r}.{suggestions_text(str(name), self.regularizers)} Names: {known}.")
        regularizer = self.regularizers[name]
        if not isinstance(value, Mapping):
            self.own[name] = checked_strength(regularizer, value)
            self.selected[name], self.chosen[name] = {}, {}
        elif not regularizer.by_site:
            raise one_for_all(name, regularizer)
        else:
            selected = {selector: checked_strength(regularizer, number) for selector, number in value.items()}
            matched = {selector: [n for n, site in self.sites[name].items() if _selects(selector, site)] for selector in selected}
            if complete and (lost := [selector for selector, names in matched.items() if not names]):
                raise NoMatchError(self._no_site(name, lost[0]))
            for selector, strength in selected.items():
                self.selected[name].pop(selector, None)  # so that it comes last
                self.selected[name][selector] = strength
                self.chosen[name] |= dict.fromkeys(matched[selector], strength)
        self._numbers = None

    def check(self, missing: Missing) -> None:
        """At the end of the first call, deal with selectors of strengths that match no site as ``missing`` says."""
        for name, selected in self.selected.items():
            for selector in selected:
                if missing != "ignore" and not any(_selects(selector, site) for site in self.sites[name].values()):
                    text = f"set_strength: {self._no_site(name, selector)}"
                    if missing == "error":
                        raise NoMatchError(text)
                    warn(text)

    def _no_site(self, name: str, selector: str) -> str:
        sites = self.sites[name]
        known = listed(list(sites), 6) or "none yet"
        return f"{selector!r} matches no site of {name}.{suggestions_text(str(selector), sites)} Its sites: {known}."

    def changed(self) -> BySite:
        """Return the strengths that differ from those that the backend was made with, by site; the site ``OWN`` means all others.

        A selector that matches no site yet stands in place of a site.
        """
        changed: BySite = {}
        for name, regularizer in self.regularizers.items():
            own, sites = {OWN: self.own[name]}, self.sites[name].values()
            for selector, value in self.selected[name].items():
                if not any(_selects(selector, site) for site in sites):
                    own = {OWN: value} if selector == EVERYWHERE else own | {selector: value}
            if own != {OWN: regularizer.weight} or self.chosen[name]:
                changed[name] = own | self.chosen[name]
        return changed

    def restore(self, changed: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the strengths that ``changed`` returned, and reset all others. Their sites may be in graphs that are not captured yet."""
        for name, regularizer in self.regularizers.items():
            values = {site: checked_strength(regularizer, value) for site, value in changed.get(name, {}).items()}
            self.own[name] = values.pop(OWN, regularizer.weight)
            self.selected[name], self.chosen[name] = {}, values
        self._numbers = None


def _number(strength: float, call: int) -> float:
    return float(strength.at(call)) if isinstance(strength, Schedule) else float(strength)


def _selects(selector: str, site: Site) -> bool:
    return selector == site.name or bool(select_among(selector, [site]))
