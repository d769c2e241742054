"""Lightning trains a module that holds a rewritten model whose penalties are attached: its training_step knows of a loss alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import ADVICE_IGNORED, SETTINGS, X, Y
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphreg
from graphreg.runtime.rewritten_module import RewrittenModule
from pages import run_page

lightning = pytest.importorskip("lightning", reason="pip install 'graphreg[trainers]'")

pytestmark = ADVICE_IGNORED


def net(scale: float | None = 1, penalties: Any = "attach") -> RewrittenModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    return graphreg.regularize(model, penalties=penalties, scale=scale if penalties == "attach" else None, **SETTINGS)


class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
    """As a user writes it, with or without graphreg."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []
        self.validated: list[float] = []
        self.gradients: list[list[Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.validated.append(F.cross_entropy(self.net(x), y).item())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-2)


@pytest.fixture(scope="module")
def noise_state() -> Any:
    """The callback of docs/trainers.md, whose code is run whole, in passing."""
    return run_page("trainers.md", "Lightning, with a separate module")["NoiseState"]


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=3)


def fit(module: Classifier, folder: Path, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> None:
    trainer = lightning.Trainer(
        **{"default_root_dir": folder, "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "callbacks": list(callbacks), **options},
    )  # fmt: skip
    trainer.fit(module, loader(), loader(), ckpt_path=ckpt_path)


@pytest.mark.parametrize("parts", [1, 4])
def test_the_first_gradient_by_hand(tmp_path: Path, parts: int) -> None:
    """A step of one batch, and one accumulated over four, which Lightning divides the loss by: ``scale=1/4``."""
    module, returned = Classifier(net(1 / parts)), net(penalties="return")
    fit(module, tmp_path, accumulate_grad_batches=parts)
    for i in range(parts):
        rows = slice(3 * i, 3 * i + 3)
        output, penalties = returned(X[rows])
        squares = [p.square().mean() for p in returned.parameters() if p.dim() > 1]
        torch.testing.assert_close(penalties["weight_l2"], 3 * torch.stack(squares).mean())
        ((F.cross_entropy(output, Y[rows]) + penalties["weight_l2"] + penalties["hidden_l1"]) / parts).backward()
    torch.testing.assert_close(module.gradients[0], [p.grad for p in returned.parameters()])


def test_it_learns_and_validates_without_noise(tmp_path: Path) -> None:
    module = Classifier(net())
    fit(module, tmp_path, max_epochs=10)
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])
    noise, plain = graphreg.rng_state(module.net), graphreg.strip(module.net).eval()
    assert noise["call"] == 40  # the calls of training alone
    with torch.no_grad():
        expected = [F.cross_entropy(plain(x), y).item() for x, y in loader()]
    assert module.validated[-4:] == expected


def test_resumed_from_a_checkpoint_of_lightnings(noise_state: Any, tmp_path: Path) -> None:
    whole = Classifier(net())
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, noise_state(), saving, max_epochs=2, enable_checkpointing=True)
    checkpoint = tmp_path / "epoch=0.ckpt"
    saved = torch.load(checkpoint)
    assert list(saved["state_dict"]) == [f"net.{name}" for name in net().state_dict()]
    found = []
    for callbacks in ([noise_state()], []):
        other = Classifier(net())
        fit(other, tmp_path, *callbacks, max_epochs=2, ckpt_path=checkpoint)
        found.append(other.losses)
    assert found[0] == whole.losses[4:] and found[1] != whole.losses[4:]
