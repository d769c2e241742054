"""Tells Sphinx how to make the site from docs/, CONTRIBUTING.md and CHANGELOG.md. ``make docs`` runs it from the root of the checkout.

The pages are plain Markdown, which a Git host shows as well. So the navigation is here, and not in the pages. Beside each page of HTML the
site has its Markdown, and llms.txt (https://llmstxt.org) lists these for readers that are programs.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.builders.text import TextBuilder

import graphreg

TOP = Path(__file__).parent.parent
LINK = re.compile(r"\[([^]]+)\]\([^)]*\)")

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
html_static_path = ["site.css"]
html_css_files = ["site.css"]
text_sectionchars = "=-~"  # the first two underline a heading in Markdown, too


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
    "Regularizers": docs("regularizers not_here"),
    "Reference": docs("reference/api options selectors cli recipes reference/errors reference/migration limits gpu"),
    "Explanation": docs("front_ends randomness verify"),
    "Coming from": docs("coming_from/keras coming_from/hooks theanets"),
    "Evidence": docs("models models_other models_ways suites fuzz sameness versions benchmarks study trials/README"),
    "For contributors": ["CONTRIBUTING", "docs/architecture", "CHANGELOG", "docs/SECURITY"],
}
parts = {"Start": "For users", "Evidence": "", "For contributors": ""}  # by the first caption of each, the part's name if it is another
under = {
    "docs/howto/README": [
        f"docs/howto/{name}" for name in re.findall(r"\]\((\w+)\.md\)", (TOP / "docs" / "howto" / "README.md").read_text(encoding="utf-8"))
    ],
    "docs/reference/api": docs("reference/api_regularize reference/api_train reference/api_look reference/api_write reference/api_records"),
    "docs/regularizers": pages_in("regularizers"),
    "docs/not_here": pages_in("examples"),
    "docs/trials/README": pages_in("trials"),
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


def show_parts(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Mark in the sidebar where each of the three parts begins, and link the page to its Markdown. Furo has made the sidebar by now."""
    for caption, part in parts.items():
        plain = f'<span class="caption-text">{caption}</span>'
        marked = f'<span class="part">{part}</span>{plain}' if part else f'<span class="part">{caption}</span>'
        context["furo_navigation_tree"] = context["furo_navigation_tree"].replace(plain, marked)
    if doctree is not None:
        context["theme_source_view_link"] = markdown = f"{name.rpartition('/')[2]}.md"
        context["metatags"] += f'<link rel="alternate" type="text/markdown" href="{markdown}">'


def write_front_door(app: Sphinx, error: Exception | None) -> None:
    """Write index.html, which leads to the page that is the index of docs/ on a Git host."""
    if error is None:
        head = f'<meta charset="utf-8"><title>{html_title}</title><meta http-equiv="refresh" content="0; url={root_doc}.html">'
        (app.outdir / "index.html").write_text(f'<!doctype html>{head}<a href="{root_doc}.html">{html_title}</a>\n')


def write_markdown(app: Sphinx, error: Exception | None) -> None:
    """Write each page's Markdown beside its HTML, with the files that it links to at the same places as in the checkout; and llms.txt."""
    if error is not None:
        return
    for name in app.env.found_docs:
        text = (TOP / f"{name}.md").read_text(encoding="utf-8")
        (app.outdir / f"{name}.md").write_text(plain_text(app, name) if "```{eval-rst}" in text else text, encoding="utf-8")
    for name in (*app.env.dlfiles, *app.env.images):
        (app.outdir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TOP / name, app.outdir / name)
    (app.outdir / "llms.txt").write_text(llms_txt(app), encoding="utf-8")


def plain_text(app: Sphinx, name: str) -> str:
    """Return a page as plain text, with the docstrings: its Markdown has directives, which say no more than their names."""
    builder = TextBuilder(app, app.env)
    builder.init()
    doctree = app.env.get_and_resolve_doctree(name, builder)
    translator = builder.create_translator(doctree, builder)
    doctree.walkabout(translator)
    return str(translator.body)


def llms_txt(app: Sphinx) -> str:
    """Return the list of all pages: below the captions of the navigation, each with its title and a sentence.

    The sentence is that of the home page's tables, or else the first one of the page.
    """
    home = (TOP / f"{root_doc}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[[^]]+\]\((\S+)\.md\) \| (.+) \|$", home, re.MULTILINE)
    said = {os.path.normpath(f"docs/{page}"): sentence for page, sentence in rows}
    about = f"This is graphreg {release}. Each page is here as Markdown and as HTML. [The home page]({root_doc}.md) has an example."
    lines = [f"# {project}", f"> {first_paragraph(home)}", about]
    for caption, pages in navigation.items():
        entries = []
        for page in (each for top in pages for each in [top, *under.get(top, [])]):
            first = first_paragraph((TOP / f"{page}.md").read_text(encoding="utf-8")).removeprefix("**Goal.** ").partition(". ")[0]
            sentence = LINK.sub(r"\1", said.get(page, first)).removesuffix(".")
            entries.append(f"- [{app.env.titles[page].astext()}]({page}.md): {sentence}")
        lines += [f"## {caption}", "\n".join(entries)]
    return "\n\n".join(lines) + "\n"


def first_paragraph(page: str) -> str:
    """Return what stands below the title of a page of Markdown, up to the next blank line."""
    return page.split("\n\n")[1].replace("\n", " ")


def setup(app: Sphinx) -> None:
    app.add_config_value("navigation", {}, "env")  # if one of them changes, all pages are read again
    app.add_config_value("under", {}, "env")
    app.connect("source-read", add_navigation)
    app.connect("html-page-context", show_parts, priority=900)
    app.connect("build-finished", write_front_door)
    app.connect("build-finished", write_markdown)
