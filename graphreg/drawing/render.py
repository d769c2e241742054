"""Writes a drawing as SVG, as PNG (made from the SVG), or as text for Graphviz's dot, which then does the layout."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Collection, Iterator
from functools import cache
from html import escape
from itertools import accumulate

from graphreg.drawing.badges import Badge
from graphreg.drawing.layout import BADGE, HEADER, SCALE, WIDEST, Arrangement, Curve, Rectangle, count_widths
from graphreg.drawing.scene import Box, Picture, label_lines, stub_text, text_width
from graphreg.errors import GraphRegError

MARGIN, ROW = 16.0, 18.0
LARGEST = 16384  # pixels: many viewers do not open a .png with a longer side
FONT = "DejaVu Sans Mono, Menlo, Consolas, Liberation Mono, Courier New, monospace"
# Okabe & Ito's colours, which colour-blind people can tell apart, without black and yellow;
# ``_further`` computes more.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = f"""
text {{ font-family: {FONT}; font-size: 11px; fill: #1f2328 }}
.second, .small {{ font-size: 9px }} .second {{ fill: #59636e }} .title {{ font-size: 13px; font-weight: bold }}
.box {{ fill: #57606a; fill-opacity: .05; stroke: #8c959f }} .head {{ fill: #57606a; fill-opacity: .14 }}
.site, .call {{ fill: #ffffff; stroke: #57606a }} .folded {{ fill: #eaeef2; stroke: #57606a; stroke-width: 1.6 }}
.end {{ fill: #24292f; stroke: #24292f }} .end + text, .end + text + text {{ fill: #ffffff }}
.line {{ fill: none; stroke: #6e7781; stroke-width: 1.1 }} .arrow {{ fill: #6e7781 }}
""".strip()


def colour(number: int) -> str:
    """Return the colour of the regularizer with this number, as ``#rrggbb``."""
    return COLOURS[number] if number < len(COLOURS) else "#" + "".join(f"{part:02x}" for part in _further()[number % len(_further())])


@cache
def _further() -> list[tuple[int, ...]]:
    """Return ``COLOURS`` and 144 more, of all hues and three degrees of lightness; each differs from all before it as much as possible."""
    colours = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in COLOURS]
    wheel = [colorsys.hls_to_rgb(hue / 48, lightness, 0.6) for hue in range(48) for lightness in (0.28, 0.42, 0.58)]
    left = [tuple(round(255 * part) for part in rgb) for rgb in wheel]
    while left:
        # The colour whose nearest neighbour among those before it is the furthest away.
        colours.append(max(left, key=lambda one: min(_far(one, other) for other in colours)))
        left.remove(colours[-1])
    return colours


def _far(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Return how different two colours look: the squared distance with weights for red, green and blue by Riemersma's formula."""
    red = (one[0] + other[0]) / 2
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    return (2 + red / 256) * squares[0] + 4 * squares[1] + (2 + (255 - red) / 256) * squares[2]


def svg(shown: Picture, arranged: Arrangement, opened: Collection[str]) -> str:
    """Return the whole drawing as SVG text, with a legend of the regularizers above it."""
    most = int(WIDEST / text_width("x") / 1.1) - 4  # what fits on a screen
    legend = [(name, f"{name}: {text}") for name, text in shown.regularizers.items()]
    legend = [(name, line if len(line) <= most else f"{line[: most - 1]}…") for name, line in legend]

    head = MARGIN + ROW * (1 + len(legend)) + 6

    # ``text_width`` is that of letters of size 10; the title has 13, and the legend 11.
    width = max(arranged.width, 1.3 * text_width(shown.title), *(1.1 * text_width(text) + 20 for _, text in legend)) + 2 * MARGIN
    left = (width - arranged.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SCALE * width:.0f}" height="{SCALE * (head + arranged.height + MARGIN):.0f}" '
        f'viewBox="0 0 {width:.1f} {head + arranged.height + MARGIN:.1f}">',
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(MARGIN, MARGIN + 12, shown.title, "title"),
    ]
    for i, (name, text) in enumerate(legend, 1):
        y = MARGIN + ROW * i
        parts.append(f'<rect x="{MARGIN}" y="{y + 4}" width="12" height="12" rx="3" {tint(shown, name)}/>')
        parts.append(_text(MARGIN + 20, y + 14, text))
    parts.append(f'<g transform="translate({left:.1f} {head:.1f})">')

    # What is drawn later covers what is there: boxes first, then the lines, then the nodes.
    places = {key: place for key, place in arranged.places.items() if key != "/"}
    parts += [_open(shown, key, place) for key, place in places.items() if key in opened]
    parts += [_curve(curve) for curve in arranged.curves]
    parts += [_thing(shown, key, place) for key, place in places.items() if key not in opened]
    return "\n".join([*parts, "</g>", "</svg>", ""])


def png(text: str) -> bytes:
    """Render SVG text as a PNG, larger than the SVG by a half, or less so if a side would have more than ``LARGEST`` pixels.

    Raises:
        GraphRegError: resvg-py or a font is not installed, or the PNG would have to be smaller than
            the SVG.
    """
    try:
        import resvg_py  # noqa: PLC0415
    except ImportError:
        raise GraphRegError("a .png is made by resvg-py, which is not installed: pip install 'graphreg[draw]'.") from None

    # Without a font, resvg leaves out all text and raises nothing: an M then looks like no text.
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    letter = f'<text y="15" style="font-family: {FONT}">M</text>'
    if bytes(resvg_py.svg_to_bytes(svg_string=frame.format(letter))) == bytes(resvg_py.svg_to_bytes(svg_string=frame.format(""))):
        raise GraphRegError("no font is installed, and a .png would have no letters (Debian: fonts-dejavu-core). Draw .svg instead.")
    longest = max(map(int, re.findall(r'(?:width|height)="(\d+)"', text)[:2]))
    if longest > LARGEST:
        raise GraphRegError(
            f"this drawing is {longest} pixels long; many viewers open no .png of more than {LARGEST}. Draw .svg or .html, or fewer "
            "modules unfolded by a lower level=."
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=text, zoom=min(1.5, LARGEST / longest)))


def tint(shown: Picture, name: str) -> str:
    """Return the SVG attributes for fill and border in a regularizer's colour."""
    number = shown.colour.get(name.partition(", ")[0])
    shade = colour(number) if number is not None else "#6e7781"
    return f'fill="{shade}" fill-opacity=".25" stroke="{shade}" stroke-width="1.4"'


def _text(x: float, y: float, text: str, style: str = "", middle: bool = False) -> str:
    kind = (f' class="{style}"' if style else "") + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{escape(text)}</text>'


def _rect(place: Rectangle, style: str, round_by: float = 4.0) -> str:
    size = f'width="{place.width:.1f}" height="{place.height:.1f}"'
    return f'<rect x="{place.x:.1f}" y="{place.y:.1f}" {size} rx="{round_by}" {style}/>'


def _open(shown: Picture, key: str, place: Rectangle) -> str:
    box = shown.boxes[key]
    head = Rectangle(place.x, place.y, place.width, HEADER)
    name = box_title(box)
    shapes = _rect(place, 'class="box"') + _rect(head, 'class="head"')
    texts = f"{_text(place.x + 8, place.y + 14, name)}{_stub(shown, key, place)}"
    return f'<g data-key="{escape(key)}">{shapes}{texts}<title>{escape(box.path)}</title></g>'


def _stub(shown: Picture, key: str, place: Rectangle) -> str:
    """Draw a short line to a block that reads a value from far above, and the value's name."""
    if not (text := stub_text(shown, key, place.width)):
        return ""
    x, y = place.x + 4, place.y
    line = f'<path class="line" d="M{x:.1f} {y - 16:.1f}V{y:.1f}"/><path class="arrow" d="M{x:.1f} {y:.1f}l-3.2 -6h6.4z"/>'
    return f'<g class="stub">{line}{_text(x + 5, y - 7, text, "second")}<title>{escape(stub_text(shown, key))}</title></g>'


def _thing(shown: Picture, key: str, place: Rectangle) -> str:
    """Draw a node, or a folded module with a dot and a count for each regularizer in it."""
    first, second = label_lines(shown, key)
    middle, attributes = place.x + place.width / 2, shown.nodes.get(key, {})
    kind = "folded" if key in shown.boxes else "end" if attributes.get("call") in ("placeholder", "output") else str(attributes["kind"])
    style = tint(shown, attributes["regularizer"]) if kind == "addition" else f'class="{kind}"'
    fold = shown.boxes[key].kind != "module" if key in shown.boxes else False
    round_by = 12.0 if kind in ("end", "addition") else 4.0
    # A second rectangle behind the first makes a fold look like a stack.
    behind = [_rect(place.moved(4, 4), 'class="folded"', round_by)] if fold or (key in shown.boxes and shown.boxes[key].repeats) else []
    parts = [*behind, _rect(place, style, round_by), _text(middle, place.y + 15, first, middle=True)]
    if second:
        parts.append(_text(middle, place.y + 28, second, "second", middle=True))
    if kind == "folded" and (acts := shown.boxes[key].acts):
        widths = count_widths(acts.values())
        for x, (name, count) in zip(accumulate(widths, initial=middle - sum(widths) / 2), acts.items(), strict=False):
            parts.append(f'<circle cx="{x + 7:.1f}" cy="{place.y + 41:.1f}" r="4" {tint(shown, name)}/>')
            parts.append(_text(x + 14, place.y + 45, str(count), "second"))
    for i, badge in enumerate(shown.badges.get(key, ())):
        parts.append(_badge(shown, badge, place, place.y + place.height - 2 - BADGE * (len(shown.badges[key]) - i)))
    full = attributes.get("source", "") and f" ({attributes['source']})"
    title = full_name(shown, key) if key in shown.boxes else f"{attributes['name']}{full}"
    return f'<g data-key="{escape(key)}">{"".join(parts)}{_stub(shown, key, place)}<title>{escape(title)}</title></g>'


def box_title(box: Box) -> str:
    """Return the title of an open box."""
    return f"{box.name} {box.repeats or box.op}".strip() if box.kind == "module" else box.op


def full_name(shown: Picture, key: str) -> str:
    """Return the path of a folded box, with what it holds if it is no module."""
    box = shown.boxes[key]
    return box.path if box.kind == "module" else " ".join(filter(None, [box.path, f"{box.op}: {label_lines(shown, key)[1]}"]))


def _badge(shown: Picture, badge: Badge, place: Rectangle, y: float) -> str:
    """Draw a badge within its node, with its upper border at y."""
    wide = 0.9 * text_width(badge.text) + 16
    x = place.x + (place.width - wide) / 2
    pill = _rect(Rectangle(x, y, wide, BADGE - 2), f"{_solid(shown, badge.regularizer)}{_MARKS[badge.state]}", 6.0)
    return f'<g class="badge {badge.state}">{pill}{_text(x + wide / 2, y + 9.7, badge.text, "small", middle=True)}</g>'


_MARKS = {
    "": "", "added": ' stroke-width="2.4"', "removed": ' stroke-dasharray="3 2"', "changed": ' stroke-width="2.4" stroke-dasharray="8 2"',
}  # fmt: skip


def _solid(shown: Picture, name: str) -> str:
    """Return the SVG attributes of a badge: a light shade of the regularizer's colour, and that colour darkened for the border."""
    shade = colour(shown.colour[name]) if name in shown.colour else "#6e7781"
    parts = [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
    light, dark = (f"#{''.join(f'{round(part * by + plus):02x}' for part in parts)}" for by, plus in ((0.25, 191.25), (0.7, 0)))
    return f'fill="{light}" stroke="{dark}"'


def _curve(curve: Curve) -> str:
    """Draw a line, with an arrowhead where it ends at a node."""
    (x, y), *rest = curve.points
    pieces = [f"C{' '.join(f'{px:.1f} {py:.1f}' for px, py in rest[i : i + 3])}" for i in range(0, len(rest), 3)]
    line = f'<path class="line" d="M{x:.1f} {y:.1f}{"".join(pieces)}"/>'
    if not curve.arrow:
        return line
    # The head points up where a line runs upwards.
    (x, y), down = rest[-1], -1 if curve.link.back else 1
    return f'{line}<path class="arrow" d="M{x:.1f} {y:.1f}l-3.2 {-6 * down}h6.4z"/>'


def dot(shown: Picture, opened: Collection[str]) -> str:
    """Return a ``digraph`` for Graphviz of all that is visible if the boxes ``opened`` are unfolded."""
    legend = "".join(f"\\l{_escaped(f'{name}: {text}')}" for name, text in shown.regularizers.items())
    head = [
        f"digraph {quoted(shown.title)} {{",
        f'  graph [label="{_escaped(shown.title)}{legend}\\l", labelloc=t, labeljust=l, fontname="monospace", compound=true]',
        '  node [shape=box, style=rounded, fontname="monospace", fontsize=11]',
    ]

    # one line for each pair of visible nodes and folded modules
    visible = {key: next((box for box in shown.around(key) if box not in opened), key) for key in shown.nodes}
    pairs = dict.fromkeys((visible[start], visible[end]) for start, end in shown.edges)
    lines = [f"  {quoted(start)} -> {quoted(end)}" for start, end in pairs if start != end]
    return "\n".join([*head, *_content(shown, "/", opened, "  "), *lines, "}", ""])


def quoted(text: str) -> str:
    """Quote a string for dot."""
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _content(shown: Picture, key: str, opened: Collection[str], indent: str) -> Iterator[str]:
    for child in shown.boxes[key].children:
        first, second = label_lines(shown, child)
        if child in opened:
            yield f"{indent}subgraph {quoted(f'cluster {child}')} {{"
            yield f"{indent}  label={quoted(first)}"
            yield from _content(shown, child, opened, f"{indent}  ")
            yield f"{indent}}}"
            continue
        attributes = shown.nodes.get(child, {})
        here = [attributes.get("regularizer", ""), *(badge.regularizer for badge in shown.badges.get(child, ()))]
        number = next((shown.colour[name] for name in here if name in shown.colour), None)
        fill = f', style="rounded,filled", color="{colour(number)}", fillcolor="{colour(number)}40"' if number is not None else ""
        acts = "".join(f"\\n[{_escaped(badge.text)}]" for badge in shown.badges.get(child, ()))
        folded = ", peripheries=2" if child in shown.boxes else ""
        yield f'{indent}{quoted(child)} [label={quoted(first)[:-1]}\\n{_escaped(second)}{acts}"{fill}{folded}]'
