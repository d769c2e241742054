"""DTensors, which are spread over the ranks of a mesh, and FSDP2 (``fully_shard``), which makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphreg.torch_internals.dynamo_marks import assume_constant_result


def is_distributed(value: Any) -> bool:
    """Return whether a value is a DTensor.

    The name of its class is compared, because ``isinstance`` would need the import. Dynamo can trace this function. To
    ``hasattr(value, "full_tensor")`` Dynamo of torch 2.13 answers no for every tensor.
    """
    return type(value).__name__ == "DTensor"


def _kinds() -> Any:
    """Return the module of DTensor and its placements. It is imported wherever there is a DTensor; its import takes half a second."""
    return dist.tensor


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class. After ``fully_shard``, which makes it an ``FSDPLinear``, this is still ``Linear``."""
    kind = type(module)
    by_fsdp = any(base.__name__ == "FSDPModule" for base in kind.__bases__[0].__mro__)
    return (kind.__bases__[-1] if by_fsdp and len(kind.__bases__) == 2 else kind).__name__


def has_process_group() -> bool:
    """Return whether the default process group of torch.distributed exists. There are no DTensors without it."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return the number of ranks of torch.distributed; 1 if there is no process group."""
    return dist.get_world_size() if has_process_group() else 1


def replicated(whole: Tensor, like: Any) -> Any:
    """Return a DTensor on the mesh of the DTensor ``like`` that has all elements of ``whole`` on each rank.

    ``whole``: a plain tensor that is the same on all ranks. It gets a plain tensor as its gradient.
    """
    kinds = _kinds()
    return kinds.DTensor.from_local(whole, like.device_mesh, [kinds.Replicate()] * like.device_mesh.ndim, run_check=False)


def without_partial_sums(value: Any) -> Any:
    """Return a DTensor whose ranks have values. The ranks of a DTensor with the placement ``Partial`` have summands of the values."""
    if not any(placement.is_partial() for placement in value.placements):
        return value
    return value.redistribute(placements=[_kinds().Replicate() if placement.is_partial() else placement for placement in value.placements])


def shards(value: Any) -> list[tuple[int, int]] | None:
    """Return how a DTensor is sharded: for each dimension of the mesh that shards it, the tensor's dimension and the number of shards.

    Return None for a DTensor that has a placement of another kind than ``Shard`` and ``Replicate``. FSDP2 over tensor parallelism has one.
    """
    kinds, placed = _kinds(), list(zip(value.placements, value.device_mesh.shape, strict=True))
    if any(type(placement) not in (kinds.Replicate, kinds.Shard) for placement, _ in placed):
        return None
    return [(placement.dim, size) for placement, size in placed if type(placement) is kinds.Shard]


def on_all_ranks(answer: bool, like: Any) -> bool:
    """Return whether ``answer`` is True on all ranks of the mesh of the DTensor ``like``. All these ranks must call this function."""
    all_true = torch.tensor(int(answer), device=like.device)
    for dim in range(like.device_mesh.ndim):
        dist.all_reduce(all_true, dist.ReduceOp.MIN, like.device_mesh.get_group(dim))
    return bool(all_true)


@assume_constant_result
def uses_fsdp() -> bool:
    """Return whether FSDP2 (``fully_shard``) shards a module. Dynamo takes the answer for a constant."""
    return next(_fsdp_parameters(), None) is not None


@assume_constant_result
def taken_by_fsdp(parameter: Tensor) -> bool:
    """Return whether FSDP2 may free a parameter, or take its gradient, before a backward pass has read it and given it one.

    That is so unless FSDP2 has gathered it for a forward that is still running. Dynamo, which has the parameter itself, takes the answer
    for a constant.
    """
    for each, state in _fsdp_parameters():
        if any(getattr(each, name, None) is parameter for name in ("sharded_param", *_OTHERS)):
            return getattr(each, _OTHERS[0], None) is not parameter or state.name != "FORWARD"
    return False


def sharded_parameters() -> dict[int, Tensor]:
    """Return, by the id of each parameter that FSDP2 uses now in place of one of its own, its own parameter: a DTensor, in its own dtype.

    While a module runs, and until it is sharded again, its parameters are gathered tensors, in the dtype of the forward. FSDP2 frees their
    memory, and takes their gradients, at times of its own. With ``reshard_after_forward=2``, parameters are on a smaller mesh after the
    forward, and FSDP2 never takes the gradients of these. Its own parameters are those that an optimizer has.
    """
    pairs = [(getattr(each, name, None), each.sharded_param) for each, _ in _fsdp_parameters() for name in _OTHERS]
    return {id(other): own for other, own in pairs if other is not None}


_OTHERS = ("_unsharded_param", "_sharded_post_forward_param")  # FSDP2's names for what it uses in place of a parameter of its own


def _fsdp_parameters() -> Iterator[tuple[Any, Any]]:
    """Yield FSDP2's record of each parameter that it shards, and what the parameter's module is doing: an enum of FSDP2's.

    If nothing has imported FSDP2, do not import it.
    """
    composable = sys.modules.get("torch.distributed._composable_state")
    states = [reference() for reference in composable._module_state_mapping.values()] if composable is not None else []
    for state in dict.fromkeys(state for state in states if type(state).__name__ == "FSDPState"):
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            yield from ((each, group._training_state) for each in (group.fsdp_params if group is not None else ()))


_COLLECTIVE = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "symm_mem"}  # the namespaces of operators that communicate


def communicates(operator: Any) -> bool:
    """Return whether an operator sends data to other ranks or waits for data from them."""
    return getattr(operator, "namespace", "") in _COLLECTIVE
