"""What the models give back besides tuples and dicts: a named tuple and a dataclass; and a module around another."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Both:
    left: Tensor
    right: Tensor


pytree.register_dataclass(Both, field_names=["left", "right"], drop_field_names=[])


class Wrap(nn.Module):
    """Calls another module, and does nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)
