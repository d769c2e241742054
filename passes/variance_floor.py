"""Units that vary: the variance term of VICReg, Bardes, Ponce & LeCun, ICLR 2022, equations 1 and 2."""

from torch import Tensor

from graphreg import Penalty


class VarianceFloor(Penalty, keys=("variance_floor",)):
    """How far the standard deviation of each unit is below ``gamma``, averaged over units: ``mean max(0, gamma - sqrt(var z + 1e-4))``.

    units: [samples, units] -> 0-d, averaged over units and sites. The variance over the samples of the batch is unbiased.
    ``weight`` >= 0.

    Attributes:
        gamma: The standard deviation from which on a unit costs nothing, above 0.
        axis: The axis of units; None for axis 1 of a convolution's value, else the last. All other axes are samples.

    Raises:
        RegularizerError: The value has a single sample.
    """

    gamma: float = 1.0
    axis: int | None = None

    min_samples = 2

    def check(self) -> None:
        super().check()
        self.require_number("gamma", lambda gamma: gamma > 0, "above 0")

    def __call__(self, units: Tensor) -> Tensor:
        return (self.gamma - (units.var(0) + 1e-4).sqrt()).relu().mean()
