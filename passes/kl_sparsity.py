"""The sparsity penalty of sparse autoencoders."""

import torch
from torch import Tensor

from graphreg import ModelInput, Penalty, mean_over_counted


class KLSparsity(Penalty, keys=("kl_sparsity",)):
    """Penalizes units whose mean activation differs from a small target.

    Formula: ``sum t log(t / m) + (1 - t) log((1 - t) / (1 - m))`` over the units, where t is ``target`` and m is the mean of the unit over
    the samples. Each term is KL(Bernoulli(t) ‖ Bernoulli(m)), a Kullback-Leibler divergence. m is clamped to [eps, 1 - eps], where eps
    is the machine epsilon of the dtype.
    Shapes: units [samples, units], in [0, 1], such as outputs of a sigmoid -> 0-d.

    Args:
        weight: The strength, 0 or more.
        target: The mean activation that each unit should have, above 0 and below 1.
        axis: The axis of units; all other axes are samples. None means that of a convolution's channels, else the last.
        lengths: The name of an input of the model that says which steps count: lengths [batch], or a mask [batch, time]. A value is then
            [batch, time, ...], and steps that do not count, which are padding, are neither penalized nor averaged.
        time_axis: The axis of time in a value, for ``lengths``. A recurrent layer says itself which axis that is.

    Raises:
        RegularizerError: A value has a number outside of [0, 1]. Compiled code raises an error of torch instead.

    Averaged over: the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Ng, Sparse autoencoder, CS294A lecture notes, 2011, section 3.
    """

    target: float = 0.05
    axis: int | None = None
    lengths: ModelInput = None
    time_axis: int = 1

    value_range = (0, 1)
    over_batch = True

    def check(self) -> None:
        super().check()
        self.require_number("target", lambda target: 0 < target < 1, "above 0 and below 1")

    def __call__(self, units: Tensor, counted: Tensor | None = None) -> Tensor:
        # At a mean of 0 or 1, a logarithm would be infinite.
        least = torch.finfo(units.dtype).eps
        mean, t = mean_over_counted(units, counted, dim=0).clamp(least, 1 - least), self.target
        return (t * (t / mean).log() + (1 - t) * ((1 - t) / (1 - mean)).log()).sum()
