"""torch.func around the running code: the active transforms, the rows and chunks of a vmap, and the tensors of functional_call.

Each active transform is a level on a stack. The level of a vmap knows the batch size and ``randomness``. A value inside the vmap does not
show the batch axis. torch's random operations read the level to decide what to draw, and so does graphreg's noise.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
)
from torch.nn.utils import stateless

from graphreg.errors import GraphRegError

# torch's own functions, without Python functions around them: they are called at each call of a module, and Dynamo can trace them.
innermost_transform = torch._C._functorch.peek_interpreter_stack  # returns the innermost active transform; None if there is none
transform_level = torch._C._functorch.maybe_current_level  # returns the level of the innermost transform; None if there is none
level_of = torch._C._functorch.maybe_get_level  # returns the level of the transform that wrapped a tensor; less than 1 if none did
one_level_below = torch._C._functorch.get_unwrapped  # returns the tensor inside a wrapped tensor
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # returns whether a transform has wrapped a tensor

_unwrap_for_grad = torch._C._functorch._unwrap_for_grad
_JVP_WRITTEN = hasattr(torch._functorch.predispatch, "_jvp_increment_nesting")
_stack = torch._C._functorch.get_interpreter_stack
_depth = torch._C._functorch.get_dynamic_layer_stack_depth
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


class Mapping(NamedTuple):
    """An active vmap: its level and its option ``randomness``."""

    level: int
    randomness: str


@dataclass(frozen=True)
class Chunk:
    """One of the chunks that a vmap with ``chunk_size`` splits its batch into.

    Attributes:
        number: The index of the chunk.
        start: The position of its first row in the batch.
        run: An object that identifies the call of the vmap: all its chunks have this object.
    """

    number: int
    start: int
    run: object


def transforms() -> bool:
    """Return whether the code runs under a transform of torch.func, also while Dynamo traces it.

    Noise is then drawn with operations that a transform can map.
    """
    return bool(_transforms() if torch.compiler.is_compiling() else innermost_transform() is not None)


# True for a transform that Dynamo traces, which is active meanwhile, and for one around the compiled code, on which Dynamo guards.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transforms() -> bool:
    return innermost_transform() is not None


def enters_levels(function: object) -> bool:
    """Return whether a function enters a level of torch.func. A graph of torch.export may call functions that enter and leave levels."""
    return getattr(function, "__name__", "").endswith("_increment_nesting")


def leaving_no_level(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function. If it raises, leave the levels of torch.func that it has entered.

    Otherwise these levels would stay on the stack, and no later code of the process could draw random numbers.
    """
    depth = _depth()
    try:
        return function(*args, **kwargs)
    except BaseException:
        # one by one, because torch 2.10's function that leaves several levels at once fails at the last of them
        while _depth() > depth:
            _LEAVE[innermost_transform().key()]()
        raise


def in_unwritten_jvp() -> bool:
    """Return whether the innermost transform is a ``torch.func.jvp`` whose level torch.export does not write into its graph.

    In torch 2.10 no such level is written, and the export fails. Newer versions write the level, and the finished graph shows it.
    """
    level = innermost_transform()
    return not _JVP_WRITTEN and level is not None and level.key() == TransformType.Jvp


def is_transform_step(function: object) -> bool:
    """Return whether a function that a ``TorchFunctionMode`` sees is an internal step of torch.func, such as entering a level.

    Such a step must not run twice.
    """
    return str(getattr(function, "__module__", "")).startswith("torch._functorch")


def vmaps() -> tuple[Mapping, ...]:
    """Return the active vmaps, the outermost first. Their ``randomness`` decides whether all rows get the same mask."""
    return tuple(_vmap_levels()) if transforms() else ()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _vmap_levels() -> tuple[Mapping, ...]:
    return tuple(Mapping(each.level(), each.randomness()) for each in _vmaps())


def _vmaps() -> list[VmapInterpreter]:
    return [each for each in map(coerce_cinterpreter, _stack() or ()) if isinstance(each, VmapInterpreter)]


