"""Private state of autograd: the running backward pass, storages, views and versions of tensors, loss scales, custom operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphreg.torch_internals.patching import Changes

NO_BACKWARD = -1

# Returns the number of the backward pass that runs in this thread; NO_BACKWARD if none runs. Each call of a rewritten module calls this
# function. It is torch's own function, because a Python wrapper would be slower, and Dynamo would compile the wrapper.
backward_task: Callable[[], int] = torch._C._current_graph_task_id


def has_saved_tensor_hooks() -> bool:
    """Return whether a block of ``torch.autograd.graph.saved_tensors_hooks`` is active in this thread."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def has_hook(tensor: Tensor) -> bool:
    """Return whether a tensor that is no leaf has a hook of its gradient, or retains it."""
    return tensor.retains_grad or bool(tensor._backward_hooks)


def in_backward() -> bool:
    """Return whether a backward pass runs in this thread.

    Activation checkpointing repeats a forward during the backward pass. The repeated forward must not draw new masks.
    """
    return backward_task() != NO_BACKWARD


def will_run(node: torch.autograd.graph.Node) -> bool:
    """Return whether the running backward pass will run, or has run, a node of the graph, or takes the gradient that arrives there."""
    return torch._C._will_engine_execute_node(node)


def number_of_node(node: torch.autograd.graph.Node) -> int:
    """Return a number that is greater than those of nodes that autograd recorded earlier in this thread; a leaf has the greatest."""
    return node._sequence_nr()


def wrap_engine(changes: Changes, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace torch's function that runs autograd's engine by ``around(function)``, until the block of ``changes`` ends.

    Each backward pass calls torch's function. Dynamo guards the other functions that ``backward()`` calls, but not this one, so
    replacing it does not make Dynamo compile anything again.
    """
    changes.put(torch.autograd, "_engine_run_backward", around(torch.autograd._engine_run_backward))  # type: ignore[attr-defined]


def recorded_in_operator() -> AbstractContextManager[None]:
    """Open a block in which autograd can record inside a custom operator. Elsewhere in a custom operator, torch excludes autograd.

    graphreg's operator for recurrent layers runs its kernel in this block, and keeps the autograd graph that results. So the backward of
    the operator does not have to run the forward again.
    """
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    return guard


def materialized(gradient: Tensor) -> Tensor:
    """Return a gradient unchanged, or as ordinary zeros if it is a ZeroTensor, which is torch's form of zeros without memory.

    The second derivative of ``abs``, for example, is a ZeroTensor. AOTAutograd does not trace a view of such a tensor, but treats the view
    as a constant of the backward graph. This constant cannot be copied. So a compiled backward pass fails with "Attempted to call copy_()
    on an invalid python storage" (torch 2.13), while the same pass works in eager.
    """
    is_lazy = torch._is_zerotensor(gradient)
    return torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device) if is_lazy else gradient


def is_forward_mode() -> bool:
    """Return whether the code runs in a block of ``forward_ad.dual_level``, so that a tensor may have a tangent."""
    return bool(forward_ad._current_level >= 0)


def storage_number(of: Tensor | torch.UntypedStorage) -> int:
    """Return a number that identifies a storage, or that of a tensor: tensors that share storage have the same number.

    Once a storage is freed, a new storage may get the same number. ``data_ptr()`` cannot identify a storage, because it is 0 for fake, meta
    and empty tensors.

    Raises:
        NotImplementedError, RuntimeError: The tensor has no storage. Sparse tensors, for example, have none.
    """
    return int((of.untyped_storage() if isinstance(of, Tensor) else of)._cdata)


def storage_of(tensor: Tensor) -> int:
    """Return the number of a tensor's storage. If the tensor has no storage (sparse, or torch.func's), return its id."""
    try:
        return storage_number(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def version_of(tensor: Tensor) -> int:
    """Return the number of writes into a tensor, including writes through its views or its base; -1 for an inference tensor.

    Autograd counts the writes in order to detect that a tensor saved for backward has changed. It does not count writes into inference
    tensors.
    """
    return -1 if tensor.is_inference() else tensor._version


def is_plain_data(tensor: Tensor) -> bool:
    """Return whether ``tensor.data`` runs no code of a tensor subclass."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def gradient_hooks(tensor: Tensor) -> list[dict[int, Any] | None]:
    """Return the hooks that a leaf has of its gradient: before it is accumulated, and after that. None if there never were any."""
    return [getattr(tensor, name) for name in GRADIENT_HOOKS]


