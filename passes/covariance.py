"""Uncorrelated units: the covariance term of VICReg, Bardes, Ponce & LeCun, ICLR 2022, equations 3 and 4."""

from torch import Tensor

from graphreg import Penalty


class Covariance(Penalty, keys=("covariance",)):
    """The sum of squared covariances of different units, divided by the number of units: ``sum (C² off the diagonal) / units``.

    units: [samples, units] -> 0-d, averaged over sites. C is the unbiased covariance over the samples of the batch. ``weight`` >= 0.

    Attributes:
        axis: The axis of units; None for axis 1 of a convolution's value, else the last. All other axes are samples.

    Raises:
        RegularizerError: The value has a single sample.
    """

    axis: int | None = None

    min_samples = 2
    min_units = 2

    def __call__(self, units: Tensor) -> Tensor:
        centred = units - units.mean(0)
        covariance = centred.T @ centred / (len(units) - 1)
        return (covariance - covariance.diagonal().diag()).square().sum() / len(covariance)
