"""The how-tos, the tutorials and the reference: their code runs and prints what they show, and each has the parts of its kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lacking import needs_own_globals
from pages import DOCS, printed_by, registry_restored

FOLDERS = ("howto", "tutorials", "coming_from", "reference")
PAGES = [path for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md")) if "```python" in path.read_text()]
ASKED_FOR = {
    "which_layers", "before_after", "off_for_a_batch", "one_weight", "ramp", "schedule", "checkpointing", "lora", "ema", "torch_func",
    "quantization", "fsdp2", "deployment", "reproduce", "yaml", "uncertainty", "dropout_off", "r_drop", "gradient_penalty", "moe_balance",
    "max_logit", "many_strengths", "search", "features", "distillation", "deep_supervision", "grad_cam",
}  # fmt: skip

LACKING = {"deployment": needs_own_globals}


# torch's own: Dynamo asks each input that is no leaf, and hides the warning; the exporter uses what torch deprecates
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "page", [pytest.param(path, id=path.relative_to(DOCS).as_posix(), marks=LACKING.get(path.stem, ())) for path in PAGES]
)
def test_it_prints_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with registry_restored():
        found = [(printed, shown) for printed, shown in printed_by(page.read_text(), page.name) if printed or shown is not None]
    assert found and [shown for _, shown in found] == [printed for printed, _ in found]


def test_there_is_a_how_to_for_each() -> None:
    assert {path.stem for path in (DOCS / "howto").glob("*.md")} == ASKED_FOR | {"README"}
    index = (DOCS / "howto" / "README.md").read_text()
    assert re.findall(r"^\| .* \| \[.*\]\((\w+)\.md\) \|$", index, re.MULTILINE) == re.findall(r"\]\((\w+)\.md\)", index)


@pytest.mark.parametrize("name", sorted(ASKED_FOR))
def test_a_how_to_is_short(name: str) -> None:
    """A goal, code, what it prints, one paragraph of why, and links."""
    text = (DOCS / "howto" / f"{name}.md").read_text()
    assert re.search(r"^# .+\n\n\*\*Goal\.\*\* ", text) and len(text.splitlines()) <= 80
    assert len(re.findall(r"^\*\*Why\.\*\* ", text, re.MULTILINE)) == 1
    see = text.partition("**See also.** ")[2]
    assert len(re.findall(r"\]\(", see)) >= 2 and "\n" not in see.strip()


def kinds() -> set[str]:
    """The names of the classes in graphreg that derive from GraphRegError, it among them, as the source has them."""
    source = "\n".join(path.read_text() for path in (DOCS.parent / "graphreg").rglob("*.py"))
    bases = {name: set(re.findall(r"\w+", given)) for name, given in re.findall(r"^class (\w+)\(([\w., ]+)\):", source, re.MULTILINE)}
    found = {"GraphRegError"}
    while more := {name for name, given in bases.items() if given & found and not name.startswith("_")} - found:
        found |= more
    return found


def test_every_kind_of_error_is_on_the_page() -> None:
    text = (DOCS / "reference" / "errors.md").read_text()
    table = text.partition("\n\nThe first column")[0]
    assert set(re.findall(r"^\| \[?`(\w+)`", table, re.MULTILINE)) == kinds() and len(kinds()) > 8
    assert "`graphreg.UntestedTorchWarning`" in text


def test_the_messages_are_those_that_are_raised() -> None:
    """Each in a table stands in what the block above it prints."""
    text = (DOCS / "reference" / "errors.md").read_text()
    for section in text.split("\n## ")[1:]:
        messages = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
        raised = " ".join("".join(re.findall(r"```text\n(.*?)```", section, re.DOTALL)).split())
        assert messages and raised
        for message in messages:
            assert re.search(".*".join(map(re.escape, message.split("…"))), raised), message