def set_gradient_hooks(tensor: Tensor, dicts: list[dict[int, Any] | None], contents: list[dict[int, Any]]) -> None:
    """Give a leaf the dicts of hooks that ``gradient_hooks`` returned, with these contents."""
    for name, hooks, content in zip(GRADIENT_HOOKS, dicts, contents, strict=True):
        now = getattr(tensor, name)
        if now is not hooks:
            if now is not None:
                now.clear()  # autograd goes on calling what is in there if None takes its place
            setattr(tensor, name, hooks)
        if hooks is not None and hooks.keys() != content.keys():  # torch gives no key twice
            hooks.clear()
            hooks.update(content)


def base_of(tensor: Tensor) -> Tensor:
    """Return the tensor that autograd records as the base of a view; the tensor itself if it is not a view."""
    base: Tensor | None = tensor._base
    return tensor if base is None else base


def is_plain_view(tensor: Tensor) -> bool:
    """Return whether torch's own view operations made this view while autograd recorded, so that ``same_view`` can repeat them.

    An ``autograd.Function`` may return a view whose derivative differs from the derivative of the view operation, for example in order to
    reverse gradients. ``same_view`` would lose the derivative of such a view.
    """
    kinds = torch._C._autograd.CreationMeta
    return torch._C._autograd._get_creation_meta(tensor) in (kinds.DEFAULT, kinds.MULTI_OUTPUT_NODE)


def same_view(tensor: Tensor, base: Tensor) -> Tensor:
    """Return a view of ``base``, made with the view operations that autograd recorded when they made ``tensor`` from its own base."""
    view: Tensor = tensor._view_func(base)  # type: ignore[attr-defined]
    return view


def scale_tensor(scaler: Any) -> Tensor | None:
    """Return the scale of a GradScaler as a tensor; None before the first ``scale(loss)``, and for an object without such a tensor.

    The public ``get_scale()`` converts the tensor to a Python number, which causes a graph break in compiled code.
    """
    tensor: Tensor | None = getattr(scaler, "_scale", None)
    return tensor


def first_scale(scaler: Any) -> tuple[bool | None, float | None]:
    """Return two values: whether a GradScaler is enabled, and its initial scale. A value is None if the object does not have it.

    The public ``is_enabled()`` and ``get_scale()`` read the same attributes, but Dynamo does not trace the functions of ``torch.amp``.
    """
    return getattr(scaler, "_enabled", None), getattr(scaler, "_init_scale", None)


def custom_operators() -> list[str]:
    """Return the names of the operators made with ``torch.library.custom_op``, as ``namespace::name``.

    The name of an operator's autograd node has ``_`` in place of ``::``. From this list, graphreg finds the operator to which an autograd
    node belongs.
    """
    return [str(each) for each in torch._library.custom_ops.OPDEFS]


def has_no_formula(function: Any) -> bool:
    """Return whether an autograd node belongs to an operator of ``torch.library.custom_op`` without a backward formula.

    Such a node raises an error only when the backward pass reaches it. To know this earlier, the function looks for the formula in the
    closure of the node's ``backward``, where torch keeps the formula.
    """
    captured = [cell.cell_contents for cell in function._forward_cls.backward.__closure__ or ()]
    return any(getattr(content, "_backward_fn", captured) is None for content in captured)


def write_uncounted(tensor: Tensor, value: Tensor) -> None:
    """Copy a value into a tensor. Autograd does not count the write, so that a backward pass that needs the tensor goes on."""
    with torch.autograd._unsafe_preserve_version_counter(tensor):  # type: ignore[attr-defined]
        tensor.copy_(value)


# Private attributes of tensors that users' code and torch's Python code read. Reading one of ``PRIVATE_FACTS`` does not read the
# elements of the tensor.
VERSION = "_version"  # an attribute of tensors that counts the writes into a tensor
PRIVATE_FACTS = frozenset({VERSION, "_base"})
# All private attributes of tensors, which tell how a tensor was made or what was done with it.
PRIVATE_ATTRIBUTES = frozenset(
    name for name, member in vars(torch._C.TensorBase).items()
    if isinstance(member, GetSetDescriptorType) and name.startswith("_") and not name.startswith("__")
)  # fmt: skip
PRIVATE_STORAGE = "_typed_storage"  # a method of tensors that gives access to the elements, like the public ``untyped_storage``
