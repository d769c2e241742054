"""What torch.func has around the code that runs: its transforms, the batch of a vmap and its chunks, what functional_call lends.

Its transforms are levels, of which a vmap knows the size of its batch and its ``randomness``. Within it a value hides the batch, and
torch's own random operations ask the level what to draw. So do ours.
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

# torch's own questions, without a function of Python's around them: they are asked at each call, and Dynamo knows them.
innermost_transform = torch._C._functorch.peek_interpreter_stack  # None outside of all transforms
transform_level = torch._C._functorch.maybe_current_level  # the number of the innermost; None outside of all
level_of = torch._C._functorch.maybe_get_level  # that of the transform that made a tensor; less than 1 where none did
one_level_below = torch._C._functorch.get_unwrapped  # the tensor that such a tensor stands for
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # whether a transform made a tensor

_unwrap_for_grad = torch._C._functorch._unwrap_for_grad
_stack = torch._C._functorch.get_interpreter_stack
_FUNCTIONAL = stateless._functional_call.__code__
_CODES = {
    name: getattr(inspect.unwrap(getattr(_vmap, name)), "__code__", None)
    for name in ("_flat_vmap", "_chunked_vmap")
    if hasattr(_vmap, name)
}


class Mapping(NamedTuple):
    """A vmap: its level, and what its ``randomness`` says."""

    level: int
    randomness: str


@dataclass(frozen=True)
class Chunk:
    """A part of a vmap that was given a ``chunk_size``: which it is, and where in the batch it begins. ``run``: of one vmap's own."""

    number: int
    start: int
    run: object


def transforms() -> bool:
    """Whether a transform of torch.func is around the code that runs, which may be traced by Dynamo.

    Noise is then drawn by operations that the transform maps, and a checkpoint is none that it takes.
    """
    return bool(_transforms() if torch.compiler.is_compiling() else innermost_transform() is not None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transforms() -> bool:  # Dynamo has the levels of what it traces on the stack, and guards on those around
    return innermost_transform() is not None


def enters_levels(function: object) -> bool:
    """Whether a function that a graph calls enters a level of torch.func, which another call in it leaves: torch.export writes them so."""
    return getattr(function, "__name__", "").endswith("_increment_nesting")


def leaving_no_level(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; where it raises, leave the levels of torch.func that it has entered.

    On the stack they would stay for all code of the process, in which nothing could draw any more.
    """
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        return function(*args, **kwargs)
    except BaseException:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        raise


def is_transform_step(function: object) -> bool:
    """Whether a function that a mode is told of is a step of torch.func's own, as to enter a level: it must not be run twice."""
    return str(getattr(function, "__module__", "")).startswith("torch._functorch")


def vmaps() -> tuple[Mapping, ...]:
    """The vmaps around the code that runs, the outermost first: their ``randomness`` says whether the masks of rows agree."""
    return tuple(_found_vmaps()) if transforms() else ()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _found_vmaps() -> tuple[Mapping, ...]:
    return tuple(Mapping(each.level(), each.randomness()) for each in _vmaps())


def _vmaps() -> list[VmapInterpreter]:
    return [each for each in map(coerce_cinterpreter, _stack() or ()) if isinstance(each, VmapInterpreter)]


def batch_positions(level: int, device: torch.device) -> Tensor:
    """int32 [1] to what the vmap maps: the place of each row in the batch, of all its chunks. A row's mask is made of it.

    Not 0-d: of ``torch.vmap(lambda row: row * 1234567891)`` with an int32 for a row Inductor makes a product in float32, wrong from
    2**24 on (torch 2.13).
    """
    if torch.compiler.is_compiling() and in_chunks():
        found: Tensor = _positions_in_chunk(level, device)
        return found
    return _positions(level, device)


def _positions(level: int, device: torch.device) -> Tensor:
    size, start = _extent(level)
    counted = torch.arange(start, start + size, dtype=torch.int32, device=device)[:, None]
    mapped: Tensor = _add_batch_dim(unwrapped(counted), 0, level)
    return mapped


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _extent(level: int) -> tuple[int, int]:
    """The rows of a vmap, and the place of the first of them in the batch."""
    size = next(int(each.batch_size()) for each in _vmaps() if each.level() == level)
    return size, next((chunk.start for at, chunk in _chunks() if at == level), 0)


def unwrapped(tensor: Tensor) -> Tensor:
    """A tensor that depends on nothing mapped or differentiated, as it is outside: a level of grad wraps whatever is made within it.

    The step of the noise goes on from call to call, and must not be a value of a level that has ended.
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
    """A block outside of all transforms: what is kept from call to call is computed there, once and not for each row."""
    with temporarily_clear_interpreter_stack():
        yield


def is_lent(tensor: Tensor) -> bool:
    """Whether a module has the tensor from ``functional_call``, which puts back what was there when the call ends.

    A step of the noise that was counted up there would be lost. torch tells nobody, so it is looked up on Python's stack.
    """
    calls = (frame.f_locals["parameters_and_buffers"] for frame in _frames() if frame.f_code is _FUNCTIONAL)
    return any(each is tensor for given in calls for each in given.values())


def chunks() -> list[Chunk]:
    """The parts of vmaps that run now, of those that were given a ``chunk_size``; the innermost first.

    All parts of a batch are one call of the module, whose noise must not go on between them.
    """
    return [chunk for _, chunk in _chunks()] if innermost_transform() is not None else []


def _chunks() -> list[tuple[int, Chunk]]:
    """torch runs one part after the other and tells none which it is: that is known on Python's stack."""
    found: list[tuple[int, Chunk]] = []
    for frame in _frames():
        caller = frame.f_back
        if frame.f_code is _CODES["_flat_vmap"] and caller.f_code is _CODES["_chunked_vmap"]:
            inner, given = caller.f_locals, caller.f_back.f_locals
            number = len(inner["chunks_output"])
            found.append((frame.f_locals["vmap_level"], Chunk(number, number * given["chunk_size"], inner["flat_in_dims"])))
        elif frame.f_code.co_name.startswith("torch_dynamo_resume_in__chunked_vmap"):
            raise GraphRegError(
                "the module draws noise in a vmap with a chunk_size that torch.compile took apart, and which rows belong to a part is not "
                "known there. Compile what the vmap is given, or leave chunk_size out."
            )
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_chunks() -> bool:
    """Of code that Dynamo traces: whether it is in a vmap with a ``chunk_size``. What it inlines has no frame, but one that traces it."""
    tracers = (frame.f_locals.get("self") for frame in _frames())
    return any(getattr(each, "f_code", None) is _CODES["_chunked_vmap"] for each in tracers) or bool(_chunks())


CHUNKED = (
    "the noise of a vmap with a chunk_size is drawn outside of compiled graphs, for one graph would serve all parts. Leave chunk_size "
    "out, or compile without fullgraph=True"
)
_positions_in_chunk = torch.compiler.disable(_positions, reason=CHUNKED)  # type: ignore[no-untyped-call]


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
