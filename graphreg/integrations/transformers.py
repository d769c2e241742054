"""``RegularizerCallback`` for the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from graphreg.errors import GraphRegError, listed
from graphreg.integrations.parts import Parts, TrainerScale
from graphreg.ir import Selector
from graphreg.recipes import write

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise GraphRegError("this callback is for the Trainer of transformers: pip install 'graphreg[trainers]'.") from error


class RegularizerCallback(TrainerCallback, ExportableState):
    """Saves and restores noise and strengths in the Trainer's checkpoints, logs the penalties, and sets the scale of the penalties.

    Beside each checkpoint it writes ``graphreg_recipe.json``, from which ``graphreg.regularize_(model, recipe=...)`` regularizes a model
    as this one was. A module in the model has its path in the file's name: ``graphreg_recipe.student.json``.

    Give the callback to the Trainer: ``Trainer(model, ..., callbacks=[RegularizerCallback()])``. Before training, regularize the model, or
    any module in it. Each log of training has ``penalty/NAME``, the value of the last call, and ``strength/NAME``.

    The Trainer divides the loss of each batch by the number of batches in a step, except for a model that gets ``num_items_in_batch``: that
    model divides the loss by this number. In both cases a step has the mean of the penalties over its batches, unless you have given a
    ``scale=`` yourself.
    """

    def __init__(self, watch: Selector | None = None) -> None:
        """``watch``: a selector of values. ``kept/SITE/NAME``, the share of such a value that a splice has kept, is logged, too."""
        self.watch = watch
        self.saved: dict[str, Any] | None = None
        self._parts: Parts | None = None
        self._scale = TrainerScale()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer puts into a checkpoint: the noise and the strengths."""
        if self._parts is not None:
            self.saved = self._parts.state()
        return {"args": {}, "attributes": {"saved": self.saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Restore the noise and the strengths if training resumes from a checkpoint, and set the scale of the penalties."""
        model: nn.Module = more["model"]
        self._parts = Parts(model)
        if names := self._parts.keeping_tensors():
            raise GraphRegError(
                f"the Trainer saves the states of callbacks as JSON, which cannot hold the tensors that {listed(names)} keeps. Leave that "
                "regularizer out, or leave this callback out and save graphreg.rng_state(model) with torch.save beside each checkpoint."
            )
        saved = state.stateful_callbacks[type(self).__name__]
        saved = (saved[0] if isinstance(saved, list) else saved)["attributes"]["saved"]
        if saved is not None:
            self._parts.load(saved)
        ranks = args.world_size if args.average_tokens_across_devices else 1
        self._scale.ranks, self._scale.scaler = ranks, getattr(more.get("optimizer"), "scaler", None)
        self._parts.scale_by(self._scale)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the recipe of each regularized module beside the checkpoint: ``graphreg_recipe.json``."""
        if self._parts is None or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path, recipe in self._parts.recipes().items() if folder.is_dir() else ():
            write(folder / f"graphreg_recipe{'.' if path else ''}{path}.json", recipe)

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **more: Any) -> None:
        """Find out how many batches the step has. The last step of an epoch may have fewer than the other steps."""
        most = args.gradient_accumulation_steps
        self._scale.batches = most
        try:
            batches = len(train_dataloader)
        except TypeError:  # the data has no length
            return
        steps = max(-(-batches // most), 1)
        if state.global_step % steps == steps - 1:
            self._scale.batches = batches % most or most

    def on_step_end(self, *args: Any, **more: Any) -> None:
        """Begin to watch the values that ``watch`` selects, as soon as there is a graph."""
        if self._parts is not None:
            self._parts.watch(self.watch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Add penalties, strengths and shares to a log of training. Other logs, such as those of evaluation, stay as they are."""
        if self._parts is None or logs is None or "loss" not in logs:
            return
        numbers = self._parts.numbers()
        logs.update(numbers)
        state.log_history[-1].update(numbers)

    def on_train_end(self, *args: Any, **more: Any) -> None:
        """Store the state, and remove the scale and the watches."""
        if self._parts is not None:
            self.saved = self._parts.state()
            self._parts.close()
