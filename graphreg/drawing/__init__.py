"""The graph as a picture: SVG, PNG, dot text or a page."""

from graphreg.drawing.draw import draw
from graphreg.drawing.graph import to_networkx

__all__ = [
    "draw", "to_networkx",
]  # fmt: skip
