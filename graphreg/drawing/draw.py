"""``graphreg.draw``: writes a drawing of a model to a file; the file's extension selects the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphreg.drawing.graph import check_level
from graphreg.drawing.html import page
from graphreg.drawing.layout import arrange
from graphreg.drawing.render import dot, png, svg
from graphreg.drawing.scene import Picture, picture, unfolded
from graphreg.drawing.view import Drawable, Mode, Viewed, viewed
from graphreg.errors import GraphRegError, first_line, suggestions_text
from graphreg.planning import Plan
from graphreg.torch_internals import collector_at_rest

Opened = frozenset[str]


def _svg(seen: Viewed, shown: Picture, opened: Opened) -> str:
    return svg(shown, arrange(shown, opened), opened)


def _png(seen: Viewed, shown: Picture, opened: Opened) -> bytes:
    return png(_svg(seen, shown, opened))


def _dot(seen: Viewed, shown: Picture, opened: Opened) -> str:
    return dot(shown, opened)


FORMATS: dict[str, Callable[[Viewed, Picture, Opened], str | bytes]] = {".svg": _svg, ".png": _png, ".dot": _dot, ".html": page}


@collector_at_rest()
def draw(
    module: Drawable,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    level: int | None = None,
    mode: Mode = "train",
) -> Path:
    """Draw a model, a trace, a plan or a rewritten module to a file.

    Args:
        module: What to draw.
        path: The file; its extension is ``.svg``, ``.png``, ``.dot`` or ``.html``. On an HTML page, a click unfolds a module.
        plan: With a model or a trace: draw it as if this plan were applied.
        example_inputs: With a model: example inputs, as in ``trace``.
        level: Fold each module at this depth into one node. A whole number, 1 or more; None unfolds one depth after the other, as long as
            at most 60 nodes are visible.
        mode: Which forward to draw, ``"train"`` or ``"eval"``, if the two differ.

    Returns:
        The path of the file.

    Raises:
        GraphRegError: The extension is unknown, the file cannot be written, a package that the format needs is not installed, an option
            is not allowed, or what was given has no graph.
    """
    check_level(level)
    file = _file(path)
    seen = viewed(module, plan, example_inputs, mode)
    shown = picture(seen)
    made = FORMATS[file.suffix.lower()](seen, shown, unfolded(shown, level))
    try:
        file.write_bytes(made if isinstance(made, bytes) else made.encode())
    except OSError as error:
        raise GraphRegError(f"{str(file)!r} cannot be written ({first_line(error)}). Give another path.") from error
    return file


def _file(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise GraphRegError(f"draw writes to a path, not to {type(path).__name__}: draw(module, 'model.svg').")
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        known = ", ".join(FORMATS)
        suggestions = suggestions_text(file.suffix, FORMATS, "Near ones") if file.suffix else ""
        raise GraphRegError(f"{str(file)!r} ends in {file.suffix or 'no extension'!r}; drawings end in {known}.{suggestions}")
    if not file.parent.is_dir():
        raise GraphRegError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}. Make it first.")
    return file
