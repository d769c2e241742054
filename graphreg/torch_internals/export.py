"""torch.export: module calls in its tracer, the proxies of tensors and sizes in its graph, its messages, and its conditions on sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.export._trace
from torch import Tensor, fx, nn
from torch.fx.experimental import proxy_tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.random_state import quiet

ModuleCall = Callable[..., Any]  # (tracer, module, forward, args, kwargs)

_INTERPRETER = "torch.utils._sympy.interp"  # logs an operation that raises, such as a division by 0
SPECIALIZED_LOGGER = "torch._export.non_strict_utils"  # logs each size that is fixed because it is 1
SOLVER_LOGGER = "torch.fx.experimental.symbolic_shapes"  # logs what torch's solver of inequalities cannot solve


def take_module_calls(changes: Changes, around: Callable[[ModuleCall], ModuleCall]) -> None:
    """Until the changes end, replace the method ``call_module`` of torch.export's tracer by ``around(call_module)``.

    torch.export has no hook for module calls, and its graph has operators only. Which operators belong to a module's call is known only
    while that call runs.
    """
    changes.put(proxy_tensor._ModuleStackTracer, "call_module", around(proxy_tensor._ModuleStackTracer.call_module))


def module_behind(module: nn.Module) -> nn.Module:
    """Return the user's module if torch.export has replaced it by a proxy that records attribute accesses; else ``module`` itself."""
    inner: Any = module
    original: nn.Module = inner.get_base() if isinstance(module, proxy_tensor._AttrProxy) else module
    return original


def proxy_of(value: Any, tracer: Any) -> fx.Proxy | None:
    """Return the proxy that stands for a tensor or a size in torch.export's graph; None if the graph has none."""
    slot: Any = proxy_tensor.get_proxy_slot(value, tracer, None)
    if slot is None or isinstance(value, Tensor):
        return getattr(slot, "proxy", None)
    proxy: fx.Proxy | None = slot.force()
    return proxy


def give_proxy(value: Any, proxy: fx.Proxy, tracer: Any) -> Any:
    """Make ``proxy`` stand for a result's tensors in torch.export's graph, as the tracer does after each operator. Return the result."""
    return proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def silence_export(changes: Changes) -> None:
    """Until the changes end, prevent a failing torch.export from printing its graph to stderr: the error gives the reason."""
    changes.put(torch.export._trace, "print", lambda *args, **kwargs: None)


class _PythonsOperators(PythonReferenceAnalysis):
    @staticmethod
    def ne(a: Any, b: Any) -> Any:
        """Compare with ``!=``. torch's own ``sym_not(a == b)`` is refused by Dynamo."""
        return a != b

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        """Divide with ``/``. torch's own function needs numbers, and cannot take the proxies of torch.fx."""
        return a / b


def evaluated(condition: Any, sizes: Mapping[Any, Any]) -> Any:
    """Evaluate a condition that torch.export found, a sympy expression, for given sizes. The sizes may be proxies of torch.fx.

    Like torch's guards, this applies Python's operators instead of sympy's, so that ``//`` rounds as in Python.
    """
    with quiet(_INTERPRETER):
        return sympy_interp(_PythonsOperators, dict(sizes), condition)


def excludes_one(condition: Any) -> bool:
    """Return whether a condition of torch.export, a sympy expression, only says that a size is not 0 or 1 (``s0 != 1``, ``s0 >= 2``).

    torch.export makes such a guard where an operation could broadcast. The guard is not needed: the operation decides again at each call.
    """
    bounds = {"!=": (0, 1), ">=": (1, 2), ">": (0, 1)}
    return getattr(condition, "rel_op", "") in bounds and condition.rhs in bounds[condition.rel_op]


def example_sizes(environment: Any) -> dict[Any, Any]:
    """Return all size symbols of an export, with their values in the example inputs. ``environment``: the export's ``ShapeEnv``."""
    return dict(environment.backed_var_to_val if hasattr(environment, "backed_var_to_val") else environment.var_to_val)  # torch 2.10
