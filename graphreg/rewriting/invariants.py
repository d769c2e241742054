"""Checks, after every rewrite, that the module is the traced model with the planned additions and nothing else. The checks change nothing.

A GraphRegError from these checks means that graphreg has a fault, or that somebody has edited the graph by hand. Only RegularizerError has
another cause: no trainable parameter reaches the sites of a penalty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphreg.blocks import original
from graphreg.errors import RegularizerError
from graphreg.ir import (
    BOUNDARY,
    RULES,
    Aliases,
    Kind,
    Operations,
    addition_of,
    apart,
    clone,
    is_kind,
    is_marked,
    is_nan,
    is_native_dropout,
    own_name,
    site_nodes,
    state_before,
)
from graphreg.planning import Edit, Plan
from graphreg.regularizer import Penalty, Regularizer, Splice
from graphreg.rewriting.graph_facts import GraphFacts
from graphreg.rewriting.instantiate import measures
from graphreg.rewriting.parameter_checks import check_parameters
from graphreg.rewriting.placement import Placed, fail, placed_in
from graphreg.rewriting.substitute import restored
from graphreg.runtime import CLOCK, Measure, NativeDropoutRule, Regularized, RewrittenModule, SpliceRule, Track, owned_by
from graphreg.session import graphs_of
from graphreg.tracing import Traced


def check(module: RewrittenModule, traced: Traced, plan: Plan, facts: Mapping[str, GraphFacts] | None = None) -> None:
    """Raise GraphRegError unless the module is the traced model with the plan's additions and nothing else.

    ``facts``: the facts about the traced graphs, by mode, if they are known already.
    """
    _same_owner(module, traced.model)
    trains: dict[str, bool] = {}  # by penalty: whether, in one of the graphs, a parameter that can train reaches it
    for mode, emitted in graphs_of(module).items():
        _lint(emitted)
        _native_dropouts(emitted, module, plan)
        graph = restored(emitted)  # the checks below look at the model's own calls
        original = traced.graphs[mode]
        _contracts(graph, original)
        placed = placed_in(graph, facts[mode] if facts is not None else GraphFacts.of(original, traced), traced, plan)
        placed.check()
        check_parameters(emitted, original, traced.parameter_reads[mode], plan)
        _runtime_modules(graph, module, plan)
        for name, some in _reaches(graph, module, plan, placed).items():
            trains[name] = some or trains.get(name, False)
    may_be_constant = not traced.whole or plan.in_whole or plan.adapters_off  # without adapters, nothing may train for a while
    for name in (name for name, some in trains.items() if not (some or may_be_constant)):
        raise RegularizerError(
            f"{name}: no parameter that can train reaches its sites, so the penalty would change nothing. Unfreeze a "
            "parameter, or leave the penalty out."
        )


def _native_dropouts(graph: fx.Graph, module: RewrittenModule, plan: Plan) -> None:
    """Check that each native dropout in the plan calls its runtime module, with the key of the call if it draws."""
    planned = {edit.dropout.site.name: edit for edit in plan.native_dropout}
    for node in graph.nodes:
        name = own_name(node)
        if not is_native_dropout(node):
            if name in planned and not is_marked(node):
                fail(f"{node.name} still calls the native dropout.")
            continue
        rule, edit, key = module.get_submodule(str(node.target)), planned.get(name), node.kwargs.get("noise")
        if edit is None or not isinstance(rule, NativeDropoutRule) or rule.site != name or rule.rate != edit.rate:
            fail(f"{node.name} does not do what was planned.")
        elif edit.draws != (isinstance(key, fx.Node) and is_kind(key, Kind.KEY)):
            fail(f"{node.name} does not take the key of the call.")
        elif edit.is_scheduled != _takes_clock(node):
            fail(f"{node.name} does not take the strengths of the call from the clock.")


def _takes_clock(node: fx.Node) -> bool:
    """Whether a node gets what the clock returns."""
    clock = node.kwargs.get(CLOCK)
    return isinstance(clock, fx.Node) and is_kind(clock, Kind.CLOCK)


def _runtime_modules(graph: fx.Graph, module: RewrittenModule, plan: Plan) -> None:
    """Check that each addition calls the runtime module that was made for it."""
    planned = {(e.name, e.site.name): e for e in plan.edits}
    acted = {site.name for e in plan.edits for site in e.sites}
    for node in graph.nodes:
        added = addition_of(node)
        if added is None:
            continue
        kind, place = added.kind, added.site
        runtime_module = module.get_submodule(node.target) if node.op == "call_module" else None
        if kind in (Kind.SPLICE, Kind.MEASURE):
            edit = planned.get((str(added.regularizer), str(place)))
            ok = edit is not None and _runs(node, runtime_module, edit) and _reads_others(node, edit, module)
        elif kind == Kind.TRACK:
            ok = place in plan.tracked and isinstance(runtime_module, Track) and runtime_module.site == place
        elif kind == Kind.TOTAL:
            ok = node.target == f"{RULES}.{added.regularizer}"
        elif kind in (Kind.KEY, Kind.CLOCK, Kind.ATTACH):
            ok = node.target == f"{RULES}.{kind}"
        elif kind in (Kind.CLONE, Kind.COPY):
            ok = node.target in (torch.clone, clone, apart) and place in acted | plan.tracked.keys()
        else:
            ok = True
        if not ok:
            fail(f"{node.name} does not do what was planned.")
        if kind in (Kind.SPLICE, Kind.MEASURE, Kind.TOTAL):
            _takes_inputs(node, plan.regularizers[str(added.regularizer)], kind)
        if kind in (Kind.SPLICE, Kind.TOTAL) and plan.regularizers[str(added.regularizer)].is_scheduled != _takes_clock(node):
            fail(f"{node.name} does not take the strengths of the call from the clock.")
        if kind == Kind.ATTACH:
            totals = [(n, a.regularizer) for n in graph.nodes if (a := addition_of(n)) is not None and a.kind == Kind.TOTAL]
            order = [n for name in plan.regularizers for n, of in totals if of == name]
            if list(node.args[1]) != order:
                fail("the penalties are attached in another order.")


def _runs(node: fx.Node, runtime_module: nn.Module | None, edit: Edit) -> bool:
    """Whether the node calls the runtime module that was made for an edit, with as many arguments as this module takes."""
    if not isinstance(runtime_module, (SpliceRule, Measure)) or len(node.args) != 1 + is_kind(node, Kind.SPLICE):
        return False
    return runtime_module.regularizer is edit.regularizer and runtime_module.site == edit.site.name


def _takes_inputs(node: fx.Node, regularizer: Regularizer, kind: Kind) -> None:
    """Check that a node that runs a formula gets those inputs of the model that the regularizer's options name, and a total no others."""
    wanted = regularizer.model_inputs if kind != Kind.TOTAL or _measures_in_total(regularizer) else {}
    for option, name in wanted.items():
        value = node.kwargs.get(option)
        if not isinstance(value, fx.Node) or value.op != "placeholder" or value.target != name:
            fail(f"{node.name} does not take the input {name!r} as {option}.")
    if kind == Kind.TOTAL and (strange := node.kwargs.keys() - {CLOCK, "places", "of", *wanted}):
        fail(f"{node.name} takes {min(strange)}, which is not in the plan.")


