"""Places everything in a drawing with Graphviz's dot, one open module at a time, from the innermost outwards.

The wheel of pygraphviz contains dot. When a module is laid out, each module directly inside it is
one node of fixed size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graphreg.drawing.columns import Laid, Point, in_columns
from graphreg.drawing.scene import IN, OUT, Box, BoxLink, Picture, label_lines, text_width
from graphreg.errors import GraphRegError

# pixels: a box's margin, its title, the room for lines at its border; an inch
PAD, HEADER, BAND, INCH = 12.0, 20.0, 14.0, 72.0
NARROWEST = 50.0  # pixels: a node without its margins; a page writes numbers into nodes
BADGE = 15.0  # pixels: the height of a badge
# pixels: a screen's width; how much larger a drawing is than its layout, so that 9 pixels are 9
# points
SCREEN, SCALE = 1920.0, 4 / 3
WIDEST = SCREEN / SCALE - 32.0  # the widest layout whose smallest text has 9 points on a screen
RANKS, NODES = 26.0, 16.0  # pixels between two ranks, and between two neighbours in a rank


@dataclass(frozen=True)
class Rectangle:
    """A rectangle in pixels: its upper left corner and its size; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    def moved(self, x: float, y: float) -> Rectangle:
        return Rectangle(self.x + x, self.y + y, self.width, self.height)


@dataclass(frozen=True)
class Curve:
    """A cubic Bézier curve: a first point, then three points for each piece. ``arrow``: whether it ends in an arrowhead."""

    link: BoxLink
    points: tuple[Point, ...]
    arrow: bool

    def moved(self, x: float, y: float) -> Curve:
        return Curve(self.link, tuple((px + x, py + y) for px, py in self.points), self.arrow)


@dataclass(frozen=True)
class Arrangement:
    """The whole layout: its size, the rectangle of each node and box by key (a box before its content), and the curves."""

    width: float
    height: float
    places: Mapping[str, Rectangle]
    curves: tuple[Curve, ...]


def graphviz() -> Any:
    """Import pygraphviz and return it; raise GraphRegError if it is not installed."""
    try:
        import pygraphviz  # noqa: PLC0415
    except ImportError:
        raise GraphRegError(
            "drawings are laid out by pygraphviz, which is not installed: pip install 'graphreg[draw]'. A .dot file does not need it."
        ) from None
    return pygraphviz


def arrange(shown: Picture, opened: Collection[str]) -> Arrangement:
    """Lay out all that is visible if the boxes ``opened`` are unfolded. A high drawing is wrapped into columns as far as a screen is wide.

    Raises GraphRegError if pygraphviz is not installed.
    """
    pgv, known = graphviz(), dict[Any, Laid]()
    whole = _box(shown, shown.boxes["/"], opened, pgv, None, known)
    if whole.height <= ENOUGH or whole.width > WIDEST:
        return whole
    tried = [_box(shown, shown.boxes["/"], opened, pgv, high, known) for high in HIGH if high < whole.height]
    return min([whole, *(one for one in tried if one.width <= WIDEST)], key=lambda one: one.height)


# pixels: heights of columns to try, and that of a screen
HIGH, ENOUGH = (2600.0, 1800.0, 1300.0, 950.0, 720.0), 800.0


def size(shown: Picture, key: str) -> tuple[float, float]:
    """Return the width and height of a node or a folded box, in pixels."""
    first, second = label_lines(shown, key)
    wide, high = max(text_width(first) * 1.1, text_width(second) * 0.9), 36.0 if second else 24.0
    if key in shown.boxes:
        widths = count_widths(shown.boxes[key].acts.values())
        return round(max(wide, sum(widths)) + 18), high + (16.0 if widths else 0)
    badges = shown.badges.get(key, ())
    wide = max(wide, NARROWEST, *(0.9 * text_width(badge.text) + 16 for badge in badges))
    return round(wide + 18), high + BADGE * len(badges) + 3 * bool(badges)


def count_widths(counts: Iterable[int]) -> list[float]:
    """Return the widths of the dots with counts in a folded box, in pixels."""
    return [20.0 + 0.9 * text_width(str(count)) for count in counts]


def header_width(box: Box) -> float:
    """Return the width that the title of an open box needs, in pixels."""
    return 1.1 * text_width(f"▾ {box.name} {box.repeats or box.op}") + 20


