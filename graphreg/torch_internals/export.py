"""torch.export's tracer: where it is told of a module's call, which node stands for a tensor, what it prints and decides on sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.export._trace
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphreg.torch_internals.patching import Changes

ModuleCall = Callable[..., Any]  # (tracer, module, forward, args, kwargs)

SOLVER_LOGGER = "torch.fx.experimental.symbolic_shapes"  # says where torch's solver of inequalities gives up


def take_module_calls(changes: Changes, around: Callable[[ModuleCall], ModuleCall]) -> None:
    """Until the changes end: have torch.export's tracer give each call of a module to what ``around`` makes of its own method.

    torch.export tells of none, and its graph has operators alone: which module's they are is known at the call.
    """
    changes.put(proxy_tensor._ModuleStackTracer, "call_module", around(proxy_tensor._ModuleStackTracer.call_module))


def module_behind(module: nn.Module) -> nn.Module:
    """The user's module, where torch.export has put a stand-in in its place that tells by which attributes it was reached."""
    inner: Any = module
    original: nn.Module = inner.get_base() if isinstance(module, proxy_tensor._AttrProxy) else module
    return original


def proxy_of(value: Any, tracer: Any) -> fx.Proxy | None:
    """What torch.export's graph calls a tensor or a size that the forward computed; None for what it has no node for."""
    slot: Any = proxy_tensor.get_proxy_slot(value, tracer, None)
    if slot is None or isinstance(value, Tensor):
        return getattr(slot, "proxy", None)
    proxy: fx.Proxy | None = slot.force()
    return proxy


def give_proxy(value: Any, proxy: fx.Proxy, tracer: Any) -> Any:
    """Have torch.export's graph call the tensors of a result after a node, as it does itself behind each operator. The result."""
    return proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def silence_export(changes: Changes) -> None:
    """Until the changes end: have a failed torch.export not print its graph to stderr; the error says what stopped it."""
    changes.put(torch.export._trace, "print", lambda *args, **kwargs: None)


def evaluated(condition: Any, sizes: Mapping[Any, Any]) -> Any:
    """A condition on sizes that torch.export found (a sympy expression), computed of values, which may be proxies of torch.fx.

    torch computes its guards in the same way, with Python's own operators and not sympy's: ``//`` is rounded as Python rounds.
    """
    return sympy_interp(PythonReferenceAnalysis, dict(sizes), condition)


def example_sizes(size: Any) -> dict[Any, Any]:
    """The symbols of the export that a size is of, with their values in the example inputs."""
    environment = size.node.shape_env
    return dict(environment.backed_var_to_val if hasattr(environment, "backed_var_to_val") else environment.var_to_val)  # torch 2.10
