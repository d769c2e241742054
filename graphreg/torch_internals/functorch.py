"""The torch.func transforms around the running code, the rows and chunks of a vmap, and the tensors of ``functional_call``.

Each active transform is a level on torch's stack of transforms. The level of a vmap stores the batch size and the option ``randomness``.
A tensor inside the vmap does not show the batch axis. So torch's random operations read the level in order to decide whether all rows get
the same random numbers, and graphreg's noise does the same.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch import vmap as _vmap
from torch._functorch.predispatch import _add_batch_dim
from torch._functorch.pyfunctorch import (
    GradInterpreter,
    JvpInterpreter,
    VmapInterpreter,
    coerce_cinterpreter,
    temporarily_clear_interpreter_stack,
    temporarily_pop_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.nn.utils import stateless

from graphreg.errors import GraphRegError
from graphreg.torch_internals.autograd import is_forward_mode
from graphreg.torch_internals.dynamo_marks import assume_constant_result, disable
from graphreg.torch_internals.interpreter import outwards
from graphreg.torch_internals.other_threads import is_compiling

# The next six names are torch's own functions, without Python wrappers: graphreg calls them often, and Dynamo can trace them.
innermost_transform = torch._C._functorch.peek_interpreter_stack  # returns the innermost active transform; None if there is none
transform_level = torch._C._functorch.maybe_current_level  # returns the level of the innermost transform; None if there is none
level_of = torch._C._functorch.maybe_get_level  # returns the level of the transform that wrapped a tensor; below 1 for other tensors
one_level_below = torch._C._functorch.get_unwrapped  # returns the tensor inside a wrapped tensor
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # returns whether a transform has wrapped a tensor
is_mapped = torch._C._functorch.is_batchedtensor  # returns whether a vmap has wrapped a tensor

_unwrap_for_grad = torch._C._functorch._unwrap_for_grad
_JVP_WRITTEN = hasattr(torch._functorch.predispatch, "_jvp_increment_nesting")
_stack = torch._C._functorch.get_interpreter_stack
levels: Callable[[], int] = torch._C._functorch.get_dynamic_layer_stack_depth  # returns how many levels are open
_LEAVE = {
    TransformType.Vmap: torch._C._functorch._vmap_decrement_nesting,
    TransformType.Grad: torch._C._functorch._grad_decrement_nesting,
    TransformType.Jvp: torch._C._functorch._jvp_decrement_nesting,
    TransformType.Functionalize: torch._C._functorch._func_decrement_nesting,
}
_FUNCTIONAL = stateless._functional_call.__code__
_CODES = {
    name: getattr(inspect.unwrap(getattr(_vmap, name)), "__code__", None)
    for name in ("_flat_vmap", "_chunked_vmap")
    if hasattr(_vmap, name)
}


@dataclass(frozen=True)
class Chunk:
    """One of the chunks that a vmap with ``chunk_size`` splits its batch into.

    Attributes:
        number: The index of the chunk.
        start: The position of the chunk's first row in the batch.
        run: An object that identifies the call of the vmap. All chunks of this call have the same object.
    """

    number: int
    start: int
    run: object


def transforms() -> bool:
    """Return whether the code runs, or is traced by Dynamo, under a transform of torch.func.

    Under a transform, graphreg draws noise with operations that the transform can map.
    """
    return bool(_transforms() if is_compiling() else innermost_transform() is not None)


# Dynamo calls this function while it traces, and takes the result as a constant. The constant is right for a transform in the traced code,
# because Dynamo enters the level of the transform while it traces. The constant is also right for a transform around the compiled code,
# because Dynamo guards on the stack of transforms.
@assume_constant_result
def _transforms() -> bool:
    return innermost_transform() is not None


def enters_levels(function: object) -> bool:
    """Return whether a function enters a level of torch.func. A graph of torch.export may call functions that enter and leave levels."""
    return getattr(function, "__name__", "").endswith("_increment_nesting")


def leaving_no_level(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function and return its result. If the function raises, leave the levels of torch.func that it has entered.

    Otherwise these levels would stay on torch's stack, and no later code of this thread could draw random numbers.
    """
    depth = levels()
    try:
        return function(*args, **kwargs)
    except BaseException:
        leave_levels(depth)
        raise


def leave_levels(depth: int) -> None:
    """Leave the levels of torch.func that were entered since there were so many."""
    # one by one, because torch 2.10's function that leaves several levels at once fails at the last of them
    while levels() > depth:
        _LEAVE[innermost_transform().key()]()


