"""``RegularizerCallback`` for the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from graphreg.errors import GraphRegError
from graphreg.integrations.parts import Parts, TrainerScale
from graphreg.ir.selector import Selector

try:
    from lightning import Callback
except ImportError as error:
    raise GraphRegError("this callback is for the Trainer of Lightning: pip install 'graphreg[trainers]'.") from error


class RegularizerCallback(Callback):
    """Saves and restores noise and strengths in Lightning's checkpoints, logs the penalties, and sets the scale of the penalties.

    Give the callback to the Trainer: ``Trainer(callbacks=[RegularizerCallback()])``. Before
    training, regularize the LightningModule in place, or regularize a module in it.
    ``penalty/NAME`` and ``strength/NAME`` are logged with the LightningModule's own logs.

    The gradients of the penalties are divided by ``accumulate_grad_batches``, as Lightning divides
    the loss, and multiplied by the factor of the scaler for mixed precision, unless you have given
    a ``scale=`` yourself.
    """

    def __init__(self, watch: Selector | None = None) -> None:
        """``watch``: a selector of values. ``kept/SITE/NAME``, the share of such a value that a splice has kept, is logged, too."""
        super().__init__()
        self.watch = watch
        self._parts: Parts | None = None
        self._scale = TrainerScale()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the noise and the strengths into a checkpoint."""
        checkpoint["graphreg"] = Parts(pl_module).state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the noise and the strengths, if the checkpoint has them."""
        if "graphreg" in checkpoint:
            Parts(pl_module).load(checkpoint["graphreg"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the scale of the penalties."""
        self._parts = Parts(pl_module)
        self._parts.scale_by(self._scale)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Find out which factors Lightning applies to the loss of this batch."""
        # With manual optimization, the user's code runs backward, and Lightning divides no loss.
        self._scale.batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._scale.scaler = getattr(trainer.precision_plugin, "scaler", None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log penalties, strengths and shares. As soon as there is a graph, begin to watch the values that ``watch`` selects.

        Warn if the regularizers do nothing.
        """
        if self._parts is not None:
            self._parts.end_step(self._scale)
            pl_module.log_dict(self._parts.numbers())
            self._parts.watch(self.watch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the scale and the watches."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the scale and the watches."""
        self._close()

    def _close(self) -> None:
        if self._parts is not None:
            self._parts.close()
