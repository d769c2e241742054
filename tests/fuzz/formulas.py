"""The formulas of the regularizers that came with version 0.2, written anew from their definitions in docs/regularizers.

A splice's formula takes the value, its strength, its draw and its options; a penalty's takes the value, with the units last where it
compares units; a penalty on parameters takes the parameter and, where it keeps a state, that state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuzz import draws


class Unfit(RuntimeError):
    """The formula is not defined for a value of this shape: the module must refuse it."""


@dataclass(frozen=True)
class Draw:
    """The draw of one splice at one call. ``shared``: the axes along which elements share a draw."""

    key: tuple[int, int]
    shared: frozenset[int] = frozenset()

    def _like(self, z: Tensor, more: set[int]) -> Tensor:
        return z.detach().new_empty([1 if axis in more | self.shared else size for axis, size in enumerate(z.shape)])

    def keep(self, z: Tensor, p: float, shared: set[int] | None = None) -> Tensor:
        return draws.keep(self.key, self._like(z, shared or set()), p)

    def normal(self, z: Tensor) -> Tensor:
        return draws.normal(self.key, self._like(z, set()))

    def uniform(self, z: Tensor) -> Tensor:
        return draws.uniform(self.key, self._like(z, set()))


Splice = Callable[[Tensor, float, Draw, Mapping[str, Any], Any], Tensor]


def _dropped(z: Tensor, p: float, keep: Tensor) -> Tensor:
    return z * (keep * (1 / (1 - strength(p, z))))


def dropout(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    """Also DropConnect, on a parameter."""
    return _dropped(z, p, draw.keep(z, p))


def noise(z: Tensor, sigma: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    """Also WeightNoise, on a parameter."""
    return z + strength(sigma, z) * draw.normal(z)


def channel_dropout(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    if z.dim() < 3:
        raise Unfit("no channels")
    return z * draw.keep(z, p, set(range(2, z.dim()))) / (1 - strength(p, z))


def gaussian_dropout(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    rate = strength(p, z)
    return z * (1 + (rate / (1 - rate)).sqrt() * draw.normal(z))


def alpha_dropout(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946  # of SELU
    low, rate = -alpha * scale, strength(p, z)
    a = ((1 - rate) * (1 + rate * low**2)) ** -0.5
    keep = draw.keep(z, p)
    return a * (z * keep + low * (1 - keep)) - a * rate * low


def drop_path(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    if not -z.dim() <= options.get("batch_axis", 0) < z.dim():
        raise Unfit("no such axis of examples")
    own = options.get("batch_axis", 0) % z.dim()
    return z * draw.keep(z, p, set(range(z.dim())) - {own}) / (1 - strength(p, z))


def layer_drop(z: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Tensor) -> Tensor:
    if z.shape != given.shape:
        raise Unfit("the layer's input has another shape than its output")
    m = draw.keep(z, p, set(range(z.dim())))
    return torch.where(m.bool(), z, given)


def neftune(z: Tensor, alpha: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    if z.dim() != 3:
        raise Unfit("no embeddings of sequences")
    return z + (2 * draw.uniform(z) - 1) * (strength(alpha, z) / math.sqrt(z.shape[1] * z.shape[2]))


def embedding_dropout(w: Tensor, p: float, draw: Draw, options: Mapping[str, Any], given: Any) -> Tensor:
    return _dropped(w, p, draw.keep(w, p, set(range(1, w.dim()))))


SPLICE_FORMULAS: dict[str, Splice] = {
    "BernoulliDropout": dropout, "GaussianNoise": noise, "ChannelDropout": channel_dropout, "GaussianDropout": gaussian_dropout,
    "AlphaDropout": alpha_dropout, "DropPath": drop_path, "LayerDrop": layer_drop, "NEFTune": neftune,
    "WeightNoise": noise, "DropConnect": dropout, "EmbeddingDropout": embedding_dropout,
}  # fmt: skip


# Penalties on values. Those on units take [samples, units].


def hidden_l2(z: Tensor, options: Mapping[str, Any]) -> Tensor:
    return (z * z).mean()


def hoyer_square(z: Tensor, options: Mapping[str, Any]) -> Tensor:
    rows = z.reshape(z.shape[0], -1) if z.dim() > 1 else z.reshape(1, -1)
    ratios = []
    for row in rows:
        squares = (row * row).sum()
        ratios.append(row.abs().sum() ** 2 / squares if squares > 0 else row.sum() * 0)
    return torch.stack(ratios).mean()


def kl_sparsity(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    t, least = options.get("target", 0.05), torch.finfo(units.dtype).eps
    total = units.new_zeros(())
    for unit in units.unbind(1):
        m = unit.mean().clamp(least, 1 - least)
        total = total + t * torch.log(t / m) + (1 - t) * torch.log((1 - t) / (1 - m))
    return total


def _pairs(units: Tensor, divisor: int) -> Tensor:
    """Σ C_ij² over all i ≠ j."""
    total, centred = units.new_zeros(()), units - units.mean(0, keepdim=True)
    for i in range(units.shape[1]):
        for j in range(units.shape[1]):
            if i != j:
                total = total + ((centred[:, i] * centred[:, j]).sum() / divisor) ** 2
    return total


def _enough(units: Tensor, samples: int, least: int) -> None:
    if units.shape[0] < samples or units.shape[1] < least:
        raise Unfit(f"{units.shape[0]} samples of {units.shape[1]} units")


def decov(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    _enough(units, 2, 2)
    return _pairs(units, units.shape[0]) / 2


def covariance(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    _enough(units, 2, 2)
    return _pairs(units, units.shape[0] - 1) / units.shape[1]


def variance_floor(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    _enough(units, 2, 1)
    variance = ((units - units.mean(0, keepdim=True)) ** 2).sum(0) / (units.shape[0] - 1)
    return torch.relu(options.get("gamma", 1.0) - torch.sqrt(variance + 1e-4)).mean()


def confidence(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    p = torch.softmax(units, 1)
    return (p * torch.log_softmax(units, 1)).sum(1).mean()


def z_loss(units: Tensor, options: Mapping[str, Any]) -> Tensor:
    return (torch.logsumexp(units, 1) ** 2).mean()


Measure = Callable[[Tensor, Mapping[str, Any]], Tensor]
ON_VALUES: dict[str, Measure] = {"HiddenL2": hidden_l2, "HoyerSquare": hoyer_square}
ON_UNITS: dict[str, Measure] = {
    "KLSparsity": kl_sparsity, "DeCov": decov, "Covariance": covariance, "VarianceFloor": variance_floor,
    "ConfidencePenalty": confidence, "ZLoss": z_loss,
}  # fmt: skip


def as_units(z: Tensor, axis: int) -> Tensor:
    """[samples, units]."""
    if not z.dim() or not -z.dim() <= axis < z.dim():
        raise Unfit(f"no axis {axis} of a value of {z.dim()} dims")
    moved = z.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


# Penalties on parameters, without those that keep a state.


def elastic_net(w: Tensor, options: Mapping[str, Any]) -> Tensor:
    r = options.get("l1_ratio", 0.5)
    return _reduced(r * w.abs() + (1 - r) * w * w / 2, options)


def _reduced(each: Tensor, options: Mapping[str, Any]) -> Tensor:
    return each.sum() if options.get("reduction") == "sum" else each.mean()


def group_lasso(w: Tensor, options: Mapping[str, Any]) -> Tensor:
    groups = w.movedim(options.get("axis", 0), 0).reshape(w.shape[options.get("axis", 0)], -1)
    return torch.stack([math.sqrt(len(group)) * _norm(group) for group in groups]).sum()


def _norm(row: Tensor) -> Tensor:
    """Whose gradient at 0 is 0."""
    return torch.sqrt((row * row).sum()) if bool((row != 0).any()) else row.sum() * 0


def orthogonality(w: Tensor, options: Mapping[str, Any]) -> Tensor:
    rows = w.reshape(w.shape[0], -1)
    rows = rows.T if rows.shape[0] > rows.shape[1] else rows
    difference = rows @ rows.T - torch.eye(rows.shape[0], dtype=w.dtype)
    return (difference * difference).sum()


def max_norm(w: Tensor, options: Mapping[str, Any]) -> Tensor:
    return torch.stack([torch.relu(_norm(row) - options["limit"]) ** 2 for row in w.reshape(w.shape[0], -1)]).sum()


def l2_sp(w: Tensor, start: Tensor, options: Mapping[str, Any]) -> Tensor:
    return _reduced((w - start.to(w.dtype)) ** 2, options)


ON_PARAMETERS: dict[str, Measure] = {
    "ElasticNet": elastic_net, "GroupLasso": group_lasso, "Orthogonality": orthogonality, "MaxNorm": max_norm,
}  # fmt: skip


def start_vector(w: Tensor) -> Tensor:
    """The left vector that the power iteration starts from: 15 iterations from a normal draw of torch's generator at seed 0."""
    matrix = w.detach().reshape(w.shape[0], -1)
    u = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    return power(matrix, u, 15)[0]


def power(matrix: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """u and v after so many power iterations."""
    v = u
    for _ in range(iterations):
        v = matrix.T @ u
        v = v / v.norm().clamp(min=1e-12)
        u = matrix @ v
        u = u / u.norm().clamp(min=1e-12)
    return u, v


def spectral(w: Tensor, u: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """σ², and the vector to start the next call from."""
    matrix = w.reshape(w.shape[0], -1)
    u, v = power(matrix.detach(), u, options.get("iterations", 1))
    return (u @ (matrix @ v)) ** 2, u


def strength(value: float, z: Tensor) -> Tensor:
    """A strength in the precision it is used in."""
    return torch.tensor(value, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
