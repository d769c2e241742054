"""Converts a value to a matrix of samples and units, [samples, units], for penalties that compare the units of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graphreg.errors import RegularizerError
from graphreg.ir.time_steps import require_tensor
from graphreg.torch_internals.dynamo import known_true


@dataclass(frozen=True)
class Units:
    """How to read the value of a site as samples of units. All axes except the axis of units become samples.

    Attributes:
        axis: The axis of units.
        channels: Whether the units are the channels of a value that comes from a convolution.
        samples: The fewest samples that the formula accepts.
        units: The fewest units that the formula accepts.
    """

    axis: int = -1
    channels: bool = False
    samples: int = 1
    units: int = 1

    @property
    def text(self) -> str:
        """The axis in words: ``"the channels"``, ``"the last axis"``, ``"axis 2"``."""
        return "the channels" if self.channels else "the last axis" if self.axis == -1 else f"axis {self.axis}"

    def of(self, value: Any, who: str) -> Tensor:
        """Return the value as [samples, units]. Raises RegularizerError for a value with too few samples or units."""
        require_tensor(value, who)
        self.require(value.shape, who)
        samples: Tensor = value.movedim(self.axis, -1).flatten(0, -2)
        if known_true(samples.shape[0] < self.samples):
            count = f"{samples.shape[0]} sample{'s' * (samples.shape[0] != 1)} of {samples.shape[1]} units"
            raise RegularizerError(
                f"{who}: the value has shape {tuple(value.shape)}, and so {count} (the units are {self.text}); the penalty "
                f"needs {self.samples} samples or more. Give a larger batch (drop_last=True in a DataLoader); graphreg.strip(module) gives "
                "the model without penalties, for single examples."
            )
        return samples

    def require(self, shape: Sequence[int], who: str) -> None:
        """Raise RegularizerError for a shape with fewer than 2 dims, without the axis of units, or with too few units."""
        if len(shape) < 2:
            raise RegularizerError(
                f"{who}: the value has shape {tuple(shape)}; the penalty needs samples of units, 2 dims or more. Select another value, or "
                "leave this one out by '!'."
            )
        if not -len(shape) <= self.axis < len(shape):
            raise RegularizerError(
                f"{who}: axis={self.axis} is out of range for a value of shape {tuple(shape)}; give the axis of the units, a whole number "
                f"from {-len(shape)} to {len(shape) - 1}."
            )
        if shape[self.axis] < self.units:
            count = f"{shape[self.axis]} unit{'s' * (shape[self.axis] != 1)}"
            raise RegularizerError(
                f"{who}: the value has shape {tuple(shape)}, and so {count} (the units are {self.text}); the penalty needs {self.units} or "
                "more. Give axis= where another axis has the units, or leave the value out by '!'."
            )
