"""The present strengths of a module for reports and drawings: by regularizer, and by site if they differ by site."""

from __future__ import annotations

from graphreg.planning import Strengths
from graphreg.runtime.controls import Regulated, site_strengths, strengths


def strengths_now(module: Regulated) -> Strengths:
    """Return the present strengths by regularizer name. If they differ by site, also return them by (regularizer name, site name)."""
    differing = {name: sites for name, sites in site_strengths(module).items() if len(set(sites.values())) > 1}
    return {**strengths(module), **{(name, site): value for name, sites in differing.items() for site, value in sites.items()}}


def strength_text(name: str, now: Strengths) -> str:
    """Return the strength of a regularizer as text: a number, or a range such as ``0 to 0.2`` if it differs by site."""
    by_site = [value for key, value in now.items() if isinstance(key, tuple) and key[0] == name]
    return f"{min(by_site):g} to {max(by_site):g}" if by_site else f"{now[name]:g}"