def _measures_in_total(regularizer: Regularizer) -> bool:
    return isinstance(regularizer, Penalty) and not measures(regularizer)


def _reads_others(node: fx.Node, edit: Edit, module: RewrittenModule) -> bool:
    """Whether a node has the right values as keyword arguments ``module_input`` and ``previous``, as far as its formula takes these.

    If the formula takes neither, the node may have no keyword argument except ``clock`` and the inputs of the model.

    ``module_input`` must be the value that the site's module got, or a replacement of this value; ``previous`` must be the state that the
    cell got.
    """
    value, takes = node.kwargs.get("module_input"), edit.regularizer.takes
    if not {"module_input", "previous"}.intersection(takes):
        return not node.kwargs.keys() - {CLOCK, *edit.regularizer.model_inputs}
    operations = Operations(module)
    wanted = state_before(site_nodes(node.graph, operations)[edit.site.name], operations) if "previous" in takes else None
    if node.kwargs.get("previous") is not wanted:
        return False
    if edit.module_input is None:
        return value is None
    while isinstance(value, fx.Node) and (earlier := replaced_by(value)) is not None:
        value = earlier
    return value is site_nodes(node.graph, operations).get(edit.module_input)


def replaced_by(node: fx.Node) -> fx.Node | None:
    """Return the value that an addition replaces, which another addition may have made; None if it replaces no value."""
    if is_kind(node, Kind.SPLICE, Kind.CLONE, Kind.TRACK, Kind.REPLACED):
        value = node.args[0]
    elif is_kind(node, Kind.ATTACHED) and isinstance(node.args[0], fx.Node):
        value = node.args[0].args[0][node.args[1]]  # type: ignore[index]
    else:
        return None
    return value if isinstance(value, fx.Node) else None


