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
            unit or channel. With ``"elements"``, groups are made of consecutive weights of a row.
        group_size: How many neighbours along the axis are one group: for the heads of attention, the size of a head. With
            ``axis="elements"``, how many consecutive weights.
        reduction: ``"mean"`` or ``"sum"``, over the parameters.
        by: ``"gradient"``, or ``"prox"`` for groups that are exactly 0, by ``graphreg.prox_``.

    Raises:
        RegularizerError: A parameter does not have the axis ``axis``, or cannot be divided into groups of ``group_size``.

    Averaged over: the parameters.
    Default sites: the parameters of 2 dims or more, without biases and norms.
    Source: Yuan & Lin, Model selection and estimation in regression with grouped variables, J. R. Stat. Soc. B 68 (2006), equation 2.1.
    Here, the matrix K of a group in that equation is the group's size times the identity. The proximal map is block soft thresholding:
    Parikh & Boyd, Proximal algorithms, Foundations and Trends in Optimization 1 (2014), section 6.5.
    """

    axis: int | str = 0
    group_size: int = 1
    reduction: str = "mean"
    by: str = "gradient"

    def check(self) -> None:
        super().check()
        self.require(self.axis == "elements" or type(self.axis) is int, "axis", "a whole number, or 'elements'")
        self.require(type(self.group_size) is int and self.group_size > 0, "group_size", "a whole number above 0")

    def why_not(self, site: Site) -> str:
        if site.shape is None:
            return ""
        dims = len(site.shape)
        if isinstance(self.axis, int) and not -dims <= self.axis < dims:
            return f"axis={self.axis} is out of range for shape {site.shape}. Give an axis from {-dims} to {dims - 1}."
        length, of = (site.shape[self.axis], f"axis {self.axis}") if isinstance(self.axis, int) else (math.prod(site.shape[1:]), "a row")
        divides = length % self.group_size == 0
        return "" if divides else f"group_size={self.group_size} does not divide the length {length} of {of}. Give a divisor of it."

    def __call__(self, w: Tensor) -> Tensor:
        groups = self._groups(w)
        # At a group of zeros, the gradient of vector_norm is 0; the gradient of ``w.square().sum(1).sqrt()`` would be nan.
        norms: Tensor = torch.linalg.vector_norm(groups, dim=1)
        return math.sqrt(groups.shape[1]) * norms.sum()

    def prox(self, w: Tensor, step: Tensor) -> Tensor:
        """Shorten each group, and no further than to 0."""
        groups = self._groups(w)
        norms = torch.linalg.vector_norm(groups, dim=1, keepdim=True)
        threshold = step * math.sqrt(groups.shape[1])
        shrunk = torch.where(norms > threshold, groups * (1 - threshold / norms), 0.0)
        return shrunk.view_as(w.movedim(self.axis, 0)).movedim(0, self.axis) if isinstance(self.axis, int) else shrunk.view_as(w)

    def _groups(self, w: Tensor) -> Tensor:
        """Return the weights as [groups, size of a group]."""
        if isinstance(self.axis, int):
            return w.movedim(self.axis, 0).reshape(w.shape[self.axis] // self.group_size, -1)
        return w.reshape(-1, self.group_size)