def _box(shown: Picture, box: Box, opened: Collection[str], pgv: Any, high: float | None, known: dict[Any, Laid]) -> Arrangement:
    """Lay out an open box by itself, with its upper left corner at 0, 0.

    ``high``: the height from which on a box is wrapped into columns. ``known``: what dot has laid
    out already.
    """
    inner = {key: _box(shown, shown.boxes[key], opened, pgv, high, known) for key in box.children if key in opened}
    sizes = {key: (inner[key].width, inner[key].height) if key in inner else size(shown, key) for key in box.children}
    what = (box.key, *sizes.values())
    if what not in known:
        known[what] = box_layout(box, sizes, pgv)
    wide, tall, spots, splines = known[what] if high is None else in_columns(known[what], sizes, high)

    # The box: its title, room for the lines at its border, and what dot has placed.
    top = HEADER if box.path else 0.0
    band_in, band_out = (BAND if any(pin in (a.start, a.end) for a in box.links) else 0.0 for pin in (IN, OUT))
    width = max(wide + 2 * PAD, header_width(box) if box.path else 0.0)
    left, above = (width - wide) / 2, top + band_in + PAD / 2
    height = above + tall + PAD / 2 + band_out

    places = {box.key: Rectangle(0, 0, width, height)}
    curves = [Curve(link, points, link.end != OUT).moved(left, above) for link, points in splines]

    for key, (x, y) in spots.items():
        if key == IN:
            curves.insert(0, Curve(BoxLink(IN, IN), bend((width / 2, top), (x + left, y + above)), False))
        elif key == OUT:
            curves.append(Curve(BoxLink(OUT, OUT), bend((x + left, y + above), (width / 2, height)), False))
        elif key in inner:
            dx, dy = x + left - sizes[key][0] / 2, y + above - sizes[key][1] / 2
            places |= {name: place.moved(dx, dy) for name, place in inner[key].places.items()}
            curves += [curve.moved(dx, dy) for curve in inner[key].curves]
        else:
            places[key] = Rectangle(x + left - sizes[key][0] / 2, y + above - sizes[key][1] / 2, *sizes[key])
    return Arrangement(width, height, places, tuple(curves))


def bend(start: Point, end: Point) -> tuple[Point, ...]:
    """Return a curve from a point to a lower one. It is vertical at both ends."""
    half = (start[1] + end[1]) / 2
    return start, (start[0], half), (end[0], half), end


def box_layout(box: Box, sizes: Mapping[str, tuple[float, float]], pgv: Any) -> Laid:
    """Run dot on one box; return the width and height of its content, the centre of each child, and the curve of each line."""
    graph = pgv.AGraph(directed=True, strict=False, ranksep=RANKS / INCH, nodesep=NODES / INCH, splines="true")
    ids = {key: f"n{i}" for i, key in enumerate([*box.children, IN, OUT])}
    for key, (width, height) in sizes.items():
        graph.add_node(ids[key], label="", shape="box", fixedsize="true", width=width / INCH, height=height / INCH)

    pins = {pin for link in box.links for pin in (link.start, link.end) if pin in (IN, OUT)}
    for pin in sorted(pins):
        graph.add_node(ids[pin], label="", shape="point", width=0.01, height=0.01)
        graph.add_subgraph([ids[pin]], rank="source" if pin == IN else "sink")

    # Lines run downwards, so that dot puts the end of a line below its start.
    for i, link in enumerate(box.links):
        upper, lower = (link.end, link.start) if link.back else (link.start, link.end)
        graph.add_edge(
            ids[upper], ids[lower], key=str(i), arrowhead="none", weight=3,
            **({} if upper == IN else {"tailport": "s"}), **({} if lower == OUT else {"headport": "n"}),
        )  # fmt: skip

    graph.layout(prog="dot")
    left, bottom, right, top = map(float, graph.graph_attr["bb"].split(","))
    spots = {key: _point(graph.get_node(ids[key]).attr["pos"], left, top) for key in [*sizes, *sorted(pins)]}

    curves = []
    for i, link in enumerate(box.links):
        upper, lower = (link.end, link.start) if link.back else (link.start, link.end)
        points = tuple(_point(text, left, top) for text in graph.get_edge(ids[upper], ids[lower], key=str(i)).attr["pos"].split())
        if upper == IN:  # dot ends a line at the border of the invisible node IN, not at its centre
            points = (spots[IN], *points[1:])
        if lower == OUT:
            points = (*points[:-1], spots[OUT])
        curves.append((link, points[::-1] if link.back else points))
    return right - left, top - bottom, spots, curves


def _point(text: str, left: float, top: float) -> Point:
    x, y = map(float, text.split(","))
    return x - left, top - y
