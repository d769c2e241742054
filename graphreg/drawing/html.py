"""Writes a drawing as one interactive HTML file: the picture as JSON, and the styles and scripts in the folder ``page``, inlined."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from graphreg.drawing.layout import box_layout, graphviz, header_width, size
from graphreg.drawing.render import box_title, colour, full_name
from graphreg.drawing.rules import Profiles, tried
from graphreg.drawing.scene import IN, OUT, Box, Picture, label_lines, text_width
from graphreg.drawing.view import Viewed
from graphreg.ir.site import Site, dtype_text, shape_text
from graphreg.planning.harms import HARMS
from graphreg.regularizer.base import Regularizer
from graphreg.session.strengths import strength_text
from graphreg.tracing.listing import NO_TENSOR, source_of

SCRIPTS = ("selector.js", "spacing.js", "scene.js", "panel.js", "code.js", "values.js", "input.js", "state.js")


def page(seen: Viewed, shown: Picture, opened: Collection[str]) -> str:
    """Return the text of the HTML file. A browser needs no other file to show it."""
    rules, profiles = tried(seen.traced)
    tensors = [site for site in seen.traced.values if site.why_not != NO_TENSOR]
    data = {
        "title": shown.title, "opened": sorted(opened), "regularizers": _regularizers(seen, shown),
        "compared": seen.against is not None, "values": seen.readings,
        "boxes": _boxes(shown), "nodes": {key: _node(shown, key) for key in shown.nodes},
        "sites": _sites(seen, shown, profiles), "rules": rules, "refusals": list(profiles.texts),
        "kinds": [{"kind": harm.kind, "mark": harm.mark, "least": harm.least, "why": harm.why} for harm in HARMS],
        "source": [function.to_dict() for function in source_of(seen.traced, tensors)],
        "harms": seen.plan.harms(seen.strengths) if seen.plan else [],
    }  # fmt: skip
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")  # so that no text contains </script>
    scripts = "\n".join(_page_file(name) for name in SCRIPTS)
    content = {"title": escape(shown.title), "css": _page_file("page.css"), "js": scripts, "data": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda place: content[place[1]], _page_file("page.html"))


def _page_file(name: str) -> str:
    return (files("graphreg.drawing") / "page" / name).read_text(encoding="utf-8")


def _number(shown: Picture, names: str) -> int:
    return shown.colour.get(names.partition(", ")[0], -1)


def _regularizers(seen: Viewed, shown: Picture) -> list[dict[str, Any]]:
    entries = []
    # Of a regularizer that both have, the one that is drawn comes last, and counts.
    known = {name: (regularizer, of) for of in (seen.against, seen) if of and of.plan for name, regularizer in of.plan.regularizers.items()}
    for i, name in enumerate(shown.regularizers):
        regularizer, of = known[name]
        doc = (inspect.getdoc(type(regularizer)) or "").partition("\n\n")[0].replace("``", "")
        entries.append({
            "name": name, "cls": type(regularizer).__name__, "text": shown.regularizers[name], "colour": colour(i),
            "strength": strength_text(name, of.strengths), "doc": " ".join(doc.split()), "code": formula_source(type(regularizer)),
        })  # fmt: skip
    return entries


def formula_source(cls: type[Regularizer]) -> str:
    """Return the source of the body of a regularizer's ``__call__``, without comments; ``""`` if Python finds no source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls.__call__))
    except (OSError, TypeError):
        return ""
    body = textwrap.dedent(source.partition(":\n")[2]).strip()
    return "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("#"))


def _boxes(shown: Picture) -> dict[str, dict[str, Any]]:
    """Return the data of all modules and folds. Those with equal structure are laid out once."""
    pgv, known = graphviz(), dict[Any, tuple[list[list[int | str]], list[list[int | str]]]]()
    made = {}
    for key, box in shown.boxes.items():
        # By number and not by key, so that equal modules have equal data.
        ids: dict[str, int | str] = {child: i for i, child in enumerate([*box.children, IN, OUT])}
        names = list(ids)
        sizes = {child: size(shown, child) for child in box.children}
        what = (tuple(sizes.values()), tuple((ids[link.start], ids[link.end], link.back) for link in box.links))
        if what not in known:
            found = layered(box, sizes, pgv)
            numbered = ([[ids.get(one, one) for one in row] for row in part] for part in found)
            known[what] = (next(numbered), next(numbered))
        layers, chains = ([[one if isinstance(one, str) else names[one] for one in row] for row in part] for part in known[what])
        made[key] = _box(shown, box, layers, chains)
    return made


def _box(shown: Picture, box: Box, layers: list[list[str]], chains: list[list[str]]) -> dict[str, Any]:
    """Return the data of a module or a fold for the page, with its children in layers from top to bottom.

    A line may pass layers between its ends. In each of these layers, the line has a point, whose name begins with ``~``.
    """
    first, second = label_lines(shown, box.key)
    wide, high = size(shown, box.key)
    return {
        "path": box.path, "name": box_title(box), "full": full_name(shown, box.key), "op": box.op, "nodes": box.nodes, "kind": box.kind,
        "stacked": box.kind != "module" or bool(box.repeats), "lines": [first, second],
        "acts": {str(_number(shown, name)): count for name, count in box.acts.items()},
        "size": [max(wide + 14, round(0.9 * text_width(SELECTED)) + 18), high],  # the page puts a mark before the name
        "head": round(header_width(box)), "layers": layers, "reads": shown.stub(box.key),
        "links": [{"chain": chain, "back": link.back} for link, chain in zip(box.links, chains, strict=True)],
    }  # fmt: skip


