"""The backend of torch.compile beside regularize: the same sites, masks, penalties and gradients; and its knobs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import graphreg
from graphreg.dynamo_backend.all_graphs import union
from lacking import needs_result

HIDDEN: dict[str, Any] = {"hidden_dropout": 0.3, "hidden_noise": 0.1, "hidden_l1": 0.1, "weight_l2": 0.1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.a(x)))
        h = torch.tanh(self.b(h)) + h
        out: Tensor = self.c(h)
        return out


class Cells(nn.Module):
    """A layer called twice, a cell with two outputs, an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.cell, self.out = nn.ReLU(), nn.LSTMCell(4, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, c = self.cell(self.act(x + self.shift * 2))
        h, c = self.cell(x, (h, c))
        h += self.act(c)
        return {"logits": self.out(h), "state": c}


def vit() -> nn.Module:
    return tv.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "net": (Net, (5, 4)),
    "cells": (Cells, (5, 4)),
    "resnet": (lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), (2, 3, 32, 32)),
    "vit": (vit, (2, 3, 32, 32)),
    "densenet": (lambda: tv.DenseNet(8, (2, 2), 16, num_classes=4), (2, 3, 64, 64)),
    "shufflenet": (lambda: tv.shufflenet_v2_x0_5(num_classes=10), (2, 3, 64, 64)),
    "layer of torch": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
}


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    return model, copy.deepcopy(model), torch.randn(MODELS[name][1])


