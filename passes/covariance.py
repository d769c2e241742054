"""The covariance term of VICReg."""

from torch import Tensor

from graphreg import Penalty


class Covariance(Penalty, keys=("covariance",)):
    """Penalizes covariances between different units, so that the units become uncorrelated.

    Formula: ``sum C_ij² / n`` over all i ≠ j, where n is the number of units, and C is the unbiased covariance of the units over the
    samples of the batch.
    Shapes: units [samples, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        axis: The axis of units; all other axes are samples. None means that of a convolution's channels, else the last.

    Raises:
        RegularizerError: A value has fewer than 2 samples, or fewer than 2 units.

    Averaged over: the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Bardes, Ponce & LeCun, VICReg, ICLR 2022, equations 3 and 4.
    """

    axis: int | None = None

    min_samples = 2
    over_batch = True
    min_units = 2

    def __call__(self, units: Tensor) -> Tensor:
        centred = units - units.mean(0)
        covariance = centred.T @ centred / (len(units) - 1)
        # The diagonal has the variances, which are not penalized.
        return (covariance - covariance.diagonal().diag()).square().sum() / len(covariance)
