"""The options of version 0.2 on a case: strengths by depth, by schedule and by site, keywords with maps, blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from fuzz.choices import STEPS, Reg, found
from fuzz.names import Table
from fuzz.strengths import ramped

if TYPE_CHECKING:
    from fuzz.cases import Case, Maker

AT_ONCE = ("Contractive", *STEPS)  # take their sites together: one strength
FAMILIES = ("BernoulliDropout", "GaussianNoise")  # come first among keywords


def varied(regs: Sequence[Reg], maker: Maker, rng: random.Random) -> list[Reg]:
    """Some with a strength by depth or by a schedule."""
    return [_varied(reg, maker, rng) for reg in regs]


def _varied(reg: Reg, maker: Maker, rng: random.Random) -> Reg:
    draw = rng.random()
    if draw < 0.15 and reg.kind not in AT_ONCE:
        deep = replace(reg, weight={"depth": [_rate(rng), _rate(rng)]})
        return deep if depth(maker, deep) else reg
    if draw < 0.35:
        return replace(reg, weight={"schedule": _schedule(rng)})
    return reg


def _rate(rng: random.Random) -> float:
    return 0.0 if rng.random() < 0.1 else round(rng.uniform(0.05, 0.85), 2)


def _schedule(rng: random.Random) -> list[Any]:
    kind, every = rng.choice(("linear", "cosine", "piecewise")), rng.choice((1, 1, 2))
    if kind == "piecewise":
        return [kind, [[step, _rate(rng)] for step in (0, *sorted(rng.sample((1, 2, 3), rng.choice((1, 2)))))], every]
    return [kind, _rate(rng), _rate(rng), rng.choice((1, 2, 3)), every]


def depth(maker: Maker, reg: Reg) -> dict[str, float]:
    """The strength at each site of a regularizer whose strength is by depth; nothing where that is not told here."""
    sites = found(reg, maker.known)
    if sites.empty or sites.unsure.intersection(sites.sites) or not isinstance(reg.weight, dict):
        return {}
    table, modules = maker.tables["train"], dict(maker.model.named_modules(remove_duplicate=False))
    order, homes = _order(table), _homes(maker, table)
    order = {**parameter_order(maker, order), **order}
    blocks = {site: _block(modules, homes[site], site) for site in sites.sites if site in homes}
    if len(blocks) < len(sites.sites) or any(block not in order and site not in order for site, block in blocks.items()):
        return {}
    place = {block: order[block] if block in order else order[site] for site, block in blocks.items()}
    if len(place) < 2 or len(set(place.values())) < len(place):
        return {}
    ramp = ramped(reg.weight["depth"], sorted(place, key=place.__getitem__))
    return {site: ramp[block] for site, block in blocks.items()}


def _order(table: Table) -> dict[str, int]:
    """When values are made, modules run for the first time, and parameters are read for the first time."""
    order: dict[str, int] = {}
    for number, value in enumerate(table.values.values()):
        path = value.scope
        while path:
            order.setdefault(path, number)
            path = path.rpartition(".")[0]
        if value.names:
            order.setdefault(value.names[0].text, number)
    return order


def _homes(maker: Maker, table: Table) -> dict[str, str]:
    """By site, the module that it is in."""
    homes = {value.names[0].text: value.scope for value in table.values.values() if value.names}
    return homes | {place.name: place.name.rpartition(".")[0] for place in maker.known.parameters}


def parameter_order(maker: Maker, order: dict[str, int]) -> dict[str, int]:
    """When each parameter is read for the first time."""
    first = {}
    for place in maker.known.parameters:
        paths = [name.name.rpartition(".")[0] for name in place.names if name.name.rpartition(".")[0]]
        reads = [order[path] for path in (*paths, *(n.name for n in place.names)) if path in order]
        if reads:
            first[place.name] = min(reads)
    return first


def _block(modules: dict[str, nn.Module], path: str, site: str) -> str:
    """The innermost module around a site that has submodules and stands beside another of its class; else the site itself."""
    while path:
        module, outer = modules[path], modules[path.rpartition(".")[0]]
        if any(module.children()) and sum(type(each) is type(module) for each in outer.children()) > 1:
            return path
        path = path.rpartition(".")[0]
    return site


def completed(case: Case, maker: Maker, rng: random.Random, compiled: bool) -> None:
    """The strengths by depth; and sometimes what is set between calls, keywords, blocks."""
    given_depth(case, maker)
    for name, reg, sites in zip(case.names, case.regs, case.found, strict=True):
        if rng.random() < 0.3 and sites.sites and not sites.empty:
            case.changes += _changes(name, reg, sites.sites, rng, 4 if compiled else 5)
    case.changes.sort(key=lambda change: int(change[0]))
    blocks = [path for path, module in maker.model.named_modules() if path and any(module.children())]
    if blocks and rng.random() < 0.3:
        case.blocks = rng.choice(blocks)


def given_depth(case: Case, maker: Maker) -> None:
    for name, reg in zip(case.names, case.regs, strict=True):
        if isinstance(reg.weight, dict) and "depth" in reg.weight:
            case.depth[name] = depth(maker, reg)


def _changes(name: str, reg: Reg, sites: Sequence[str], rng: random.Random, calls: int) -> list[list[Any]]:
    changes: list[list[Any]] = []
    for call in sorted(rng.sample(range(calls), rng.choice((1, 1, 2)))):
        if reg.kind in AT_ONCE or rng.random() < 0.3:
            changes.append([call, name, _rate(rng), {}])
            continue
        given = {site: _rate(rng) for site in rng.sample(list(sites), rng.randint(1, len(sites)))}
        changes.append([call, name, given, given])
    return changes


def as_keywords(regs: list[Reg]) -> list[Reg]:
    """In the order in which keywords give them; all as they are where keywords cannot say it."""
    if any(reg.kind in FAMILIES and len(reg.pattern) > 1 for reg in regs):
        return []
    kinds = [*(kind for kind in FAMILIES if any(reg.kind == kind for reg in regs)), *(reg.kind for reg in regs)]
    return [reg for kind in dict.fromkeys(kinds) for reg in regs if reg.kind == kind]


def several(regs: Sequence[Reg], rng: random.Random) -> list[Reg]:
    """Now and then one of them a second time, with another strength."""
    more = list(regs)
    if regs and rng.random() < 0.3:
        more.append(replace(rng.choice(list(regs)), weight=_rate(rng)))
    return more


__all__ = ["as_keywords", "completed", "given_depth", "several", "varied"]
