"""One of two ranks on which a training library trains; test_trainers_on_ranks.py starts it, in the way of torchrun.

WAY.py, a copy of this file, trains by this library for one step of two batches by SGD, with a penalty on weights and without, for each kind
of model. RANK.pt, in the same folder, has the weights at the end: the difference is the learning rate times the gradient of the penalty,
times the factor by which the library and the model enlarge the loss of a step.
"""

from __future__ import annotations

import os
import shutil
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

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        y = self.out(torch.tanh(self.hid(x)))
        return {"loss": (y - labels).square().mean() if num_items_in_batch is None else (y - labels).square().sum() / num_items_in_batch}


class MeanNet(Net):
    """Takes ``num_items_in_batch``, but does not divide by it."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return super().forward(x, labels)


class TupleNet(MeanNet):
    """Returns its loss in a tuple, to which penalties cannot be added."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return tuple(super().forward(x, labels).values())


def regularized(model: nn.Module, penalty: bool) -> Any:
    """The masks are the same with the penalty and without."""
    return graphreg.regularize_(model, weight_l2={"weight": WEIGHT if penalty else 0.0}, hidden_dropout=0.5, rng=0)


def both(library: str) -> tuple[Any, Any]:
    """The library and what graphreg has for it, of which a process imports no other."""
    return import_module(library), import_module(f"graphreg.integrations.{library}")


def trainer_of(model: nn.Module, folder: str, **options: Any) -> Any:
    transformers, ours = both("transformers")
    arguments = transformers.TrainingArguments(
        folder, **{"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": RATE,
        "optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "ddp_backend": "gloo", **options},
    )  # fmt: skip
    assert arguments.world_size == 2
    data = [{"x": row, "labels": row} for row in X]
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[ours.RegularizerCallback()])


def by_transformers(penalty: bool, make: Callable[[], nn.Module] = Net, counted: bool = True, over_ranks: bool = True) -> nn.Module:
    """``counted``: whether the model gets ``num_items_in_batch``; ``over_ranks``: whether this is the number on all ranks."""
    model = regularized(make(), penalty)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(model, folder, average_tokens_across_devices=over_ranks)
        trainer.model_accepts_loss_kwargs = counted
        trainer.train()
    return model


def resumed(penalty: bool) -> nn.Module:
    """Train three steps, or, with the penalty, two steps and then one, from the checkpoint; both have penalties that keep tensors."""
    settings: Any = {"l2_sp": 5.0, "spectral": 1.0, "hidden_dropout": 0.5, "rng": 0}
    files = [tempfile.gettempdir()]
    torch.distributed.broadcast_object_list(files)  # one folder for both ranks
    folder = f"{files[0]}/{os.environ['MASTER_PORT']}{penalty}"
    model = graphreg.regularize_(Net(), **settings)
    trainer_of(model, folder, max_steps=2 if penalty else 3, save_strategy="steps", save_steps=2, learning_rate=0.05).train()
    assert len([*Path(folder, "checkpoint-2").glob("graphreg_state.*.pt")]) == 1
    if penalty:
        model = graphreg.regularize_(Net(), **settings)
        trainer_of(model, folder, max_steps=3, learning_rate=0.05).train(resume_from_checkpoint=True)
    torch.distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)
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


# By library, then by kind of model: the function, and the factor by which the step has the loss of a batch.
WAYS: dict[str, dict[str, tuple[Callable[[bool], nn.Module], int]]] = {
    "accelerate": {"divided by the library": (by_accelerate, 1)},
    "transformers": {
        "divided by the library": (lambda penalty: by_transformers(penalty, counted=False), 1),
        "divided by the model": (by_transformers, 1),
        "divided by the model, on each rank": (lambda penalty: by_transformers(penalty, over_ranks=False), 1),
        "not divided": (lambda penalty: by_transformers(penalty, MeanNet), 4),
        "not divided, on each rank": (lambda penalty: by_transformers(penalty, MeanNet, over_ranks=False), 2),
        "not divided, in a tuple": (lambda penalty: by_transformers(penalty, TupleNet), 4),
        "resumed": (resumed, 0),
    },
    "lightning": {"divided by the library": (by_lightning, 1)},
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = {
        kind: [[p.detach().clone() for p in train(penalty).parameters()] for penalty in (True, False)]
        for kind, (train, _) in WAYS[Path(__file__).stem].items()
    }
    torch.save(trained, f"{os.environ['RANK']}.pt")