def in_unwritten_jvp() -> bool:
    """Return whether the innermost transform is a ``torch.func.jvp`` that the graph of torch.export will not show.

    torch 2.10 does not write the level of a jvp into the graph, and the export fails. Newer versions write the level, so graphreg finds the
    jvp in the finished graph.
    """
    level = innermost_transform()
    return not _JVP_WRITTEN and level is not None and level.key() == TransformType.Jvp


def is_transform_step(function: object) -> bool:
    """Return whether a function that a ``TorchFunctionMode`` intercepts is an internal step of torch.func, such as entering a level.

    The export front end runs some calls twice. A step of torch.func must run only once.
    """
    return str(getattr(function, "__module__", "")).startswith("torch._functorch")


def vmaps() -> tuple[tuple[int, str], ...]:
    """Return the level and the option ``randomness`` of each active vmap, the outermost first.

    ``randomness`` decides whether all rows get the same mask. The pairs are plain tuples, because Dynamo of torch 2.12 does not trace a
    loop over named tuples that come from a function decorated with ``assume_constant_result``.
    """
    return _vmap_levels() if transforms() else ()


@assume_constant_result
def _vmap_levels() -> tuple[tuple[int, str], ...]:
    return tuple((each.level(), each.randomness()) for each in _vmaps())


def _vmaps() -> list[VmapInterpreter]:
    return [each for each in map(coerce_cinterpreter, _stack() or ()) if isinstance(each, VmapInterpreter)]


def batch_positions(level: int, device: torch.device) -> Tensor:
    """Return the position of each row in the whole batch of a vmap, as an int32 tensor of shape [1] inside the vmap.

    Positions count across the chunks of a vmap with ``chunk_size``. The mask of a row depends on the position of the row. The tensor is not
    0-d, because Inductor would multiply a 0-d tensor in float32. For example, torch 2.13 compiles
    ``torch.vmap(lambda row: row * 1234567891)`` over an int32 vector to a product that is wrong from 2**24 on.
    """
    if is_compiling() and in_chunks():
        positions: Tensor = _positions_in_chunk(level, device)
        return positions
    return _positions(level, device)


def _positions(level: int, device: torch.device) -> Tensor:
    size, start = _extent(level)
    counted = torch.arange(start, start + size, dtype=torch.int32, device=device)[:, None]
    mapped: Tensor = _add_batch_dim(without_levels(counted), 0, level)
    return mapped


@assume_constant_result
def _extent(level: int) -> tuple[int, int]:
    """Return the number of rows of a vmap (with ``chunk_size``: of its running chunk), and the first row's position in the whole batch."""
    size = next(int(each.batch_size()) for each in _vmaps() if each.level() == level)
    return size, next((chunk.start for at, chunk in _chunks() if at == level), 0)


def without_levels(tensor: Tensor) -> Tensor:
    """Remove the wrappers of all active grad and jvp levels from a tensor. The tensor must not depend on inputs of a transform.

    A grad or jvp level wraps every tensor that is made inside the level. The counter of calls, on which graphreg's noise depends, is used
    beyond the end of the level. So the counter must not keep the wrapper of a level that has ended.
    """
    for level in _tracking():
        tensor = _unwrap_for_grad(tensor, level)
    return tensor


@assume_constant_result
def _tracking() -> tuple[int, ...]:
    levels = map(coerce_cinterpreter, reversed(_stack() or ()))
    return tuple(each.level() for each in levels if isinstance(each, (GradInterpreter, JvpInterpreter)))


