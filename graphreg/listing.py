"""The graphs of a backend taken together: whether each selector found something in any of them, and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from graphreg.eager import left
from graphreg.errors import NoMatchError
from graphreg.own_choice import OwnDropout, decide, table
from graphreg.parts import Part
from graphreg.plan import check_count, selected
from graphreg.regularizer import Regularizer
from graphreg.selector import Missing, Pattern, strings
from graphreg.sites import Site, columns, dtype_text, shape_text
from graphreg.trace import Traced


def union(parts: Sequence[Part]) -> Traced:
    """The sites of all graphs, each once: as it is where it is made, and hidden where any graph finds it so."""
    sites: dict[str, Site] = {}
    for part in parts:
        for site in part.traced.values:
            known = sites.get(site.name, site)
            hidden = "hidden" in (known.role, site.role)
            sites[site.name] = dataclasses.replace(known, role="hidden" if hidden else known.role, used=known.used or site.used)
    return dataclasses.replace(parts[0].traced, graphs={}, values=tuple(sites.values()))


def check_selectors(parts: Sequence[Part], regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout, missing: Missing) -> None:
    """Refuse, over all graphs of the first call, what ``plan`` refuses in one: NoMatchError, also for ``expect``."""
    whole = union(parts)
    for regularizer in regularizers.values():
        if regularizer.on == "values":
            try:
                check_count(regularizer, list(selected(whole, regularizer, missing)))
            except NoMatchError as error:
                raise NoMatchError(f"{error}{_elsewhere(whole, regularizer)}{left()}") from None
    decide(own_dropout, [own for part in parts for own in part.traced.own_dropout], whole.title, missing)


def _elsewhere(whole: Traced, regularizer: Regularizer) -> str:
    """What of the model a selector names, where the call went another way."""
    texts = [] if callable(regularizer.pattern) else [Pattern.parse(text) for text in strings(regularizer.pattern)]
    known = {label.module for site in whole.values for label in site.labels}
    paths = [p for p in whole.operations.modules if p and p not in known and any("*" not in t.name and t.path(p) for t in texts)]
    if not paths:
        return ""
    return (
        f" {paths[0]!r} is a module of {whole.title}, but no graph of the first call has it: the call went another way, or torch.compile "
        "left it to eager. missing='ignore' waits for later calls."
    )


def told(
    title: str, parts: Sequence[Part], regularizers: Mapping[str, Regularizer], weights: Mapping[str, Sequence[Site]],
    strengths: Mapping[str, float], own_dropout: OwnDropout,
) -> str:  # fmt: skip
    """A line a graph, a table of sites, a line a regularizer."""
    if not parts:
        return "no graph was captured yet: call what torch.compile made with this backend"
    edits = [(part, edit) for part in parts for edit in part.plan.edits]
    rows = [
        (
            str(part.number), e.place, e.site.op, shape_text(e.site), dtype_text(e.site),
            f"{type(e.regularizer).__name__} {e.name}", f"{strengths[e.name]:g}", e.matched,
        )
        for part, e in edits
    ]  # fmt: skip
    count = f"{len(parts)} graph{'s' * (len(parts) != 1)}"
    lines = [
        f"{title}, captured by torch.compile: {count}, {len(edits)} edits",
        columns(("graph", "code", "modes"), list(map(_graph, parts))),
    ]
    if rows:
        lines += ["", columns(("graph", "site", "op", "shape", "dtype", "regularizer", "strength", "matched by"), rows)]
    lines.append("")
    for name, regularizer in regularizers.items():
        sites = list({edit.site.name: edit.site for _, edit in edits if edit.name == name}.values()) or list(weights.get(name, ()))
        note = regularizer.note(sites, strengths[name]) if sites else ""
        lines.append(
            f"{name}: {type(regularizer).__name__} {strengths[name]:g} on {regularizer.pattern!r}, {len(sites)} "
            f"site{'s' * (len(sites) != 1)}" + (f"; {note}" if note else "")
        )
    own = list({edit.own.site.name: edit for part in parts for edit in part.plan.own}.values())
    stays = {each.site.name: each for part in parts for each in part.traced.own_dropout if each.why_not and own_dropout != "keep"}
    return "\n".join([*lines, *table(own, list(stays.values()))]).rstrip()


def _graph(part: Part) -> tuple[str, str, str]:
    place = part.place
    where = f"{place.path}.{place.code}" if place.path else place.code
    how = f"breaks at line {place.line}" if part.broken else "to its end"
    modes = {True: "train", False: "eval"}
    return str(part.number), f"{where} {how}", "/".join(dict.fromkeys(modes[mode] for mode in part.modes))
