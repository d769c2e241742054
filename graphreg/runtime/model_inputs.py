"""Prepares the inputs of the model that a formula takes: a runtime module gets them as keyword arguments of its forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import RegularizerError, shown
from graphreg.regularizer.base import Regularizer
from graphreg.runtime.distributed_values import whole


def require_inputs(regularizer: Regularizer, inputs: Mapping[str, Any], description: str) -> None:
    """Raise RegularizerError for an input of the model that is no tensor in this call.

    ``inputs``: the inputs by the names of the formula's arguments. ``description``: the regularizer and its site, for messages.
    """
    for option, name in regularizer.model_inputs.items():
        if not isinstance(inputs.get(option), Tensor):
            raise RegularizerError(
                f"{description}: {option}={name!r} is {shown(inputs.get(option))} in this call; it must be a tensor. Call the model with a "
                f"tensor for {name}, or leave {option}= out."
            )


def fitted(regularizer: Regularizer, inputs: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
    """Return the inputs as the formula gets them: whole tensors on a device, those of a floating dtype in ``dtype``.

    An argument whose option is None, so that it has no input, is None.
    """
    none: dict[str, Tensor | None] = dict.fromkeys((*regularizer.input_options, "lengths", "counted"))
    tensors: dict[str, Tensor] = {option: whole(value) for option, value in inputs.items()}
    return none | {option: x.to(device, dtype) if x.is_floating_point() else x.to(device) for option, x in tensors.items()}
