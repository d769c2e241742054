"""Checks a built site: ``python docs/check_site.py build/site`` lists dead links and what a reader without a network would miss.

Sphinx checks the links that it makes from Markdown. This reads the pages as a browser does, those of the theme and of autodoc as well; and
llms.txt and the Markdown of the pages as a program does that follows their links.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}  # what a browser fetches to show a page


class PageReader(HTMLParser):
    """Collects the anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.links, self.loads = {""}, list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.loads.append(given[LOADED[tag]])


def faults(site: Path) -> Iterator[str]:
    """Yield a line for each link that leads nowhere, for each thing that a page loads from the network, and for each page of Markdown that
    has no HTML or is not in llms.txt.

    A page of HTML has a link to its Markdown in its head. A place on a page of Markdown is one that the same page has as HTML.
    """
    found = {path: PageReader(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not found:
        yield f"{site}: no pages"
        return
    rendered = MarkdownIt().enable("table")
    for path in (site / "llms.txt", *sorted(site.rglob("*.md"))):
        if path.is_file():
            found[path] = PageReader(rendered.render(path.read_text(encoding="utf-8")))
            found[path].anchors |= found[twin].anchors if (twin := path.with_suffix(".html")) in found else set()
    for path, page in found.items():
        name = path.relative_to(site)
        yield from (f"{name}: loads {url} from the network" for url in page.loads if urlsplit(url).netloc)
        for url in page.links + page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name}: {url} leads to no file"
            elif target in found and unquote(parts.fragment) not in found[target].anchors:
                yield f"{name}: {url} leads to no place on its page"
    if site / "llms.txt" not in found:
        yield "llms.txt is missing"
        return
    listed = {(site / url.partition("#")[0]).resolve() for url in found[site / "llms.txt"].links}
    for path in (path for path in found if path.suffix == ".md"):
        if path.with_suffix(".html") not in found:
            yield f"{path.relative_to(site)} has no HTML beside it"
        elif path not in listed:
            yield f"{path.relative_to(site)} is not in llms.txt"


if __name__ == "__main__":
    found = list(faults(Path(sys.argv[1]).resolve()))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
