"""Logits that don't drift: the auxiliary z-loss of Chowdhery et al., PaLM, 2022, section 5."""

from torch import Tensor

from graphreg import Penalty, Site


class ZLoss(Penalty, keys=("z_loss",)):
    """The squared logarithm of the softmax normalizer, averaged over samples: ``mean (log sum exp z)²``.

    units: the logits, [samples, classes] -> 0-d, averaged over sites. ``weight`` >= 0, 1e-4 in the paper. The default sites are the
    model's outputs, losses left out.

    Attributes:
        axis: The axis of classes; None for axis 1 of a convolution's value, else the last. All other axes are samples.

    Raises:
        RegularizerError: The values are those of a softmax, a log-softmax or a sigmoid, and no logits.
    """

    axis: int | None = None

    min_units = 2
    default_role = "output"

    def why_not(self, site: Site) -> str:
        made = {"softmax", "log_softmax", "logsoftmax", "sigmoid"}.intersection(label.op.lower() for label in site.labels)
        return f"these are results of {min(made)}, and it takes logits. Select the value that {min(made)} reads." if made else ""

    def __call__(self, units: Tensor) -> Tensor:
        return units.logsumexp(1).square().mean()
