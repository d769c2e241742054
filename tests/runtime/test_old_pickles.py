"""Pickles and states of noise of graphreg 0.1: a state loads, a pickle is refused with a sentence that says what to do."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import pkgutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphreg
from graphreg import GraphRegError
from graphreg.old_pickles import MODULES_OF_0_1, OldModules
from graphreg.passes import BernoulliDropout

DATA = Path(__file__).parents[1] / "data"
STATES = json.loads((DATA / "rng_states_of_0_1.json").read_text())
X = torch.ones(2, 8)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Relu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def module() -> Any:
    model = nn.Sequential(Identity(), nn.Identity(), nn.Identity())
    return graphreg.regularize(model, BernoulliDropout("1", 0.5), rng=0)


def test_a_pickle_of_0_1_is_refused() -> None:
    data = (DATA / "module_of_0_1.pickle").read_bytes()
    for _ in range(2):  # nothing stays imported
        with pytest.raises(GraphRegError, match=r"^graphreg\.module was a module of graphreg 0\.1, .*rng_state.*load_state_dict"):
            pickle.loads(data)
    assert not {"graphreg.module", "graphreg.rules"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["module", "rules", "plan", "sites", "keys", "measures", "census", "storage"])
def test_the_old_modules_are_refused_as_imports_too(name: str) -> None:
    with pytest.raises(ImportError, match=r"graphreg 0\.1") as caught:
        importlib.import_module(f"graphreg.{name}")
    assert isinstance(caught.value, GraphRegError) and caught.value.name == f"graphreg.{name}"


def test_another_missing_module_is_missing_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of another package: Python does not ask graphreg about these."""
    asked = list[str]()
    monkeypatch.setattr(OldModules, "find_spec", lambda self, name, target=None: asked.append(name))
    for name in ("graphreg.nothing", "leaves", "torch.leaves"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert asked == ["graphreg.nothing"]


def test_the_packages_other_modules_are_found_as_ever() -> None:
    importlib.invalidate_caches()
    found = {each.name for each in pkgutil.iter_modules(graphreg.__path__)}
    assert {"runtime", "errors"} <= found and not found & MODULES_OF_0_1


def test_a_pickle_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphreg.runtime.rewritten_module.PICKLE_VERSION", 2)  # that of graphreg 0.2
    monkeypatch.setattr("graphreg.runtime.rewritten_module.VERSION", "0.9")
    data = pickle.dumps(module())
    with pytest.raises(GraphRegError, match=r"made by graphreg 0\.9, in format version 2; graphreg .* reads version 3\. .*state_dict"):
        pickle.loads(data)


def test_a_record_of_another_version_is_refused_by_itself() -> None:
    record = module().graphreg_rules.build_record
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(GraphRegError, match=r"made by graphreg 0\.9, in format version 2"):
        pickle.loads(pickle.dumps(replace(record, version=2, made_with="0.9")))


def test_a_pickle_of_this_version_loads() -> None:
    given = module()
    given(X)
    file = io.BytesIO()
    torch.save(given, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(given)), torch.load(file, weights_only=False)):
        assert graphreg.rng_state(twin) == graphreg.rng_state(given)


def test_a_state_of_0_1_loads_into_a_module() -> None:
    given = module()
    graphreg.set_rng_state(given, STATES["module"]["state"])
    assert graphreg.rng_state(given) == STATES["module"]["state"]
    assert given(X).output.tolist() == STATES["module"]["next"]


def test_a_state_of_0_1_loads_into_a_backend() -> None:
    run = torch.compile(Relu(), backend=graphreg.backend(BernoulliDropout("relu", 0.5), inner="eager", rng=0))
    run(X)
    graphreg.set_rng_state(run, STATES["backend"]["state"])
    assert graphreg.rng_state(run) == STATES["backend"]["state"]
    assert run(X).tolist() == STATES["backend"]["next"]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool1d(self.conv(x).relu(), 2)


def test_a_function_that_torch_makes_in_another_is_pickled_by_its_name() -> None:
    """``F.max_pool1d`` is one, of ``boolean_dispatch``. pickle itself looks for it by its qualified name."""
    module = graphreg.regularize(Pooled(), weight_l2=0.1)
    x = torch.randn(2, 1, 8)
    for each in (module, graphreg.strip(module)):
        again = pickle.loads(pickle.dumps(each))
        for ours, theirs in zip(pytree.tree_leaves(again(x)), pytree.tree_leaves(each(x)), strict=True):
            assert torch.equal(ours, theirs)
