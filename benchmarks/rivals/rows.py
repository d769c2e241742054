"""The rows of the table, its columns, and what the page says in each cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "randomness.md"

Probe = Callable[[], str]

# what a probe is called: how the page names the row
ROWS = {
    "compiled": "eager and compiled draw the same masks",
    "layout": "every memory layout and batch size draws the same masks",
    "budget": "backward has the forward's mask when the compiler recomputes",
    "checkpoint": "backward has the forward's mask inside activation checkpointing",
    "seeds": "a site can have its own seed",
    "apart": "two sites never share a stream",
    "added": "adding a site leaves the masks of the others as they are",
    "resume": "resumes bit for bit from a small saved state",
    "ranks": "ranks have different masks or the same, by choice",
    "held": "can draw the same masks for several calls",
    "sampled": "many passes with the noise on, the rest in eval mode",
    "moved": "changes the rate of native dropout, removes it, reseeds it",
    "recompiles": "a new rate needs no recompilation",
    "fused": "is fused into the surrounding kernels",
    "kept": "additional bytes per element for backward, eager / compiled",
}

COLUMNS = {"graphreg": "ours", "`F.dropout`": "of_torch", "Keras 3 on torch": "of_keras", "Flax on JAX": "of_flax"}  # name: module


def said(page: str) -> dict[str, dict[str, str]]:
    """column -> row -> verdict, the words of a cell before its first comma, semicolon or bracket."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    start = next(i for i, cells in enumerate(lines) if set(COLUMNS) <= set(cells))
    head, body = lines[start], {cells[0]: cells for cells in lines[start + 1 :]}
    missing = [text for text in ROWS.values() if text not in body]
    if missing:
        raise LookupError(f"{PAGE.name} has no row {missing[0]!r}; the rows are those of {Path(__file__).name}.")
    return {
        column: {row: re.split(r"[,;(:]", body[text][head.index(column)])[0].strip() for row, text in ROWS.items()} for column in COLUMNS
    }


def found(probes: Mapping[str, Probe]) -> dict[str, str]:
    """The verdict of every row's probe. Raises LookupError where the probes are not the rows'."""
    if list(probes) != list(ROWS):
        raise LookupError(f"the probes are {list(probes)}, the rows {list(ROWS)}.")
    return {row: probe() for row, probe in probes.items()}


def yes(holds: bool) -> str:
    return "yes" if holds else "no"
