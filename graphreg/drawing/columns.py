"""Wraps the layout of a high box into columns, which are read from top to bottom and from left to right.

A line from one column to the next goes to the gap between the columns, up in it, and into the next
column from above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphreg.drawing.scene import OUT, BoxLink

Point = tuple[float, float]
Points = tuple[Point, ...]
# width, height, centres by key, and the curve of each line
Laid = tuple[float, float, dict[str, Point], list[tuple[BoxLink, Points]]]
LANE, GAP = 7.0, 14.0  # pixels: between two lines in a gap, and beside them
MOST = 8  # lines that may go from one column to the next


def in_columns(laid: Laid, sizes: Mapping[str, tuple[float, float]], high: float) -> Laid:
    """Wrap a layout into columns of about the height ``high``. Return it as it is if it is not higher, or cannot be cut."""
    tall, spots, splines = laid[1:]
    if tall <= 1.3 * high:
        return laid

    # Lines that run upwards are turned round here, and back again at the end.
    downward = [(link, points[::-1] if link.back else points) for link, points in splines]
    cuts = _cuts(tall, spots, sizes, [points for _, points in downward], high)
    if not cuts:
        return laid

    bounds = [*zip([0.0, *cuts], [*cuts, tall], strict=True)]
    pieces = [_split(points, cuts) for _, points in downward]
    # Each line that goes on in the next column has a lane of its own in the gap before it.
    lanes = [sum(len(piece) > 0 and i + 1 in piece and i in piece for piece in pieces) for i in range(len(cuts))]
    moves, bottoms, width, height = _placed(bounds, spots, sizes, pieces, lanes)

    moved = {}
    for key, (x, y) in spots.items():
        dx, dy = moves[_column(y, cuts)]
        moved[key] = (x + dx, height if key == OUT else y + dy)

    used = [0] * len(cuts)
    curves = []
    for (link, _), piece in zip(downward, pieces, strict=True):
        points = _joined(piece, moves, bottoms, lanes, used)
        # The border of the box is at the bottom of the highest column, and maybe below this one.
        if link.end == OUT and points[-1][1] < height:
            points = (*points, *_straight(points[-1], (points[-1][0], height)))
        curves.append((link, points[::-1] if link.back else points))
    return width, height, moved, curves


def _column(y: float, cuts: Sequence[float]) -> int:
    return sum(y > cut for cut in cuts)


def _cuts(
    tall: float, spots: Mapping[str, Point], sizes: Mapping[str, tuple[float, float]], lines: Sequence[Points], high: float
) -> list[float]:
    """Choose heights to cut at: between two ranks, near the wished heights, where the fewest lines are cut."""
    spans = sorted((y - sizes.get(key, (0, 0))[1] / 2, y + sizes.get(key, (0, 0))[1] / 2) for key, (_, y) in spots.items())
    gaps, low = [], spans[0][1]
    for top, bottom in spans[1:]:
        # No node reaches into this height, so that a cut there passes through lines alone.
        if top > low + 4:
            gaps.append((low + top) / 2)
        low = max(low, bottom)
    count = -(-tall // high)
    cuts: list[float] = []
    for i in range(1, int(count)):
        wish = tall * i / count
        near = [gap for gap in gaps if abs(gap - wish) < 0.35 * tall / count and gap > (cuts[-1] if cuts else 0)]
        crossing = {gap: sum(points[0][1] < gap < points[-1][1] for points in lines) for gap in near}
        allowed = [gap for gap in near if crossing[gap] <= MOST]
        if allowed:
            # A cut through at most two lines is best. Among those, a cut line weighs as much as 40
            # pixels of distance from the wished height.
            cuts.append(min(allowed, key=lambda gap: (crossing[gap] > 2, abs(gap - wish) + 40 * crossing[gap])))
    return cuts


def _split(points: Points, cuts: Sequence[float]) -> dict[int, Points]:
    """Cut a line that runs downwards at each height; return its piece in each column that it passes."""
    found: dict[int, Points] = {}
    column, rest = _column(points[0][1], cuts), points
    while column < len(cuts) and rest[-1][1] > cuts[column]:
        upper, rest = _cut(rest, cuts[column])
        found[column] = upper
        column += 1
    found[column] = rest
    return found


def _cut(points: Points, height: float) -> tuple[Points, Points]:
    """Cut a chain of Bézier curves at a height that it passes."""
    for i in range(0, len(points) - 1, 3):
        if points[i + 3][1] >= height:
            break
    a, b, c, d = points[i : i + 4]
    # By bisection: the line runs downwards, so it passes the height once.
    low, top = 0.0, 1.0
    for _ in range(30):
        t = (low + top) / 2
        y = (1 - t) ** 3 * a[1] + 3 * t * (1 - t) ** 2 * b[1] + 3 * t * t * (1 - t) * c[1] + t**3 * d[1]
        low, top = (t, top) if y < height else (low, t)

    # De Casteljau's construction: the points of the two halves of the curve at t.
    ab, bc, cd = _between(a, b, t), _between(b, c, t), _between(c, d, t)
    left, right = _between(ab, bc, t), _between(bc, cd, t)
    middle = _between(left, right, t)
    return (*points[: i + 1], ab, left, middle), (middle, right, cd, *points[i + 3 :])


def _between(one: Point, other: Point, t: float) -> Point:
    return one[0] + (other[0] - one[0]) * t, one[1] + (other[1] - one[1]) * t


def _placed(
    bounds: Sequence[tuple[float, float]], spots: Mapping[str, Point], sizes: Mapping[str, tuple[float, float]],
    pieces: Sequence[Mapping[int, Points]], lanes: Sequence[int],
) -> tuple[list[Point], list[tuple[float, float]], float, float]:  # fmt: skip
    """Place the columns. Return how far each is moved, the right end and the bottom of each, and the size of the whole."""
    room = max(lanes) * LANE + GAP
    moves, ends, x, height = list[Point](), list[tuple[float, float]](), 0.0, 0.0
    for i, (top, bottom) in enumerate(bounds):
        xs = [x for piece in pieces if i in piece for x, _ in piece[i]]
        for key, (middle, y) in spots.items():
            if top < y <= bottom or (i == 0 and y <= bottom):
                half = sizes.get(key, (0, 0))[0] / 2
                xs += [middle - half, middle + half]
        left, right, above = min(xs), max(xs), room if i else 0.0
        moves.append((x - left, above - top))
        ends.append((x + right - left, above + bottom - top))
        height = max(height, above + bottom - top + (room if i < len(lanes) else 0.0))
        x += right - left + (GAP * 2 + lanes[i] * LANE if i < len(lanes) else 0.0)
    return moves, ends, x, height


def _joined(
    piece: Mapping[int, Points], moves: Sequence[Point], ends: Sequence[tuple[float, float]], lanes: Sequence[int], used: list[int]
) -> Points:
    """Join the pieces of a line through the gaps between the columns."""
    points: Points = ()
    for i in sorted(piece):
        dx, dy = moves[i]
        part = tuple((x + dx, y + dy) for x, y in piece[i])
        if points:
            lane = used[i - 1]
            used[i - 1] += 1
            x, low = ends[i - 1][0] + GAP + lane * LANE, ends[i - 1][1] + 4 + lane * LANE
            top = part[0][1] - 6 - (lanes[i - 1] - 1 - lane) * LANE
            for corner in ((points[-1][0], low), (x, low), (x, top), (part[0][0], top), part[0]):
                points = (*points, *_straight(points[-1], corner))
            part = part[1:]
        points = (*points, *part)
    return points


def _straight(start: Point, end: Point) -> Points:
    """Return the further points of a straight line as a Bézier curve."""
    return _between(start, end, 1 / 3), _between(start, end, 2 / 3), end
