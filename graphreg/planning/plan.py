"""``plan`` decides every edit before anything changes, and returns a ``Plan``, which prints as a table.

``plan`` matches the selectors of all regularizers to the sites of a traced model, and checks the selected sites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from graphreg.errors import GraphRegError, RegularizerError, RenamedAttributes, listed, shown, warn
from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.selector import Missing, Selector, escaped, unmatched
from graphreg.ir.site import Site, dtype_text, shape_text
from graphreg.ir.terminal import Lines, Paragraph, Printed
from graphreg.ir.text_table import Table
from graphreg.ir.time_steps import Steps
from graphreg.ir.units import Units
from graphreg.planning.blocks import called_blocks, check_layers, lost_to_checkpoints
from graphreg.planning.dependence import DependenceSlice, dependence_slice
from graphreg.planning.depth import strengths_by_depth
from graphreg.planning.harms import harm_lines
from graphreg.planning.kept import KEEP, Keep, KeptValue, check_keep, kept_values, missed_values
from graphreg.planning.kept import kept_table as table_of_kept
from graphreg.planning.keywords import instances
from graphreg.planning.matching import (
    SiteCounts,
    check_count,
    check_shapes,
    check_sites,
    check_trainable,
    count_sites,
    matching_sites,
    missed,
)
from graphreg.planning.model_inputs import check_model_inputs
from graphreg.planning.module_inputs import check_cells, module_inputs
from graphreg.planning.native_dropout import (
    OWN_DROPOUT,
    NativeDropoutEdit,
    OwnDropout,
    decide,
    native_dropout_table,
    rates_are_scheduled,
    read_option,
)
from graphreg.planning.parameter_splices import Readers, check_calls, check_order, replaced_reads
from graphreg.planning.practically_off import practically_off
from graphreg.planning.repeats import Repeat, Strengths, lines_beside_native, repeat_lines, repeats, warning
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.by_depth import ByDepth
from graphreg.regularizer.model_inputs import inputs_text
from graphreg.regularizer.sequences import sequences, splice_steps
from graphreg.regularizer.units import units_at, units_note
from graphreg.schedules import Schedule
from graphreg.tracing.trace import Traced


@dataclass(frozen=True)
class Edit:
    """One regularizer at one site.

    Attributes:
        site: The site; if the calls of a recurrent cell are the steps of a sequence, the site of the first call.
        name: The regularizer's name in the plan.
        regularizer: The regularizer.
        matched: The string of the selector that matched the site; for a selector that is a function, the function's name.
        occurrence: How many edits before this one act at the same site with a regularizer of the same class.
        steps: How to read the value as a sequence, for a regularizer that needs the axis of time or of the batch; None for others.
        units: Which axis of the value has the units, for a penalty that compares units; None for other regularizers.
        at_depth: The strength at the site, a number or a schedule, if it differs by depth; None if it is the regularizer's ``weight``.
        module_input: For a splice that takes ``module_input``, the name of the value that the site's module gets; else None.
        readers: For a splice on a parameter, the paths of the modules at whose reads it acts; None if it acts at every read.
        other_readers: For a splice on a parameter, the paths of the modules at whose reads it does not act.
        other_calls: If the selector is the name of a module that is called several times, the values of calls that it does not select.
    """

    site: Site
    name: str
    regularizer: Regularizer
    matched: str
    occurrence: int = 0
    steps: Steps | None = None
    units: Units | None = None
    at_depth: float | None = None
    module_input: str | None = None
    readers: Readers = None
    other_readers: tuple[str, ...] = ()
    other_calls: tuple[str, ...] = ()

    @property
    def weight(self) -> float:
        """The strength at the site."""
        return self.regularizer.weight if self.at_depth is None else self.at_depth

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites where the edit acts: ``site`` alone, or the sites of all calls of a recurrent cell."""
        return self.steps.calls if self.steps and self.steps.calls else (self.site,)

    @property
    def replaces_parameter(self) -> bool:
        """Whether the edit is a splice on a parameter."""
        return self.site.kind == "parameter" and isinstance(self.regularizer, Splice)

    @property
    def place(self) -> str:
        """The site's name as tables show it. For a recurrent cell, the number of its calls follows."""
        return f"{self.site.name} ({len(self.sites)} calls)" if self.steps and self.steps.calls else self.site.name


