"""Uncorrelated units: Cogswell, Ahmed, Girshick, Zitnick & Batra, Reducing overfitting by decorrelating representations, ICLR 2016.

The formula is equation 2.
"""

from torch import Tensor

from graphreg import Penalty


class DeCov(Penalty, keys=("decov",)):
    """Half the sum of squared covariances of different units: ``(|C|² - |diag C|²) / 2``.

    units: [samples, units] -> 0-d, averaged over sites. C is the covariance over the samples of the batch, divided by their number.
    ``weight`` >= 0.

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
        covariance = centred.T @ centred / len(units)
        return (covariance - covariance.diagonal().diag()).square().sum() / 2
