"""Computes a formula on DTensors, such that the result and the gradients are those of the whole tensors.

A formula is code that graphreg does not know, and torch computes some functions of shards wrong: up to torch 2.13 at least, the sum of the
norms of rows whose elements are on several ranks is not that of the whole tensor. So a formula is computed on shards only if a trial has
given the value and the gradient of the whole tensor. In all other cases the tensor is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from graphreg.ir.precision import widest
from graphreg.ir.time_steps import Steps
from graphreg.ir.units import Units
from graphreg.regularizer.base import Penalty
from graphreg.rng.operators import compiling
from graphreg.runtime.runtime_module import accumulation
from graphreg.torch_internals.distributed import (
    has_process_group,
    is_distributed,
    on_all_ranks,
    replicated,
    sharded_parameters,
    shards,
    taken_by_fsdp,
    uses_fsdp,
    without_partial_sums,
)
from graphreg.torch_internals.dynamo_marks import allow_in_graph, assume_constant_result, disable
from graphreg.torch_internals.fake_tensors import is_fake
from graphreg.torch_internals.functorch import transforms
from graphreg.torch_internals.torch_modes import without_modes

Compute = Callable[[Mapping[str, Any]], Any]  # a formula, from its tensors by name to a 0-d tensor
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of a trial, relative to the largest element

_trials: dict[Hashable, bool] = {}  # the answers of ``_computes_on_shards``


def computed(
    compute: Compute, values: Mapping[str, Any], regularizer: Penalty, inputs: Mapping[str, Any], reads: Steps | Units | None = None
) -> Tensor:  # fmt: skip
    """Return the result of a formula, [], a plain tensor. If some tensors are DTensors, the result is the same on all ranks.

    The DTensors get their gradients in their own placements: FSDP2 adds local tensors to these gradients.

    Args:
        compute: The formula, as a function of its tensors by name.
        values: The tensors, plain or DTensors.
        regularizer: The regularizer whose formula it is.
        inputs: The inputs of the model that ``compute`` uses. If there are any, the formula is not computed on shards.
        reads: How the formula reads the tensors, if not as they are.
    """
    if not any(map(is_distributed, values.values())):
        return compute(values)  # type: ignore[no-any-return]
    if compiling() or transforms():
        return compute({name: whole(value) for name, value in values.items()})  # type: ignore[no-any-return]
    if torch.is_inference_mode_enabled():
        with _outside_inference():
            return computed(compute, values, regularizer, inputs, reads)
    values = {name: without_partial_sums(value) if is_distributed(value) else value for name, value in values.items()}
    if not inputs and len(values) == 1 and regularizer.value_range is None:  # the range of a DTensor's numbers is not checked
        ((name, value),) = values.items()
        # regularizers of one class and with equal options compute the same formula
        options = tuple((field.name, repr(getattr(regularizer, field.name))) for field in fields(regularizer))
        if _computes_on_shards(compute, name, value, ((type(regularizer), options), repr(reads))):
            return whole(compute({name: value.redistribute(placements=value.placements)}))  # type: ignore[no-any-return]
    trained = any(each.requires_grad for each in inputs.values() if isinstance(each, Tensor))  # _OnWhole has the gradients of values alone
    if trained or not torch.is_grad_enabled() or not any(value.requires_grad for value in values.values()):
        return compute({name: whole(value) for name, value in values.items()})  # type: ignore[no-any-return]
    total: Tensor = _OnWhole.apply(compute, tuple(values), *values.values())  # type: ignore[no-untyped-call]
    return total


def whole(value: Any) -> Any:
    """Return a DTensor as a plain tensor that has all elements, and other values as they are."""
    if not is_distributed(value):
        return value
    if compiling() or not torch.is_inference_mode_enabled():
        return value.full_tensor()
    with _outside_inference():
        return value.full_tensor()


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Leave inference mode: up to torch 2.12, a DTensor that was made outside of it cannot be redistributed in it."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


class _OnWhole(torch.autograd.Function):
    """Computes a formula on whole tensors, and keeps of them only the own shards of their gradients.

    Autograd would keep all whole tensors of a model until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, compute: Compute, names: tuple[str, ...], *values: Any) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad(), _saving_plainly():
            leaves = [whole(value.detach()) for value in values]
            leaves = [leaf.to(accumulation(leaf.dtype)).requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
            total = compute(dict(zip(names, leaves, strict=True)))
            live = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(total, live, materialize_grads=True) if total.requires_grad else map(torch.zeros_like, live)
        placed = map(_placed, found, (value for value, need in zip(values, needs, strict=True) if need))
        ctx.compute, ctx.names, ctx.needs = compute, names, needs
        ctx.save_for_backward(*values, *placed)
        return total.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        saved, count, grad = ctx.saved_tensors, len(ctx.needs), whole(grad)  # within a checkpoint, they can be read once
        values, gradients = saved[:count], iter(saved[count:])
        if not torch.is_grad_enabled():
            scaled = [(next(gradients) * grad).to(value.dtype) if need else None for value, need in zip(values, ctx.needs, strict=True)]
            return (None, None, *scaled)
        # this backward pass is itself to be differentiated
        total = ctx.compute({name: whole(value) for name, value in zip(ctx.names, values, strict=True)})
        live = [value for value, need in zip(values, ctx.needs, strict=True) if need]
        again = iter(torch.autograd.grad(total, live, grad, create_graph=True, materialize_grads=True))
        return (None, None, *(next(again) if need else None for need in ctx.needs))


def _placed(gradient: Tensor, value: Any) -> Any:
    """Return the gradient of a whole tensor, which is the same on all ranks, as that of the value."""
    return replicated(gradient, value).redistribute(placements=value.placements) if is_distributed(value) else gradient


def _saving_plainly() -> saved_tensors_hooks:
    """Return a context in which autograd keeps tensors as they are, also within a checkpoint, which would count them."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def own_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters, and in place of those that FSDP2 has gathered for a forward, its own: their gradients reach it at any time."""
    if compiling() or not has_process_group():
        return dict(values)
    own = sharded_parameters()
    found = {name: own.get(id(value), value) for name, value in values.items()}
    return {name: found[name] if found[name].device == value.device else value for name, value in values.items()}  # not offloaded ones


def leaves_graph(parameters: Iterable[Any]) -> bool:
    """Return whether Dynamo must not compile a function of these parameters: only in eager can FSDP2 be asked for its own parameters."""
    if not has_process_group():
        return False
    if torch.compiler.is_dynamo_compiling():
        return uses_fsdp() and any(map(taken_by_fsdp, parameters))
    return bool(uses_fsdp())  # if this runs in eager because Dynamo has left its graph here, Dynamo would compile what the function calls


@disable(
    "graphreg: a penalty on parameters that FSDP2 shards runs in eager. Compile the blocks, block.compile(), or the whole model without "
    "fullgraph=True"
)
def in_eager(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function. Dynamo does not compile it."""
    return function(*args, **kwargs)


def with_plain_gradient(total: Tensor) -> Tensor:
    """Return a total, [], whose gradient may be a DTensor. It is one if the total is added to a loss that is a DTensor."""
    if torch.compiler.is_dynamo_compiling():  # Dynamo would assume that the gradient is plain
        _known_to_dynamo()
    return _with_plain_gradient(total)


def _with_plain_gradient(total: Tensor) -> Tensor:
    plain: Tensor = _WithPlainGradient.apply(total)  # type: ignore[no-untyped-call]
    return plain


@assume_constant_result
def _known_to_dynamo() -> None:
    allow_in_graph(_with_plain_gradient)


class _WithPlainGradient(torch.autograd.Function):
    """The identity. Its backward makes a plain tensor of the gradient."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return whole(grad)


# Trials


def _computes_on_shards(compute: Compute, name: str, value: Any, formula: Hashable) -> bool:
    """Return whether the formula has the same value and gradient on shards as on the whole tensor.

    All ranks of the mesh must call this function. The first call for a formula, placements and sizes makes a trial.
    """
    parts = shards(value)
    if not parts or value.device.type == "meta" or is_fake(value.to_local()) or has_empty_shard(value.shape, parts):
        return False
    shape = small_shape(value.shape, math.prod(size for _, size in parts))
    key = formula, shape, value.placements, value.device_mesh  # other ranks may have tried it on another mesh that this rank is in
    if key not in _trials:
        with torch.enable_grad(), _saving_plainly(), without_modes():
            _trials[key] = any(on_all_ranks(_agree(compute, name, shape, value, scale), value) for scale in (1.0, 1e3))
    return _trials[key]


def _agree(compute: Compute, name: str, shape: Sequence[int], value: Any, scale: float) -> bool:
    """Compare the formula on shards with the formula on the whole, for random numbers. A gradient of zeros says nothing: return False."""
    dtype = widest(value.device)
    numbers = scale * torch.randn(shape, dtype=dtype, device="cpu", generator=torch.Generator().manual_seed(0)).to(value.device)
    try:
        first, expected = _value_and_gradient(compute, name, numbers)
        second, found = _value_and_gradient(compute, name, replicated(numbers, value).redistribute(placements=value.placements))
    except Exception:  # whatever it is: on the whole tensor, either it does not occur, or the user sees it
        return False
    return all(
        bool(ours.isfinite().all()) and float((ours - theirs).abs().max()) <= TOLERANCE[dtype] * float(theirs.abs().max())
        for ours, theirs in ((second, first), (found, expected))
    ) and bool(expected.any())


def _value_and_gradient(compute: Compute, name: str, tensor: Any) -> tuple[Tensor, Tensor]:
    leaf = tensor.detach().requires_grad_()
    total = whole(compute({name: leaf}))
    return total.detach(), whole(torch.autograd.grad(total, leaf)[0])


def has_empty_shard(shape: Sequence[int], parts: Sequence[tuple[int, int]]) -> bool:
    """Return whether a rank has no element: then an operation may fail on this rank alone, and the other ranks would wait for it."""
    sizes = [{size} for size in shape]
    for dim, count in parts:
        shares = {(size, -(-size // count)) for size in sizes[dim]}  # torch gives each rank the rounded-up share, and the last one the rest
        sizes[dim] = {share for _, share in shares} | {size - (count - 1) * share for size, share in shares}
    return any(size <= 0 for each in sizes for size in each)


def small_shape(shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Return a smaller shape for a trial: sizes keep their order and their remainder by the number of ranks, and no shard gets empty."""
    small, last = {0: 0}, 0
    for size in sorted(set(shape) - {0}):
        start = max(8, 4 * ranks if size % ranks == 0 else ranks * ranks, last + 1)
        small[size] = last = min(size, start + (size - start) % ranks)
    return tuple(small[size] for size in shape)
