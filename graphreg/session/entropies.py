"""``Entropies``: what the entropy and the mutual information of many passes need, summed up pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import RegularizerError, shown, suggestions_text
from graphreg.torch_internals import pytree

Of = str | Callable[[Any], Tensor]  # where a tensor is in an output: the name of a field or key, or a function of the output
TOLERANCE = 1e-2  # by which the sum of probabilities may differ from 1: half precision is not exact


@dataclass
class Entropies:
    """The mean of the probabilities over passes, and the mean of their entropies.

    Attributes:
        dim: The axis of the classes.
        logits: Whether the output has logits, and not probabilities.
        of: Where these are in the output.
        n: The number of passes.
        probabilities: The mean of the probabilities, with the shape of one output.
        within: The mean of the entropies of single passes, without the axis of the classes.
    """

    dim: int = -1
    logits: bool = True
    of: Of | None = None
    n: int = field(default=0, init=False)
    probabilities: Tensor = field(default=torch.zeros(()), init=False, repr=False)
    within: Tensor = field(default=torch.zeros(()), init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise RegularizerError(f"dim={shown(self.dim)} is not allowed; give the number of the axis of the classes.")
        if not isinstance(self.logits, bool):
            raise RegularizerError(f"logits={shown(self.logits)} is not allowed; give True for logits, False for probabilities.")

    @classmethod
    def asked(cls, options: Mapping[str, Any]) -> Entropies:
        """Make it from the option ``entropy`` of ``sample``."""
        names = [each.name for each in fields(cls) if each.init]
        if not isinstance(options, Mapping):
            raise RegularizerError(f"entropy={shown(options)} is not allowed; give the arguments of Samples.entropy: {{'dim': 1}}.")
        if strange := next((name for name in options if name not in names), None):
            raise RegularizerError(f"entropy: {strange!r} is unknown.{suggestions_text(str(strange), names)} Names: {', '.join(names)}.")
        return cls(**options)

    def require_same(self, dim: int, logits: bool, of: Of | None) -> None:
        """Raise RegularizerError unless these are the arguments with which the passes were summed up."""
        if (dim, logits, of) != (self.dim, self.logits, self.of):
            mine, theirs = ((f"dim={d}, logits={g}, of={o!r}") for d, g, o in ((self.dim, self.logits, self.of), (dim, logits, of)))
            raise RegularizerError(f"the passes were summed up with {mine}, and not with {theirs}, which needs sample(..., keep=True).")

    def take(self, output: Any) -> None:
        """Take the output of one pass."""
        p = self._probabilities(tensor_of(output, self.of))
        self.n += 1
        if self.n == 1:
            self.probabilities, self.within = torch.zeros_like(p), torch.zeros_like(p.sum(self.dim))
        self.probabilities = self.probabilities + (p - self.probabilities) / self.n
        self.within = self.within + (torch.special.entr(p).sum(self.dim) - self.within) / self.n

    @property
    def whole(self) -> Tensor:
        """The entropy of the mean of the probabilities."""
        entropies: Tensor = torch.special.entr(self.probabilities).sum(self.dim)
        return entropies

    def _probabilities(self, values: Tensor) -> Tensor:
        shape = tuple(values.shape)
        if not values.is_floating_point() or not -len(shape) <= self.dim < len(shape):
            raise RegularizerError(
                f"dim={self.dim} is no axis of classes in an output of shape {shape} and {values.dtype}. Give the axis of the logits or "
                "probabilities."
            )
        if shape[self.dim] < 2:
            raise RegularizerError(
                f"axis dim={self.dim} has {shape[self.dim]} class (shape {shape}), whose entropy is 0. If it is the logit of a sigmoid, "
                f"give of=lambda z: torch.cat([z, torch.zeros_like(z)], {self.dim})."
            )
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if self.logits:
            return values.softmax(self.dim)
        sums = values.sum(self.dim)
        if values.numel() and not (values.amin() >= 0 and (sums - 1).abs().amax() <= TOLERANCE):
            raise RegularizerError(
                f"logits=False, but the values are no probabilities: the least is {float(values.amin()):.3g}, and the sums along dim="
                f"{self.dim} are from {float(sums.amin()):.3g} to {float(sums.amax()):.3g}. Give logits=True, or another dim."
            )
        return values


def tensor_of(output: Any, of: Of | None) -> Tensor:
    """Return the tensor in an output that ``of`` names; without ``of``, the only tensor in it.

    Raises:
        RegularizerError: There is no such tensor, or there are several.
    """
    if of is None:
        tensors = pytree.tree_tensors(output)
        if len(tensors) == 1:
            return tensors[0]
        raise RegularizerError(
            f"the output has {len(tensors)} tensors{_names_text(output)}. Give of=, the name of one of them or a function of the output."
        )
    if not isinstance(of, str) and not callable(of):
        raise RegularizerError(f"of={shown(of)} is not allowed; give the name of a field or key, or a function of the output.")
    found: Any = of(output) if callable(of) else output.get(of) if isinstance(output, Mapping) else getattr(output, of, None)
    if isinstance(found, Tensor):
        return found
    near = suggestions_text(of, _names(output)) if isinstance(of, str) else ""
    raise RegularizerError(
        f"of={shown(of)} gives no tensor, but {shown(found)}.{near} Give the name of a tensor, or a function of the output."
    )


def _names(output: Any) -> list[str]:
    if isinstance(output, Mapping):
        return [str(key) for key in output]
    return list(getattr(output, "_fields", ())) or [name for name in getattr(output, "__dict__", {}) if not name.startswith("_")]


def _names_text(output: Any) -> str:
    names = _names(output)
    return f" ({', '.join(names)})" if names else ""
