"""The DeCov penalty."""

from torch import Tensor

from graphreg import Penalty


class DeCov(Penalty, keys=("decov",)):
    """Penalizes covariances between different units, so that the units become uncorrelated.

    Formula: ``sum C_ij² / 2`` over all i ≠ j, where C is the covariance of the units over the samples of the batch. The divisor of C is the
    number of samples.
    Shapes: units [samples, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        axis: The axis of units; all other axes are samples. None means that of a convolution's channels, else the last.

    Raises:
        RegularizerError: A value has fewer than 2 samples, or fewer than 2 units.

    Averaged over: the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Cogswell, Ahmed, Girshick, Zitnick & Batra, Reducing overfitting in deep networks by decorrelating representations, ICLR 2016,
    equation 2.
    """

    axis: int | None = None

    min_samples = 2
    over_batch = True
    min_units = 2

    def __call__(self, units: Tensor) -> Tensor:
        centred = units - units.mean(0)
        covariance = centred.T @ centred / len(units)
        # The diagonal has the variances, which are not penalized.
        return (covariance - covariance.diagonal().diag()).square().sum() / 2
