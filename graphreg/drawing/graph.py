"""Converts a graph to a networkx.DiGraph, with names, operations, shapes and modules of nodes, and with what each regularizer added.

All attributes are str, int, float or bool, and never None, so that GraphML, GEXF and node-link JSON
can store the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import networkx as nx
from torch import fx

from graphreg.drawing.view import Drawable, Mode, Viewed, viewed
from graphreg.errors import GraphRegError
from graphreg.ir.metadata import Addition, Kind, addition_of, is_added, is_kind, own_labels, scope_of
from graphreg.ir.operations import function_name, nodes_in
from graphreg.ir.roles import labels_of
from graphreg.ir.site import MARKS, Site, dtype_text, shape_text
from graphreg.ir.source_location import origin_of, short
from graphreg.planning.plan import Plan
from graphreg.torch_internals.interpreter import collector_at_rest

NodeAttributes = dict[str, Any]
_FX = {"placeholder": "input", "get_attr": "read", "output": "output"}


@collector_at_rest()
def to_networkx(
    module: Drawable, *, level: int | None = None, plan: Plan | None = None, example_inputs: Any = None, mode: Mode = "train"
) -> nx.DiGraph[str]:
    """Convert a model, a trace, a plan or a rewritten module to a ``networkx.DiGraph``.

    A node's key is the name of its site, which is a value or a parameter with a name. A node that
    is not a site has ``$`` and the name of the torch.fx node as its key.
    docs/drawing.md lists the attributes of nodes and edges.

    Args:
        module: What to convert.
        level: Fold each module at this depth into one node. A whole number, 1 or more; None folds
            nothing.
        plan: Only if ``module`` is a model or a trace: convert it as if this plan were applied.
        example_inputs: Only if ``module`` is a model: example inputs, as in ``trace``.
        mode: Which forward to convert, ``"train"`` or ``"eval"``, if the two differ.

    Raises:
        GraphRegError: What was given has no graph, or an option is not allowed.
    """
    check_level(level)
    seen = viewed(module, plan, example_inputs, mode)
    graph = as_networkx(seen)
    return graph if level is None else collapsed(graph, level)


def check_level(level: object) -> None:
    """Raise GraphRegError unless ``level`` is a depth of modules or None."""
    if level is not None and (type(level) is not int or level < 1):
        raise GraphRegError(
            f"level={level!r} is not a depth of modules; give a whole number, 1 (the model's own children) or more, or None."
        )


def as_networkx(seen: Viewed) -> nx.DiGraph[str]:
    """Convert the graph, with the nodes that graphreg added. No module is folded."""
    plan = seen.plan
    names = ", ".join(plan.regularizers) if plan else ""
    graph: nx.DiGraph[str] = nx.DiGraph(model=seen.title, forward=seen.forward, regularizers=names)
    operations, sites = seen.traced.operations, seen.sites
    keys = {node: f"${node.name}" for node in seen.graph.nodes if not is_kind(node, Kind.LAYER)}
    for node in seen.graph.nodes:
        if not is_added(node) and (labels := labels_of(node, operations)):
            keys[node] = labels[0].text

    # The class of a module that the forward calls comes from its label, because in a GraphModule
    # the object at that path may be a plain ``nn.Module`` that only holds parameters and
    # submodules.
    classes = {path: type(module).__name__ for path, module in seen.traced.model.named_modules(remove_duplicate=False)}
    classes |= {label.module: label.op for site in seen.traced.values for label in site.labels if label.module}

    boxes: dict[str, str] = {}
    called = {str(node.target) for node in seen.graph.nodes if node.op == "call_module"}
    for node in seen.graph.nodes:
        if is_kind(node, Kind.LAYER):  # this node only fetches the layer that the next node calls
            continue
        addition = addition_of(node) if is_added(node) else None
        if addition is not None:
            attributes = _addition(node, addition, seen, boxes, called)
        else:
            attributes = _model_node(node, sites.get(keys[node]), seen)
        boxes[keys[node]] = attributes["box"]
        graph.add_node(keys[node], **attributes)
        for i, read in _arguments(node):
            if read not in keys:
                continue
            _add_edge(graph, keys[read], keys[node], i)
    graph.graph["modules"] = "\n".join(f"{path}\t{classes[path]}" for path in _prefixes(boxes.values()) if path in classes)
    return graph


def _prefixes(paths: Any) -> list[str]:
    """Return each path and the paths of the modules around it, the outermost first: ``a`` and ``a.b`` for ``a.b``."""
    prefixes: dict[str, None] = {}
    for path in paths:
        names = path.split(".") if path else []
        prefixes.update(dict.fromkeys(".".join(names[: i + 1]) for i in range(len(names))))
    return list(prefixes)


def _arguments(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """Yield the nodes that a node reads, each with the index or the keyword of the argument that it is in."""
    named = [*((str(i), value) for i, value in enumerate(node.args)), *node.kwargs.items()]
    for place, value in named:
        for read in nodes_in(value):
            yield place, read


def _add_edge(graph: nx.DiGraph[str], read: str, reader: str, place: str) -> None:
    value = graph.nodes[read]
    if graph.has_edge(read, reader):
        edge = graph.edges[read, reader]
        edge["argument"] += f", {place}"
        return
    carried = {name: value[name] for name in ("shape", "dtype") if name in value}
    added = graph.nodes[reader].get("regularizer") or value.get("regularizer") or ""
    graph.add_edge(read, reader, argument=place, value=value["name"], regularizer=added, **carried)


def _model_node(node: fx.Node, site: Site | None, seen: Viewed) -> NodeAttributes:
    """Return the attributes of one of the model's own nodes, whether it is a site or not."""
    modules = seen.traced.operations.modules
    # torch.export may record a path that names no module of the model
    path = scope if (scope := scope_of(node)) in modules else ""
    # not None if graphreg changed the call of the model's node, such as the call of a native
    # dropout
    addition = addition_of(node)
    op, target = (addition and addition.was) or (node.op, node.target)
    labels = own_labels(node)

    attributes: NodeAttributes = {
        "name": site.name if site else labels[0].text if labels else node.name,
        "kind": "site" if site else _FX.get(op, "call" if labels else "other"),
        "op": site.op if site else labels[0].op if labels else op if op == "output" else function_name(node) or target_text(target),
        "call": op,
        "target": target_text(target),
        "module": path,
        "box": path.rpartition(".")[0] if op == "call_module" else path,
    }

    if site:
        attributes |= {"names": ", ".join(site.names), "role": site.role, "selectable": site.selectable}
        attributes |= {mark: mark in site.marks for mark in MARKS}
        attributes["why_not"] = site.why_not
        attributes["module_output"] = ", ".join(label.module for label in site.labels if label.module)
        attributes["acts"] = ", ".join(edit.name for edit in seen.plan.by_site.get(site.name, ())) if seen.plan else ""
        if kept := [each.name for each in seen.plan.kept if site in (each.calls or (each.site,))] if seen.plan else []:
            attributes["kept"] = ", ".join(kept)
        if site.shape is not None:
            attributes |= {"shape": shape_text(site), "dtype": dtype_text(site)}
        if (native := seen.native_dropout.get(site.name)) is not None and native.rate is not None and native.when != "never":
            attributes["own_rate"] = native.rate

    if (origin := origin_of(node)) is not None:
        attributes["source"] = short(origin)
    if seen.plan and addition is not None and addition.kind == Kind.NATIVE:
        attributes["own_dropout"] = next(e.action for e in seen.plan.native_dropout if e.dropout.site.name == addition.site)
    return attributes


