"""What a notebook shows: the same blocks as HTML. Colours are see-through, so that it reads on light and on dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from graphreg.screen import Block, Lines

_CELL = "text-align:left;padding:0.1em 0.8em 0.1em 0;vertical-align:top;font-family:monospace"
_BACKGROUNDS = {"+": "rgba(46,160,67,0.18)", "-": "rgba(248,81,73,0.18)", "@": "rgba(56,139,253,0.15)"}


def html(blocks: Iterable[Block]) -> str:
    """Tables and paragraphs; every text is escaped."""
    return "<div>" + "".join(map(_block, blocks)) + "</div>"


def _block(block: Block) -> str:
    if isinstance(block, Lines):
        lines = "<br>".join(map(escape, block.lines))
        return f"<p>{f'<strong>{lines}</strong>' if block.style == 'bold' else lines}</p>" if lines else ""
    if not block.full[0]:
        return ""
    head, *rows = ["".join(f'<{tag} style="{_CELL}">{escape(cell)}</{tag}>' for cell in row) for tag, row in _tagged(block.full)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _tagged(full: list[tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    return [("td" if i else "th", row) for i, row in enumerate(full)]


def marked(lines: Iterable[tuple[str, str]]) -> str:
    """Lines of code with the signs of a difference, ``+``, ``-``, ``@`` or a blank: [(sign, line)]."""
    shown = []
    for sign, line in lines:
        colour = f";background:{_BACKGROUNDS[sign]}" if sign in _BACKGROUNDS else ""
        shown.append(f'<span style="display:block;min-height:1.2em{colour}">{escape(line)}</span>')
    return f'<pre style="overflow-x:auto;line-height:1.3">{"".join(shown)}</pre>'
