"""One of two ranks on which a training library trains; test_trainers_on_ranks.py starts it, in the way of torchrun.

WAY.py, a copy of this file, trains in this way for one step of two batches by SGD, with a penalty on weights and without. RANK.pt, in the
same folder, has the weights at the end: the difference is the learning rate times the gradient of the penalty.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphreg

WEIGHT, RATE = 3.0, 0.5
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """As models of transformers do, it divides its loss by ``num_items_in_batch`` if it gets that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        y = self.out(torch.tanh(self.hid(x)))
        return {"loss": (y - labels).square().mean() if num_items_in_batch is None else (y - labels).square().sum() / num_items_in_batch}


def regularized(model: nn.Module, penalty: bool) -> Any:
    """The masks are the same with the penalty and without."""
    return graphreg.regularize_(model, weight_l2={"weight": WEIGHT if penalty else 0.0}, hidden_dropout=0.5, rng=0)


def both(library: str) -> tuple[Any, Any]:
    """The library and what graphreg has for it, of which a process imports no other."""
    return import_module(library), import_module(f"graphreg.integrations.{library}")


def by_transformers(penalty: bool, counted: bool = False) -> nn.Module:
    transformers, ours = both("transformers")
    model = regularized(Net(), penalty)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=RATE, optim="sgd",
            max_grad_norm=0, lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, average_tokens_across_devices=counted, ddp_backend="gloo",
        )  # fmt: skip
        data = [{"x": row, "labels": row} for row in X]
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[ours.RegularizerCallback()])
        trainer.model_accepts_loss_kwargs = counted  # whether the model gets num_items_in_batch
        trainer.train()
    assert arguments.world_size == 2
    return model


def by_lightning(penalty: bool) -> nn.Module:
    lightning, ours = both("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = regularized(Net(), penalty)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(batch[0], batch[0])["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), RATE)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=1)
    trainer = lightning.Trainer(
        max_steps=1, accumulate_grad_batches=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ours.RegularizerCallback()],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, data)
    assert trainer.world_size == 2
    return module.net


def by_accelerate(penalty: bool) -> nn.Module:
    accelerate, ours = both("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = regularized(Net(), penalty)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), RATE))
    accelerator.register_for_checkpointing(ours.RegularizerState(wrapped, accelerator))
    for i in range(2):
        with accelerator.accumulate(wrapped):
            x = X[2 * i + accelerator.process_index :][:1]
            accelerator.backward(wrapped(x, x)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.num_processes == 2
    return model


WAYS: dict[str, Callable[[bool], nn.Module]] = {
    "accelerate": by_accelerate,
    "transformers": by_transformers,
    "transformers_counted": lambda penalty: by_transformers(penalty, counted=True),
    "lightning": by_lightning,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = [[p.detach().clone() for p in WAYS[Path(__file__).stem](penalty).parameters()] for penalty in (True, False)]
    torch.save(trained, f"{os.environ['RANK']}.pt")
