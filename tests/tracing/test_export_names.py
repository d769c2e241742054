"""The two front ends on models that both can trace: the same names, roles and shapes, the same outputs and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.ir.metadata import scope_of
from graphreg.ir.site import Label, Site
from graphreg.tracing.trace import Traced
from ten_models import TEN, build, tensors

QUICK = ("resnet18", "vit_b_16", "mixed_mlp")
MODELS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in TEN]


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
    assert functions == functions_too
    assert list(symbolic.graphs) == list(export.graphs) and symbolic.opaque_modules == export.opaque_modules == {}
    assert [(own.site.name, own.kind, own.rate) for own in symbolic.native_dropout] == [
        (own.site.name, own.kind, own.rate) for own in export.native_dropout
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


class Sizes(nn.Module):
    """Reads sizes in the ways that people write, beside operations of the same names on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.axis = nn.Linear(4, 4), 1
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        a = self.linear(x)[:, 0]
        b = x[:, x.shape[self.axis] - 1]
        rows, columns = x.shape[-2:]
        c = x.reshape(x.size(0), rows * columns)[: x.size()[0], : self.scale.shape[0]]
        d = x.mT[:, 0, : self.scale.shape[0]] if x.dim() == 3 else x
        return torch.cat((a, b, c, d, x[0, :1].expand(batch, width)), dim=steps - steps + 1)[:, 1:]


def test_a_size_that_is_read_counts_as_it_does_in_a_symbolic_trace() -> None:
    x = torch.randn(3, 5, 4)
    symbolic, export = (found(graphreg.trace(Sizes(), x, front_end=end)) for end in ("symbolic", "export"))  # type: ignore[arg-type]
    assert symbolic == export


def test_what_torch_export_adds_to_compute_sizes_is_in_no_unknown_module() -> None:
    """torch.export gives a node that it adds after the trace, here of a size, the name of no module in place of a module's path."""

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rand(x.shape[0], 1)

    model = nn.Sequential(nn.Linear(4, 4), Part(), nn.Linear(4, 4))
    ours = graphreg.regularize(model, front_end="export", example_inputs=torch.randn(3, 4), hidden_dropout=0.1)
    assert any("sym_size" in str(node.target) for node in ours.graph.nodes)
    assert {scope_of(node) for node in ours.graph.nodes} <= {*dict(model.named_modules())}