def batch_positions(level: int, device: torch.device) -> Tensor:
    """Return the position of each row in the whole batch of a vmap, across its chunks: int32, [1] inside the vmap.

    A row's mask depends on its position. The tensor is not 0-d, because Inductor would multiply a 0-d tensor in float32: torch 2.13
    compiles ``torch.vmap(lambda row: row * 1234567891)`` over an int32 vector to a product that is wrong from 2**24 on.
    """
    if torch.compiler.is_compiling() and in_chunks():
        positions: Tensor = _positions_in_chunk(level, device)
        return positions
    return _positions(level, device)


def _positions(level: int, device: torch.device) -> Tensor:
    size, start = _extent(level)
    counted = torch.arange(start, start + size, dtype=torch.int32, device=device)[:, None]
    mapped: Tensor = _add_batch_dim(unwrapped(counted), 0, level)
    return mapped


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _extent(level: int) -> tuple[int, int]:
    """Return the number of rows of a vmap, or of its running chunk, and the position of the first row in the whole batch."""
    size = next(int(each.batch_size()) for each in _vmaps() if each.level() == level)
    return size, next((chunk.start for at, chunk in _chunks() if at == level), 0)


def unwrapped(tensor: Tensor) -> Tensor:
    """Remove the wrappers of grad and jvp levels from a tensor that depends on nothing mapped or differentiated.

    Such a level wraps every tensor that is made inside it. The noise's counter of calls outlives the call, so it must not stay wrapped in a
    level that has ended.
    """
    for level in _tracking():
        tensor = _unwrap_for_grad(tensor, level)
    return tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tracking() -> tuple[int, ...]:
    levels = map(coerce_cinterpreter, reversed(_stack() or ()))
    return tuple(each.level() for each in levels if isinstance(each, (GradInterpreter, JvpInterpreter)))


@contextmanager
def without_transforms() -> Iterator[None]:
    """Open a block outside of all transforms. State that outlives the call is computed in this block: once, not for each row."""
    with temporarily_clear_interpreter_stack():
        yield


def is_lent(tensor: Tensor) -> bool:
    """Return whether a running ``functional_call`` has put this tensor into a module. At its end, the module gets its own tensor back.

    If the noise's counter of calls were such a tensor, its next value would be lost. torch has no function to find out, so this
    searches Python's stack.
    """
    calls = (frame.f_locals["parameters_and_buffers"] for frame in _frames() if frame.f_code is _FUNCTIONAL)
    return any(each is tensor for tensors in calls for each in tensors.values())


def chunks() -> list[Chunk]:
    """Return the chunks that are running, one for each active vmap with a ``chunk_size``; the innermost first.

    All chunks of a batch count as one call of the module, so its noise must not advance from one chunk to the next.
    """
    return [chunk for _, chunk in _chunks()] if innermost_transform() is not None else []


def _chunks() -> list[tuple[int, Chunk]]:
    """Return the running chunks, each with the level of its vmap. Only the frame of torch's loop on Python's stack has the index."""
    chunks_now: list[tuple[int, Chunk]] = []
    for frame in _frames():
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_chunks() -> bool:
    """Return whether the code, which Dynamo may be tracing, runs in a vmap with a ``chunk_size``.

    A function that Dynamo inlines has no frame on Python's stack. So this searches for the frame of the translator that traces it.
    """
    tracers = (frame.f_locals.get("self") for frame in _frames())
    return any(getattr(each, "f_code", None) is _CODES["_chunked_vmap"] for each in tracers) or bool(_chunks())


CHUNKED = (
    "the noise of a vmap with a chunk_size is drawn outside of compiled graphs, because all chunks would share one graph. Leave "
    "chunk_size out, or compile without fullgraph=True"
)
_positions_in_chunk = torch.compiler.disable(_positions, reason=CHUNKED)  # type: ignore[no-untyped-call]


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
