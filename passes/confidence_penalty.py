"""Outputs that are not too sure: Pereyra, Tucker, Chorowski, Kaiser & Hinton, Regularizing neural networks by penalizing confident output
distributions, ICLR workshop 2017, section 3."""

from torch import Tensor

from graphreg import Penalty, Site


class ConfidencePenalty(Penalty, keys=("confidence",)):
    """The negative entropy of the output distributions, averaged over samples: ``mean sum p log p``, p = softmax of the logits.

    units: the logits, [samples, classes] -> 0-d, averaged over sites; between -log(classes) and 0. ``weight`` >= 0. The default sites
    are the model's outputs, losses left out.

    Attributes:
        axis: The axis of classes; None for axis 1 of a convolution's value, else the last. All other axes are samples.

    Raises:
        RegularizerError: The values are those of a softmax or a sigmoid, and no logits.
    """

    axis: int | None = None

    min_units = 2
    default_role = "output"

    def why_not(self, site: Site) -> str:
        made = {"softmax", "sigmoid"}.intersection(label.op.lower() for label in site.labels)
        return f"these are probabilities, of {min(made)}, and it takes logits. Select the value that {min(made)} reads." if made else ""

    def __call__(self, units: Tensor) -> Tensor:
        log_p = units.log_softmax(1)
        return (log_p.exp() * log_p).sum(1).mean()
