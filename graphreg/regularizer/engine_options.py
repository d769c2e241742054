"""The options of a regularizer that the engine itself reads, if the class has options of these names.

Any other option concerns the class alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from graphreg.ir.selector import Selector


@dataclass(frozen=True)
class EngineOptions:
    """The options that the engine reads, as one regularizer has them. A field has its default if the class lacks the option.

    Attributes:
        reduction: How measurements of several sites become one penalty: ``"mean"`` or ``"sum"``.
        time_axis: The axis of time in a value, for a regularizer that reads values as sequences.
        lengths: The name of the model's input that carries the lengths of sequences; None if every
            step is valid.
        wrt: The selector of the values that a penalty with ``vjp`` differentiates with respect to;
            ``"*"`` means floating-point inputs.
        always: Whether a penalty that takes ``vjp`` acts in eval mode, too.
        axis: For a penalty that takes ``units``: the axis of units in a value. None means axis 1 of
            a convolution's value, and the last axis of any other value.
        share_axes: The axes along which a splice has one draw for all elements: ``"time"``,
            ``"batch"``, or numbers.
        by: How a penalty on parameters acts: ``"gradient"``, as a term of the loss, or ``"prox"``,
            by ``graphreg.prox_`` after the optimizer's step.
    """

    reduction: str = "mean"
    time_axis: int = 1
    lengths: str | None = None
    wrt: Selector = "*"
    always: bool = False
    axis: int | None = None
    share_axes: tuple[str | int, ...] = ()
    by: str = "gradient"

    @classmethod
    def of(cls, regularizer: object) -> EngineOptions:
        """Read the options of a regularizer, each of which may be a field, a class attribute or a property."""
        # The defaults are class attributes: what an object does not have is read from the class.
        return cls(*(getattr(regularizer, name, getattr(cls, name)) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(EngineOptions))
