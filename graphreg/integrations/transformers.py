"""``RegularizerCallback`` for the Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from graphreg.errors import GraphRegError, listed
from graphreg.integrations.parts import Parts, TrainerScale, check_tensors, recipe_of, tensors_apart, tensors_replaced
from graphreg.ir.selector import Selector, strings
from graphreg.recipes.files import write

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise GraphRegError("this callback is for the Trainer of transformers: pip install 'graphreg[trainers]'.") from error


class RegularizerCallback(TrainerCallback, ExportableState):
    """Saves and restores noise and strengths in the Trainer's checkpoints, logs the penalties, and sets the scale of the penalties.

    Into each checkpoint's folder it writes ``graphreg_recipe.json``, from which
    ``graphreg.regularize_(model, recipe=...)`` regularizes a model as this one was. A module in the
    model has its path in the file's name: ``graphreg_recipe.student.json``. The tensors that
    regularizers keep from call to call, such as the start of ``l2_sp``, are in
    ``graphreg_state.ID.pt`` in the same folder.

    Give the callback to the Trainer: ``Trainer(model, ..., callbacks=[RegularizerCallback()])``.
    Before training, regularize the model, or any module in it. Each log of training has
    ``penalty/NAME``, the value of the last call, and ``strength/NAME``.

    A step has the mean of the penalties over its batches, unless you have given a ``scale=``
    yourself. If neither the Trainer nor the model divides the loss of a batch, so that a step of k
    batches has k times the loss, it has k times the penalties, too.
    """

    def __init__(self, watch: Selector | None = None) -> None:
        """``watch``: a selector of values. ``kept/SITE/NAME``, the share of such a value that a splice has kept, is logged, too."""
        self.watch = watch
        # the states of the modules that ``state`` returned last
        self._saved: dict[str, Any] | None = None
        self._parts: Parts | None = None
        # the arguments and the state of the Trainer that trains
        self._run: tuple[Any, Any] | None = None
        self._scale = _Scale()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer puts into the JSON of a checkpoint: the noise and the strengths. Write the tensors into its folder.

        The Trainer calls this method while it saves a checkpoint, before it deletes the oldest one.
        So at each moment there is a checkpoint that has all its files. It also calls this method at
        the start of training.
        """
        self._saved, tensors = None, {"file": "", "folder": ""}
        if self._parts is not None and self._run is not None:
            (args, state), (self._saved, kept) = self._run, tensors_apart(self._parts.state())
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if kept and folder.is_dir():
                tensors = {"file": f"graphreg_state.{uuid4().hex[:12]}.pt", "folder": str(folder.resolve())}
                torch.save(kept, folder / tensors["file"])
        # (): a function, which JSON cannot hold
        watch = () if self.watch is None else strings(self.watch)
        return {"args": {"watch": list(watch)} if watch else {}, "attributes": {"saved": self._saved, "tensors": tensors}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Restore the noise and the strengths if training resumes from a checkpoint, and set the scale of the penalties."""
        model: nn.Module = more["model"]
        self._parts, self._run = Parts(model), (args, state)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:  # the Trainer itself could not save a checkpoint then
            raise GraphRegError(
                f"the checkpoint was saved without {type(self).__name__}, so the Trainer cannot resume from it with this callback. Load "
                "the weights of the checkpoint into the model, and train without resume_from_checkpoint."
            )

        # The Trainer stores a list if it has several callbacks of one class.
        attributes = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
        modules, named = attributes["saved"], dict[str, str]()
        if modules is not None and modules is not self._saved:  # they were read from a checkpoint
            tensors_replaced(modules, named.setdefault)
            tensors = torch.load(_file(args, state, attributes["tensors"]), "cpu", weights_only=True) if named else {}
            check_tensors(tensors.keys(), named.keys())
            self._parts.load(tensors_replaced(modules, lambda key, name: tensors[key]))

        # Only then does ``num_items_in_batch`` count the items of all ranks.
        ranks = args.world_size if args.average_tokens_across_devices else 1
        self._scale.ranks, self._scale.scaler = ranks, getattr(more.get("optimizer"), "scaler", None)
        self._parts.scale_by(self._scale)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the recipe of each regularized module into the checkpoint's folder: ``graphreg_recipe.json``."""
        if self._parts is None or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path, session in self._parts.sessions.items() if folder.is_dir() else ():
            if (recipe := recipe_of(session)) is not None:
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
        """Begin to watch the values that ``watch`` selects, as soon as there is a graph. Warn if the regularizers do nothing."""
        if self._parts is not None:
            self._parts.end_step(self._scale)
            self._parts.watch(self.watch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        """Add penalties, strengths and shares to a log of training. Other logs, such as those of evaluation, stay as they are."""
        if self._parts is None or logs is None or "loss" not in logs:
            return
        numbers = self._parts.numbers()
        logs.update(numbers)
        # The Trainer has put a copy of ``logs`` into its history before it calls this method.
        state.log_history[-1].update(numbers)

    def on_train_end(self, *args: Any, **more: Any) -> None:
        """Remove the scale and the watches."""
        if self._parts is not None:
            self._parts.close()
            self._parts = self._run = None


class _Scale(TrainerScale):
    """The scale under this Trainer."""

    divides = False


def _file(args: Any, state: Any, tensors: Mapping[str, str]) -> Path:
    """Return the file of tensors in the checkpoint from which training resumes. The Trainer does not say in which folder that is."""
    folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
    folders += [Path(folder) for folder in (args.resume_from_checkpoint, tensors["folder"]) if folder]
    for folder in folders if tensors["file"] else ():
        if (file := folder / tensors["file"]).is_file():
            return file
    raise GraphRegError(
        f"{tensors['file'] or 'the file graphreg_state'} of the checkpoint is missing: it has the tensors that regularizers keep from call "
        f"to call, and is not in {listed([str(folder) for folder in folders])}. If you have moved the checkpoint, say where it is: "
        "TrainingArguments(resume_from_checkpoint=folder). Otherwise resume from another checkpoint."
    )
