"""The state of autograd: the backward pass that is running, a tensor's storage, view and version, loss scales, custom operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphreg.torch_internals.patching import Changes

NO_BACKWARD = -1

# Returns the number of the backward pass that runs in this thread; NO_BACKWARD if none runs. Each call of a rewritten module calls this, so
# it is torch's own function: a Python function around it would take longer, and Dynamo would compile it.
backward_task: Callable[[], int] = torch._C._current_graph_task_id


def has_saved_tensor_hooks() -> bool:
    """Return whether a block of ``torch.autograd.graph.saved_tensors_hooks`` is active in this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread. A forward that runs then must not draw new masks."""
    return backward_task() != NO_BACKWARD


def wrap_engine(changes: Changes, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Until the changes end, replace the function with which each backward pass runs autograd's engine by ``around(function)``.

    Of the functions that ``backward()`` goes through, this is the only one whose name Dynamo does not guard. So replacing it does
    not make Dynamo compile anything again.
    """
    changes.put(torch.autograd, "_engine_run_backward", around(torch.autograd._engine_run_backward))  # type: ignore[attr-defined]


def recorded_in_operator() -> AbstractContextManager[None]:
    """Open a block inside a custom operator in which autograd can record. Outside the block, torch excludes autograd.

    The recurrent operator needs this block: it keeps the autograd graph of its kernel, so that its backward need not run the forward again.
    """
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    return guard


def materialized(gradient: Tensor) -> Tensor:
    """Return the gradient; but return ordinary zeros for a zero tensor without memory, such as the second derivative of ``abs``.

    AOTAutograd does not trace a view of such zeros, but treats it as a constant of the backward graph. This constant cannot be copied, so a
    compiled backward pass fails with "Attempted to call copy_() on an invalid python storage" (torch 2.13), while eager works.
    """
    is_lazy = torch._is_zerotensor(gradient)
    return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device) if is_lazy else gradient


def is_forward_mode() -> bool:
    """Return whether the code runs inside a forward-mode differentiation (``forward_ad.dual_level``), where a tensor may have a tangent."""
    return bool(forward_ad._current_level >= 0)


def storage_number(tensor: Tensor) -> int:
    """Return a number that identifies the storage of a tensor: tensors that share storage have the same number.

    When no tensor uses the storage any more, a new storage may get the same number. ``data_ptr()`` cannot tell storages apart: it is 0 for
    fake, meta and empty tensors.

    Raises:
        NotImplementedError, RuntimeError: The tensor has no storage, such as a sparse tensor.
    """
    return int(tensor.untyped_storage()._cdata)


def number_of_storage(storage: Any) -> int:
    """Return the same number as ``storage_number``, for a storage instead of a tensor."""
    return int(storage._cdata)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into, also through its views or its base; -1 for an inference tensor.

    Autograd counts the writes, to notice that a tensor that it saved for backward has changed. Writes into inference tensors are not
    counted.
    """
    return -1 if tensor.is_inference() else tensor._version


def base_of(tensor: Tensor) -> Tensor:
    """Return the tensor that autograd records as the base of a view; the tensor itself if it is not a view."""
    base: Tensor | None = tensor._base
    return tensor if base is None else base


def is_plain_view(tensor: Tensor) -> bool:
    """Return whether a view was made by torch's own view operations while autograd recorded, so that ``same_view`` can make it again.

    A view that an ``autograd.Function`` returned may have another derivative than the view operation, for example to reverse gradients. A
    view made with ``same_view`` would lose that derivative.
    """
    kinds = torch._C._autograd.CreationMeta
    return torch._C._autograd._get_creation_meta(tensor) in (kinds.DEFAULT, kinds.MULTI_OUTPUT_NODE)


def same_view(tensor: Tensor, base: Tensor) -> Tensor:
    """Apply to ``base`` the view operations that autograd recorded when ``tensor`` was made from its own base."""
    view: Tensor = tensor._view_func(base)  # type: ignore[attr-defined]
    return view


def scale_tensor(scaler: Any) -> Tensor | None:
    """Return the scale of a GradScaler as a tensor; None before the first ``scale(loss)``, and for an object without such a tensor.

    The public ``get_scale()`` reads the tensor into a Python number, which breaks a compiled graph.
    """
    tensor: Tensor | None = getattr(scaler, "_scale", None)
    return tensor


def first_scale(scaler: Any) -> tuple[bool | None, float | None]:
    """Return whether a GradScaler is enabled, and its initial scale. Each is None if the object lacks it.

    ``is_enabled()`` and ``get_scale()`` would return the same, but Dynamo does not trace the functions of ``torch.amp``.
    """
    return getattr(scaler, "_enabled", None), getattr(scaler, "_init_scale", None)


def custom_operators() -> list[str]:
    """Return the operators made with ``torch.library.custom_op``, as ``namespace::name``.

    The name of an operator's autograd node has ``_`` in place of ``::``. With this list, the operator of a node can be found.
    """
    return [str(each) for each in torch._library.custom_ops.OPDEFS]


def has_no_formula(function: Any) -> bool:
    """Return whether an autograd node belongs to an operator of ``torch.library.custom_op`` without a backward formula.

    Such a node raises only when backward reaches it. To know this earlier, the function looks for the formula in the closure where torch
    keeps it.
    """
    captured = [cell.cell_contents for cell in function._forward_cls.backward.__closure__ or ()]
    return any(getattr(content, "_backward_fn", captured) is None for content in captured)


# Private attributes of tensors that users' code and torch's Python code read. They do not depend on the values of the elements.
PRIVATE_FACTS = frozenset({"_version", "_base"})
PRIVATE_STORAGE = "_typed_storage"  # gives access to the elements, as the public ``untyped_storage`` does
