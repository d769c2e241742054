"""The options of a regularizer that the engine itself reads. A class has one by defining an option of that name.

Every other option is its formula's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from graphreg.ir import Selector


@dataclass(frozen=True)
class EngineOptions:
    """What a regularizer says to the engine by its options; the defaults are those of a class that does not have the option.

    Attributes:
        reduction: How measurements of several sites become one penalty: ``"mean"`` or ``"sum"``.
        time_axis: The axis of time in a value, of a penalty that asks for ``steps``.
        lengths: The name of the model's input that carries the lengths of sequences; None where every step counts.
        wrt: What a penalty that asks for ``vjp`` differentiates with respect to, a selector; ``"*"``: floating-point inputs.
        always: Whether a penalty that asks for ``vjp`` acts in eval mode, too.
    """

    reduction: str = "mean"
    time_axis: int = 1
    lengths: str | None = None
    wrt: Selector = "*"
    always: bool = False

    @classmethod
    def of(cls, regularizer: object) -> EngineOptions:
        """The options of a regularizer, or of a class of somebody else's: fields, class attributes and properties alike."""
        options: dict[str, Any] = {each.name: getattr(regularizer, each.name) for each in fields(cls) if hasattr(regularizer, each.name)}
        return cls(**options)
