"""Which versions of torch are tested, and the warning for one that is newer."""

from __future__ import annotations

import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphreg
from graphreg.torch_internals import versions
from graphreg.torch_internals.versions import known_versions
from matrix.pairs import PAIRS

TOP = Path(__file__).parents[2]
SENTENCE = (
    "graphreg is made for torch 2.10 to 2.15, and this is torch 2.16.0.dev20261201. 'python -m graphreg doctor --torch' shows in "
    "seconds which parts work with it. To silence this: warnings.filterwarnings('ignore', category=graphreg.UntestedTorchWarning)."
)


def test_the_versions_are_those_of_the_matrix_and_of_the_package() -> None:
    numbers = sorted({tuple(map(int, pair.torch.split("."))) for pair in PAIRS})
    assert (numbers[0], numbers[-1]) == (versions.OLDEST, versions.NEWEST)
    assert known_versions() == f"graphreg is made for torch {PAIRS[0].torch} to {PAIRS[-1].torch}"
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    floor = next(text.partition(">=")[2] for text in project["dependencies"] if text.startswith("torch>="))
    assert floor in {pair.torch for pair in PAIRS}  # what the package asks for is run
    pythons = {f"Programming Language :: Python :: {pair.python}" for pair in PAIRS}
    assert pythons <= set(project["classifiers"])


def test_the_version_of_torch() -> None:
    assert re.match(rf"{versions.version()[0]}\.{versions.version()[1]}\b", torch.__version__)


USES: dict[str, Callable[[], object]] = {
    "trace": lambda: graphreg.trace(nn.Linear(1, 1)),
    "regularize": lambda: graphreg.regularize(nn.Linear(1, 1), weight_l2=0.1),
    "backend": lambda: graphreg.backend(weight_l2=0.1),
}


@pytest.mark.parametrize("use", USES)
def test_a_newer_torch_is_warned_of_once(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.16.0.dev20261201")
    monkeypatch.setattr(versions, "_asked", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        USES[use]()
        USES["regularize"]()
    (warning,) = caught
    assert (warning.category, str(warning.message), warning.filename) == (graphreg.UntestedTorchWarning, SENTENCE, __file__)


def test_it_is_silenced_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.16.0.dev20261201")
    monkeypatch.setattr(versions, "_asked", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=graphreg.UntestedTorchWarning)
        USES["trace"]()


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cpu", "2.15.3"])
def test_a_tested_torch_is_not_warned_of(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(versions, "_asked", False)
    USES["trace"]()


def test_torch_2_10_on_python_3_13_0_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found with ``make matrix``: compiled in train mode, a plain module's code ran in eval mode, too."""
    monkeypatch.setattr(versions, "_asked", False)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
        with pytest.warns(graphreg.UntestedTorchWarning, match=r"2.10.0 on Python 3.13.0 does not notice .* Use Python 3.13.1 or newer"):
            versions.warn_if_untested()
