"""Checks that each selector matches a site in at least one graph of a backend, and makes the report over all graphs."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from graphreg.dynamo_backend.fallback import left
from graphreg.dynamo_backend.subgraph import Subgraph
from graphreg.errors import GraphRegError, NoMatchError, warn
from graphreg.ir.selector import Missing, Pattern, strings
from graphreg.ir.site import Site
from graphreg.planning.harms import harm_lines
from graphreg.planning.matching import check_count, count_sites, matching_sites, missed
from graphreg.planning.native_dropout import OwnDropout, decide, log_unmovable
from graphreg.planning.parameter_splices import readers_of
from graphreg.planning.plan import Edit
from graphreg.planning.practically_off import practically_off
from graphreg.planning.repeats import Strengths, repeat_lines, warning
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.reporting.entries import acted, entry, native_dropout_rows
from graphreg.reporting.records import Report
from graphreg.schedules import Schedule
from graphreg.session.strengths import strength_text
from graphreg.tracing.trace import Traced

log = logging.getLogger("graphreg")


def union(subgraphs: Sequence[Subgraph]) -> Traced:
    """Return a ``Traced`` with the sites of all graphs.

    A site that several graphs have is listed once, with the data that the first of them has. But it is hidden, used, a branch or on the
    trunk if it is that in any graph.
    """
    sites: dict[str, Site] = {}
    for subgraph in subgraphs:
        for site in subgraph.traced.values:
            known = sites.get(site.name, site)
            role = "hidden" if "hidden" in (known.role, site.role) else known.role
            anywhere = {name: getattr(known, name) or getattr(site, name) for name in ("used", "branch", "trunk")}
            sites[site.name] = dataclasses.replace(known, role=role, **anywhere)
    graphs = {str(subgraph.number): graph for subgraph in subgraphs for graph in subgraph.traced.graphs.values()}
    notes = (f"torch.compile captured {len(subgraphs)} graph{'s' * (len(subgraphs) != 1)}",)
    return dataclasses.replace(subgraphs[0].traced, graphs=graphs, values=tuple(sites.values()), notes=notes)


@contextmanager
def for_compiled() -> Iterator[None]:
    """Within the context, errors name the call that lists the sites of a compiled model, for which ``names(model)`` may fail."""
    try:
        yield
    except GraphRegError as error:
        text = str(error).replace("graphreg.names(model)", "graphreg.names(compiled_model)")
        raise (type(error)(text) if text != str(error) else error) from error.__cause__


def check_selectors(
    subgraphs: Sequence[Subgraph], regularizers: Mapping[str, Regularizer], own_dropout: OwnDropout, missing: Missing
) -> None:
    """Check the selectors and ``own_dropout`` over all graphs of the first call, as ``plan`` checks them in one graph.

    Raises:
        NoMatchError: A selector matches no site, or another number of sites than ``expect`` says.
    """
    united = union(subgraphs)
    for regularizer in regularizers.values():
        if regularizer.on == "values" or isinstance(regularizer, Splice):
            try:
                sites = list(matching_sites(united, regularizer, missing))
                check_count(regularizer, sites)
                if isinstance(regularizer, Splice) and regularizer.on == "parameters":
                    # It raises if the splice acts at no read of the parameter, in none of the
                    # graphs.
                    for site in sites:
                        readers_of(united, regularizer, site)
            except NoMatchError as error:
                raise NoMatchError(f"{error}{_elsewhere(united, regularizer)}{left()}") from None
    weights = {name: float(regularizer.weight) for name, regularizer in regularizers.items()}
    if again := warning([repeat for subgraph in subgraphs for repeat in subgraph.plan.repeats], regularizers, united.values, weights):
        warn(again)
    for name, regularizer in regularizers.items():
        on_weights = isinstance(regularizer, Penalty) and regularizer.on == "parameters"
        if on_weights and (note := _caution(regularizer, list(matching_sites(united, regularizer, "ignore")))):
            log.warning("%s: %s", name, note)
    for line in harm_lines(_acts(edit for subgraph in subgraphs for edit in subgraph.plan.edits), weights):
        log.warning("%s", line)
    native = [dropout for subgraph in subgraphs for dropout in subgraph.traced.native_dropout]
    _, unmovable = decide(own_dropout, native, united.title, missing, united.values)
    log_unmovable(unmovable)


def _caution(regularizer: Regularizer, sites: Sequence[Site]) -> str:
    return regularizer.caution(sites, len(sites)) if isinstance(regularizer, Penalty) and sites else ""


def _acts(edits: Iterable[Edit]) -> list[tuple[Site, str, Regularizer]]:
    return [(site, edit.name, edit.regularizer) for edit in edits for site in edit.sites]


def _elsewhere(united: Traced, regularizer: Regularizer) -> str:
    """Return a sentence for the error if the selector names a module of which no graph of the first call has a value; else ``""``."""
    texts = [] if callable(regularizer.pattern) else [Pattern.parse(text) for text in strings(regularizer.pattern)]
    known = {label.module for site in united.values for label in site.labels}
    paths = [p for p in united.operations.modules if p and p not in known and any("*" not in t.name and t.path(p) for t in texts)]
    if not paths:
        return ""
    return (
        f" {paths[0]!r} is a module of {united.title}, but no graph of the first call has it: the call did not run it, or torch.compile "
        "left it to eager. missing='ignore' waits for later calls."
    )


def backend_report(
    title: str, subgraphs: Sequence[Subgraph], regularizers: Mapping[str, Regularizer], strengths: Strengths, given: Mapping[str, float]
) -> Report:  # fmt: skip
    """Make the report of a backend.

    ``given``: the strengths for all sites as the user set them, numbers or schedules; ``strengths``: the present ones, as
    ``strengths_now`` returns them.

    The report is like the report of a rewritten module, but it has a table of graphs. It has no costs, because these depend on which
    tensors the compiler saves for backward.
    """
    if not subgraphs:
        advice = ("call the model that was compiled with this backend",)
        return Report(title or "a backend", "which has captured no graph yet", (), (), notes=advice)
    united, entries = union(subgraphs), []
    totals = count_sites(united)
    weights = list[Edit]()
    for name, regularizer in regularizers.items():
        # no graph's plan has a penalty on parameters: the call computes it once, in whichever graph
        # comes first
        if regularizer.on == "parameters" and not isinstance(regularizer, Splice):
            weights += [Edit(site, name, regularizer, text) for site, text in matching_sites(united, regularizer, "ignore").items()]
    edits = [*(edit for subgraph in subgraphs for edit in subgraph.plan.edits), *weights]
    there = {(edit.name, edit.site.name) for edit in edits}
    differing = {key[0]: strength_text(key[0], strengths) for key in strengths if isinstance(key, tuple)}
    for name, regularizer in regularizers.items():
        schedule = f"schedule {given[name]!r}" if isinstance(given[name], Schedule) else ""
        once = {site.name: site for edit in edits if edit.name == name for site in edit.sites}
        faint = practically_off(regularizer, [(site, strengths.get((name, site.name), strengths[name])) for site in once.values()])
        faint = _caution(regularizer, list(once.values())) or faint
        notes, by_site = [schedule, faint], differing.get(name, "")
        entries.append(entry(name, regularizer, list(once.values()), strengths[name], totals, None, notes, by_site))
    edited = {edit.dropout.site.name: edit for subgraph in subgraphs for edit in subgraph.plan.native_dropout}
    native = {dropout.site.name: dropout for subgraph in subgraphs for dropout in subgraph.traced.native_dropout}
    unedited = [dropout for name, dropout in native.items() if dropout.when != "never" and dropout.rate != 0 and name not in edited]
    repeats = [repeat for subgraph in subgraphs for repeat in subgraph.plan.repeats]
    sites = [site for subgraph in subgraphs for site in acted(subgraph.plan.edits, strengths, there, subgraph.number)]
    return Report(
        title, f"captured by torch.compile in {len(subgraphs)} graph{'s' * (len(subgraphs) != 1)}", tuple(entries),
        (*sites, *acted(weights, strengths, there)), native_dropout_rows(edited.values(), unedited), tuple(map(_graph, subgraphs)),
        totals.parameters.sites, notes=(*repeat_lines(repeats, regularizers, strengths), *harm_lines(_acts(edits), strengths)),
        no_cost="the compiler decides what it keeps",
        missed={name: lost for name, regularizer in regularizers.items() if (lost := missed(united, regularizer))},
    )  # fmt: skip


def _graph(subgraph: Subgraph) -> tuple[str, str, str]:
    place = subgraph.place
    where = f"{place.path}.{place.code}" if place.path else place.code
    how = f"breaks at line {place.line}" if subgraph.broken else "to its end"
    modes = {True: "train", False: "eval"}
    return str(subgraph.number), f"{where} {how}", "/".join(dict.fromkeys(modes[mode] for mode in subgraph.modes))
