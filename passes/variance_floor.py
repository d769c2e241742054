"""The variance term of VICReg."""

from torch import Tensor

from graphreg import Penalty


class VarianceFloor(Penalty, keys=("variance_floor",)):
    """Penalizes units whose standard deviation over the samples of the batch is small.

    Formula: ``max(0, gamma - sqrt(var + 1e-4))``, where var is the unbiased variance of the unit over the samples.
    Shapes: units [samples, units] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        gamma: The floor, above 0. A unit adds nothing to the penalty if its ``sqrt(var + 1e-4)`` is gamma or more.
        axis: The axis of units; all other axes are samples. None means that of a convolution's channels, else the last.

    Raises:
        RegularizerError: A value has fewer than 2 samples.

    Averaged over: the units, then the sites.
    Default sites: the hidden values, except the outputs of normalizations.
    Source: Bardes, Ponce & LeCun, VICReg, ICLR 2022, equations 1 and 2.
    """

    gamma: float = 1.0
    axis: int | None = None

    min_samples = 2
    over_batch = True

    def check(self) -> None:
        super().check()
        self.require_number("gamma", lambda gamma: gamma > 0, "above 0")

    def __call__(self, units: Tensor) -> Tensor:
        # Without 1e-4, the gradient at a unit that does not vary would be infinite.
        return (self.gamma - (units.var(0) + 1e-4).sqrt()).relu().mean()
