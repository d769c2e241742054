"""Groups of weights that vanish together: Yuan & Lin, J. R. Stat. Soc. B 68 (2006), equation 2.1, with K = size times identity."""

import math

import torch
from torch import Tensor

from graphreg import Penalty, Site


class GroupLasso(Penalty, keys=("group_lasso",), on="parameters"):
    """The norms of groups of weights, summed over groups: ``sum sqrt(size of g) |w_g|``.

    w: [2 or more dims] -> 0-d, averaged over the selected parameters, by default all of 2 dims or more. The weights at one index of
    ``axis`` are a group: with axis 0, those of one output unit or channel. A group of zeros has the gradient 0. ``weight`` >= 0.

    Attributes:
        axis: The axis whose indices number the groups.
        reduction: ``"mean"`` or ``"sum"``, over parameters.

    Raises:
        RegularizerError: A parameter has no such axis.
    """

    axis: int = 0
    reduction: str = "mean"

    def check(self) -> None:
        super().check()
        self.require(type(self.axis) is int, "axis", "a whole number")

    def why_not(self, site: Site) -> str:
        dims = len(site.shape or ())
        known = site.shape is None or -dims <= self.axis < dims
        return "" if known else f"axis={self.axis} is out of range for shape {site.shape}. Give an axis from {-dims} to {dims - 1}."

    def __call__(self, w: Tensor) -> Tensor:
        groups = w.movedim(self.axis, 0).flatten(1)
        # vector_norm has the gradient 0 at a group of zeros, where the square root of a sum has none
        norms: Tensor = torch.linalg.vector_norm(groups, dim=1)
        return math.sqrt(groups.shape[1]) * norms.sum()
