"""Takes from the plan of the whole model what a stage has to do, so that all stages together do what the plan says, each thing once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, listed
from graphreg.ir.roles import site_nodes
from graphreg.ir.selector import Selector
from graphreg.ir.site import Site
from graphreg.planning.blocks import called_blocks, check_layers
from graphreg.planning.matching import count_sites
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.base import Splice
from graphreg.stages.stage_trace import StageTrace
from graphreg.tracing.trace import Traced


def plan_of_stage(plan: Plan, whole: Traced, stage: StageTrace, blocks: Selector | None) -> Plan:
    """Return the plan of a stage.

    Args:
        plan: The plan of the whole model.
        whole: The trace of the whole model.
        stage: The trace of the stage.
        blocks: The selector of blocks in the whole model. The blocks that are in the stage stay modules, which the stage's code calls.

    Raises:
        GraphRegError: It is not certain which sites the stage has.
        RegularizerError: A regularizer needs sites of several stages at once.
    """
    if plan.slices:
        name = next(iter(plan.slices))
        raise RegularizerError(
            f"{name}: {type(plan.regularizers[name]).__name__} differentiates the whole forward, and a stage runs a part of it. Use "
            "another penalty, or train without a pipeline."
        )
    _require_certain(plan, whole, stage)
    edits = tuple(made for edit in plan.edits if (made := _edit(edit, stage)) is not None)
    _require_all_at_once(plan, edits)
    dropouts = {dropout.site.name: dropout for dropout in stage.traced.native_dropout}
    native = tuple(replace(e, dropout=dropouts[e.dropout.site.name]) for e in plan.native_dropout if e.dropout.site.name in dropouts)
    called, unasked = called_blocks(stage.traced, blocks, "ignore")
    check_layers([(edit.site, edit.name, edit.readers) for edit in edits if edit.replaces_parameter], called)
    there = {edit.site.name for edit in edits} | dropouts.keys()
    one = next(iter(whole.graphs.values()))  # for a stage with two graphs of a model with one
    counts = {mode: _counts(plan, whole, whole.graphs.get(mode) or one) for mode in stage.traced.graphs}
    return replace(
        plan, title=stage.traced.title, edits=edits, native_dropout=native,
        unmovable=tuple(each for each in plan.unmovable if each.site.name in dropouts),
        site_counts=count_sites(stage.traced), repeats=tuple(each for each in plan.repeats if there.issuperset(each.sites)),
        blocks=called, unasked=unasked, in_whole=counts,
        traced=stage.traced,
    )  # fmt: skip


def _counts(plan: Plan, whole: Traced, graph: fx.Graph) -> Mapping[str, int]:
    """Return, for each penalty that is a mean over its sites, the number of its sites in a graph of the whole model."""
    there = site_nodes(graph, whole.operations)
    counts = {}
    for name, regularizer in plan.regularizers.items():
        # A sum needs no count, and a formula that takes all sites at once is no mean over them.
        if not regularizer.has_penalty() or not regularizer.by_site or regularizer.engine_options.reduction != "mean":
            continue
        edits = [edit for edit in plan.of(name) if edit.site.kind == "parameter" or any(site.name in there for site in edit.sites)]
        # The penalty of a splice comes from its state, which every mode has for all sites.
        counts[name] = len(plan.of(name)) if isinstance(regularizer, Splice) else len(edits)
    return counts


def _edit(edit: Edit, stage: StageTrace) -> Edit | None:
    """Return an edit of the whole model as an edit of the stage; None if it acts in another stage."""
    if edit.site.kind == "parameter":
        return _parameter_edit(edit, stage)
    here = [site for site in edit.sites if site.name in _made(stage)]
    if not here:
        return None
    who = f"{edit.name} at {edit.site.name}"
    if len(here) < len(edit.sites):
        raise RegularizerError(
            f"{who}: the calls of the recurrent cell are in several stages ({listed([site.name for site in here], 3)} in this one), and "
            "the penalty is one over all of them. Put the cell into one stage, or leave it out."
        )
    names = {site.name for site in stage.traced.values}
    if edit.module_input is not None and edit.module_input not in names:
        raise RegularizerError(
            f"{who}: the splice may return {edit.module_input}, the module's input, and the stage neither computes it nor gets it. Begin "
            "the stage with a whole module, or leave the site out."
        )
    _require_inputs(edit, stage)
    value = _made(stage)[edit.site.name]  # its batch is a microbatch
    return replace(edit, site=replace(edit.site, shape=value.shape, dtype=value.dtype))


def _require_inputs(edit: Edit, stage: StageTrace) -> None:
    """Raise RegularizerError if the stage does not take an input of the model that the formula of an edit takes."""
    inputs = {str(node.target) for graph in stage.traced.graphs.values() for node in graph.nodes if node.op == "placeholder"}
    for option, name in edit.regularizer.model_inputs.items():
        if name not in inputs:
            raise RegularizerError(
                f"{edit.name} at {edit.site.name}: {option}={name!r} names an input of the model that the stage does not take. Let its "
                f"forward take {name}, and pass it to schedule.step by that name."
            )


def _made(stage: StageTrace) -> dict[str, Site]:
    """Return, by name, the sites of the values that the stage itself computes, and of those inputs that are inputs of the whole model."""
    return {site.name: site for site in stage.traced.values if site.name not in stage.received}


def _parameter_edit(edit: Edit, stage: StageTrace) -> Edit | None:
    parameters = {label.name: site for site in stage.traced.parameters for label in site.labels}
    here = next((parameters[label.name] for label in edit.site.labels if label.name in parameters), None)
    if here is None:
        return None
    if not isinstance(edit.regularizer, Splice):
        if (is_first := stage.first_reads[here.name]) is None:
            raise GraphRegError(
                f"{edit.name} at {here.name}: the parameter is read several times in the whole model, and it is not certain whether the "
                "first of these reads is in this stage, which would then count the penalty. Say which call a value belongs to, as by "
                "names={'layer': 'layer_1'}, or leave the parameter out."
            )
        if is_first:
            _require_inputs(edit, stage)
        return replace(edit, site=here) if is_first else None
    reads = [read for by_name in stage.traced.parameter_reads.values() for read in by_name.get(here.name, ())]
    if not any(read.is_by(edit.readers) for read in reads):
        return None
    if here.name != edit.site.name:
        raise RegularizerError(
            f"{edit.name} at {edit.site.name}: the parameter is tied, and this stage has it as {here.name}. A splice on it would draw "
            "another mask here than in the other stage. Leave the parameter out."
        )
    _require_inputs(edit, stage)
    others = tuple(sorted({read.module or stage.traced.title for read in reads if not read.is_by(edit.readers)}))
    return replace(edit, site=here, other_readers=others)


def _require_all_at_once(plan: Plan, edits: tuple[Edit, ...]) -> None:
    """Raise RegularizerError if a formula takes all sites at once, and they are in several stages."""
    for name, regularizer in plan.regularizers.items():
        here = [edit.site.name for edit in edits if edit.name == name]
        if not regularizer.by_site and 0 < len(here) < len(plan.of(name)):
            raise RegularizerError(
                f"{name}: the formula of {type(regularizer).__name__} takes all its sites at once, and this stage has {len(here)} of "
                f"{len(plan.of(name))} ({listed(here, 3)}). Select sites of one stage."
            )


def _require_certain(plan: Plan, whole: Traced, stage: StageTrace) -> None:
    """Raise an error if a site that something acts at could be in the stage without being found."""
    acting = {site.name for edit in plan.edits if edit.site.kind == "value" for site in edit.sites}
    acting |= {edit.dropout.site.name for edit in plan.native_dropout}
    for ours, theirs in stage.uncertain.items():
        if not acting.isdisjoint(theirs):
            raise GraphRegError(
                f"the value {ours!r} of the stage may be {listed(list(theirs), 4)} in {whole.title}, and it is not certain which. Say it: "
                f"names={{{ours!r}: {theirs[0]!r}}}."
            )
    for path in stage.opaque:
        if inside := [name for name in acting if name.startswith(f"{path}.")]:
            raise NoMatchError(
                f"the stage calls {path!r} as a whole, and something acts inside it in {whole.title} ({listed(sorted(inside), 3)}). A "
                "stage that torch.distributed.pipelining.pipeline() made has no such values. Build the stage from the modules of the "
                "model, as by a copy from which the other layers are deleted; and give both or neither of the two example_inputs."
            )
    if stage.strange and acting:
        ours, op = next(iter(stage.strange.items()))
        raise NoMatchError(
            f"the stage computes {ours!r} ({op}), and {whole.title} has no such value, so it is not certain what should act there. Build "
            f"the stage from the code of the whole model. If nothing should act at the value, say so: names={{{ours!r}: None}}."
        )
