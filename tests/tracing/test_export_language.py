"""Language models of transformers through the export front end: trained compiled, with dropout and penalties, and stripped."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.tracing.trace import Traced
from language_models import MLPS, MODELS, STATES, WORDS, batch, build


def settings(name: str) -> dict[str, object]:
    return {
        "hidden_dropout": 0.1,
        "hidden_l1": {"weight": 1e-3, "pattern": MLPS[name]},
        "weight_l2": 1e-3,
        "recurrent_state": {"weight": 1e-3, "pattern": STATES[name]},
    }


class Seen(NamedTuple):
    """A trace of a model of which a part is in eval mode, and what there was before."""

    traced: Traced
    tensors: dict[str, Tensor]
    modes: list[bool]
    state: Tensor


@functools.cache
def seen(name: str) -> Seen:
    model = build(name)
    next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0].eval()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    return Seen(graphreg.trace(model, batch()), tensors, modes, state)


def rewritten(name: str, **keywords: object) -> RewrittenModule:
    """As regularize makes it, traced once."""
    traced = seen(name).traced
    return graphreg.rewrite(traced, graphreg.plan(traced, graphreg.from_kwargs(traced, **keywords)), rng=0)  # type: ignore[arg-type]


def regularized(name: str, **keywords: object) -> RewrittenModule:
    """With weights of its own, as they are at first, in train mode."""
    return copy.deepcopy(rewritten(name, **keywords)).train()


def test_the_model_is_left_as_it_was_and_shares_all_it_has() -> None:
    seen.cache_clear()
    traced, before, modes, state = seen("gpt2")
    module, model = rewritten("gpt2", hidden_dropout=0.1), traced.model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.use_cache is True
    assert [m.training for m in model.modules()] == modes and False in modes and True in modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert list(module.state_dict()) == list(before)
    assert module.lm_head.weight is module.transformer.wte.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    report = graphreg.report(module)
    assert report.cost is not None and report.cost.kept["hidden_dropout"] > 0
    assert report.made == "traced by the symbolic front end"


@pytest.mark.parametrize(("name", "backend"), [("gpt2", "inductor"), *((name, "aot_eager") for name in MODELS)])
def test_ten_steps_compiled_and_stripped(name: str, backend: str) -> None:
    model, data = build(name), batch()
    module = regularized(name, **settings(name))
    step = torch.compile(module, fullgraph=True, backend=backend)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(10):
        output, penalties = step(**data)
        assert set(penalties) == {"hidden_l1", "weight_l2", "recurrent_state"}
        assert all(value > 0 for value in penalties.values())
        loss = output.loss + sum(penalties.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    stripped = graphreg.strip(module).eval()
    model.eval().load_state_dict(module.state_dict())
    for rows, words in ((3, 7), (2, 5), (1, 9)):  # other sizes than the example's
        other = batch(rows, words, seed=1)
        ours, theirs = stripped(**other), model(**other)
        assert type(ours) is type(theirs) and torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_and_gradients_are_the_models(name: str) -> None:
    model, data = build(name).train(), batch()
    module = graphreg.strip(regularized(name, weight_l2=1e-3))
    found = []
    for each in (module, model):
        torch.manual_seed(1)  # the model's own dropout draws
        output = each(**data)
        output.loss.backward()
        found.append((output.logits, {n: p.grad for n, p in each.named_parameters() if p.grad is not None}))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.allclose(g, found[1][1][n], atol=1e-7) for n, g in found[0][1].items())


class Words(nn.Module):
    """The arguments of a language model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, WORDS)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ) -> dict[str, Tensor]:
        logits = self.head(self.table(input_ids))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("make", [Words, pytest.param(lambda: build("gpt2"), marks=pytest.mark.sweep, id="gpt2")])
def test_what_the_example_did_not_carry_is_refused(make: Callable[[], nn.Module]) -> None:
    module = graphreg.regularize(make(), example_inputs={"input_ids": batch()["input_ids"]}, weight_l2=1e-3, front_end="export")
    with pytest.raises(graphreg.GraphRegError, match="labels was specialized to None when the model was traced. Give regularize"):
        module(**batch())
    with pytest.raises(graphreg.GraphRegError, match=r"kwargs=\{'num_items_in_batch': a tensor of int64\}\), and the graph"):
        module(batch()["input_ids"], num_items_in_batch=torch.tensor(3))
    assert list(inspect.signature(module.forward).parameters)[-1] == "logits_to_keep"  # trainers ask: there is no **kwargs
    with_labels = graphreg.regularize(make(), example_inputs=batch(), weight_l2=1e-3, front_end="export")
    with pytest.raises(graphreg.GraphRegError, match="labels was carried by the example_inputs, so the graph needs it"):
        with_labels(batch()["input_ids"])
    with pytest.raises(graphreg.GraphRegError, match="labels was carried by the example_inputs, so the graph needs it"):
        with_labels(batch()["input_ids"], labels=None)


def test_own_dropout_seeded_draws_the_same_compiled() -> None:
    module = graphreg.regularize(build("gpt2"), example_inputs=batch(), rng=0, own_dropout=0.3)
    state = graphreg.rng_state(module)
    eager = module(**batch()).output.logits
    graphreg.set_rng_state(module, state)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(**batch()).output.logits
    assert torch.allclose(eager, compiled, atol=1e-6)
    assert not torch.allclose(eager, module(**batch()).output.logits, atol=1e-2)  # the next call draws anew


class Head(nn.Module):
    """A model of the user's own around one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = build("bert").bert, nn.Linear(16, 2)  # type: ignore[union-attr]

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])}


def test_a_backbone_is_seen_into_where_export_is_asked_for() -> None:
    model, ids = Head(), batch()["input_ids"]
    traced = graphreg.trace(model, (ids, torch.ones_like(ids)), front_end="export")
    assert not traced.opaque_modules and "backbone.encoder.layer.1" in [name for site in traced.values for name in site.names]
    module = graphreg.strip(graphreg.rewrite(traced, graphreg.plan(traced, []))).eval()
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    assert torch.equal(module(ids, mask)["logits"], model.eval()(ids, mask)["logits"])


def test_without_a_cache_packed_sequences_keep_apart() -> None:
    """The model looks for them in the values, unless a trace runs; the graph has them at every call."""
    model = build("llama").eval()
    ids = torch.arange(8)[None] % WORDS
    in_row, packed = torch.arange(8)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    module = graphreg.regularize(
        model, hidden_dropout=0.1, front_end="symbolic", example_inputs={"input_ids": ids, "position_ids": in_row, "use_cache": False}
    ).eval()
    assert not [note for note in graphreg.report(module).notes if "opaque" in note]
    for positions in (in_row, packed):
        expected = model(ids, position_ids=positions, use_cache=False).logits
        assert torch.equal(module(input_ids=ids, position_ids=positions, use_cache=False).output.logits, expected)
