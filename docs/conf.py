"""Tells Sphinx how to make the site from docs/, CONTRIBUTING.md and CHANGELOG.md. ``make docs`` runs it from the root of the checkout.

The pages are plain Markdown, which a Git host shows as well. So the navigation is here, and not in the pages.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

import graphreg

TOP = Path(__file__).parent.parent

project = "graphreg"
author = "the developers of graphreg"
project_copyright = author
version = release = graphreg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
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
navigation = {
    "Start": docs("start"),
    "Tutorials": docs("tutorials/vit tutorials/bert tutorials/gru tutorials/monte_carlo tutorials/fsdp2"),
    "How-to": docs(
        "howto/README training penalties modes mixed_precision which_tool how_strong trainers in_place scale blocks pipeline backend"
        " fx_pass where attention depth parameters optimizers"
        " exact_zeros keep learned native_dropout report diff drawing page beside monitor audit doctor writing"
    ),
    "Regularizers": docs("regularizers not_here study"),
    "Reference": docs(
        "reference/api options selectors cli recipes reference/errors reference/migration limits models models_other suites gpu versions"
    ),
    "Explanation": docs("architecture front_ends randomness sameness verify benchmarks fuzz"),
    "Coming from": docs("coming_from/keras coming_from/hooks theanets"),
    "Contributing": ["CONTRIBUTING", "CHANGELOG", "docs/SECURITY"],
}
under = {
    "docs/howto/README": [
        f"docs/howto/{name}" for name in re.findall(r"\]\((\w+)\.md\)", (TOP / "docs" / "howto" / "README.md").read_text(encoding="utf-8"))
    ],
    "docs/reference/api": docs("reference/api_regularize reference/api_train reference/api_look reference/api_write reference/api_records"),
    "docs/regularizers": pages_in("regularizers"),
    "docs/not_here": pages_in("examples"),
}


def toctree(pages: list[str], caption: str = "") -> str:
    """Return a list of pages as a directive of MyST, which the reader of a page does not see."""
    return "\n".join(
        ["", "```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *(f"/{page}" for page in pages), "```", ""]
    )


def add_navigation(app: Sphinx, name: str, text: list[str]) -> None:
    """Append to a page the lists of the pages that stand below it in the navigation."""
    if name == root_doc:
        text[0] += "".join(toctree(pages, caption) for caption, pages in navigation.items())
    elif name in under:
        text[0] += toctree(under[name])


def write_front_door(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which leads to the page that is the index of docs/ on a Git host."""
    if error is None:
        head = f'<meta charset="utf-8"><title>{html_title}</title><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (app.outdir / "index.html").write_text(f'<!doctype html>{head}<a href="{root_doc}.html">{html_title}</a>\n')


def setup(app: Sphinx) -> None:
    app.add_config_value("navigation", {}, "env")  # if one of them changes, all pages are read again
    app.add_config_value("under", {}, "env")
    app.connect("source-read", add_navigation)
    app.connect("build-finished", write_front_door)