def _lint(graph: fx.Graph) -> None:
    """Check what torch.fx demands of a graph, such as that each node comes after the nodes that it reads, so that there is no cycle."""
    doubled = [name for name, count in Counter(node.name for node in graph.nodes).items() if count > 1]
    if doubled:
        fail(f"two nodes are called {doubled[0]!r}.")
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        fail(str(error).splitlines()[0])


def _same_owner(module: RewrittenModule, model: nn.Module) -> None:
    """Check that no submodule, parameter or buffer of the user's was replaced, added or lost."""
    waiting: list[tuple[str, nn.Module, nn.Module]] = [("", module, model)]
    while waiting:
        path, ours, theirs = waiting.pop()
        for what, tensors, of_model in (
            ("parameter", ours._parameters, theirs._parameters), ("buffer", ours._buffers, theirs._buffers)
        ):  # fmt: skip
            if tensors.keys() != of_model.keys() or any(tensors[name] is not tensor for name, tensor in of_model.items()):
                fail(f"a {what} is not the user's own.")
        children = {name: child for name, child in ours._modules.items() if child is not None and (path or name != RULES)}
        known = {name: child for name, child in theirs._modules.items() if child is not None}
        for name in known.keys() | children.keys():
            child, other = children.get(name), known.get(name)
            if child is None or other is None or original(child) is not original(other):
                fail(f"the submodule {f'{path}.{name}' if path else name!r} is not the user's own.")
            elif child is not other:  # an object that stands for a block; all that is in one and the same module is the same
                waiting.append((f"{path}.{name}" if path else name, child, other))


def _contracts(graph: fx.Graph, original: fx.Graph) -> None:
    """Check that the graph without the additions is the original: each operation, on the same values, in the same order."""
    originals: dict[fx.Node, fx.Node] = {}  # by addition: the model's value that it replaces
    for node in graph.nodes:
        value = replaced_by(node)
        if value is not None:
            originals[node] = originals.get(value, value)
    remaining = [node for node in graph.nodes if not is_marked(node)]
    if len(remaining) != len(original.nodes):
        fail(f"{len(remaining)} of the model's own {len(original.nodes)} operations are left.")
    twin = dict(zip(remaining, original.nodes, strict=True))
    for ours, theirs in twin.items():
        if (ours.op, ours.target) != (theirs.op, theirs.target):
            fail(f"{theirs.name} ({theirs.op} {theirs.target}) became {ours.name} ({ours.op} {ours.target}).")
        args = ours.args
        if ours.op == "output" and isinstance(args[0], Regularized):
            args = (args[0].output,)
        if not _equal((args, ours.kwargs), (theirs.args, theirs.kwargs), lambda n: twin.get(originals.get(n, n))):
            fail(f"{ours.name} does not read what it read in the model: {args}, not {theirs.args}.")


def _equal(ours: Any, theirs: Any, resolve: Callable[[fx.Node], fx.Node | None]) -> bool:
    """Whether two structures of arguments are equal: containers of the same kind, the same keys, the same values."""
    if isinstance(theirs, fx.Node):
        return isinstance(ours, fx.Node) and resolve(ours) is theirs
    if isinstance(theirs, (tuple, list)):
        if not isinstance(ours, tuple if isinstance(theirs, tuple) else list) or len(ours) != len(theirs):
            return False
        for a, b in zip(ours, theirs, strict=True):  # noqa: SIM110  # a loop is twice as quick as ``all``, at each argument of the graph
            if not _equal(a, b, resolve):
                return False
        return True
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and list(ours) == list(theirs) and all(_equal(ours[k], theirs[k], resolve) for k in theirs)
    if isinstance(theirs, slice):
        return isinstance(ours, slice) and _equal((ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), resolve)
    return type(ours) is type(theirs) and bool(ours == theirs or (is_nan(ours) and is_nan(theirs)))


_NEED_NO_READER = (
    Kind.KEY, Kind.CLOCK, Kind.SPLICE, Kind.CLONE, Kind.COPY, Kind.TRACK, Kind.PARAMETER, Kind.REPLACED, Kind.LAYER,
)  # fmt: skip


