"""The auxiliary z-loss, which keeps logits from drifting."""

from collections.abc import Sequence

from torch import Tensor

from graphreg import ModelInput, Penalty, Site, mean_over_counted


class ZLoss(Penalty, keys=("z_loss",)):
    """Penalizes the logarithm of the softmax normalizer, so that the logits do not drift.

    Formula: ``(log sum exp z)²``, where the sum is over the classes.
    Shapes: units (the logits z) [samples, classes] -> 0-d.

    Args:
        weight: The strength, 0 or more; 1e-4 in the paper.
        axis: The axis of classes; all other axes are samples. None means that of a convolution's channels, else the last.
        lengths: The name of an input of the model that says which steps count: lengths [batch], or a mask [batch, time]. A value is then
            [batch, time, ...], and steps that do not count, which are padding, are neither penalized nor averaged.
        time_axis: The axis of time in a value, for ``lengths``. A recurrent layer says itself which axis that is.

    Raises:
        RegularizerError: A site is the output of a softmax, a log-softmax or a sigmoid, or has fewer than 2 classes.

    Averaged over: the samples, then the sites.
    Default sites: the model's outputs, except losses, the outputs of normalizations and of activations, values that a later layer or
    product reads or that have no gradient, and states and attention weights of a layer. Outputs of one number a sample are left out if
    there are others.
    Source: Chowdhery et al., PaLM: Scaling language modeling with pathways, 2022, section 5.
    """

    axis: int | None = None
    lengths: ModelInput = None
    time_axis: int = 1

    min_units = 2
    default_role = "output"
    usual = "the outputs that no later layer reads, losses left out"

    def defaults(self, sites: Sequence[Site]) -> list[Site]:
        found = [site for site in super().defaults(sites) if site.prediction]
        return [site for site in found if site.has_units] or found

    def why_not(self, site: Site) -> str:
        made = site.made_by({"softmax", "log_softmax", "logsoftmax", "sigmoid"})
        return f"the penalty takes logits, and this comes from a {made}. Select what the {made} reads." if made else ""

    def __call__(self, units: Tensor, counted: Tensor | None = None) -> Tensor:
        return mean_over_counted(units.logsumexp(1).square(), counted)

    def slope(self, elements: int) -> float:
        """Return the derivative of the formula at a logarithm of 1."""
        return 2 / elements
