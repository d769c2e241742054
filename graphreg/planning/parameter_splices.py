"""Finds the reads of a parameter at which a splice acts, and refuses the reads at which no splice can act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import nn

from graphreg.errors import RegularizerError, listed
from graphreg.ir.metadata import own_name
from graphreg.ir.parameter_reads import ParameterRead, alias_paths
from graphreg.ir.selector import Pattern, strings
from graphreg.ir.site import Label, Site
from graphreg.planning.native_dropout import NativeDropoutEdit
from graphreg.regularizer.base import Splice
from graphreg.tracing.trace import Traced

# the paths of the modules at whose reads a splice acts; None for every reader
Readers = frozenset[str] | None


def with_reads(traced: Traced, splice: Splice, sites: Sequence[Site]) -> list[Site]:
    """Return copies of parameter sites, in which ``selectable``, ``why_not`` and ``reads`` are set as this splice needs them.

    ``Site.reads`` of an embedding's table is the name of the input that holds the indices. A
    parameter is not selectable if no operation reads it, or if no module that has it is of a class
    in the splice's ``readers``.
    """
    read = {name for reads in traced.parameter_reads.values() for name in reads}
    inputs = {value.module: value.reads for value in traced.values if value.reads}
    known = []
    for site in sites:
        labels = _labels(traced, splice, site)
        why_not = "" if labels else f"of a {site.op}, not of {' or '.join(kind.__name__ for kind in splice.readers)}"
        why_not = site.why_not or why_not or ("" if site.name in read else "no operation reads it")
        reads = next((inputs[owner] for label in labels if (owner := _owner(label)) in inputs), "")
        known.append(replace(site, selectable=not why_not, why_not=why_not, reads=reads))
    return known


def _labels(traced: Traced, splice: Splice, site: Site) -> list[Label]:
    """Return the labels of a parameter whose module is of a class in the splice's ``readers``; all labels if ``readers`` is empty."""
    modules = traced.operations.modules
    return [label for label in site.labels if not splice.readers or isinstance(modules[_owner(label)], splice.readers)]


def _owner(label: Label) -> str:
    return label.name.rpartition(".")[0]


def readers_of(traced: Traced, splice: Splice, site: Site) -> Readers:
    """Return the paths of the modules at whose reads of a selected parameter the splice acts; None if it acts at every read.

    The selector ``*``, a function, and a string with ``**`` and without ``@`` mean every read. Any
    other string means the reads of the module in which it matches the parameter: if the parameter
    is tied, the reads of other modules are not replaced. The splice's ``readers`` may exclude more
    reads.

    Raises:
        RegularizerError: None of these modules reads the parameter, or the splice cannot act at one
            of the reads.
    """
    readers = _readers(traced, splice, site)
    reads = list(_reads_of(traced, site))
    covered = [read for read in reads if read.is_by(readers)]
    who = f"{type(splice).__name__} at {site.name}"
    if not covered:
        modules = listed(sorted({repr(read.module) if read.module else "the model's own forward" for read in reads}))
        if splice.readers:
            kinds = " and ".join(kind.__name__ for kind in splice.readers)
            advice = f"{type(splice).__name__} acts only where modules of the classes {kinds} read. Leave the parameter out."
        else:
            advice = f"'**{site.name}' acts at every read, whichever module it is in."
        raise RegularizerError(f"{who}: the module that has the parameter does not read it; {modules} does. {advice}")
    for read in covered:
        _check_read(traced, read, who)
    return readers


def _readers(traced: Traced, splice: Splice, site: Site) -> Readers:
    labels = _labels(traced, splice, site)
    # A string that excludes, such as '!fc.*', names no module at whose reads to act.
    patterns = [pattern for text in strings(splice.pattern) if not (pattern := Pattern.parse(text)).exclude]
    matching = [pattern for pattern in patterns if pattern.lone or pattern.find([site])]
    every = not matching or any(pattern.lone or ("**" in pattern.name and pattern.op is None) for pattern in matching)
    if every and not splice.readers:
        return None
    if not every:
        chosen = {label for pattern in matching for label, _ in pattern.labels([site])}
        labels = [label for label in labels if label in chosen] or labels
    # A module with several paths may read under any of them.
    return alias_paths(traced.operations.modules, frozenset(map(_owner, labels)))


def _check_read(traced: Traced, read: ParameterRead, who: str) -> None:
    """Raise RegularizerError for a read by a layer that cannot be called with another tensor in place of its parameter."""
    if read.source is None and traced.operations.is_opaque(read.node):
        path = str(read.node.target)
        reason = traced.opaque_modules.get(path, "")
        raise RegularizerError(
            f"{who}: {path!r} is an opaque module{f' ({reason})' if reason else ''}, so it is not known when its code reads the parameter: "
            "checkpointing, for example, reads it again in backward, where it would not be replaced. Leave the parameter out, or give "
            "example_inputs, with which graphreg can see into more modules."
        )
    modules = traced.operations.modules
    owner = modules.get(read.module)
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        raise RegularizerError(
            f"{who}: {read.module!r} has max_norm={owner.max_norm:g}, so it writes into its weight at each call, and the write would be "
            "lost. Leave the parameter out, or set the module's max_norm to None and use the penalty max_norm."
        )


# the site, the name of the splice, and the readers at whose reads it acts
Acting = tuple[Site, str, Readers]


def check_order(traced: Traced, splices: Sequence[Acting]) -> None:
    """Raise RegularizerError if a splice acts at a read of a parameter where an earlier splice at the same parameter does not.

    The later splice would then need two results: one computed after the earlier splice, and one
    computed without it.
    """
    for (site, first, earlier), (_, second, later) in _pairs(splices):
        for read in _reads_of(traced, site):
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


def check_calls(traced: Traced, splices: Sequence[Acting], native: Sequence[NativeDropoutEdit]) -> None:
    """Raise RegularizerError if a splice and ``own_dropout=`` would both replace the same call, such as a call of attention."""
    chosen = {edit.dropout.site.name for edit in native}
    for site, name, readers in splices if chosen else ():
        for read in _reads_of(traced, site):
            # Without a node of its own for the read, the call of the layer is what the splice
            # replaces.
            if read.source is None and own_name(read.node) in chosen and read.is_by(readers):
                raise RegularizerError(
                    f"{name} acts on {site.name} in the call of {read.node.target!r}, whose dropout own_dropout= replaces, but a call can "
                    "be replaced only once. Leave the parameter out, or keep this dropout."
                )


def replaced_reads(traced: Traced, splice: Splice, site: Site) -> tuple[Readers, tuple[str, ...]] | None:
    """Return the readers at whose reads of a parameter the splice acts, and the paths of the modules that read the original parameter.

    Return None if ``traced`` is one of several graphs that Dynamo captured of a model, and the
    splice acts at no read in this graph.
    """
    readers = _readers(traced, splice, site)
    if traced.whole or any(read.is_by(readers) for read in _reads_of(traced, site)):
        readers = readers_of(traced, splice, site)
        return readers, tuple(sorted({read.module or traced.title for read in _reads_of(traced, site) if not read.is_by(readers)}))
    return None


def _reads_of(traced: Traced, site: Site) -> Iterator[ParameterRead]:
    for reads in traced.parameter_reads.values():
        yield from reads.get(site.name, ())