def flat(output: Any) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def step(model: nn.Module, output: Any, penalties: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    (sum(out.square().mean() for out in flat(output)) + sum(penalties.values())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_sites_masks_penalties_and_gradients_are_those_of_regularize(name: str) -> None:
    model, twin, x = made(name)
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        theirs, ours = module(x), run(x)
        same(flat(ours), flat(theirs.output))
        same(backend.penalties(), theirs.penalties)
        same(step(model, ours, backend.penalties()), step(twin, theirs.output, theirs.penalties))
    made_by_us = {(e.name, e.site.name) for part in backend.subgraphs for e in part.plan.edits}
    by_them = {(e.name, e.site.name) for e in module.graphreg_rules.build_record.plan.edits if e.site.kind == "value"}
    assert made_by_us == by_them


# What a trace of the model names of the sizes of tensors (``x.shape[0]``) Dynamo has as numbers: so ``getitem_5`` is ``getitem``.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit"])
def test_site_names_are_those_of_a_trace(name: str) -> None:
    model, twin, x = made(name)
    backend = graphreg.backend(inner="eager")
    torch.compile(model, backend=backend)(x)
    ours = {site.name: (site.op, site.role, site.norm, site.shape) for site in union(backend.subgraphs).values if site.selectable}
    traced = graphreg.trace(twin, example_inputs=x)
    assert ours == {site.name: (site.op, site.role, site.norm, site.shape) for site in traced.values if site.selectable}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_further_the_masks_stay(inner: str) -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    backend = graphreg.backend(inner=inner, rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        theirs, ours = module(x), run(x)
        same(ours, theirs.output)
        same(backend.penalties(), theirs.penalties)
        same(step(model, ours, backend.penalties()), step(twin, theirs.output, theirs.penalties))
    assert len(backend.subgraphs) == 1


def test_modes_and_batch_sizes_keep_names_and_streams() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend)
    for size, mode in [(5, True), (5, False), (3, True), (5, True), (9, True), (9, False), (5, True)]:
        model.train(mode), module.train(mode)
        x = torch.randn(size, 4)
        theirs = module(x)
        same(run(x), theirs.output)
        same(backend.penalties(), theirs.penalties)
    graphs = len(backend.subgraphs)
    run(torch.randn(11, 4)), model.eval(), run(torch.randn(12, 4))
    assert len(backend.subgraphs) == graphs
    assert {e.site.name for part in backend.subgraphs for e in part.plan.edits} == {"relu", "add"}


class Plain(nn.Module):
    """Reads its mode nowhere, so that Dynamo alone would not see it change."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.block = nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.a(x))
        return out


def test_a_splice_follows_the_mode_of_its_module_though_the_forward_does_not_read_it() -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(2, 4)
    expected = model(x)
    backend = graphreg.backend(inner="eager", dropout={"block.0": 0.5})
    run = torch.compile(model, backend=backend)
    assert not torch.equal(run(x), expected)
    model.block.eval()
    assert torch.equal(run(x), expected) and len(backend.subgraphs) == 2
    model.train()
    assert not torch.equal(run(x), expected) and len(backend.subgraphs) == 2


def test_a_module_that_compiles_itself() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, input_noise=0.1, output_dropout=0.5, **HIDDEN)
    backend = graphreg.backend(inner="eager", rng=7, input_noise=0.1, output_dropout=0.5, **HIDDEN)
    model.compile(backend=backend)
    theirs = module(x)
    same(model(x), theirs.output)
    same(backend.penalties(), theirs.penalties)
    assert graphreg.backend_of(model) is backend and type(model) is Net and "graphreg_rules" not in dict(model.named_modules())


def test_a_function_that_holds_modules() -> None:
    torch.manual_seed(0)
    model, head, x = Plain(), nn.Linear(4, 1), torch.randn(2, 4)

    def loss(x: Tensor) -> Tensor:
        return head(torch.relu(model(x))).square().mean()  # type: ignore[no-any-return]

    backend = graphreg.backend(inner="eager", rng=0, hidden_l1=0.1, weight_l2=1e-2, dropout={"model.block.0": 0.5})
    run = torch.compile(loss, backend=backend)
    run(x)
    names = union(backend.subgraphs).values
    assert [s.name for s in names if s.selectable] == ["x", "model.a", "model.block.0", "model.block.1", "relu", "head", "square", "mean"]
    same(
        backend.penalties()["weight_l2"],
        1e-2 * torch.stack([p.square().mean() for p in (model.a.weight, model.block[1].weight, head.weight)]).mean(),
    )


def test_by_name() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    run = torch.compile(model, backend="graphreg", options={"inner": "eager", "rng": 7, **HIDDEN})
    theirs = module(x)
    same(run(x), theirs.output)
    same(graphreg.backend_of(run).penalties(), theirs.penalties)
    assert graphreg.strengths(run) == graphreg.strengths(module)


@needs_result
@pytest.mark.parametrize("name", ["net", "cells"])
def test_attached_penalties_have_the_same_gradients(name: str) -> None:
    model, twin, x = made(name)
    returned = graphreg.backend(inner="aot_eager", rng=7, **HIDDEN)
    attached = graphreg.backend(inner="aot_eager", rng=7, penalties="attach", scale=1.0, **HIDDEN)
    ours, theirs = torch.compile(model, backend=attached)(x), torch.compile(twin, backend=returned)(x)
    same(step(model, ours, {}), step(twin, theirs, returned.penalties()))
    same(attached.penalties(), {k: v.detach() for k, v in returned.penalties().items()})
    assert not any(value.requires_grad for value in attached.penalties().values())


@needs_result
def test_an_attached_penalty_on_weights_alone_counts_once_a_pass() -> None:
    model, x = Plain(), torch.randn(2, 4)
    run = torch.compile(model, backend=graphreg.backend(inner="eager", weight_l2=1.0, penalties="attach", scale=2.0))
    output = run(x)
    (output.sum() * 0).backward(retain_graph=True)
    same(model.a.weight.grad, 2.0 * 2 * model.a.weight.detach() / 16 / 2)
    (output.sum() * 0).backward()
    same(model.a.weight.grad, 2 * 2.0 * 2 * model.a.weight.detach() / 16 / 2)


def test_a_strength_changes_and_nothing_is_compiled_again() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend)
    for value in (0.1, 0.4, 0.0):
        for given in (run, module):
            for name in HIDDEN:
                graphreg.set_strength(given, name, value)
        theirs = module(x)
        same(run(x), theirs.output)
        same(backend.penalties(), theirs.penalties)
    assert len(backend.subgraphs) == 1 and graphreg.strengths(backend) == dict.fromkeys(HIDDEN, 0.0)


def test_noise_is_resumed_in_another_backend() -> None:
    model, _, x = made("net")
    model.norm.momentum = 0.0
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend)
    run(x)
    state = graphreg.rng_state(run)
    expected = [run(x), run(x)]
    torch.compiler.reset()
    other = graphreg.backend(inner="eager", rng=8, **HIDDEN)
    again = torch.compile(model, backend=other)
    graphreg.set_rng_state(other, state)
    assert [torch.equal(again(x), y) for y in expected] == [True, True]
    assert graphreg.rng_state(other) == graphreg.rng_state(backend)


def test_noise_is_held_still_and_goes_on_behind_the_block() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN)
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend)
    same(run(x), module(x).output)
    for _ in range(2):
        with graphreg.frozen_noise(run), graphreg.frozen_noise(module):
            first = run(x)
            assert torch.equal(run(x), first)
            same(module(x).output, first)
    same(run(x), module(x).output)


def test_noise_in_eval_mode() -> None:
    model, twin, x = made("net")
    module = graphreg.regularize(twin, example_inputs=x, rng=7, **HIDDEN).eval()
    model.eval()
    backend = graphreg.backend(inner="eager", rng=7, **HIDDEN)
    run = torch.compile(model, backend=backend)
    quiet = run(x)
    with graphreg.noise_on(run), graphreg.noise_on(module):
        same(run(x), module(x).output)
        same(run(x), module(x).output)
    assert torch.equal(run(x), quiet) and len(backend.subgraphs) == 2


def test_the_models_own_dropout_is_seeded() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    twin, x = copy.deepcopy(model), torch.randn(5, 4)
    module = graphreg.regularize(twin, own_dropout="seeded", rng=7)
    backend = graphreg.backend(inner="eager", own_dropout="seeded", rng=7)
    run = torch.compile(model, backend=backend)
    for _ in range(2):
        same(run(x), module(x).output)
    model.eval()
    assert torch.equal(run(x), model(x))


def test_what_torch_compile_is_given_may_be_copied() -> None:
    """As lightning's wrapper of torch.compile does: the copy is the backend that the compiled code knows."""
    model, _, x = made("net")
    given = {"backend": graphreg.backend(inner="eager", **HIDDEN)}
    torch.compile(model, **given)(x)
    assert copy.deepcopy(given)["backend"] is given["backend"] and given["backend"].penalties()


def test_the_model_stays_as_it_is() -> None:
    model, _, x = made("net")
    before = {name: id(value) for name, value in vars(model).items()}
    state, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    torch.compile(model, backend=graphreg.backend(inner="eager", **HIDDEN))(x)
    marks = {"_is_torch_compile", "_compile_kwargs"}  # torch's own, and lightning's once it is imported
    assert {name: id(value) for name, value in vars(model).items() if name not in marks} == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    kept = {k: v for k, v in model.state_dict().items() if "running" not in k and "num_batches" not in k}
    assert all(torch.equal(state[name], value) for name, value in kept.items()) and list(state) == list(model.state_dict())


def test_report() -> None:
    model, _, x = made("net")
    backend = graphreg.backend(inner="eager", **HIDDEN)
    nothing = "a backend, which has captured no graph yet: nothing acts\n\ncall the model that was compiled with this backend"
    assert str(graphreg.report(backend)) == nothing
    run = torch.compile(model, backend=backend)
    run(x)
    model.eval()(x), run(x)
    graphreg.set_strength(backend, "weight_l2", 0.5)
    assert graphreg.report(run).text(None) == REPORT


REPORT = """\
Net, captured by torch.compile in 2 graphs: 4 regularizers at 2 values and 3 parameters

graph  code                modes
1      forward to its end  train
2      forward to its end  eval

regularizer     class             strength  selector  options           sites              share
hidden_dropout  BernoulliDropout  0.3       *                           2 of 8 values      30 %
hidden_noise    GaussianNoise     0.1       *                           2 of 8 values      30 %
hidden_l1       HiddenL1          0.1       *                           2 of 8 values      30 %
weight_l2       WeightL2          0.5       *         reduction='mean'  3 of 8 parameters  77 %

weight_l2: equivalent SGD weight_decay: 0.00521 to 0.0208, by parameter

graph  site      op      shape  dtype    what acts, in order  matched by
1      relu      relu    5x8    float32  hidden_dropout       *
                                         hidden_noise         *
                                         hidden_l1            *
1      add       add     5x8    float32  hidden_dropout       *
                                         hidden_noise         *
                                         hidden_l1            *
2      relu      relu    5x8    float32  hidden_dropout       *
                                         hidden_noise         *
                                         hidden_l1            *
2      add       add     5x8    float32  hidden_dropout       *
                                         hidden_noise         *
                                         hidden_l1            *
       a.weight  Linear  8x4    float32  weight_l2            *
       b.weight  Linear  8x8    float32  weight_l2            *
       c.weight  Linear  2x8    float32  weight_l2            *

cost: not known, because the compiler decides what it keeps"""
