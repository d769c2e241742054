"""The group lasso."""

import math

import torch
from torch import Tensor

from graphreg import Penalty, Site


class GroupLasso(Penalty, keys=("group_lasso",), on="parameters"):
    """Penalizes the norms of groups of weights, so that all weights of a group become 0 together.

    Formula: ``sum sqrt(size of g) |w_g|`` over the groups g, where |w_g| is the L2 norm. The gradient at a group of zeros is 0.
    Shapes: w [2 or more dims] -> 0-d.

    Args:
        weight: The strength, 0 or more.
        axis: The axis whose indices number the groups: the weights at one index are a group. With axis 0, that is one output unit or
            channel.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.

    Raises:
        RegularizerError: A parameter has no such axis.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more.
    Source: Yuan & Lin, Model selection and estimation in regression with grouped variables, J. R. Stat. Soc. B 68 (2006), equation 2.1,
    where the matrix K of a group is the group's size times the identity.
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
        # vector_norm has the gradient 0 at a group of zeros; that of the square root of a sum of squares would be nan
        norms: Tensor = torch.linalg.vector_norm(groups, dim=1)
        return math.sqrt(groups.shape[1]) * norms.sum()
