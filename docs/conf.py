"""Tells Sphinx how to make the site from docs/, CONTRIBUTING.md and CHANGELOG.md. ``make docs`` runs it from the root of the checkout.

The pages are plain Markdown, which a Git host shows as well. So the navigation is here, and not in the pages.
"""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

import graphreg

TOP = Path(__file__).parent.parent

project = "graphreg"
author = "the developers of graphreg"
project_copyright = author
version = release = graphreg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/README"
include_patterns = ["docs/**", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "*.egg-info", "build", "dist", "graphreg", "passes", "tests", "examples", "benchmarks"]

myst_heading_anchors = 4  # those that a Git host makes
myst_enable_extensions = ["html_image"]

html_theme = "furo"
html_title = f"graphreg {release}"
html_show_sphinx = html_show_sourcelink = html_copy_source = False
html_show_search_summary = False  # it is fetched, which a browser forbids for pages on disk


def pages_in(folder: str) -> list[str]:
    """Return the pages of a folder of docs/, by name, without its README."""
    return sorted(f"docs/{folder}/{path.stem}" for path in (TOP / "docs" / folder).glob("*.md") if path.stem != "README")


def docs(names: str) -> list[str]:
    """Return the pages of docs/ that a text names."""
    return [f"docs/{name}" for name in names.split()]


# The captions of the navigation, each with its pages, and below them the pages that are shown under another.
NAVIGATION = {
    "Start": docs("start"),
    "How-to": docs(
        "training trainers in_place scale blocks pipeline backend fx_pass depth parameters learned native_dropout"
        " report diff drawing page monitor audit doctor writing"
    ),
    "Regularizers": docs("regularizers not_here study theanets"),
    "Reference": docs("options selectors cli recipes limits models versions"),
    "Explanation": docs("architecture front_ends randomness sameness verify benchmarks fuzz"),
    "Contributing": ["CONTRIBUTING", "CHANGELOG"],
}
UNDER = {"docs/regularizers": pages_in("regularizers"), "docs/not_here": pages_in("examples")}


def toctree(pages: list[str], caption: str = "") -> str:
    """Return a list of pages as a directive of MyST, which the reader of a page does not see."""
    return "\n".join(
        ["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *(f"/{page}" for page in pages), "```", ""]
    )


def add_navigation(app: Sphinx, name: str, text: list[str]) -> None:
    """Append to a page the lists of the pages that stand below it in the navigation."""
    if name == root_doc:
        text[0] += "".join(toctree(pages, caption) for caption, pages in NAVIGATION.items())
    elif name in UNDER:
        text[0] += toctree(UNDER[name])


def write_front_door(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which leads to the page that is the index of docs/ on a Git host."""
    if error is None:
        head = f'<meta charset="utf-8"><title>{html_title}</title><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (app.outdir / "index.html").write_text(f'<!doctype html>{head}<a href="{root_doc}.html">{html_title}</a>\n')


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", write_front_door)
