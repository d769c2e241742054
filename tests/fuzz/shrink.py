"""Makes a failing case small: fewer regularizers, then fewer statements, as long as it fails in the same way."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

from fuzz import variants
from fuzz.cases import Case, Discarded, Group, Maker
from fuzz.program import Body, Program, Stmt, bodies

Failing = Callable[[Group], str]  # the kind of fault of the one case, or nothing


def shrunk(maker: Maker, case: Case, failing: Failing, tries: int = 150) -> Group:
    """The smallest group that was found, of one case, which fails as the given one does."""
    best = maker.group([case])
    kind = failing(best)
    if not kind:
        return best
    left = tries
    progress = True
    while progress and left > 0:
        progress = False
        for program, smaller in _smaller(maker, case):
            left -= 1
            if left <= 0:
                break
            found = _tried(program, smaller, failing, kind, maker)
            if found is not None:
                maker, case, best = found
                progress = True
                break
    return best


def _tried(program: Program, case: Case, failing: Failing, kind: str, before: Maker) -> tuple[Maker, Case, Group] | None:
    try:
        maker = before if program is before.program else Maker(program)
        made = rebuilt(maker, case)
        group = maker.group([made])
        if failing(group) == kind:
            return maker, made, group
    except (Discarded, AssertionError, KeyError, StopIteration, IndexError, RuntimeError, TypeError, ValueError, AttributeError):
        return None  # it does not run any more
    return None


def rebuilt(maker: Maker, case: Case) -> Case:
    """The case on another program: what its selectors find there."""
    fresh = maker.case(case.regs, random.Random(0))
    fresh.penalties, fresh.scale, fresh.rng, fresh.stripped = case.penalties, case.scale, case.rng, case.stripped
    dropouts = {place.name for place, _ in maker._dropouts()}
    fresh.own_dropout = case.own_dropout if case.own and dropouts >= set(case.own) else "keep"
    fresh.own = dict(case.own) if fresh.own_dropout != "keep" else {}
    fresh.own_sites = list(fresh.own)
    if any(found.empty for found in fresh.found) and not any(found.empty for found in case.found):
        raise Discarded("a selector finds nothing any more")
    fresh.later, fresh.moves, fresh.keywords, fresh.blocks = case.later, case.moves, case.keywords, case.blocks
    variants.given_depth(fresh, maker)
    if any(not ramp for ramp in fresh.depth.values()):
        raise Discarded("a strength by depth is not told any more")
    there = dict(zip(fresh.names, (set(each.sites) for each in fresh.found), strict=True))
    fresh.changes = [each for each in case.changes if each[1] in there and set(each[3]) <= there[each[1]]]
    fresh.oracle = maker.oracle(fresh.regs, [found.sites for found in fresh.found], fresh.own, later=case.later)
    return fresh


def _smaller(maker: Maker, case: Case) -> Iterator[tuple[Program, Case]]:
    for i in range(len(case.regs)):
        if len(case.regs) > 1:
            fewer = copy.copy(case)
            fewer.regs = [*case.regs[:i], *case.regs[i + 1 :]]
            fewer.found = [*case.found[:i], *case.found[i + 1 :]]
            yield maker.program, fewer
    for plainer in _plainer(case):
        yield maker.program, plainer
    for program in _programs(maker.program):
        yield program, case


def _plainer(case: Case) -> Iterator[Case]:
    if case.penalties == "attach":
        other = copy.copy(case)
        other.penalties = "return"
        yield other
    if case.own:
        other = copy.copy(case)
        other.own, other.own_dropout, other.own_sites = {}, "keep", []
        yield other
    for field in ("blocks", "keywords", "changes"):
        if getattr(case, field):
            other = copy.copy(case)
            setattr(other, field, {"blocks": "", "keywords": False, "changes": []}[field])
            yield other
    for i, found in enumerate(case.found):
        if len(found.sites) > 1 or len(case.regs[i].pattern) > 1:
            for site in found.sites:
                other = copy.copy(case)
                kind = type(case.regs[i])
                reg = kind(case.regs[i].kind, (site,), case.regs[i].weight, case.regs[i].options)
                other.regs = [*case.regs[:i], reg, *case.regs[i + 1 :]]
                yield other


def _programs(program: Program) -> Iterator[Program]:
    """The program without one statement, without one of its outputs, with one simplification."""
    count = len(list(_all(program.root)))
    for i in reversed(range(count)):
        yield from _without(program, i)
    if len(program.root.returns) > 1:
        for i in range(len(program.root.returns)):
            smaller = copy.deepcopy(program)
            del smaller.root.returns[i]
            smaller.root.form = "one" if len(smaller.root.returns) == 1 else "tuple"
            yield smaller
    if program.root.form not in ("one", "tuple"):
        smaller = copy.deepcopy(program)
        smaller.root.form = "one" if len(smaller.root.returns) == 1 else "tuple"
        yield smaller
    for field, value in (("ties", ()), ("apart", ()), ("frozen", ())):
        if getattr(program, field):
            smaller = copy.deepcopy(program)
            setattr(smaller, field, value)
            yield smaller


def _all(body: Body) -> Iterator[tuple[Body, int]]:
    for each in [body, *bodies(body)]:
        for i in range(len(each.stmts)):
            yield each, i


def _without(program: Program, at: int) -> Iterator[Program]:
    """A statement left out: what read its value reads one of its operands."""
    smaller = copy.deepcopy(program)
    body, i = list(_all(smaller.root))[at]
    stmt = body.stmts[i]
    used = {v for s in body.stmts for v in s.ins.values()} | set(body.returns)
    if not used.intersection(stmt.outs.values()):
        del body.stmts[i]
        yield smaller
        return
    for operand in dict.fromkeys(stmt.ins.values()):
        again = copy.deepcopy(program)
        body, i = list(_all(again.root))[at]
        _replace(body, body.stmts.pop(i), operand)
        yield again


def _replace(body: Body, stmt: Stmt, operand: int) -> None:
    gone = set(stmt.outs.values())
    for other in body.stmts:
        other.ins = {letter: operand if v in gone else v for letter, v in other.ins.items()}
    body.returns = list(dict.fromkeys(operand if v in gone else v for v in body.returns))
    if body.form in ("Pair", "Both") and len(body.returns) < 2:
        body.form = "tuple"