@dataclass(frozen=True, repr=False)
class Plan(Printed, RenamedAttributes):
    """All edits of all regularizers; it prints as a table.

    Attributes:
        title: The model's name.
        regularizers: The regularizers by their final names, in order.
        edits: One edit for each regularizer at each of its sites.
        slices: The dependence slices of penalties on derivatives, by the penalty's name.
        native_dropout: What to do with native dropout.
        unmovable: Native dropouts that ``own_dropout`` selects but that cannot draw from graphreg's streams.
        site_counts: How many sites of the model can be selected.
        missed: The strings of selectors that match nothing, by the regularizer's name, or by ``"own_dropout"`` or ``"keep"`` for these
            options. Empty with ``missing="error"``.
        repeats: Values that splices of one kind act on several times in a row.
        missing: The option ``missing`` of ``plan``.
        own_dropout: The option ``own_dropout`` of ``plan``.
        blocks: The paths of the blocks, which the rewritten module still calls as modules: those that ``blocks=`` selects, and those that
            checkpoint their own forward.
        unasked: The paths of the blocks that ``blocks=`` does not select.
        in_whole: For a stage of a pipeline, by mode, then by penalty: over how many sites of the whole model the penalty is a mean.
        resting: Why the model may train nothing for a while, such as "adapters are disabled"; "" if it trains. See ``plan``.
        keep: The option ``keep`` of ``plan``.
        kept: The values that a call returns beside output and penalties.
        traced: The traced model that the plan is for; None in the plan that a rewritten module stores.
    """

    renamed: ClassVar[Mapping[str, str]] = {"cones": "slices", "own": "native_dropout", "stays": "unmovable", "census": "site_counts"}
    title: str
    regularizers: Mapping[str, Regularizer]
    edits: tuple[Edit, ...]
    slices: Mapping[str, DependenceSlice] = field(default_factory=dict)
    native_dropout: tuple[NativeDropoutEdit, ...] = ()
    unmovable: tuple[NativeDropout, ...] = ()
    site_counts: SiteCounts = field(default_factory=SiteCounts)
    missed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    repeats: tuple[Repeat, ...] = ()
    missing: Missing = "error"
    own_dropout: OwnDropout = "keep"
    blocks: tuple[str, ...] = ()
    unasked: tuple[str, ...] = ()
    in_whole: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    resting: str = ""
    keep: Keep | None = None
    kept: tuple[KeptValue, ...] = ()
    traced: Traced | None = field(default=None, repr=False, compare=False)

    def of(self, name: str) -> tuple[Edit, ...]:
        """Return the edits of one regularizer."""
        return tuple(edit for edit in self.edits if edit.name == name)

    def strength_sites(self, name: str) -> dict[str, Site]:
        """Return, by name, the sites at which a strength can be set; for ``own_dropout``, those of native dropouts with a schedule."""
        # A regularizer may have been given this very name.
        if name == OWN_DROPOUT and name not in self.regularizers:
            return {edit.dropout.site.name: edit.dropout.site for edit in self.native_dropout if edit.is_scheduled}
        return {edit.site.name: edit.site for edit in self.of(name)}

    def planned_strengths(self, name: str) -> dict[str, float]:
        """Return the planned strength at each site that has one of its own; empty if the formula takes all sites at once."""
        if name not in self.regularizers:
            rates = {edit.dropout.site.name: edit.rate for edit in self.native_dropout if edit.is_scheduled}
            return {site: rate for site, rate in rates.items() if rate is not None}
        return {edit.site.name: edit.weight for edit in self.of(name)} if self.regularizers[name].by_site else {}

    @property
    def penalties(self) -> list[str]:
        """The names of the regularizers that have an entry in the penalties of a call."""
        return [name for name, regularizer in self.regularizers.items() if regularizer.has_penalty() and not regularizer.by_prox]

    @property
    def is_scheduled(self) -> bool:
        """Whether some strength changes while the model trains, so that the rewritten module has a clock."""
        return any(r.is_scheduled for r in self.regularizers.values()) or rates_are_scheduled(self.own_dropout)

    @property
    def blocks_text(self) -> str:
        """The number of blocks and their paths, and which of them no selector asked for."""
        unasked = f"; these checkpoint their own forward: {', '.join(self.unasked)}" if self.unasked else ""
        return f"{len(self.blocks)} block{'s' * (len(self.blocks) != 1)}: {', '.join(self.blocks)}{unasked}"

    @property
    def asked_blocks(self) -> tuple[str, ...]:
        """Strings for ``blocks=`` that select the same blocks again."""
        return tuple(escaped(path) for path in self.blocks if path not in self.unasked)

    @cached_property
    def by_site(self) -> dict[str, list[Edit]]:
        """The edits at each site, by the site's name, in order."""
        by_site: dict[str, list[Edit]] = {}
        for edit in self.edits:
            for site in edit.sites:
                by_site.setdefault(site.name, []).append(edit)
        return by_site

    @cached_property
    def tracked(self) -> dict[str, list[str]]:
        """The names of the penalties that differentiate with respect to the value of a site, by the site's name."""
        tracked: dict[str, list[str]] = {}
        for name, slice_ in self.slices.items():
            for site in slice_.wrt:
                tracked.setdefault(site.name, []).append(name)
        return tracked

    def note(self, name: str) -> str:
        """Describe what the table leaves out: ``wrt``, unreplaced reads, other calls, how a strength depends on depth, axes of units."""
        calls = [f"not at {listed(e.other_calls)}, further calls of {e.matched}" for e in self.of(name) if e.other_calls]
        if name in self.slices:
            return "; ".join(filter(None, (*calls, self.slices[name].note(), inputs_text(self.regularizers[name]))))
        stays = [f"{e.site.name} is not replaced when read by {listed(e.other_readers)}" for e in self.of(name) if e.other_readers]
        depth = f"weight {self.regularizers[name].weight!r}" if any(edit.at_depth is not None for edit in self.of(name)) else ""
        read_as = [(edit.site.name, edit.units) for edit in self.of(name) if edit.units is not None]
        given = inputs_text(self.regularizers[name])
        return "; ".join(filter(None, (listed(stays), *calls, depth, units_note(read_as) if read_as else "", given)))

    @cached_property
    def faint(self) -> dict[str, str]:
        """A note for each penalty whose strength is practically off, by its name; not for those of ``cautions``, which say more."""
        notes = {n: practically_off(r, [(e.site, e.weight) for e in self.of(n)], self.whole(n)) for n, r in self.regularizers.items()}
        return {name: note for name, note in notes.items() if note and name not in self.cautions}

    @cached_property
    def cautions(self) -> dict[str, str]:
        """What penalties warn of by ``Penalty.caution``, by name."""
        penalties = {name: (r, [e.site for e in self.of(name)]) for name, r in self.regularizers.items() if isinstance(r, Penalty)}
        notes = {name: r.caution(sites, self.whole(name) or len(sites)) for name, (r, sites) in penalties.items() if sites}
        return {name: note for name, note in notes.items() if note}

    @property
    def off_text(self) -> str:
        """Say why the model may train nothing for a while, and which regularizers therefore add nothing; "" if it trains."""
        idle = [name for name in self.regularizers if not self.of(name)]
        what = f", so {listed(idle)} add{'s' * (len(idle) == 1)} nothing" if idle else ""
        return f"{self.resting}{what}" if self.resting else ""

    def whole(self, name: str) -> int:
        """Return over how many sites of the whole model a penalty is a mean; 0 if the plan is not for a stage of a pipeline."""
        return next(iter(self.in_whole.values()), {}).get(name, 0)

    def splices(self, site: str) -> tuple[Edit, ...]:
        """Return the edits at a site that replace its value."""
        return tuple(edit for edit in self.by_site.get(site, ()) if isinstance(edit.regularizer, Splice))

    def reads_replaced(self, site: str) -> bool:
        """Whether autograd saves what replaces a site's value, because a penalty reads it or differentiates with respect to the value."""
        edits = self.by_site.get(site, ())
        after = any(isinstance(edit.regularizer, Penalty) and not edit.regularizer.clean for edit in edits)
        return (after and bool(self.splices(site))) or site in self.tracked

    def _blocks(self) -> Iterator[Paragraph]:
        count, edits = len(self.regularizers), f"{len(self.edits)} edit{'s' * (len(self.edits) != 1)}"
        yield Lines((f"{self.title}: {edits} by {count} regularizer{'s' * (count != 1)}",), "bold")
        rows = list[tuple[str, ...]]()
        for edit in self.edits:
            where = (edit.place, edit.site.op, shape_text(edit.site), dtype_text(edit.site))
            rows.append((*where, f"{type(edit.regularizer).__name__} {edit.name}", f"{edit.weight:g}", edit.matched))
        yield Table(("site", "op", "shape", "dtype", "regularizer", "weight", "matched by"), tuple(rows))
        remarks = ((name, note) for name in self.regularizers for note in (self.note(name), self.faint.get(name), self.cautions.get(name)))
        notes = (f"{name}: {note}" for name, note in remarks if note)
        yield Lines((*notes, *self.repeated(), *self.harms()))
        yield from native_dropout_table(self.native_dropout, self.unmovable)
        yield from table_of_kept(self.kept)
        missed = (f"{name}: {', '.join(map(repr, texts))} matches nothing" for name, texts in self.missed.items())
        yield Lines((*([self.blocks_text] if self.blocks else []), *filter(None, [self.off_text]), *missed))

    def repeated(self, strengths: Strengths | None = None) -> list[str]:
        """Return lines about values that splices act on several times in a row. ``strengths``: by default, those of the plan."""
        return repeat_lines(self.repeats, self.regularizers, strengths or _planned(self.regularizers, self.edits))

    def harms(self, strengths: Strengths | None = None) -> list[str]:
        """Return a line for each kind of known harm that dropout and noise do. ``strengths``: by default, those of the plan."""
        acts = [(site, edit.name, edit.regularizer) for edit in self.edits for site in edit.sites]
        return harm_lines(acts, strengths or _planned(self.regularizers, self.edits))

    @cached_property
    def beside_native(self) -> list[str]:
        """Those of the lines of ``repeated`` that are about native dropout."""
        return lines_beside_native(self.repeats, self.regularizers, _planned(self.regularizers, self.edits))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data that JSON can hold.

        Its keys: ``title``, ``regularizers``, ``edits``, ``derivatives``, ``own_dropout``, ``stays``, ``missed``, ``repeats``,
        ``harms``, ``blocks``, ``kept``.
        """
        return {
            "title": self.title,
            "regularizers": {name: regularizer.to_dict() for name, regularizer in self.regularizers.items()},
            "edits": [
                {"regularizer": e.name, "matched": e.matched, "sites": [site.to_dict() for site in e.sites]}
                | ({} if e.at_depth is None else {"weight": str(e.at_depth) if isinstance(e.at_depth, Schedule) else e.at_depth})
                for e in self.edits
            ],
            "derivatives": {name: slice_.note() for name, slice_ in self.slices.items()},
            "own_dropout": [{"site": e.dropout.site.name, "becomes": e.action, "matched": e.matched} for e in self.native_dropout],
            "stays": [dropout.text for dropout in self.unmovable],
            "missed": {name: list(texts) for name, texts in self.missed.items()},
            "repeats": [list(repeat.sites) for repeat in self.repeats],
            "harms": self.harms(),
            "blocks": list(self.blocks),
            "kept": [
                {"name": each.name, "form": each.form, "matched": each.matched, "sites": [s.to_dict() for s in each.calls or (each.site,)]}
                for each in self.kept
            ],
        }


def plan(
    traced: Traced,
    regularizers: Regularizer | Iterable[Regularizer],
    missing: Missing = "error",
    own_dropout: OwnDropout = "keep",
    blocks: Selector | None = None,
    resting: str = "",
    keep: Keep | None = None,
) -> Plan:
    """Make a plan. Warn if splices of one kind act on one value several times in a row, and if checkpoints hide sites from a selector.

    ``graphreg.plan`` in ``pipeline.py`` describes the arguments. With ``resting``, the model's adapters are disabled or all of its
    parameters are frozen, and there is a plan for the model as it trains: no selector has to match, and a penalty on parameters that are
    all frozen has no site.
    """
    # The plan of the model as it trains has complained of what is missing.
    made = plan_quietly(traced, regularizers, "ignore" if resting else missing, own_dropout, blocks, resting, keep)
    repeated = warning(made.repeats, made.regularizers, traced.values, _planned(made.regularizers, made.edits))
    for message in filter(None, (repeated, lost_to_checkpoints(traced, made.regularizers))):
        warn(message)
    return made


def plan_quietly(
    traced: Traced,
    regularizers: Regularizer | Iterable[Regularizer],
    missing: Missing = "error",
    own_dropout: OwnDropout = "keep",
    blocks: Selector | None = None,
    resting: str = "",
    keep: Keep | None = None,
) -> Plan:
    """Make the same plan as ``plan``, without the two warnings of ``plan``."""
    if not isinstance(traced, Traced):
        raise RegularizerError(f"plan takes what graphreg.trace(model) gives, not {type(traced).__name__}.")
    check_missing(missing)
    check_keep(keep)
    own_dropout = read_option(own_dropout)
    named = named_once(instances(regularizers))
    edits: list[Edit] = []
    seen: Counter[tuple[str, type]] = Counter()
    repeated = _repeated_calls(traced.values)
    for name, regularizer in named.items():
        chosen = _select(traced, regularizer, missing, bool(resting))
        depths = strengths_by_depth(traced, regularizer, list(chosen)) if isinstance(regularizer.weight, ByDepth) else {}
        texts = {site: text for site, (text, _, _) in chosen.items()}
        inputs = module_inputs(traced, regularizer, texts) if "module_input" in regularizer.takes else {}
        for site, (text, steps, units) in chosen.items():
            kind = type(regularizer)
            more: dict[str, Any] = {"at_depth": depths.get(site), "module_input": inputs.get(site)}
            if text in repeated:
                selected = {each.name for other, (_, by, _) in chosen.items() for each in (other, *(by.calls if by else ()))}
                more["other_calls"] = tuple(call.name for call in repeated[text] if call.name not in selected)
            if regularizer.on == "parameters" and isinstance(regularizer, Splice):
                reads = replaced_reads(traced, regularizer, site)
                if reads is None:  # the splice acts only at reads in other graphs that Dynamo captured
                    continue
                more |= {"readers": reads[0], "other_readers": reads[1]}
            edits.append(Edit(site, name, regularizer, text, seen[site.name, kind], steps, units, **more))
            # Splices of one class at one site have noise streams that differ by this number alone.
            seen[site.name, kind] += 1

    # All edits are known. What follows looks at several of them together.
    replacing = [(edit.site, edit.name, edit.readers) for edit in edits if edit.replaces_parameter]
    if replacing:
        check_order(traced, replacing)
    native_dropout, unmovable = decide(own_dropout, traced.native_dropout, traced.title, missing, traced.values)
    slices = _slices(traced, named, edits)
    if replacing:
        check_calls(traced, replacing, native_dropout)
    splices = [edit for edit in edits if isinstance(edit.regularizer, Splice) and edit.site.kind == "value"]
    again = repeats(traced, [(edit.site, edit.name, edit.regularizer) for edit in splices], native_dropout)
    lost = _missed(traced, named, own_dropout, missing, keep)
    counts, (called, unasked) = count_sites(traced), called_blocks(traced, blocks, missing)
    check_layers(replacing, called)
    asked = (missing, own_dropout, called, unasked)
    more = {"resting": resting, "keep": keep, "kept": kept_values(traced, keep, missing), "traced": traced}
    return Plan(traced.title, named, tuple(edits), slices, native_dropout, unmovable, counts, lost, again, *asked, **more)


def _repeated_calls(values: Sequence[Site]) -> dict[str, list[Site]]:
    """Return, for each module that the forward calls several times, the values that its calls return, in order."""
    calls: dict[str, list[Site]] = {}
    for site in values:
        for label in site.labels:
            if label.module and label.default:
                calls.setdefault(label.module, []).append(site)
    return {path: sites for path, sites in calls.items() if len(sites) > 1}


def _planned(regularizers: Mapping[str, Regularizer], edits: Sequence[Edit]) -> Strengths:
    """Return the strengths of a plan by regularizer name.

    For a strength that differs by depth, there is a further entry for each site, with the key (regularizer name, site name).
    """
    by_name = {name: float(regularizer.weight) for name, regularizer in regularizers.items()}
    return {**by_name, **{(edit.name, edit.site.name): float(edit.at_depth) for edit in edits if edit.at_depth is not None}}


def _slices(traced: Traced, named: Mapping[str, Regularizer], edits: Sequence[Edit]) -> dict[str, DependenceSlice]:
    slices = {}
    for name, regularizer in named.items():
        sites = [edit.site for edit in edits if edit.name == name]
        if sites and regularizer.takes_vjp:
            slices[name] = dependence_slice(traced, regularizer.engine_options.wrt, sites, type(regularizer).__name__)
    return slices


def _missed(
    traced: Traced, named: Mapping[str, Regularizer], own_dropout: OwnDropout, missing: Missing, keep: Keep | None
) -> dict[str, tuple[str, ...]]:
    if missing == "error":  # a string that matches nothing has already raised an error
        return {}
    texts_of = {name: missed(traced, regularizer) for name, regularizer in named.items()}
    dropouts = [dropout.site for dropout in traced.native_dropout]
    selectors = own_dropout if isinstance(own_dropout, Mapping) else ()
    texts_of[OWN_DROPOUT] = tuple(text for each in selectors for text in unmatched(each, dropouts, dropouts, traced.values))
    texts_of[KEEP] = missed_values(traced, keep)
    return {name: texts for name, texts in texts_of.items() if texts}


def check_missing(missing: str) -> None:
    """Raise RegularizerError unless ``missing`` is ``"error"``, ``"warn"`` or ``"ignore"``."""
    if missing not in ("error", "warn", "ignore"):
        raise RegularizerError(f"missing={shown(missing)} is unknown; it is 'error', 'warn' or 'ignore'.")


def named_once(regularizers: Sequence[Regularizer]) -> dict[str, Regularizer]:
    """Give each regularizer a unique name: its ``name``, else its first key, else its class's name; repeated names get ``_1``, ``_2``."""
    named: dict[str, Regularizer] = {}
    wanted = [r.name or (r.keys[0] if r.keys else type(r).__name__.lower()) for r in regularizers]
    for base, regularizer in zip(wanted, regularizers, strict=True):
        name, count = base, 0
        # A number must not make a name that another regularizer was given.
        while name in named or (count and name in wanted):
            count += 1
            name = f"{base}_{count}"
        named[name] = regularizer
    return named


