"""The README and the pages of docs/: their code runs and prints what they show, their tables are complete, their links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graphreg
from pages import FENCE as BLOCK
from pages import printed_by, registry_restored

TOP = Path(__file__).parent.parent
DOCS = TOP / "docs"
README = (TOP / "README.md").read_text()
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")

# How many blocks of a page have their output compared. Other tests run the other pages: see test_every_page_with_code_is_run.
COMPARED = {
    "README.md": 1,
    "docs/attention.md": 2,
    "docs/audit.md": 1,
    "docs/backend.md": 1,
    "docs/doctor.md": 2,
    "docs/exact_zeros.md": 4,
    "docs/front_ends.md": 1,
    "docs/fx_pass.md": 1,
    "docs/how_strong.md": 3,
    "docs/keep.md": 1,
    "docs/learned.md": 4,
    "docs/mixed_precision.md": 4,
    "docs/modes.md": 1,
    "docs/native_dropout.md": 1,
    "docs/not_here.md": 1,
    "docs/optimizers.md": 9,
    "docs/options.md": 1,
    "docs/penalties.md": 2,
    "docs/randomness.md": 6,
    "docs/depth.md": 6,
    "docs/regularizers.md": 3,
    "docs/start.md": 4,
    "docs/selectors.md": 2,
    "docs/training.md": 5,
    "docs/where.md": 3,
    "docs/which_tool.md": 5,
    "docs/writing.md": 3,
}

# the folders whose pages test_regularizer_pages.py, test_written_examples.py and test_guides.py run
RUN_WHOLE = ("regularizers", "examples", "howto", "tutorials", "coming_from", "reference")


# torch's own: Dynamo asks each input that is no leaf, and hides the warning; the exporter uses what torch deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPARED)
def test_blocks(name: str) -> None:
    with registry_restored(bare=True):
        found = [(printed, shown) for printed, shown in printed_by((TOP / name).read_text(), name) if shown is not None]
    assert [printed for printed, _ in found] == [shown for _, shown in found]
    assert len(found) == COMPARED[name]


def test_every_page_with_code_is_run() -> None:
    """A page whose code is run elsewhere is named in the test that runs it."""
    tests = "".join(path.read_text() for path in (TOP / "tests").rglob("*.py") if path != Path(__file__))
    here = {TOP / name for name in COMPARED} | {page for folder in RUN_WHOLE for page in (DOCS / folder).glob("*.md")}
    unread = {page.name for page in PAGES if "```python" in page.read_text() and page not in here}
    assert [name for name in sorted(unread) if not re.search(rf"[\"/]{re.escape(name)}\"", tests)] == []


def test_no_example_has_a_penalty_on_weights_that_does_nothing() -> None:
    """As a mean, a strength below 1e-2 pulls a layer of 64 x 64 more weakly than a weight decay of 5e-6."""
    weak = set()
    for page in (TOP / "README.md", *PAGES):
        code = "".join(code for language, code in BLOCK.findall(page.read_text()) if language in ("python", "console"))
        weak |= {page.name for number in re.findall(r"weight[_-]l[12][= ]'?([\d.e-]+)", code) if float(number) < 1e-2}
    assert weak == set()


# The tables


def test_every_option_stands_in_the_table() -> None:
    told = dict(re.findall(r"^\| `(\w+)=(\S+)` \|", (DOCS / "options.md").read_text(), re.MULTILINE))
    parameters = inspect.signature(graphreg.regularize).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {name: ast.literal_eval(default) for name, default in told.items() if name != "regularizers"} == options
    assert graphreg.from_kwargs(torch.nn.Linear(2, 2), regularizers=None) == []


def test_the_options_that_other_functions_lack_are_named() -> None:
    """The pages on a pass, a backend and a stage name all options of ``regularize`` that these do not take."""
    options = {p.name for p in inspect.signature(graphreg.regularize).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for page, function in (("fx_pass.md", graphreg.as_pass), ("backend.md", graphreg.backend), ("pipeline.md", graphreg.regularize_stage)):
        (named,) = re.findall(r"takes the options of `regularize`, except (.*?)\.", (DOCS / page).read_text())
        assert set(re.findall(r"`(\w+)`", named)) == options - inspect.signature(function).parameters.keys(), page


def test_every_regularizer_stands_in_both_tables() -> None:
    """The README names each once by a keyword, and docs/regularizers.md where it acts; both link to its page."""
    keys: dict[str, set[str]] = {}
    for key, cls in graphreg.registered().items():
        if cls.__module__.startswith("graphreg.passes."):
            keys.setdefault(cls.__name__, set()).add(key)
    table = dict(re.findall(r"^\| \[`(\w+)`\]\((\S+)\) \(`", (DOCS / "regularizers.md").read_text(), re.MULTILINE))
    assert sorted(keys) == sorted(table)
    named = re.findall(r"\[`(\w+)`\]\(docs/(regularizers/\w+\.md)\)", README)
    assert sorted(file for _, file in named) == sorted(table.values())
    class_of = {file: name for name, file in table.items()}
    for key, file in named:
        assert (DOCS / file).read_text().startswith(f"# {class_of[file]}\n") and key in keys[class_of[file]]


def test_the_ratios_are_those_of_the_benchmarks() -> None:
    section = (DOCS / "benchmarks.md").read_text().partition("## Step time, one thread\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (eager|compiled) \| [\d.]+ \| ([\d.]+) [^|]*\| ([\d.]+) [^|]*\| ([\d.]+) ", section, re.MULTILINE)
    assert len(rows) == 8
    span = {}
    for mode in ("eager", "compiled"):
        columns = zip(*(numbers for told, *numbers in rows if told == mode), strict=True)
        span[mode] = [f"{min(column)} to {max(column)}" for column in columns]
        _, hooks, ours = span[mode]
        assert f"| time of a training step, {mode} | {ours} | {hooks} |" in README
    assert f"takes {span['compiled'][0]} compiled and {span['eager'][0]} in eager" in README


def test_the_models_are_those_of_the_page() -> None:
    told = re.search(r"(\d+) of (\d+) models pass every column", (DOCS / "models.md").read_text())
    assert told and f"Of {told[2]} models, " in README and f"{told[1]} pass every test" in README


# The README as a whole


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_commands_stand_alone() -> None:
    shell = [code.strip() for language, code in BLOCK.findall(README) if language == "sh"]
    assert shell == ["pip install .", "make demo", "make test"]


# Links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Each link of a page that leads to a file of the project: the file, and the anchor in it."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in ("".join(found) for found in LINK.findall(prose)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(page.relative_to(TOP).as_posix() for page in PAGES)])
def test_links_lead_somewhere(name: str) -> None:
    for path, anchor in links(TOP / name):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), (path, anchor)


def test_every_page_stands_in_the_index() -> None:
    """That of the documentation, or for the pages of a folder the page that has the list of them."""
    lists = ("README.md", "howto/README.md", "reference/api.md", "regularizers.md", "not_here.md", "trials/README.md")
    index = {path for page in lists for path, _ in links(DOCS / page)}
    assert set(PAGES) - {DOCS / "README.md"} <= index
    assert {page for page in PAGES if page.parent == DOCS} - {DOCS / "README.md"} <= {path for path, _ in links(DOCS / "README.md")}
    assert DOCS / "README.md" in {path for path, _ in links(TOP / "README.md")}
