"""The axes of the sameness matrix, the cells that exist, and the few that have every pair of values of two axes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
LAYOUTS = ("contiguous", "transposed", "channels_last", "strided")
BACKENDS = ("eager", "aot_eager", "inductor")
RECOMPUTATION: dict[str, dict[str, Any]] = {
    "default": {},
    "aggressive_recomputation": {"aggressive_recomputation": True},
    "activation_memory_budget=0.3": {"activation_memory_budget": 0.3},
    "recompute_views": {"recompute_views": True},
}
CHECKPOINTING = {
    "none": "no activation checkpointing",
    "in the model": "submodules before and after each splice (a regularizer that replaces a value, such as dropout) call `checkpoint` in "
    "their own forwards; graphreg keeps them as opaque "
    "modules",
    "layers": "the user puts torch's `checkpoint_wrapper` around layers of the rewritten module, before and after each splice",
    "cut out": "torch.fx's `split_module` splits the rewritten module after its random keys; the part with all sites and splices is "
    "checkpointed",
    "in a bigger model": "the rewritten module is a layer of a bigger model, which checkpoints it, within `frozen_noise`. In "
    "compiled cells the bigger model is compiled, with the setting `skip_fwd_side_effects_in_bwd_under_checkpoint`, which torch's error "
    "message asks for",
    "around the whole": "`checkpoint` around the rewritten module, compiled or not, within `frozen_noise`",
}
BATCHES = {"one size": (3, 3), "two sizes": (3, 5)}  # of two calls


@dataclass(frozen=True)
class Cell:
    """One value of each axis."""

    dtype: str
    layout: str
    backend: str
    recomputation: str
    checkpointing: str
    batch: str

    def __str__(self) -> str:
        return ", ".join(self.values())

    def values(self) -> tuple[str, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    def pairs(self) -> frozenset[tuple[tuple[int, str], tuple[int, str]]]:
        return frozenset(itertools.combinations(enumerate(self.values()), 2))


AXES: dict[str, tuple[str, ...]] = dict(
    zip(
        (field.name for field in fields(Cell)),
        (tuple(DTYPES), LAYOUTS, BACKENDS, tuple(RECOMPUTATION), tuple(CHECKPOINTING), tuple(BATCHES)),
        strict=True,
    )
)
LEFT_OUT = {
    "eager with a setting of recomputation": "the settings belong to AOTAutograd's partitioner, which eager code does not use; eager cells "
    "have only `default`",
    "checkpointing around the whole, or in a bigger model, without `frozen_noise`": "in eager, and around a compiled module, this raises "
    "an error that says what to do, which `tests/runtime/test_control.py` tests. A checkpoint around a compiled function that calls the "
    "module raises no error, and backward draws other masks; `graphreg.doctor` finds this",
}
COST = {"eager": 1, "aot_eager": 2, "inductor": 8}  # roughly, of a cell


def exists(cell: Cell) -> bool:
    return cell.backend != "eager" or cell.recomputation == "default"


def product() -> list[Cell]:
    return [cell for values in itertools.product(*AXES.values()) if exists(cell := Cell(*values))]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that have between them every pair of values that is in ``cells``: greedily, the most new pairs for their cost first."""
    offered = {cell: cell.pairs() for cell in cells}
    missing = set().union(*offered.values())
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(offered[cell] & missing) / COST[cell.backend])  # of equals the first
        chosen.append(best)
        missing -= offered[best]
    return chosen