def is_differentiated(tensor: Tensor) -> bool:
    """Return whether a derivative by this tensor is being recorded: by autograd, in forward mode, or by any transform around the code.

    Dynamo traces this function, and cannot look below a vmap there, nor for the tangents of a jvp around another transform.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_dynamo_compiling():
        return (is_forward_mode() or transforms()) and _is_differentiated_in_trace(tensor)
    if not is_forward_mode() and innermost_transform() is None:
        return False
    with ExitStack() as stack:
        while True:
            # a level sees the tensors of other levels as constants, so each tensor is asked within its own level
            while (level := innermost_transform()) is not None and level.level() > max(level_of(tensor), 0):
                stack.enter_context(temporarily_pop_interpreter_stack())
            if tensor.requires_grad or _has_tangent(tensor):
                return True
            if not is_wrapped(tensor):
                return False
            tensor = one_level_below(tensor)


def _is_differentiated_in_trace(tensor: Tensor) -> bool:
    if _has_tangent(tensor):
        return True
    for level in _tracking():
        tensor = _unwrap_for_grad(tensor, level)
        if tensor.requires_grad or _has_tangent(tensor):
            return True
    return False


def _has_tangent(tensor: Tensor) -> bool:
    if not is_forward_mode() or (not torch.compiler.is_dynamo_compiling() and is_mapped(tensor)):
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


@contextmanager
def without_transforms() -> Iterator[None]:
    """Open a block in which no transform of torch.func is active.

    In such a block, graphreg computes state that it keeps after the call. So the state is computed once, and not for each row of a vmap.
    """
    with temporarily_clear_interpreter_stack():
        yield


def is_lent(tensor: Tensor, holders: int = -1) -> bool:
    """Return whether a running ``torch.func.functional_call`` has put this tensor into a module for the duration of the call.

    At the end of the call, ``functional_call`` puts the module's own tensor back. If this happened to the counter of calls, on which
    graphreg's noise depends, the next value of the counter would be lost. torch has no query for this, so the function searches Python's
    stack.

    ``holders``: how many references to the tensor the caller knows of. If there are no others, no ``functional_call`` has lent the tensor,
    because it would hold the tensor, too. Then the stack, which may be deep, is not searched.
    """
    # How many references to its argument a call has itself differs between versions of Python, and between calls: while Dynamo evaluates
    # frames, the caller keeps a reference, too.
    holder = {"": object()}
    if sys.getrefcount(tensor) <= holders + _counted(holder[""]) - 1:
        return False
    frame: Any = sys._getframe(1)  # not ``outwards``, because each call of a module comes here
    while frame is not None:
        if frame.f_code is _FUNCTIONAL and any(each is tensor for each in frame.f_locals["parameters_and_buffers"].values()):
            return True
        frame = frame.f_back
    return False


def _counted(thing: object) -> int:
    return sys.getrefcount(thing)


def chunks() -> list[Chunk]:
    """Return the running chunk of each active vmap with a ``chunk_size``, the innermost vmap first.

    All chunks of a batch count as one call of the module, so the noise of the module must not advance from one chunk to the next.
    """
    return [chunk for _, chunk in _chunks()] if innermost_transform() is not None else []


def _chunks() -> list[tuple[int, Chunk]]:
    """Return a pair for each running chunk: the level of its vmap, and the chunk. The frame of torch's loop shows the chunk's index."""
    chunks_now: list[tuple[int, Chunk]] = []
    frame: Any
    for frame in outwards(sys._getframe(1)):
        caller = frame.f_back
        if frame.f_code is _CODES["_flat_vmap"] and caller.f_code is _CODES["_chunked_vmap"]:
            inner, options = caller.f_locals, caller.f_back.f_locals
            number = len(inner["chunks_output"])
            chunks_now.append((frame.f_locals["vmap_level"], Chunk(number, number * options["chunk_size"], inner["flat_in_dims"])))
        elif frame.f_code.co_name.startswith("torch_dynamo_resume_in__chunked_vmap"):
            raise GraphRegError(
                "the module draws noise in a vmap with a chunk_size, and torch.compile breaks the graph inside that vmap, so it is not "
                "known which rows a chunk has. Compile the function that is passed to vmap, or leave chunk_size out."
            )
    return chunks_now


@assume_constant_result
def in_chunks() -> bool:
    """Return whether the code runs, or is traced by Dynamo, in a vmap with a ``chunk_size``.

    If Dynamo inlines torch's loop over the chunks, the loop has no frame on Python's stack. Then the stack has a frame of the translator
    with which Dynamo traces the loop, so this function searches for both frames.
    """
    tracers = (frame.f_locals.get("self") for frame in outwards(sys._getframe(1)))
    return any(getattr(each, "f_code", None) is _CODES["_chunked_vmap"] for each in tracers) or bool(_chunks())


CHUNKED = (
    "the noise of a vmap with a chunk_size is drawn outside of compiled graphs, because all chunks would share one graph. Leave "
    "chunk_size out, or compile without fullgraph=True"
)


@disable(CHUNKED)
def _positions_in_chunk(level: int, device: torch.device) -> Tensor:
    return _positions(level, device)