Chosen = dict[Site, tuple[str, Steps | None, Units | None]]  # from a site to the string that matched it, and how to read its value


def _select(traced: Traced, regularizer: Regularizer, missing: Missing, rests: bool) -> Chosen:
    matched = matching_sites(traced, regularizer, missing)
    check_sites(regularizer, matched)
    units = units_at(matched, regularizer, traced.unit_finder) if "units" in regularizer.takes else {}
    chosen = {site: (*found, units.get(site)) for site, found in _sequences(traced, regularizer, matched).items()}
    # ``expect`` counts the sites of the model with its adapters.
    if not rests:
        check_count(regularizer, list(chosen))
    if "previous" in regularizer.takes:
        check_cells(traced, regularizer, list(chosen))
    if isinstance(regularizer, Splice):
        check_shapes(regularizer, {site: steps for site, (_, steps, _) in chosen.items()})
    if isinstance(regularizer, Penalty) and regularizer.on == "parameters":
        try:
            check_trainable(traced, regularizer, list(chosen))
        except RegularizerError:
            if not rests:
                raise
            # It acts on what trains at other times.
            return {}
    return chosen


def _sequences(traced: Traced, regularizer: Regularizer, matched: Mapping[Site, str]) -> dict[Site, tuple[str, Steps | None]]:
    """Return the selected sites, each with the string that matched it and the ``Steps`` for ``Edit.steps``, or None.

    Also check the inputs of the model that the formula takes.
    """
    chosen: dict[Site, tuple[str, Steps | None]]
    if "steps" in regularizer.takes or ("counted" in regularizer.takes and regularizer.engine_options.lengths is not None):
        chosen = {**sequences(matched, regularizer, traced.values, traced.operations, traced.graphs)}
    elif isinstance(regularizer, Splice) and regularizer.on == "values":
        steps = splice_steps(matched, regularizer, traced.values, traced.operations, traced.graphs)
        chosen = {site: (text, steps[site]) for site, text in matched.items()}
    else:
        chosen = {site: (text, None) for site, text in matched.items()}
    # The backend checks the edits that are left, without those that acted in another graph.
    if chosen and regularizer.model_inputs and traced.front_end != "dynamo":
        check_model_inputs(traced, regularizer, chosen)
    return chosen


def require_sites(plan: Plan, traced: Traced) -> None:
    """Raise GraphRegError if the plan was made for another model."""
    known = {site.name for site in traced.sites}
    strange = [site.name for edit in plan.edits for site in edit.sites if site.name not in known]
    known_dropouts = {dropout.site.name for dropout in traced.native_dropout} if plan.native_dropout else set()
    strange += [site.name for each in plan.kept for site in each.calls or (each.site,) if site.name not in known]
    strange += [edit.dropout.site.name for edit in plan.native_dropout if edit.dropout.site.name not in known_dropouts]
    if strange:
        raise GraphRegError(f"the plan is for {plan.title} and names {strange[0]!r}, which {traced.title} does not have. Plan again.")