def target_text(target: object) -> str:
    """Return the target of a node as text."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _addition(node: fx.Node, addition: Addition, seen: Viewed, boxes: Mapping[str, str], called: Collection[str]) -> NodeAttributes:
    """Return the attributes of a node that graphreg added: its regularizer, its site, and the module whose box it is drawn in.

    ``boxes``: the boxes of the nodes so far, by key. ``called``: the paths of the modules that the
    graph calls.
    """
    plan, place, name, kind = seen.plan, addition.site or "", addition.regularizer or "", addition.kind.value
    site = seen.sites.get(place)
    if kind == Kind.TRACK and plan:
        name = ", ".join(plan.tracked.get(place, ()))
    box = boxes.get(place, "")
    if site is not None and site.kind == "parameter":
        # If the graph calls the module that has the parameter, or a module around it, the node is
        # drawn next to the outermost module that is called; otherwise inside the module that has
        # the parameter.
        prefixes = _prefixes([site.module])
        box = next((path.rpartition(".")[0] for path in prefixes if path in called), site.module)

    attributes: NodeAttributes = {
        "name": node.name, "kind": "addition", "added": kind, "regularizer": name, "site": place, "call": node.op,
        "target": target_text(node.target), "module": site.module if site else "", "box": box, "op": kind,
    }  # fmt: skip

    regularizer = plan.regularizers.get(name) if plan else None
    if regularizer is not None:
        attributes |= {"op": type(regularizer).__name__, "strength": seen.strengths.get((name, place), seen.strengths[name])}
    if site is not None and site.shape is not None and kind in (Kind.SPLICE, Kind.TRACK, Kind.CLONE, Kind.COPY, Kind.READ):
        attributes |= {"shape": shape_text(site), "dtype": dtype_text(site)}
    return attributes


def collapsed(graph: nx.DiGraph[str], level: int) -> nx.DiGraph[str]:
    """Fold each module at the depth ``level`` into a single node; its attribute ``nodes`` is the number of nodes folded into it."""
    classes = dict(line.split("\t") for line in graph.graph["modules"].split("\n") if line)
    made: nx.DiGraph[str] = nx.DiGraph(**graph.graph)

    folded = dict[str, str]()
    for key, attributes in graph.nodes(data=True):
        names = attributes["box"].split(".") if attributes["box"] else []
        # a module's key ends in a slash, because a site may have the module's path as its name
        folded[key] = f"{'.'.join(names[:level])}/" if len(names) >= level else key

    inside: dict[str, list[NodeAttributes]] = {}
    for key, attributes in graph.nodes(data=True):
        inside.setdefault(folded[key], []).append(attributes)
    for key, attributes in graph.nodes(data=True):
        if folded[key] == key:
            made.add_node(key, **attributes)
        elif folded[key] not in made:
            made.add_node(folded[key], **_module(folded[key][:-1], inside[folded[key]], classes))
    for read, reader, edge in graph.edges(data=True):
        a, b = folded[read], folded[reader]
        if a != b and not made.has_edge(a, b):
            made.add_edge(a, b, **edge)
        elif a != b:
            merged = made.edges[a, b]
            for name in ("argument", "value", "regularizer"):
                merged[name] = ", ".join(dict.fromkeys(filter(None, [*merged[name].split(", "), *edge[name].split(", ")])))
    return made


def _module(path: str, inside: list[NodeAttributes], classes: Mapping[str, str]) -> NodeAttributes:
    """Return the attributes of a folded module; its shape and dtype are those of the value that it returns."""
    added = Counter(a["regularizer"] for a in inside if a.get("added") in ("splice", "measure", "read") and a["regularizer"])
    attributes: NodeAttributes = {
        "name": path, "kind": "module", "op": classes.get(path, ""), "module": path, "box": path.rpartition(".")[0],
        "nodes": len(inside), "acts": ", ".join(f"{name} ({count})" for name, count in added.items()),
    }  # fmt: skip
    returned = next((a for a in inside if path in a.get("module_output", "").split(", ")), {})
    return attributes | {name: returned[name] for name in ("shape", "dtype") if name in returned}
