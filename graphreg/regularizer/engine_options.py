"""The options of a regularizer that the engine itself reads, from a class that defines options with these names.

Only the formula of the class reads its other options.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from graphreg.ir import Selector


@dataclass(frozen=True)
class EngineOptions:
    """The values of these options in one regularizer; the defaults are for a class without the option.

    Attributes:
        reduction: How measurements of several sites become one penalty: ``"mean"`` or ``"sum"``.
        time_axis: The axis of time in a value, for a penalty that takes ``steps``.
        lengths: The name of the model's input that carries the lengths of sequences; None where every step counts.
        wrt: A selector of what a penalty that takes ``vjp`` differentiates with respect to; ``"*"`` means floating-point inputs.
        always: Whether a penalty that takes ``vjp`` acts in eval mode, too.
        axis: The axis of units in a value, for a penalty that takes ``units``; None for axis 1 of a convolution's value, else the last.
        share_axes: The axes along which a splice has one draw for all elements: ``"time"``, ``"batch"``, or numbers.
    """

    reduction: str = "mean"
    time_axis: int = 1
    lengths: str | None = None
    wrt: Selector = "*"
    always: bool = False
    axis: int | None = None
    share_axes: tuple[str | int, ...] = ()

    @classmethod
    def of(cls, regularizer: object) -> EngineOptions:
        """Read the options of a regularizer; fields, class attributes and properties count alike."""
        options: dict[str, Any] = {each.name: getattr(regularizer, each.name) for each in fields(cls) if hasattr(regularizer, each.name)}
        return cls(**options)
