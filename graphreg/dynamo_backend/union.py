"""Looks at all graphs of a backend together: whether each selector matches a site in any of them, and the report of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from graphreg.dynamo_backend.fallback import left
from graphreg.dynamo_backend.subgraph import Part
from graphreg.errors import NoMatchError, warn
from graphreg.ir import Missing, Pattern, Site, strings
from graphreg.planning import Edit, OwnDropout, check_count, count_sites, decide, lines, matching_sites, missed, warning
from graphreg.regularizer import Regularizer
from graphreg.reporting import Report, acted, entry, own_rows
from graphreg.tracing import Traced


def union(parts: Sequence[Part]) -> Traced:
    """Return a ``Traced`` with the sites of all graphs, each once, as the first graph has it, but hidden if it is so in any graph."""
    sites: dict[str, Site] = {}
    for part in parts:
        for site in part.traced.values:
            known = sites.get(site.name, site)
            hidden = "hidden" in (known.role, site.role)
            sites[site.name] = dataclasses.replace(known, role="hidden" if hidden else known.role, used=known.used or site.used)
    return dataclasses.replace(parts[0].traced, graphs={}, values=tuple(sites.values()))


def check_selectors(parts: Sequence[Part], regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout, missing: Missing) -> None:
    """Check the selectors over all graphs of the first call, as ``plan`` checks them in one: raises NoMatchError, also for ``expect``."""
    whole = union(parts)
    for regularizer in regularizers.values():
        if regularizer.on == "values":
            try:
                check_count(regularizer, list(matching_sites(whole, regularizer, missing)))
            except NoMatchError as error:
                raise NoMatchError(f"{error}{_elsewhere(whole, regularizer)}{left()}") from None
    if again := warning([repeat for part in parts for repeat in part.plan.repeats], regularizers, whole.values):
        warn(again)
    decide(own_dropout, [own for part in parts for own in part.traced.own_dropout], whole.title, missing, whole.values)


def _elsewhere(whole: Traced, regularizer: Regularizer) -> str:
    """Explain, as a sentence, that a selector names a module that no graph of the first call has; empty if it does not."""
    texts = [] if callable(regularizer.pattern) else [Pattern.parse(text) for text in strings(regularizer.pattern)]
    known = {label.module for site in whole.values for label in site.labels}
    paths = [p for p in whole.operations.modules if p and p not in known and any("*" not in t.name and t.path(p) for t in texts)]
    if not paths:
        return ""
    return (
        f" {paths[0]!r} is a module of {whole.title}, but no graph of the first call has it: the call went another way, or torch.compile "
        "left it to eager. missing='ignore' waits for later calls."
    )


def told(title: str, parts: Sequence[Part], regularizers: Mapping[str, Regularizer], strengths: Mapping[str, float]) -> Report:
    """Make the report of a backend: like that of a module, with a table of graphs. It has no cost: the compiler decides what it keeps."""
    if not parts:
        called = ("call what torch.compile made with this backend",)
        return Report(title or "a backend", "which has captured no graph yet", (), (), notes=called)
    whole, entries = union(parts), []
    there_is = count_sites(whole)
    weights = [edit for name, regularizer in regularizers.items() for edit in _on_parameters(name, regularizer, whole)]
    edits = [*(edit for part in parts for edit in part.plan.edits), *weights]
    there = {(edit.name, edit.site.name) for edit in edits}
    for name, regularizer in regularizers.items():
        once = {site.name: site for edit in edits if edit.name == name for site in edit.sites}
        entries.append(entry(name, regularizer, list(once.values()), strengths[name], there_is))
    own = {edit.dropout.site.name: edit for part in parts for edit in part.plan.native_dropout}
    kept = {each.site.name: each for part in parts for each in part.traced.own_dropout if each.when != "never" and each.rate != 0}
    return Report(
        title, f"captured by torch.compile in {len(parts)} graph{'s' * (len(parts) != 1)}", tuple(entries),
        (*(site for part in parts for site in acted(part.plan.edits, strengths, there, part.number)), *acted(weights, strengths, there)),
        own_rows(own.values(), [each for name, each in kept.items() if name not in own]), tuple(map(_graph, parts)),
        there_is.parameters.sites, notes=tuple(lines([repeat for part in parts for repeat in part.plan.repeats], regularizers, strengths)),
        no_cost="the compiler decides what it keeps",
        missed={name: lost for name, regularizer in regularizers.items() if (lost := missed(whole, regularizer))},
    )  # fmt: skip


def _on_parameters(name: str, regularizer: Regularizer, whole: Traced) -> list[Edit]:
    """Return the edits of a penalty on parameters, which are in no graph's plan."""
    found = matching_sites(whole, regularizer, "ignore") if regularizer.on == "parameters" else {}
    return [Edit(site, name, regularizer, text) for site, text in found.items()]


def _graph(part: Part) -> tuple[str, str, str]:
    place = part.place
    where = f"{place.path}.{place.code}" if place.path else place.code
    how = f"breaks at line {place.line}" if part.broken else "to its end"
    modes = {True: "train", False: "eval"}
    return str(part.number), f"{where} {how}", "/".join(dict.fromkeys(modes[mode] for mode in part.modes))
