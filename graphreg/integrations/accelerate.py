"""``RegularizerState`` for checkpoints of accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from graphreg.integrations.parts import Parts, TrainerScale


class RegularizerState:
    """The noise and the strengths of a model, for ``accelerator.register_for_checkpointing(RegularizerState(model, accelerator))``.

    ``accelerator.save_state`` then saves both, and ``load_state`` restores both.
    ``accelerator.backward`` divides the loss by ``gradient_accumulation_steps``, and multiplies it
    by the factor of the GradScaler if it has one (fp16). The gradients of attached penalties get
    the same factors, unless you have given a ``scale=`` yourself.
    """

    def __init__(self, model: nn.Module, accelerator: Any = None) -> None:
        """Find the regularized modules.

        Args:
            model: The model, before or after ``accelerator.prepare``.
            accelerator: The accelerator that calls backward; None to set no scale.
        """
        self._parts = Parts(model)
        if accelerator is not None:
            self._parts.scale_by(_AcceleratorScale(accelerator))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the noise and the strengths."""
        return self._parts.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned."""
        self._parts.load(state)


class _AcceleratorScale(TrainerScale):
    """A scale that reads the accelerator's factors at each call."""

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self.accelerator = accelerator

    def of_call(self, args: Any, kwargs: Mapping[str, Any], reads: Any) -> tuple[Any, Any]:
        self.batches, self.ranks = self.accelerator.gradient_accumulation_steps, self.accelerator.num_processes
        self.scaler = getattr(self.accelerator, "scaler", None)
        return super().of_call(args, kwargs, reads)
