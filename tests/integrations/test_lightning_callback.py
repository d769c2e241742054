"""Lightning trains a model that is regularized in place, or holds one; a callback is all that knows of graphreg."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning_runs import ADVICE_IGNORED, SETTINGS, X, Y
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphreg
from graphreg import GraphRegError

lightning = pytest.importorskip("lightning", reason="pip install 'graphreg[trainers]'")
from graphreg.integrations.lightning import RegularizerCallback  # noqa: E402

pytestmark = ADVICE_IGNORED


class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
    """As a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
        self.losses: list[float] = []
        self.gradients: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.relu(self.hid(x)))
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-2)


class Holds(Classifier):
    """Calls a module that ``regularize`` has made."""

    def __init__(self) -> None:
        super().__init__()
        net = nn.Sequential(self.hid, nn.ReLU(), self.out)
        self.net = graphreg.regularize(net, penalties="attach", scale=None, **SETTINGS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class CallsNet(Classifier):
    """``training_step`` calls a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.hid, nn.ReLU(), self.out)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Skips(CallsNet):
    """A first batch that is no good."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        return super().training_step(batch, index) if index else None


@pytest.mark.filterwarnings("ignore:penalties=.attach.. the model returns no loss:UserWarning")
@pytest.mark.filterwarnings("ignore:.*training_step.* returned .None:UserWarning")
@pytest.mark.parametrize(("kind", "path", "is_told"), [(CallsNet, "", True), (CallsNet, "net", False), (Skips, "net", False)])
def test_a_regularized_module_that_no_step_calls(
    kind: Any, path: str, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: warnings.append(text % args))
    module = kind()
    graphreg.regularize_(module.get_submodule(path), hidden_dropout=0.5)
    fit(module, tmp_path, RegularizerCallback())
    told = "no regularized module has been called in train mode so far, so no regularizer acts. The model itself is regularized: "
    assert [warning.startswith(told) for warning in warnings] == [True] * is_told


def classifier() -> Classifier:
    return graphreg.regularize_(Classifier(), **SETTINGS)


def fit(module: Classifier, folder: Path, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        **{"default_root_dir": folder, "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks), **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=3), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:penalties=.attach.. the model returns no loss:UserWarning")  # the callback knows
@pytest.mark.parametrize("kind", [classifier, Holds])
@pytest.mark.parametrize("parts", [1, 4])
def test_the_first_gradient_by_hand(tmp_path: Path, kind: Any, parts: int) -> None:
    module, oracle = kind(), Classifier()
    returned = graphreg.regularize(nn.Sequential(oracle.hid, nn.ReLU(), oracle.out) if kind is Holds else oracle, **SETTINGS)
    trainer = fit(module, tmp_path, RegularizerCallback(), accumulate_grad_batches=parts)
    for i in range(parts):
        rows = slice(3 * i, 3 * i + 3)
        output, penalties = returned(X[rows])
        ((F.cross_entropy(output, Y[rows]) + penalties["weight_l2"] + penalties["hidden_l1"]) / parts).backward()
    torch.testing.assert_close(module.gradients[0], [p.grad for p in oracle.parameters()])
    prefix = "net/" if kind is Holds else ""
    if kind is classifier:  # what only training_step reads makes no other graph
        assert [len(made) for made in vars(module)["graphreg_in_place"]._made.values()] == [1]
    assert trainer.logged_metrics[f"{prefix}strength/weight_l2"] == 3.0 and trainer.logged_metrics[f"{prefix}penalty/weight_l2"] > 0


def test_resumed_bit_for_bit(tmp_path: Path) -> None:
    """What l2_sp and spectral keep comes back, too."""
    keeping = {**SETTINGS, "l2_sp": 5.0, "spectral": 2.0}
    whole = graphreg.regularize_(Classifier(), **keeping)
    graphreg.set_strength(whole, "weight_l2", 2.0)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, RegularizerCallback(watch="relu"), saving, max_epochs=2, enable_checkpointing=True)
    checkpoint = tmp_path / "epoch=0.ckpt"
    assert list(torch.load(checkpoint)["state_dict"]) == list(Classifier().state_dict())
    other = graphreg.regularize_(Classifier(), **{**keeping, "rng": 5})
    trainer = fit(other, tmp_path, RegularizerCallback(watch="relu"), max_epochs=2, ckpt_path=checkpoint)
    assert other.losses == whole.losses[4:] and graphreg.strengths(other)["weight_l2"] == 2.0
    assert 0.4 < trainer.logged_metrics["kept/relu/hidden_dropout"] < 1


def test_a_model_that_is_not_regularized(tmp_path: Path) -> None:
    with pytest.raises(GraphRegError, match="no module in this Classifier is regularized"):
        fit(Classifier(), tmp_path, RegularizerCallback())


class Grouped(Classifier):
    """Its optimizer has the groups in the other order when ``reverse`` is set."""

    reverse = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = graphreg.param_groups(self, {"out.*": {"lr": 0.1}}, default={"lr": 0.03, "weight_decay": 0.1}, decay="standard")
        optimizer = torch.optim.AdamW(groups[::-1] if self.reverse else groups)
        graphreg.load_by_name(optimizer)
        return optimizer


def test_groups_resume_by_name(tmp_path: Path) -> None:
    whole, other = (graphreg.regularize_(Grouped(), **SETTINGS) for _ in range(2))
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, tmp_path, RegularizerCallback(), saving, max_epochs=2, enable_checkpointing=True)
    other.reverse = True
    fit(other, tmp_path, RegularizerCallback(), max_epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert other.losses == whole.losses[4:]