def _reaches(graph: fx.Graph, module: RewrittenModule, plan: Plan, placed: Placed) -> dict[str, bool]:
    """Check that additions and penalties are connected to the rest of the graph.

    Measurements, penalties and the nodes that attach them must reach the output, each splice must take the key of the call, and the output
    must have each penalty.

    Return, for each penalty that has a site in this graph, whether a trainable parameter reaches it.
    """
    output = graph.output_node()
    upstream = _upstream(graph)
    additions = [(node, added) for node in graph.nodes if (added := addition_of(node)) is not None]
    keys = {node for node, added in additions if added.kind == Kind.KEY}
    if sum(added.kind == Kind.CLOCK for _, added in additions) != plan.is_scheduled:
        fail("it does not have one clock for its schedules.")
    totals: dict[str, fx.Node] = {}
    for node, added in additions:
        if (
            added.kind not in _NEED_NO_READER
            and node not in upstream
            and _used_site(node, upstream)
        ):
            fail(f"{node.name} does not reach the output.")
        if added.kind == Kind.SPLICE and (len(keys) != 1 or node.args[1] not in keys):
            fail(f"{node.name} does not take the key of the call.")
        if added.kind == Kind.TOTAL:
            totals[str(added.regularizer)] = node
    wanted = [name for name, r in plan.regularizers.items() if r.has_penalty()]
    returned = output.args[0].penalties if isinstance(output.args[0], Regularized) else {n: totals.get(n) for n in wanted}
    if {n: totals.get(n) for n in wanted} != dict(returned) or None in returned.values():
        fail(f"the output does not carry exactly the penalties {wanted}.")
    for name, node in totals.items():
        _counts(node, name, plan, placed)
    trained = _trained(graph, module, placed.aliases)
    return {name: node in trained for name, node in totals.items() if node.args and node.args[0] != {}}


def _counts(node: fx.Node, name: str, plan: Plan, placed: Placed) -> None:
    """Check that a penalty's total reads each of its sites once: in the order of the plan, or by name if its formula takes all at once."""
    regularizer = plan.regularizers[name]
    edits = [e for e in plan.of(name) if any(site.kind == "parameter" or site.name in placed.where for site in e.sites)]
    if isinstance(regularizer, Splice):
        right = not node.args and not node.kwargs.keys() - {CLOCK, "of"}
    elif name in plan.slices:
        right = node.args == placed.derivative(name, edits)
    elif "values" in regularizer.takes:
        expected = {e.site.name: placed.read(e) for e in edits}
        right = node.args == (expected,)
    else:
        right = list(node.args) == [placed.added[name, e.site.name] for e in edits]
    if not right:
        fail(f"{name} does not add up each of its {len(edits)} sites once.")
    if node.kwargs.get("of") not in ([counts.get(name) for counts in plan.in_whole.values()] or [None]):
        fail(f"{name} is not averaged over its sites in the whole model.")


def _upstream(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that the output depends on. ``_lint`` has made sure that a walk from the end meets readers first."""
    upstream = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in upstream:
            upstream.update(node.all_input_nodes)
    return upstream - {graph.output_node()}


def _used_site(node: fx.Node, upstream: set[fx.Node]) -> bool:
    """Whether the model uses the value that an addition replaces; True for an addition that replaces no value."""
    if not is_kind(node, Kind.SPLICE, Kind.CLONE):
        return True
    value = replaced_by(node)
    while value is not None and is_marked(value):
        value = replaced_by(value)
    return value is None or value in upstream


def _trained(graph: fx.Graph, module: RewrittenModule, aliases: Aliases) -> set[fx.Node]:
    """Return the nodes that a trainable parameter reaches, also through definite in-place writes."""
    trains = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in trains}
    prefixes = {".".join(owner.split(".")[:i]) for owner in owners for i in range(1, owner.count(".") + 2)}
    reached, written = set[fx.Node](), set[fx.Node]()  # ``written``: the bases of the values that such a node writes into
    for n in graph.nodes:
        if (
            not reached.isdisjoint(n.all_input_nodes)
            or (n.op == "get_attr" and n.target in trains) or (n.op == "call_module" and n.target in prefixes) or n.meta.get(BOUNDARY)
            or (n.op == "call_module" and any(p.requires_grad for p in owned_by(module.get_submodule(str(n.target)))))
            or (written and any(not written.isdisjoint(aliases.bases(value)) for value in n.all_input_nodes))
        ):  # fmt: skip
            reached.add(n)
            written.update(base for value in aliases.effects.writes(n, is_definite=True) for base in aliases.bases(value))
    return reached
