"""The two front ends on models that both can trace: the same names, roles and shapes, the same outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graphreg
from graphreg.sites import Label, Site
from graphreg.trace import Traced
from ten_models import TEN, build, tensors

QUICK = ("resnet18", "vit_b_16", "mixed_mlp")
MODELS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in TEN]
# Functions whose counter the arithmetic on sizes shares in a symbolic trace: named from one less, or not at all, by export.
COUNTED = {"vit_b_16": {"getitem"}}


def found(traced: Traced) -> tuple[dict[str, Any], dict[str, Any]]:
    """The selectable sites by name: those of modules and inputs, and the rest."""
    of_modules, of_functions = {}, {}
    for site in traced.values:
        if site.selectable:
            for label in site.labels:
                about = site.role, label.op, site.shape, site.dtype, site.norm
                (of_modules if _of_module(site, label) else of_functions)[label.text] = about
    return of_modules, of_functions


def _of_module(site: Site, label: Label) -> bool:
    return label.module is not None or site.role == "input"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_names_and_the_same_function(name: str) -> None:
    model, inputs = build(name)
    symbolic, export = (graphreg.trace(model, inputs, front_end=end) for end in ("symbolic", "export"))  # type: ignore[arg-type]
    (modules, functions), (modules_too, functions_too) = found(symbolic), found(export)
    assert modules == modules_too
    apart = set(functions.keys() ^ functions_too.keys())
    assert {text.rpartition(".")[2].rstrip("_0123456789") for text in apart} <= COUNTED.get(name, set())
    assert all(functions[text] == functions_too[text] for text in functions.keys() & functions_too.keys() if not COUNTED.get(name))
    assert list(symbolic.graphs) == list(export.graphs) and symbolic.leaves == export.leaves == {}
    assert [(own.site.name, own.kind, own.rate) for own in symbolic.own_dropout] == [
        (own.site.name, own.kind, own.rate) for own in export.own_dropout
    ]
    module = graphreg.rewrite(export, graphreg.plan(export, [graphreg.build("dropout", weight=0.0)]), rng=0)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    ours = tensors(module(*inputs).output)
    torch.manual_seed(1)
    theirs = tensors(twin(*inputs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for outputs in (ours, theirs):
        sum(out.square().mean() for out in outputs).backward()  # type: ignore[union-attr]
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    stripped = graphreg.strip(module).eval()
    assert all(torch.equal(a, b) for a, b in zip(tensors(stripped(*inputs)), tensors(twin.eval()(*inputs)), strict=True))
