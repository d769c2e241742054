"""torch.export: replaces its tracing of module calls, reads its proxies and its conditions on sizes, and silences its messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

from torch import Tensor, fx, nn
from torch._guards import tracing
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphreg.torch_internals.other_threads import only_here
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.random_state import quiet

CallModule = Callable[..., Any]  # a method ``call_module``, with the arguments (tracer, module, forward, args, kwargs)

_PRINTS = "torch.export._trace"  # imported when it is needed, because it imports Dynamo, which takes a second

# Names of torch's loggers
_INTERPRETER = "torch.utils._sympy.interp"  # logs an operation on sizes that raises, such as a division by 0
SPECIALIZED_LOGGER = "torch._export.non_strict_utils"  # logs each size that torch.export fixes because the size is 0 or 1
SOLVER_LOGGER = "torch.fx.experimental.symbolic_shapes"  # logs each failure of torch's solver of inequalities


def on_data_dependence(changes: Changes, told: Callable[[set[str]], object]) -> None:
    """Call ``told`` whenever torch is about to refuse that code decides by values, until the block of ``changes`` ends.

    ``told`` gets the names of the error's classes.
    """
    kind: Any = symbolic_shapes.GuardOnDataDependentSymNode
    original, kinds = kind.__init__, {each.__name__ for each in kind.__mro__}

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        told(kinds)
        original(self, *args, **kwargs)

    changes.put(kind, "__init__", made)


def take_module_calls(changes: Changes, around: Callable[[CallModule], CallModule]) -> None:
    """Replace the method ``call_module`` of torch.export's tracer by ``around(call_module)``, until the block of ``changes`` ends.

    graphreg must know which operators belong to the call of a module. torch.export's graph contains only operators, and torch.export has no
    hook for module calls. So graphreg must intercept the call while it runs.
    """
    changes.put(proxy_tensor._ModuleStackTracer, "call_module", around(proxy_tensor._ModuleStackTracer.call_module))


def module_behind(module: nn.Module) -> nn.Module:
    """Return the user's module behind a proxy with which torch.export records attribute accesses; any other module unchanged."""
    inner: Any = module
    original: nn.Module = inner.get_base() if isinstance(module, proxy_tensor._AttrProxy) else module
    return original


def proxy_of(value: Any, tracer: Any) -> fx.Proxy | None:
    """Return the torch.fx proxy of a tensor or a size in torch.export's graph; None if the tensor or size has no proxy there."""
    slot: Any = proxy_tensor.get_proxy_slot(value, tracer, None)
    if slot is None or isinstance(value, Tensor):
        return getattr(slot, "proxy", None)
    proxy: fx.Proxy | None = slot.force()
    return proxy


def give_proxy(value: Any, proxy: fx.Proxy, tracer: Any) -> Any:
    """Make ``proxy`` the proxy of ``value``, the result of an operation, in torch.export's graph. Return ``value``.

    If ``value`` is a tuple or a list, each tensor in it gets a proxy of its own. torch.export's tracer does the same after each operator.
    """
    return proxy_tensor.track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def silence_export(changes: Changes) -> None:
    """Prevent torch.export from printing its graph when it fails, until the block of ``changes`` ends. The error states the reason."""
    changes.put(import_module(_PRINTS), "print", only_here(lambda *args, **kwargs: None, print))


def apart_from_compilation() -> AbstractContextManager[Any]:
    """Open a block in which torch.export does not know that this thread is in the midst of a compilation, such as in a backend.

    It would add its guards on sizes to those of the code that is being compiled, which has other arguments. torch then raises "Guard
    failed on the same frame it was created" (torch 2.13, also for a plain torch.export in a backend).
    """
    return tracing(None)


class _PythonsOperators(PythonReferenceAnalysis):
    @staticmethod
    def ne(a: Any, b: Any) -> Any:
        """Compare with ``!=``, because Dynamo refuses ``sym_not(a == b)``, which the inherited method computes."""
        return a != b

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        """Divide with ``/``, because the inherited method needs numbers, and does not accept torch.fx proxies."""
        return a / b


def evaluated(condition: Any, sizes: Mapping[Any, Any]) -> Any:
    """Evaluate a condition on sizes, a sympy expression of torch.export, for given sizes. The sizes may be torch.fx proxies.

    The evaluation applies Python's operators instead of sympy's, as torch's guards do. So ``//`` rounds as in Python.

    Args:
        condition: The condition.
        sizes: The size for each symbol of the condition.
    """
    with quiet(_INTERPRETER):
        return sympy_interp(_PythonsOperators, dict(sizes), condition)


def excludes_one(condition: Any) -> bool:
    """Return whether a guard of torch.export, a sympy expression, excludes no other sizes than 0 and 1 (``s0 != 1``, ``s0 >= 2``).

    torch.export adds such a guard when an operation could broadcast. graphreg does not need the guard, because the operation decides again
    at each call whether it broadcasts.
    """
    bounds = {"!=": (0, 1), ">=": (1, 2), ">": (0, 1)}
    return getattr(condition, "rel_op", "") in bounds and condition.rhs in bounds[condition.rel_op]


def example_sizes(environment: Any) -> dict[Any, Any]:
    """Return the value of each size symbol of an export in the example inputs. ``environment``: the ``ShapeEnv`` of the export."""
    # torch 2.10 has the attribute ``var_to_val`` instead
    return dict(environment.backed_var_to_val if hasattr(environment, "backed_var_to_val") else environment.var_to_val)
