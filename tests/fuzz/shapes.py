"""What the models give back besides tuples and dicts: a named tuple and a dataclass."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Both:
    left: Tensor
    right: Tensor


pytree.register_dataclass(Both, field_names=["left", "right"], drop_field_names=[])
