"""What autograd does now, and what it keeps of a tensor: the backward pass that runs, storages, views, versions, loss scales."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphreg.torch_internals.patching import Changes

NO_BACKWARD = -1

# The number of the backward pass that runs in this thread, NO_BACKWARD where none does. It is torch's own function, and none of Python's
# around it, for it is asked at each call of a module: Python's would take longer, and Dynamo would compile it.
backward_task: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether a backward pass runs in this thread. What draws then would draw other masks than the forward did."""
    return backward_task() != NO_BACKWARD


def wrap_engine(changes: Changes, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Until the changes end: have every backward pass go through what ``around`` makes of torch's function that runs the engine.

    It is the one name on the way there that Dynamo does not guard, so nothing that was compiled is compiled again for it.
    """
    changes.put(torch.autograd, "_engine_run_backward", around(torch.autograd._engine_run_backward))  # type: ignore[attr-defined]


def recorded_in_operator() -> AbstractContextManager[None]:
    """A region of a custom operator in which autograd records again: torch runs such an operator below autograd, and excludes its key.

    The recurrent operator keeps the graph that a kernel records, so that its backward computes nothing twice.
    """
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    return guard


def is_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is entered, so that a tensor may have a tangent."""
    return bool(forward_ad._current_level >= 0)


def storage_number(tensor: Tensor) -> int:
    """What the storage of a tensor is known by, the same for all that share it; it is another's when no tensor of it lives any more.

    Raises NotImplementedError or RuntimeError for a tensor without a storage (sparse). ``data_ptr`` would not do: fake and meta tensors
    have none, and empty ones share it.
    """
    return int(tensor.untyped_storage()._cdata)


def number_of_storage(storage: Any) -> int:
    """The same, of a storage that somebody holds already."""
    return int(storage._cdata)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into: autograd counts, to tell of what it has saved whether it is still true.

    -1 of a tensor made in inference mode, of which it does not count.
    """
    return -1 if tensor.is_inference() else tensor._version


def base_of(tensor: Tensor) -> Tensor:
    """What a tensor is a view of by autograd's account; itself where it is none."""
    base: Tensor | None = tensor._base
    return tensor if base is None else base


def is_plain_view(tensor: Tensor) -> bool:
    """Whether views lead from the base of a view to it, whose derivatives are known.

    A custom function may return a view and have a derivative that is no view's (gradient reversal), which a view that is made anew, with
    ``same_view``, would not have.
    """
    kinds = torch._C._autograd.CreationMeta
    return torch._C._autograd._get_creation_meta(tensor) in (kinds.DEFAULT, kinds.MULTI_OUTPUT_NODE)


def same_view(tensor: Tensor, base: Tensor) -> Tensor:
    """The view of another base that ``tensor`` is of its own: autograd keeps how a view was made."""
    view: Tensor = tensor._view_func(base)  # type: ignore[attr-defined]
    return view


def scale_tensor(scaler: Any) -> Tensor | None:
    """The scale of a GradScaler as a tensor; None before the first ``scale(loss)``, and of another scaler.

    ``get_scale()`` reads it to a number, which breaks a compiled graph.
    """
    tensor: Tensor | None = getattr(scaler, "_scale", None)
    return tensor


def first_scale(scaler: Any) -> tuple[bool | None, float | None]:
    """Whether a GradScaler is enabled, and the scale it begins with: Dynamo does not trace torch.amp's functions, which tell too."""
    return getattr(scaler, "_enabled", None), getattr(scaler, "_init_scale", None)


def custom_operators() -> list[str]:
    """The operators made with ``torch.library.custom_op``, as ``namespace::name``: autograd calls them by a name that hides which it is."""
    return [str(each) for each in torch._library.custom_ops.OPDEFS]


def has_no_formula(function: Any) -> bool:
    """Whether a function of autograd's is that of a ``custom_op`` without a backward formula; it raises when it is asked for one.

    torch keeps the formula in a closure, and the second derivative of such an operator is found out to be missing only when it runs.
    """
    captured = [cell.cell_contents for cell in function._forward_cls.backward.__closure__ or ()]
    return any(getattr(content, "_backward_fn", captured) is None for content in captured)


# What is asked of a tensor by private names, of which user code (and torch's own Python) reads the same: facts that hold no values.
PRIVATE_FACTS = frozenset({"_version", "_base"})
PRIVATE_STORAGE = "_typed_storage"  # as ``untyped_storage``: shows what a tensor holds
