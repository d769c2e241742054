"""A loop that accelerate drives: checkpoints, accumulation, autocast; the regularized model resumes bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from perceptron import perceptron
from torch import nn

import graphreg
from graphreg import RegularizerError

accelerate = pytest.importorskip("accelerate", reason="pip install 'graphreg[trainers]'")
from graphreg.integrations.accelerate import RegularizerState  # noqa: E402

SETTINGS: dict[str, Any] = {"hidden_dropout": 0.5, "weight_l2": 3.0, "rng": 1}
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Let each test have an accelerator with options of its own: accelerate keeps those of the first in a process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(accumulation: int = 1, settings: Mapping[str, Any] = SETTINGS, **options: Any) -> tuple[Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    model = graphreg.regularize_(perceptron(), **settings)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    accelerator.register_for_checkpointing(RegularizerState(model, accelerator))
    return accelerator, model, optimizer


def steps(accelerator: Any, model: Any, optimizer: Any, count: int) -> list[float]:
    losses = []
    for i in range(count):
        with accelerator.accumulate(model):
            loss = model(X[2 * (i % 4) : 2 * (i % 4) + 2]).float().pow(2).mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_resumed_bit_for_bit(tmp_path: Path) -> None:
    """What l2_sp and spectral keep comes back, too."""
    keeping = {**SETTINGS, "l2_sp": 5.0, "spectral": 2.0}
    accelerator, model, optimizer = prepared(settings=keeping, mixed_precision="bf16")
    graphreg.set_strength(model, "weight_l2", 2.0)
    steps(accelerator, model, optimizer, 2)
    accelerator.save_state(str(tmp_path))
    expected = steps(accelerator, model, optimizer, 3)
    other = prepared(settings={**keeping, "rng": 7}, mixed_precision="bf16")
    other[0].load_state(str(tmp_path))
    assert steps(*other, 3) == expected and graphreg.strengths(other[1])["weight_l2"] == 2.0


def test_the_gradient_of_an_accumulated_step_by_hand() -> None:
    accelerator, model, _ = prepared(accumulation=2)
    oracle = perceptron()
    module = graphreg.regularize(oracle, **SETTINGS)
    for rows in (slice(0, 2), slice(2, 4)):
        accelerator.backward(model(X[rows]).pow(2).mean())
        output, penalties = module(X[rows])
        ((output.pow(2).mean() + penalties["weight_l2"]) / 2).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in oracle.parameters()])


class Divides(nn.Module):
    """Returns a loss, which it divides by ``num_items_in_batch`` if it gets that, and else by the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: torch.Tensor, num_items_in_batch: Any = None) -> Any:
        return {"loss": self.net(x).pow(2).sum() / (x.shape[0] if num_items_in_batch is None else num_items_in_batch)}


@pytest.mark.parametrize("counts", [False, True])
def test_a_mean_over_all_items_of_a_step(counts: bool) -> None:
    """As in accelerate's guide to accumulation: the loss is divided by the items of the step, and multiplied by what accelerate divides."""
    found = []
    for batches in (1, 4):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=batches)
        torch.manual_seed(0)
        model = accelerator.prepare(graphreg.regularize_(Divides(), weight_l2=30.0))
        accelerator.register_for_checkpointing(RegularizerState(model, accelerator))
        for _ in range(batches):
            loss = model(X[:2], num_items_in_batch=torch.tensor(2.0 * batches) if counts else None)["loss"]
            accelerator.backward(loss * batches if counts else loss)
        found.append([p.grad for p in model.parameters()])
        accelerate.state.AcceleratorState._reset_state(True)
    torch.testing.assert_close(*found)


def test_a_state_of_another_model() -> None:
    state = RegularizerState(graphreg.regularize_(perceptron(), **SETTINGS)).state_dict()
    other = nn.Sequential(graphreg.regularize_(perceptron(), **SETTINGS))
    with pytest.raises(RegularizerError, match="only the model has a regularized module at the model itself, 0. Regularize the model"):
        RegularizerState(other).load_state_dict(state)
