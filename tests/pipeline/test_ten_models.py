"""Every stage of the pipeline on ten real models: names, one training step, eval and stripped equality, nothing changed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import get_graph_node_names

import graphreg
from graphreg.runtime.splice import SpliceRule
from ten_models import TEN, build, tensors

GOLDEN, BRANCHES = (json.loads((Path(__file__).parents[1] / "data" / name).read_text()) for name in ("hidden_sites.json", "branches.json"))
WEIGHTS = {"hidden_dropout": 0.1, "weight_l2": 1e-4, "hidden_l1": 1e-3}


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    tensors = {name: id(p) for name, p in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    return modes, tensors, list(model.state_dict()), dict(model.state_dict()._metadata), [list(m.__dict__) for m in model.modules()]


@pytest.mark.parametrize("name", TEN)
def test_names_contain_torchvisions(name: str) -> None:
    model, inputs = build(name)
    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    listed = set(graphreg.names(model))
    # torchvision strips "_N" from a leaf module's own name (its ln_1 is the output of ln_2); here a module keeps its path
    paths = {path for path, _ in model.named_modules()}
    stripped = {path.rpartition("_")[0] for path in paths if path.rpartition("_")[2].isdigit()}
    missing = [n for n in dict.fromkeys(train + evaluation) if n not in listed and n not in stripped]
    assert missing == []
    assert paths - {""} - {n.partition(":")[0] for n in listed} == never_called(model, inputs)


def never_called(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> set[str]:
    """Containers and modules that the forward does not call have no value to name."""
    called = {""}
    for path, module in model.named_modules():
        module.register_forward_hook(lambda m, a, o, path=path: called.add(path))
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)(*inputs)
    return {path for path, _ in model.named_modules()} - called


@pytest.mark.parametrize("name", TEN)
def test_hidden_sites_and_branches(name: str) -> None:
    model, _ = build(name)
    sites = graphreg.trace(model).values
    assert [site.name + (" (norm)" if site.norm else "") for site in sites if site.role == "hidden"] == GOLDEN[name]
    assert [site.name for site in sites if site.branch] == BRANCHES[name]


@pytest.mark.parametrize("name", TEN)
def test_one_step(name: str) -> None:
    model, inputs = build(name)
    before = fingerprint(model)
    original = copy.deepcopy(model)
    module = graphreg.regularize(model, rng=1, **WEIGHTS)
    assert fingerprint(model) == before
    kept = watch_splices(module)
    output, penalties = module(*inputs)
    loss = sum(t.square().mean() for t in tensors(output)) + sum(penalties.values())
    loss.backward()
    assert list(penalties) == ["weight_l2", "hidden_l1"]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    planned = [n for n, leaf in module.graphreg_rules.named_children() if isinstance(leaf, SpliceRule)]
    assert list(kept) == planned and planned
    for splice, (fraction, count) in kept.items():
        assert abs(fraction - 0.9) <= 4 * (0.09 / count) ** 0.5, (splice, fraction, count)
    assert fingerprint(model)[0] == before[0] and fingerprint(model)[2:] == before[2:]
    same_in_eval(module, original, inputs, model)


def watch_splices(module: nn.Module) -> dict[str, tuple[float, int]]:
    """The share of the elements that each splice keeps, and their number; zeros of the value itself do not count."""
    kept: dict[str, tuple[float, int]] = {}

    def watch(name: str, leaf: SpliceRule) -> None:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            there = args[0] != 0
            kept[name] = (float((out[there] != 0).double().mean()), int(there.sum()))

        leaf.register_forward_hook(hook)

    for name, leaf in module.graphreg_rules.named_children():  # type: ignore[union-attr,operator]
        if isinstance(leaf, SpliceRule):
            watch(name, leaf)
    return kept


def same_in_eval(module: nn.Module, original: nn.Module, inputs: tuple[torch.Tensor, ...], model: nn.Module) -> None:
    """Eval and stripped outputs are the original's bit for bit, with the state of the moment."""
    original.load_state_dict(module.state_dict())
    stripped = graphreg.strip(module)
    for each in (original.eval(), module.eval(), stripped.eval()):
        each.zero_grad()
    with torch.no_grad():
        expected = tensors(original(*inputs))
        ours = tensors(module(*inputs).output)
        bare = tensors(stripped(*inputs))
    assert len(expected) == len(ours) == len(bare)
    for a, b, c in zip(expected, ours, bare, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert type(original(*inputs)) is type(stripped(*inputs))


def test_stripped_in_train_mode_is_the_original_too() -> None:
    model, inputs = build("googlenet")  # two graphs
    original = copy.deepcopy(model)
    stripped = graphreg.strip(graphreg.regularize(model, rng=1, **WEIGHTS))
    torch.manual_seed(3)
    expected = original(*inputs)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(tensors(expected), tensors(stripped(*inputs)), strict=True))
    assert type(expected) is type(stripped(*inputs))
