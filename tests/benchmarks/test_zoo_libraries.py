"""The zoo of other libraries: its rules, on constructors and a library of the tests' own; none of the libraries is needed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from zoo.libraries import models
from zoo.libraries.made import Entry, known, provider
from zoo.providers import Inputs

TOP = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self, dim: int, depth: int = 12, *, heads: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(depth)))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


def inputs() -> Inputs:
    return (torch.ones(2, 3),)


def test_a_constructor_gets_the_small_values_that_it_has_names_for() -> None:
    small = {"dim": 3, "depth": 2, "patch_size": 8}
    assert known(Net, small) == {"dim": 3, "depth": 2}
    assert known(Net, small, depth=1, heads=4) == {"dim": 3, "depth": 1, "heads": 4}
    assert known(Net.__init__, small) == known(Net, small)


def test_a_model_is_made_from_the_same_seed_and_tried_in_both_modes() -> None:
    found = provider(lambda: {"net": Entry(lambda: Net(3, 1).eval(), inputs, "dense")}, {"other": "it is another's"})
    assert (found.names(), found.skipped()) == ({"net": "dense"}, {"other": "it is another's"})
    (first, given), (second, _) = found.build("net"), found.build("net")
    assert first.training and torch.equal(first.layers[0].weight, second.layers[0].weight) and torch.equal(given[0], torch.ones(2, 3))


def test_a_model_that_does_not_take_its_inputs_says_so() -> None:
    found = provider(lambda: {"net": Entry(lambda: Net(5, 1), inputs)})
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        found.build("net")


@pytest.mark.parametrize("name", models.PROVIDERS)
def test_a_provider_is_there_and_explained(name: str) -> None:
    """Read, not imported: that would need the library."""
    place, _, attribute = models.PROVIDERS[name].partition(":")
    text = (TOP / "benchmarks" / Path(*place.split("."))).with_suffix(".py").read_text()
    assert re.search(rf"^{attribute} = [pP]rovider\(", text, re.MULTILINE)
    assert f"\n| {name} | {{{name}}}" in models.INTRODUCTION


def test_the_sample_for_inductor_names_providers() -> None:
    assert {name.partition("/")[0] for name in models.INDUCTOR} <= models.PROVIDERS.keys()


def test_the_environment_has_every_package_whose_version_is_kept() -> None:
    text = (TOP / "Makefile").read_text().replace("\\\n", " ")
    listed = re.search(r"^LIBRARIES := (.*)", text, re.MULTILINE)
    alone = re.search(r"^\t\.venv-libraries/.* --no-deps (.*)", text, re.MULTILINE)
    assert listed and alone
    assert {*listed[1].split(), *alone[1].split()} == {*models.PACKAGES} - {"torch", "einops"}  # which others bring


SOURCES = {
    "__init__": "",
    "plain": """
from torch import nn

class Block(nn.Module):
    def __init__(self, dim, num_classes): super().__init__()

class Net(nn.Module):
    def __init__(self, *, image_size, dim, num_classes):
        super().__init__()
        self.sizes = image_size, dim, num_classes

class Head(nn.Module):
    def __init__(self, dim): super().__init__()
""",
    "levit": "from .plain import *",  # whose classes are another module's
}


@pytest.fixture
def of_vit_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The provider with a library of the test's own in place of the real one."""
    (tmp_path / "vit_pytorch").mkdir()
    for name, text in SOURCES.items():
        (tmp_path / "vit_pytorch" / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vit_pytorch" or name.endswith("of_vit_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("zoo.libraries.of_vit_pytorch")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vit_pytorch" or name.endswith("of_vit_pytorch")]:
        del sys.modules[name]


def test_the_model_of_a_module_is_its_last_class_that_classifies(of_vit_pytorch: ModuleType) -> None:
    assert of_vit_pytorch.modules() == ["levit", "plain"]
    assert of_vit_pytorch.model_class("plain").__name__ == "Net"
    assert of_vit_pytorch._made("plain").sizes == (32, 16, 5)
    with pytest.raises(IndexError):
        of_vit_pytorch.model_class("levit")
