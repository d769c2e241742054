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
        axis: The axis of groups: all weights at one index of this axis are one group. With axis 0, a group holds the weights of one output
            unit or channel.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.

    Raises:
        RegularizerError: A parameter does not have the axis ``axis``.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more.
    Source: Yuan & Lin, Model selection and estimation in regression with grouped variables, J. R. Stat. Soc. B 68 (2006), equation 2.1.
    Here, the matrix K of a group in that equation is the group's size times the identity.
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
        # At a group of zeros, the gradient of vector_norm is 0; the gradient of ``w.square().sum(1).sqrt()`` would be nan.
        norms: Tensor = torch.linalg.vector_norm(groups, dim=1)
        return math.sqrt(groups.shape[1]) * norms.sum()
