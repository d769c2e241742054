"""The drawing as Graphviz's own text: modules as clusters, additions in their colours. It needs no library."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from graphreg.picture import Picture, lines
from graphreg.svg import colour


def dot(shown: Picture, opened: Collection[str]) -> str:
    """A ``digraph`` of what is visible with these boxes open."""
    legend = "".join(f"\\l{_escaped(f'{name}: {text}')}" for name, text in shown.regularizers.items())
    head = [
        f"digraph {quoted(shown.title)} {{",
        f'  graph [label="{_escaped(shown.title)}{legend}\\l", labelloc=t, labeljust=l, fontname="monospace", compound=true]',
        '  node [shape=box, style=rounded, fontname="monospace", fontsize=11]',
    ]
    return "\n".join([*head, *_content(shown, "/", opened, "  "), *_lines(shown, opened), "}", ""])


def quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _content(shown: Picture, key: str, opened: Collection[str], indent: str) -> Iterator[str]:
    for child in shown.boxes[key].children:
        first, second = lines(shown, child)
        if child in opened:
            yield f"{indent}subgraph {quoted(f'cluster {child}')} {{"
            yield f"{indent}  label={quoted(first)}"
            yield from _content(shown, child, opened, f"{indent}  ")
            yield f"{indent}}}"
            continue
        about = shown.nodes.get(child, {})
        number = shown.colour.get(str(about.get("regularizer", "")).partition(", ")[0])
        fill = f', style="rounded,filled", color="{colour(number)}", fillcolor="{colour(number)}40"' if number is not None else ""
        folded = ", peripheries=2" if child in shown.boxes else ""
        yield f'{indent}{quoted(child)} [label={quoted(first)[:-1]}\\n{_escaped(second)}"{fill}{folded}]'


def _lines(shown: Picture, opened: Collection[str]) -> Iterator[str]:
    """Every line of the graph between what is visible, once."""
    visible = {key: next((box for box in shown.around(key) if box not in opened), key) for key in shown.nodes}
    seen: dict[tuple[str, str], str] = {}
    for start, end, name in shown.edges:
        pair = visible[start], visible[end]
        if pair[0] != pair[1]:
            seen[pair] = name if seen.get(pair, name) == name else ""
    for (start, end), name in seen.items():
        number = shown.colour.get(name.partition(", ")[0])
        yield f"  {quoted(start)} -> {quoted(end)}" + (f' [color="{colour(number)}"]' if number is not None else "")