SELECTED = "99999 selected"  # the longest text that the page writes in the place of the second line


def layered(box: Box, sizes: Mapping[str, tuple[float, float]], pgv: Any) -> tuple[list[list[str]], list[list[str]]]:
    """Return a module's children in layers, each from left to right, and for each line the chain of children and points that it passes.

    Layers and chains are from top to bottom.
    """
    _, _, spots, splines = box_layout(box, sizes, pgv)
    heights = sorted({round(y) for _, y in spots.values()})
    rows: list[list[tuple[float, str]]] = [[] for _ in heights]
    row = {key: heights.index(round(y)) for key, (_, y) in spots.items()}
    for key, (x, _) in spots.items():
        rows[row[key]].append((x, key))
    chains = []
    for i, (link, points) in enumerate(splines):
        upper, lower = (link.end, link.start) if link.back else (link.start, link.end)
        passed = range(row[upper] + 1, row[lower])
        through = [f"~{i}.{j}" for j in passed]
        for j, name in zip(passed, through, strict=True):
            rows[j].append((_x_at(points, heights[j]), name))
        chains.append([upper, *through, lower])
    return [[key for _, key in sorted(layer, key=lambda one: one[0])] for layer in rows], chains


def _x_at(points: Sequence[tuple[float, float]], height: float) -> float:
    """Find, approximately, the x at which a curve passes a height. A curve only rises or only falls, so there is one such x."""
    best, x = float("inf"), 0.0
    for i in range(0, len(points) - 1, 3):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = points[i : i + 4]
        for step in range(17):
            t = step / 16
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            off = abs(a * ay + b * by + c * cy + d * dy - height)
            if off < best:
                best, x = off, a * ax + b * bx + c * cx + d * dx
    return x


def _node(shown: Picture, key: str) -> dict[str, Any]:
    attributes = shown.nodes[key]
    kind = "end" if attributes["call"] in ("placeholder", "output") else attributes["kind"]
    return {
        "name": attributes["name"], "op": attributes["op"], "shape": attributes.get("shape", ""), "source": attributes.get("source", ""),
        "kind": kind, "lines": label_lines(shown, key), "size": size(shown, key),
        "regularizer": _number(shown, attributes.get("regularizer", "")),
        "badges": [[_number(shown, badge.regularizer), badge.text, badge.state] for badge in shown.badges.get(key, ())],
        "site": attributes["name"] if kind in ("site", "end") else "", "acts_at": attributes.get("site", ""), "reads": shown.stub(key),
    }  # fmt: skip


def _sites(seen: Viewed, shown: Picture, profiles: Profiles) -> list[dict[str, Any]]:
    """Return every site, drawn or not, with the data that selector.js needs to match it and that the page's panel shows."""
    entries = []
    for i, site in enumerate(seen.traced.sites):
        attributes: Mapping[str, Any] = shown.nodes.get(site.name, {}) if site.kind == "value" else {}
        edits = seen.plan.by_site.get(site.name, ()) if seen.plan else ()
        acts = [{"regularizer": _number(shown, edit.name), "matched": edit.matched} for edit in edits]
        entries.append({
            "id": i, **site_metadata(site), "op": site.op, "shape": shape_text(site), "dtype": dtype_text(site), "at": _at(site, shown),
            "source": attributes.get("source", ""), "own_dropout": _native(seen, site.name, attributes), "acts": acts,
            "refusal": profiles.of.get(site.name, -1), "also_at": _also_at(site, shown),
        })  # fmt: skip
    return entries


def _native(seen: Viewed, name: str, attributes: Mapping[str, Any]) -> str:
    """Return what the panel says of a native dropout: its rate, when it acts, and what happens to it; ``""`` for another site."""
    dropout = seen.native_dropout.get(name)
    if dropout is None:
        return ""
    rate = "of unknown rate" if dropout.rate is None else f"{dropout.rate:g}"
    when = {"mode": "in train mode", "always": "acts always", "never": "acts never"}[dropout.when]
    return ", ".join(filter(None, [rate, when, attributes.get("own_dropout", "")]))


def site_metadata(site: Site) -> dict[str, Any]:
    """Return the attributes of a site that selector.js needs to match a selector."""
    labels = [
        {"name": label.name, "op": label.op, "ports": label.ports, "default": label.default, "module": label.module}
        for label in site.labels
    ]
    return {
        "name": site.name, "names": site.names, "labels": labels, "kind": site.kind, "role": site.role,
        "branch": site.branch, "trunk": site.trunk, "normed": site.normed,
        "selectable": site.selectable, "norm": site.norm, "why_not": site.why_not, "used": site.used, "dims": len(site.shape or ()),
    }  # fmt: skip


def _at(site: Site, shown: Picture) -> str | None:
    """Return the key of the node or box that shows a site; None if nothing does.

    For a value, this is its own node. For a parameter, it is the first node that uses the parameter, or, if no node does, the innermost
    box around the parameter.
    """
    if site.kind == "value":
        return site.name if site.name in shown.nodes else None
    if (layer := shown.layers.of(site.name)) is not None and layer in shown.nodes:
        return layer
    path = site.module
    while path and f"{path}/" not in shown.boxes:
        path = path.rpartition(".")[0]
    return f"{path}/" if path else None


def _also_at(site: Site, shown: Picture) -> list[str]:
    """Return the keys of the other nodes that use a tied parameter, which has a name in each of their layers."""
    if site.kind == "value":
        return []
    layers = dict.fromkeys(layer for name in site.names if (layer := shown.layers.of(name)) is not None and layer in shown.nodes)
    first = _at(site, shown)
    return [layer for layer in layers if layer != first]
