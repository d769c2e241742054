"""Inductor: custom passes on its graphs, lowerings of operators, and Inductor as a compiler that a backend can call.

The import of Inductor takes a second. So each function imports the parts of Inductor that it needs when it is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from graphreg.torch_internals.config import INDUCTOR, compiler_config, setting_of
from graphreg.torch_internals.dynamo import translator

Lowering = Callable[..., Any]


def graph_pass(change: Callable[[fx.Graph], object], *files: str) -> Any:
    """Return a pass that applies ``change`` to a graph, for a setting of Inductor such as ``post_grad_custom_post_pass``.

    ``files``: the files that define ``change``. Their hash becomes part of the key in Inductor's cache. If the pass were a plain
    function, Inductor would not cache graphs at all.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files  # noqa: PLC0415

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            change(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files(files)

    return Pass()


def register_lowerings(lowerings_of: Mapping[Any, Lowering]) -> bool:
    """Register lowerings of operators with Inductor. Return False if this is impossible, because Inductor has other internal names.

    Inductor does not fuse an operator that has no lowering: the compiled code calls the operator, and writes the operator's inputs and its
    result to memory.
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
    """Return the contiguous strides of a shape in Inductor. The sizes may be symbols."""
    from torch._inductor.ir import FlexibleLayout  # noqa: PLC0415

    strides: Sequence[Any] = FlexibleLayout.contiguous_strides(list(shape))
    return strides


def pointwise(like: Any, dtype: torch.dtype, shape: Sequence[Any], value: Callable[[Any, Sequence[Any]], Any]) -> Any:
    """Return a value of Inductor that is computed element by element. Inductor fuses the computation into the operations that read it.

    Args:
        like: A value on the same device.
        dtype: The dtype of the value.
        shape: The shape of the value.
        value: A function with two arguments, Inductor's operations (``ops``) and an index, that returns the element at this index.
    """
    from torch._inductor.ir import Pointwise  # noqa: PLC0415
    from torch._inductor.virtualized import ops  # noqa: PLC0415

    return Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=lambda index: value(ops, index), ranges=list(shape))


def inductor_with(options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the compiler that ``torch.compile(options=options)`` uses, which is Inductor. Raise RuntimeError for an unknown option."""
    compiler: Callable[..., Any] = torch._TorchCompileInductorWrapper(None, dict(options), None)  # type: ignore[no-untyped-call]
    return compiler


def add_inductor_options(options: Mapping[str, Any]) -> None:
    """Add options of Inductor to those with which the graph that Dynamo is capturing will be compiled.

    An option that is set already stays, be it by the call of torch.compile or in Inductor's configuration. Other graphs and Inductor's
    configuration do not change. Nothing happens if another backend than Inductor compiles the graph.

    Call this function while Dynamo traces, from a function with ``torch.compiler.assume_constant_result``.
    """
    output: Any = translator().output
    output.compiler_fn = _with_options(output.compiler_fn, options)


def inductor_option(name: str) -> Any:
    """Return the value of an option of Inductor for the graph that Dynamo is capturing. Return None if another backend compiles the graph.

    Call this function as ``add_inductor_options`` is called.
    """
    output: Any = translator().output
    compiler = output.compiler_fn
    while not isinstance(compiler, torch._TorchCompileInductorWrapper):  # as in ``_with_options``
        splitting = getattr(compiler, "__self__", None)
        compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(splitting, "backend_compile_fn", None)
        if compiler is None:
            return None
    return compiler.config.get(name, getattr(compiler_config(INDUCTOR), name))


def _with_options(compiler: Any, options: Mapping[str, Any]) -> Any:
    """Return a compiler, which may be wrapped, that has the options. Return the compiler itself if it is not Inductor."""
    if isinstance(compiler, torch._TorchCompileInductorWrapper):
        present = compiler.config
        settings = {name: setting_of(INDUCTOR, name) for name in options if name not in present}
        added = {name: options[name] for name, setting in settings.items() if setting is None or setting[0] == setting[1]}
        return _changed(compiler, "config", {**present, **added})
    # what Dynamo wraps around a backend in order to debug it; what splits graphs for DistributedDataParallel
    if (inner := getattr(compiler, "_torchdynamo_orig_backend", None)) is not None:
        return _changed(compiler, "_torchdynamo_orig_backend", _with_options(inner, options))
    splitting = getattr(compiler, "__self__", None)
    if (inner := getattr(splitting, "backend_compile_fn", None)) is not None:
        return getattr(_changed(splitting, "backend_compile_fn", _with_options(inner, options)), compiler.__name__)
    return compiler


def _changed(holder: Any, name: str, value: Any) -> Any:
    """Return a copy of an object that has another value of an attribute."""
    copied = copy.copy(holder)
    setattr(copied, name, value)
    return copied


def without_autograd_cache() -> AbstractContextManager[None]:
    """Open a block in which AOTAutograd does not use its cache.

    The key of the cache does not depend on graphreg's runtime modules. So the cache could return a graph that was compiled with other
    runtime modules.
    """
    import torch._functorch.config  # noqa: PLC0415

    patched: AbstractContextManager[None] = torch._functorch.config.patch(enable_autograd_cache=False)
    return patched
