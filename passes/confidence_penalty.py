"""A penalty on confident outputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphreg import ModelInput, Penalty, Site, mean_over_counted


class ConfidencePenalty(Penalty, keys=("confidence",)):
    """Penalizes confident output distributions: their negative entropy.

    Formula: ``sum p log p`` over the classes, where p is the softmax of the logits. The sum is between -log(number of classes) and 0.
    Shapes: units (the logits) [samples, classes] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        axis: The axis of classes; all other axes are samples. None means that of a convolution's channels, else the last.
        lengths: The name of an input of the model that says which steps count: lengths [batch], or a mask [batch, time]. A value is then
            [batch, time, ...], and steps that do not count, which are padding, are neither penalized nor averaged.
        time_axis: The axis of time in a value, for ``lengths``. A recurrent layer says itself which axis that is.

    Raises:
        RegularizerError: A site is the output of a softmax or a sigmoid, or has fewer than 2 classes.

    Averaged over: the samples, then the sites.
    Default sites: the model's outputs, except losses, the outputs of normalizations and of activations, values that a later layer or
    product reads or that have no gradient, and states and attention weights of a layer. Outputs of one number a sample are left out if
    there are others.
    Source: Pereyra, Tucker, Chorowski, Kaiser & Hinton, Regularizing neural networks by penalizing confident output distributions, ICLR
    workshop 2017, section 3.
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
        made = site.made_by({"softmax", "sigmoid"})
        return f"the penalty takes logits, and this comes from a {made}. Select what the {made} reads." if made else ""

    def __call__(self, units: Tensor, counted: Tensor | None = None) -> Tensor:
        # log p stays finite where p is 0 or rounds to 0, such as for a logit of -inf (a masked class): with -inf, the product would be nan
        log_p = units.log_softmax(1)
        log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)
        return mean_over_counted((log_p.exp() * log_p).sum(1), counted)
