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
THREE = ("For users", "Evidence", "For contributors")


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
    code, table = "`[no](link)`\n\n```python\nx = [y](z)\n```", "| a |\n|---|\n| [torch](https://pytorch.org) |"
    (tmp_path / "a.md").write_text(f"# A\n\n[x](#x), {code}\n\n{table}\n")
    (tmp_path / "llms.txt").write_text("# A site\n\n- [A](a.md#x): a page\n")
    assert list(checker.faults(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.md", "[b](b.md)", "a.md: b.md leads to no file"),
        ("a.md", "| a |\n|---|\n| [y](#y) |", "a.md: #y leads to no place on its page"),
        ("a.md", "![a picture](b.svg)", "a.md: b.svg leads to no file"),
        ("b.md", "# B", "b.md has no HTML beside it"),
        ("c.md", "# C", "c.md is not in llms.txt"),
        ("llms.txt", "- [A](a.md)\n- [D](d.md)", "llms.txt: d.md leads to no file"),
    ],
)
def test_faults_of_markdown_are_found(checker: Any, tmp_path: Path, name: str, text: str, fault: str) -> None:
    for page in ("a.html", "c.html"):
        (tmp_path / page).write_text("<h1>A</h1>")
    (tmp_path / "a.md").write_text("# A")
    (tmp_path / "llms.txt").write_text("- [A](a.md)")
    (tmp_path / name).write_text(text)
    assert list(checker.faults(tmp_path)) == [fault]


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
    assert list(checker.faults(tmp_path)) == [fault, "llms.txt is missing"]


def test_an_empty_site_is_a_fault(checker: Any, tmp_path: Path) -> None:
    assert list(checker.faults(tmp_path)) == [f"{tmp_path}: no pages"]


PAGES = [path.relative_to(TOP) for path in (*(TOP / "docs").rglob("*.md"), TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md")]


def test_the_site_has_every_page(site: Path, checker: Any) -> None:
    """As HTML, which leads to its Markdown, and as Markdown."""
    assert list(checker.faults(site)) == []
    for path in PAGES:
        link = f'<link rel="alternate" type="text/markdown" href="{path.name}">'
        assert link in (site / path).with_suffix(".html").read_text() and (site / path).is_file()


def test_markdown_is_the_pages_and_has_docstrings(site: Path) -> None:
    where, written = (site / "docs" / "where.md").read_text(), (site / "docs" / "reference" / "api_train.md").read_text()
    assert where == (TOP / "docs" / "where.md").read_text()
    assert "eval-rst" not in written and "\ngraphreg.set_strength(\n   module: Module" in written
    assert "strength (its weight or rate), or replace" in " ".join(written.split())  # from its docstring


def test_llms_txt(site: Path) -> None:
    """The form of llmstxt.org, and each page once, with a sentence: the home page's, or the page's first."""
    text = (site / "llms.txt").read_text()
    assert re.match(r"# graphreg\n\n> graphreg adds dropout, [^\n]+\n\n[^\n]+\n\n## Start\n\n- \[", text)
    entries = dict(re.findall(r"^- \[[^\]\n]+\]\(([^)\n]+)\): (.+)$", text, re.MULTILINE))
    assert entries.keys() | {"docs/README.md"} == {path.as_posix() for path in PAGES}
    assert len(entries) == text.count("\n- ") and "](" not in "".join(entries.values())
    assert entries["docs/models.md"] == "which models of torchvision, timm and transformers work"
    assert entries["docs/regularizers/dropout.md"] == "Zeroes elements of values at random: ordinary dropout"


def test_the_home_page_has_the_example_of_the_readme_and_three_parts(site: Path) -> None:
    home, readme = (TOP / "docs" / "README.md").read_text(), (TOP / "README.md").read_text()
    example = re.compile(r"```python\n.*?```\n\n```text\n.*?```\n", re.DOTALL)
    assert example.findall(home) == example.findall(readme)[:1]
    assert home.split("\n\n")[1] == readme.split("\n\n")[1].replace("\n", " ").partition(" All measurements")[0]
    assert [name for name in re.findall(r"^## (.+)$", home, re.MULTILINE) if name != "An example"] == list(THREE)
    assert re.findall(r'<span class="part">(.+?)</span>', (site / "docs" / "where.html").read_text()) == list(THREE)


@pytest.mark.parametrize("path", PAGES, ids=map(str, PAGES))
def test_no_link_is_named_by_a_page_s_file(path: Path) -> None:
    assert re.findall(r"\[[^]]*\.md\]\(", (TOP / path).read_text()) == []


@needs_chromium
def test_it_works_from_disk(site: Path) -> None:
    """The front door leads to the home page, the search finds a page, and no code or diff needs scrolling."""
    page = Page(site / "index.html")
    page.driver.implicitly_wait(20)
    assert page.driver.find_element("css selector", "article h1").text.startswith("graphreg")
    assert page.driver.current_url.endswith("/docs/README.html")
    found = Page(site / "search.html")
    found.driver.find_element("css selector", "input[name=q]").send_keys("stochastic depth\n")
    assert found.driver.find_elements("css selector", ".search li a")
    links = found.run("return [...document.querySelectorAll('.search li a')].map(link => link.href)")
    assert any(link.partition("#")[0].partition("?")[0].endswith("/docs/depth.html") for link in links)
    for name in ("diff", "regularizers/embedding_dropout", "trainers"):
        scrolled = "return [...document.querySelectorAll('pre')].filter(pre => pre.scrollWidth > pre.clientWidth).length"
        assert Page(site / "docs" / f"{name}.html").run(scrolled) == 0
