"""The draws as operators of a compiled graph; ``inductor_lowerings.py`` says how Inductor lowers them to the arithmetic of ``hash.py``.

A draw that is traced as ordinary operators takes twenty to thirty of them. Dynamo, autograd and the
partitioner must handle each one. Each time Inductor adds an operator to an expression that it
fuses, it traces the whole expression again (``inner_fn_opcount``, called by
``has_exceeded_max_reads``). For the masks of four sites, that was a quarter of the compile time.
Backends other than Inductor run the custom operators as defined here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from graphreg.rng.hash import call_words, kept_words, words
from graphreg.rng.inductor_lowerings import lowers
from graphreg.torch_internals.dynamo import known_or_asserted
from graphreg.torch_internals.dynamo_marks import assume_constant_result
from graphreg.torch_internals.functorch import transforms
from graphreg.torch_internals.inductor import inductor_option
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.torch_modes import is_exporting

# elements; a larger draw is traced as ordinary operators, because its indices do not fit into int32
LIMIT = 1 << 31


def fits_int32(count: int) -> bool:
    """Return whether a draw of so many elements has indices that fit. If values of tensors decide the count, compiled code asserts that."""
    return known_or_asserted(count <= LIMIT)


@torch.library.custom_op("graphreg::bits", mutates_args=())
def fused_bits(key: Tensor, shape: Sequence[int], lane: int, start: int) -> Tensor:
    """Draw random words as one operator: int32 [2] key -> int32 [shape] (``hash.words``)."""
    return words(key, torch.Size(shape).numel(), lane, start).view(tuple(shape))


@torch.library.custom_op("graphreg::keep", mutates_args=())
def fused_keep(key: Tensor, p: Tensor, shape: Sequence[int], lane: int) -> Tensor:
    """Draw a mask as one operator: int32 [2] key, 0-d rate p -> int8 [shape], 1 with probability 1 - p, else 0."""
    kept: Tensor = kept_words(words(key, torch.Size(shape).numel(), lane, 0), p)
    return kept.to(torch.int8).view(tuple(shape))


@torch.library.custom_op("graphreg::next_keys", mutates_args=())
def fused_keys(streams: Tensor, step: Tensor, free: Tensor, keys: Tensor) -> Tensor:
    """Compute the keys of call ``step`` as one operator: int32 [n, 2]; if ``free`` is 0, return a copy of ``keys``."""
    low, high = call_words(streams, step)
    return torch.where(free != 0, torch.stack((low, high), dim=-1).to(torch.int32), keys)


# Inductor leaves an operator with this tag out of CUDA graphs.
_UNRECORDED = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
RECORDED_ON = ("cuda",)  # the types of devices that have CUDA graphs


@torch.library.custom_op("graphreg::unrecorded", mutates_args=(), tags=_UNRECORDED)
def unrecorded(tensor: Tensor) -> Tensor:
    """Copy a tensor outside of all CUDA graphs."""
    return tensor.clone()


@unrecorded.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def between_calls(tensor: Tensor) -> Tensor:
    """Return a tensor that one call leaves to the next; call this function where it is left, and where the next call takes it.

    Under CUDA graphs (``torch.compile(mode="reduce-overhead")``), the result is a copy that no CUDA
    graph has as an input or output. Inductor's CUDA graphs overwrite their outputs at the next
    call, so torch raises an error if an output is then an input, and they are recorded again for
    each new address of a buffer. A write in place would keep the address, but then a backward that
    recomputes values would read what the next call needs, without an error. See docs/gpu.md.
    """
    if tensor.device.type not in RECORDED_ON or not torch.compiler.is_dynamo_compiling() or transforms() or not _records():
        return tensor
    copied: Tensor = unrecorded(tensor)
    return copied


@assume_constant_result
def _records() -> bool:
    """Return whether the graph that Dynamo is capturing will run in CUDA graphs."""
    return bool(inductor_option("triton.cudagraphs"))


@fused_bits.register_fake
def _(key: Tensor, shape: Sequence[int], lane: int, start: int) -> Tensor:
    return key.new_empty(tuple(shape))


@fused_keep.register_fake
def _(key: Tensor, p: Tensor, shape: Sequence[int], lane: int) -> Tensor:
    return key.new_empty(tuple(shape), dtype=torch.int8)


@fused_keys.register_fake
def _(streams: Tensor, step: Tensor, free: Tensor, keys: Tensor) -> Tensor:
    return torch.empty_like(keys)


class _Within:
    """Holds ``on``: whether the inner compiler of graphreg's backend is tracing. ``is_compiling()`` is False then."""

    on = False


@contextmanager
def within_backend() -> Iterator[None]:
    """Open a block in which draws have the form of compiled code. graphreg's backend calls its inner compiler in such a block."""
    with Changes() as changes, changes:
        changes.put(_Within, "on", True)
        yield


def compiling() -> bool:
    """Return whether a compiler is tracing: Dynamo, or the inner compiler of graphreg's backend."""
    return is_compiling() or _Within.on


def recomputes() -> bool:
    """Return whether a compiler is tracing that can recompute results in backward: Dynamo, or the inner compiler of graphreg's backend.

    Return False under a transform of torch.func, which does not support checkpoints. Under Dynamo,
    also return False if gradients are disabled: there is no backward then, and up to torch 2.11
    AOTAutograd warns of nodes that are marked to be recomputed.
    """
    return ((torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()) or _Within.on) and not transforms()


def fuses() -> bool:
    """Return whether to trace a draw as one custom operator, which Inductor lowers.

    Return False for an exported program, which must contain torch's operators only, and under a
    transform of torch.func, which cannot map the custom operators.
    """
    traced = _Within.on or (torch.compiler.is_dynamo_compiling() and not is_exporting())
    return traced and not transforms() and lowers()
