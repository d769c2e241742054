"""Splices on parameters: at which reads of a parameter a splice acts, and the reads at which none can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from graphreg.errors import RegularizerError, listed
from graphreg.ir import ParameterRead, Pattern, Site, alias_paths, strings
from graphreg.regularizer import Splice
from graphreg.tracing import Traced

Readers = frozenset[str] | None  # the paths of the modules at whose reads a splice acts; None for every reader


def with_reads(traced: Traced, splice: Splice, sites: Sequence[Site]) -> list[Site]:
    """Return the parameters; those that a splice cannot replace, because no read of the forward is known, have ``selectable=False``."""
    read = {name for reads in traced.parameter_reads.values() for name in reads}
    named = [_named(site, splice.readers) for site in sites]
    return [s if not s.selectable or s.name in read else replace(s, selectable=False, why_not="no operation reads it") for s in named]


def _named(site: Site, kinds: tuple[str, ...]) -> Site:
    """Return the site as not selectable if none of the modules that have the parameter is of one of these classes; () for any class."""
    if not kinds or not site.selectable or any(label.op in kinds for label in site.labels):
        return site
    return replace(site, selectable=False, why_not=f"of a {site.op}, not of an {' or '.join(kinds)}")


def readers_of(traced: Traced, splice: Splice, site: Site) -> Readers:
    """Return at which reads of a selected parameter the splice acts, and check that there are such reads and that it can act there.

    A string with ``**`` in it, the selector ``*`` and a function mean every read. Any other string means the reads of the module whose
    name it matches: where a parameter is tied, the reads of other modules stay as they are. A class may also limit the readers.
    """
    readers = _readers(traced, splice, site)
    reads = [read for each in traced.parameter_reads.values() for read in each.get(site.name, ())]
    covered = [read for read in reads if read.is_by(readers)]
    who = f"{type(splice).__name__} at {site.name}"
    if not covered:
        modules = listed(sorted({repr(read.module) if read.module else "the model's own forward" for read in reads}))
        if splice.readers:
            advice = f"{type(splice).__name__} acts on what {' and '.join(splice.readers)} read. Leave the parameter out."
        else:
            advice = f"'**{site.name}' acts at every read, whichever module it is in."
        raise RegularizerError(f"{who}: the module that has the parameter does not read it; {modules} does. {advice}")
    for read in covered:
        _check_read(traced, read, who)
    return readers


def _readers(traced: Traced, splice: Splice, site: Site) -> Readers:
    labels = [label for label in site.labels if not splice.readers or label.op in splice.readers]
    patterns = [pattern for text in strings(splice.pattern) if not (pattern := Pattern.parse(text)).exclude]
    matching = [pattern for pattern in patterns if pattern.lone or pattern.find([site])]
    every = not matching or any(pattern.lone or ("**" in pattern.name and pattern.op is None) for pattern in matching)
    if every and not splice.readers:
        return None
    if not every:
        chosen = {label for pattern in matching for label, _ in pattern.labels([site])}
        labels = [label for label in labels if label in chosen] or labels
    return alias_paths(traced.operations.modules, frozenset(label.name.rpartition(".")[0] for label in labels))


def _check_read(traced: Traced, read: ParameterRead, who: str) -> None:
    """Raise RegularizerError for a read by a layer that cannot be called with another tensor in place of its parameter."""
    modules = traced.operations.modules
    owner = modules.get(read.module)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        raise RegularizerError(
            f"{who}: {read.module!r} has max_norm={owner.max_norm:g}, so it writes into its weight at each call, and the write would be "
            "lost. Leave it out, or set its max_norm to None and take the penalty max_norm."
        )
    if read.source is None and isinstance(modules.get(str(read.node.target)), torch.jit.ScriptModule):
        raise RegularizerError(f"{who}: {read.node.target!r} is compiled by torch.jit and takes no other parameters. Leave it out.")


Acting = tuple[Site, str, Readers]  # the site, the name of the splice, and the readers at whose reads it acts


def check_order(traced: Traced, splices: Sequence[Acting]) -> None:
    """Raise RegularizerError if of several splices at one parameter a later one acts at a read where an earlier one does not.

    The earlier one would then have to be computed without the later one for some reads, and after it for others.
    """
    for (site, first, earlier), (_, second, later) in _pairs(splices):
        for read in (read for each in traced.parameter_reads.values() for read in each.get(site.name, ())):
            if read.is_by(later) and not read.is_by(earlier):
                raise RegularizerError(
                    f"{second} acts where {read.module or 'the model'} reads {site.name}, and {first}, which comes before it, does not. "
                    f"Give {second} first, or let both act at the same reads."
                )


def _pairs(splices: Sequence[Acting]) -> Iterator[tuple[Acting, Acting]]:
    by_site: dict[str, list[Acting]] = {}
    for each in splices:
        by_site.setdefault(each[0].name, []).append(each)
    for there in by_site.values():
        yield from pairwise(there)


def other_readers(traced: Traced, site: Site, readers: Readers) -> tuple[str, ...]:
    """Return the paths of the modules that read the parameter as it is, because the splice acts at the reads of ``readers`` only."""
    reads = (read for each in traced.parameter_reads.values() for read in each.get(site.name, ()))
    return tuple(sorted({read.module or traced.title for read in reads if not read.is_by(readers)}))
