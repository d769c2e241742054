"""The documentation site: how it is checked, and that it works from disk, in a browser without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from browser import Page, needs_chromium
from loading import loaded

TOP = Path(__file__).parent.parent
SITE = TOP / "build" / "site"


@pytest.fixture(scope="module")
def checker() -> Any:
    return loaded(TOP / "docs" / "check_site.py")


@pytest.fixture(scope="module")
def site() -> Path:
    """The site as ``make site`` builds it; but after it, only pages that have changed since are built again."""
    pytest.importorskip("sphinx")
    command = re.search(r"^\t\$\(PY\) (-m sphinx .*)$", (TOP / "Makefile").read_text(), re.MULTILINE)
    assert command is not None
    words = command[1].split()
    assert "-W" in words and "-E" in words  # a second build would not repeat the warnings of the first
    subprocess.run([sys.executable, *(word for word in words if word != "-E")], cwd=TOP, check=True)
    return SITE


def test_a_site_without_faults(checker: Any, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="x">A</h1><a href="b/c.html#y z">c</a><a href="#x">x</a><a href="https://pytorch.org">torch</a>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.html").write_text('<p id="y z"><a href="../a.html">a</a><a href="../a%2Ehtml#">a</a>')
    assert list(checker.faults(tmp_path)) == []


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="none.html">', "a.html: none.html leads to no file"),
        ('<a href="#none">', "a.html: #none leads to no place on its page"),
        ('<img src="none.png">', "a.html: none.png leads to no file"),
        ('<a href=".">', "a.html: . leads to no file"),
        ('<script src="https://cdn.example/x.js">', "a.html: loads https://cdn.example/x.js from the network"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "a.html: loads //cdn.example/x.css from the network"),
    ],
)
def test_faults_are_found(checker: Any, tmp_path: Path, html: str, fault: str) -> None:
    (tmp_path / "a.html").write_text(html)
    assert list(checker.faults(tmp_path)) == [fault]


def test_an_empty_site_is_a_fault(checker: Any, tmp_path: Path) -> None:
    assert list(checker.faults(tmp_path)) == [f"{tmp_path}: no pages"]


def test_the_site_has_every_page(site: Path, checker: Any) -> None:
    assert list(checker.faults(site)) == []
    pages = {
        path.relative_to(TOP).with_suffix(".html")
        for path in (*(TOP / "docs").rglob("*.md"), TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md")
    }
    assert {path for path in pages if not (site / path).is_file()} == set()


@needs_chromium
def test_it_works_from_disk(site: Path) -> None:
    """The front door leads to the index, and the search finds a page."""
    page = Page(site / "index.html")
    page.driver.implicitly_wait(20)
    assert page.driver.find_element("css selector", "article h1").text.startswith("Documentation")
    assert page.driver.current_url.endswith("/docs/README.html")
    found = Page(site / "search.html")
    found.driver.find_element("css selector", "input[name=q]").send_keys("stochastic depth\n")
    assert found.driver.find_elements("css selector", ".search li a")
    links = found.run("return [...document.querySelectorAll('.search li a')].map(link => link.href)")
    assert any(link.partition("#")[0].partition("?")[0].endswith("/docs/depth.html") for link in links)
