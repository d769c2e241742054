"""Inductor's inner parts: passes over its graphs, lowerings of operators, the compiler as a backend takes it.

It takes a second to import, so each function imports what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._functorch.config
from torch import fx

Lowering = Callable[..., Any]


def graph_pass(change: Callable[[fx.Graph], object], file: str) -> Any:
    """A pass for Inductor's slots (``post_grad_custom_post_pass``), marked in its cache by the file that the change is written in.

    A plain function there would keep every graph out of the cache.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # noqa: PLC0415

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            change(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((file,))

    return Pass()


def lower(lowerings_of: Mapping[Any, Lowering]) -> bool:
    """Have Inductor lower operators by these functions. False for another torch, whose inner parts have other names.

    An operator without one is a call in the compiled code, and what is computed around it is written to memory.
    """
    try:
        from torch._inductor.lowering import lowerings, register_lowering  # noqa: PLC0415
    except ImportError:
        return False
    for operator, lowering in lowerings_of.items():
        if operator not in lowerings:
            register_lowering(operator, broadcast=False, type_promotion_kind=None)(lowering)
    return True


def strides_of(shape: Sequence[Any]) -> Sequence[Any]:
    """The strides of a contiguous value in Inductor, whose sizes may be symbols."""
    from torch._inductor.ir import FlexibleLayout  # noqa: PLC0415

    strides: Sequence[Any] = FlexibleLayout.contiguous_strides(list(shape))
    return strides


def pointwise(like: Any, dtype: torch.dtype, shape: Sequence[Any], value: Callable[[Any, Sequence[Any]], Any]) -> Any:
    """A value in Inductor whose elements are computed one by one: ``value`` is given Inductor's operations and an index.

    Inductor fuses it into whatever reads it.
    """
    from torch._inductor.ir import Pointwise  # noqa: PLC0415
    from torch._inductor.virtualized import ops  # noqa: PLC0415

    return Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=lambda index: value(ops, index), ranges=list(shape))


def inductor_with(options: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor as ``torch.compile(options=...)`` calls it, with the options checked. Raises RuntimeError for one that it does not know."""
    compiler: Callable[..., Any] = torch._TorchCompileInductorWrapper(None, dict(options), None)  # type: ignore[no-untyped-call]
    return compiler


def without_autograd_cache() -> AbstractContextManager[None]:
    """A block in which AOTAutograd keeps no graph in its cache: modules of graphreg's are in no key of it, so it would give another's."""
    patched: AbstractContextManager[None] = torch._functorch.config.patch(enable_autograd_cache=False)
    return patched
