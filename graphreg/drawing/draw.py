"""``graphreg.draw``: draws a model to a file, whose extension selects the format, or for a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, overload

from graphreg.drawing.graph import check_level
from graphreg.drawing.html import page
from graphreg.drawing.layout import SCREEN, WIDEST, arrange
from graphreg.drawing.render import dot, png, svg
from graphreg.drawing.scene import Picture, picture, unfolded
from graphreg.drawing.values import read_values
from graphreg.drawing.view import Drawable, Mode, Viewed, viewed
from graphreg.errors import GraphRegError, first_line, suggestions_text
from graphreg.planning.plan import Plan
from graphreg.torch_internals.interpreter import collector_at_rest

Target = str | os.PathLike[str]
Opened = frozenset[str]


@dataclass(frozen=True)
class Drawing:
    """What ``draw`` returns without a path: a notebook shows it as an interactive page.

    Attributes:
        title: The model's name.
        page: The text of the page, which ``save`` writes to a file.
    """

    title: str
    page: str = field(repr=False)

    def _repr_html_(self) -> str:
        frame = "width:100%;height:640px;border:1px solid #8884"
        return f'<iframe title="{escape(self.title)}" style="{frame}" srcdoc="{escape(self.page)}"></iframe>'

    def save(self, path: Target) -> Path:
        """Write the page to a file that ends in ``.html``, and return its path."""
        return _write(_file(path, (".html",)), self.page)


def _svg(seen: Viewed, shown: Picture, opened: Opened) -> str:
    arranged = arrange(shown, opened)
    if arranged.width > WIDEST:
        times, deepest = arranged.width / WIDEST, max(shown.boxes[key].depth for key in opened)
        fewer = f"level={deepest} unfolds less; " if deepest else ""
        raise GraphRegError(
            f"this drawing of {shown.title} is {times:.1f} times as wide as a screen of {SCREEN:.0f} pixels on which its text has 9 "
            f"points. {fewer}an .html page can be zoomed, and folds what is not looked at."
        )
    return svg(shown, arranged, opened)


def _png(seen: Viewed, shown: Picture, opened: Opened) -> bytes:
    return png(_svg(seen, shown, opened))


def _dot(seen: Viewed, shown: Picture, opened: Opened) -> str:
    return dot(shown, opened)


FORMATS: dict[str, Callable[[Viewed, Picture, Opened], str | bytes]] = {".svg": _svg, ".png": _png, ".dot": _dot, ".html": page}


def _fitting(shown: Picture, opened: Opened) -> Opened:
    """Fold modules, one depth after another, until the drawing can be read on a screen, or nothing is left to fold."""
    while len(opened) > 1 and arrange(shown, opened).width > WIDEST:
        deepest = max(shown.boxes[key].depth for key in opened)
        opened = frozenset(key for key in opened if shown.boxes[key].depth < deepest)
    return opened


@overload
def draw(
    module: Drawable, path: Target, *, plan: Plan | None = ..., example_inputs: Any = ..., level: int | None = ..., mode: Mode = ...,
    against: Drawable | None = ..., values: Target | None = ...,
) -> Path: ...  # fmt: skip
@overload
def draw(
    module: Drawable, path: None = ..., *, plan: Plan | None = ..., example_inputs: Any = ..., level: int | None = ..., mode: Mode = ...,
    against: Drawable | None = ..., values: Target | None = ...,
) -> Drawing: ...  # fmt: skip
@collector_at_rest()
def draw(
    module: Drawable,
    path: Target | None = None,
    *,
    plan: Plan | None = None,
    example_inputs: Any = None,
    level: int | None = None,
    mode: Mode = "train",
    against: Drawable | None = None,
    values: Target | None = None,
) -> Path | Drawing:
    """Draw a model, a trace, a plan or a rewritten module to a file, or for a notebook.

    Args:
        module: What to draw.
        path: The file; its extension is ``.svg``, ``.png``, ``.dot`` or ``.html``. On an HTML page,
            a click unfolds a module. None returns a ``Drawing``, which a notebook shows as such a
            page.
        plan: Only if ``module`` is a model or a trace: draw it as if this plan were applied.
        example_inputs: Only if ``module`` is a model: example inputs, as in ``trace``. Without them,
            those that ``names`` uses.
        level: Fold each module at this depth into one node. A whole number, 1 or more; None unfolds
            one depth after the other, as long as at most 60 nodes are visible, and leaves repeated
            blocks folded.
        mode: Which forward to draw, ``"train"`` or ``"eval"``, if the two differ.
        against: Another plan or rewritten module for the same model. The drawing marks what
            ``module`` has in addition to ``against``, what it lacks, and what differs.
        values: For a page: a file that ``monitor(..., file=...)`` has written. The page shows the
            values on the drawing.

    Returns:
        The path of the file; without ``path``, a ``Drawing``.

    Raises:
        GraphRegError: The extension is unknown, the file cannot be written, a package that the
            format needs is not installed, an option is not allowed, what was given has no graph, or
            an ``.svg`` or ``.png`` would be too large to read on a screen.
    """
    check_level(level)
    file = None if path is None else _file(path, tuple(FORMATS))
    if values is not None and file is not None and file.suffix.lower() != ".html":
        raise GraphRegError(f"values= is for an .html page, not for {file.name!r}. Leave it out, or draw an .html page.")
    seen = viewed(module, plan, example_inputs, mode)
    # A plan has a trace of its own, and ``viewed`` refuses example inputs beside it.
    other = None if against is None else viewed(against, None, None if isinstance(against, Plan) else example_inputs, mode)
    seen = replace(seen, against=other, readings=None if values is None else read_values(values))
    shown = picture(seen)
    opened = unfolded(shown, level)
    if file is None:
        return Drawing(seen.title, page(seen, shown, opened))
    if level is None and file.suffix.lower() in (".svg", ".png"):
        opened = _fitting(shown, opened)
    return _write(file, FORMATS[file.suffix.lower()](seen, shown, opened))


def _write(file: Path, made: str | bytes) -> Path:
    try:
        file.write_bytes(made if isinstance(made, bytes) else made.encode())
    except OSError as error:
        raise GraphRegError(f"{str(file)!r} cannot be written ({first_line(error)}). Give another path.") from error
    return file


def _file(path: object, endings: tuple[str, ...]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise GraphRegError(f"draw writes to a path, not to {type(path).__name__}: draw(module, 'model.svg').")
    file = Path(path)
    if file.suffix.lower() not in endings:
        suggestions = suggestions_text(file.suffix, endings, "Near ones") if file.suffix else ""
        raise GraphRegError(f"{str(file)!r} ends in {file.suffix or 'no extension'!r}; drawings end in {', '.join(endings)}.{suggestions}")
    if not file.parent.is_dir():
        raise GraphRegError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}. Make it first.")
    return file
