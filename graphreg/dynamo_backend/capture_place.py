"""Finds where Dynamo captured a graph: which model was compiled, and from which module's code the graph comes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from graphreg.dynamo_backend.wrappers import innermost_module, module_itself, unwrapped
from graphreg.torch_internals.dynamo import CALLERS_OF_FORWARD, CapturedCode, CompiledCall, captured_code, first_arguments


class Functions(nn.Module):
    """Takes the place of the model if a function was compiled. Its submodules are the modules that the function uses.

    Each submodule has the name of the function's variable that holds it.
    """

    def __init__(self, name: str, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.title = name
        for path, module in modules.items():
            self.add_module(path, module)


def same_model(one: nn.Module, other: nn.Module) -> bool:
    """Return whether both are one model, whatever wrappers are around it; for compiled functions, whether they use the same modules."""
    if isinstance(one, Functions) and isinstance(other, Functions):
        return {id(innermost_module(m)) for m in one.children()} == {id(innermost_module(m)) for m in other.children()}
    return innermost_module(one) is innermost_module(other)


def without_wrappers(model: nn.Module) -> nn.Module:
    """Return a model without its wrappers, as ``unwrapped`` does; for a compiled function, without those of the modules that it uses."""
    if not isinstance(model, Functions):
        return unwrapped(model)
    known: dict[int, nn.Module] = {}
    return Functions(model.title, {name: unwrapped(child, known) for name, child in model.named_children()})


def is_training(model: nn.Module) -> bool:
    """Return whether a model is in train mode; for a compiled function, whether any module that it uses is."""
    modules = list(model.children()) if isinstance(model, Functions) else []
    return any(module.training for module in modules or [model])


def root_of(call: CompiledCall) -> nn.Module:
    """Return the model of a call: the module that was compiled, or a ``Functions`` with the modules that a compiled function uses."""
    function: Any = call.function
    owner = getattr(function, "__self__", None)
    inner = getattr(function, "__wrapped__", None)
    for candidate in (owner, inner):
        if isinstance(candidate, nn.Module):
            return candidate
    used: dict[str, Any] = {}
    if inspect.isfunction(inspect.unwrap(getattr(function, "__func__", function))):
        code = inspect.unwrap(getattr(function, "__func__", function))
        variables = inspect.getclosurevars(code)
        # What the function can name: globals, its closure, attributes of its object, then its
        # arguments.
        used = {**variables.globals, **variables.nonlocals, **(vars(owner) if owner else {})}
        used |= dict(zip(code.__code__.co_varnames[bool(owner) :], call.arguments, strict=False))
    modules = {name: value for name, value in used.items() if isinstance(value, nn.Module)}
    return Functions(getattr(function, "__name__", type(function).__name__), modules)


@dataclass(frozen=True)
class Place:
    """The code that a graph was captured from.

    Attributes:
        path: The path of the module whose method the code is; ``""`` for the model itself.
        code: The name of the function.
        line: The line at which the graph ends, if that is known; else the first line of the function.
        local: The name of the local variable that holds the module; None if no variable does.
        first: Whether the graph begins where the model's forward begins.
        last: Whether the model returns what the graph returns.
        returns: Whether the module at ``path``, a submodule, returns what the graph returns.
        passes: Whether the code is that of ``nn.Module`` or of a wrapper of the model, and passes its arguments on to the model's forward.
    """

    path: str
    code: str
    line: int
    local: str | None
    first: bool
    last: bool
    returns: bool
    passes: bool = False


def place_of(gm: fx.GraphModule, translator: Any, root: nn.Module, paths: Mapping[int, str]) -> Place:
    """Return the place of the graph that Dynamo is compiling. ``paths``: the paths of the model's modules and of their wrappers by id."""
    code = captured_code(translator, gm)
    function = isinstance(root, Functions) and code.name == root.title
    local = None if function else _variable_of_owner(code, paths)
    # In a plain function that a method calls, the innermost method on the stack tells the module.
    path = paths[id(code.values[local])] if local is not None else here(paths)
    owner = module_itself(root if path == "" else root.get_submodule(path))
    outermost = getattr(type(owner).forward, "__code__", None)  # that of a decorator, if forward has one
    calls = code.name in ("forward", *CALLERS_OF_FORWARD, "forward" if outermost is None else outermost.co_name)
    # A compiled function is the whole model. Of a module, only code of its forward is.
    is_model = function or (not isinstance(root, Functions) and path == "" and calls)
    returns = path != "" and calls and not code.broken
    wraps = local is not None and innermost_module(code.values[local]) is not code.values[local]
    passes = code.name in CALLERS_OF_FORWARD or (wraps and path == "")
    return Place(path, code.name, code.line, local, is_model and not code.resumed, is_model and not code.broken, returns, passes)


def _variable_of_owner(code: CapturedCode, paths: Mapping[int, str]) -> str | None:
    """Return the local variable that holds the module whose method the code is; None if none does.

    Such a variable is the method's first argument. After a graph break, Dynamo makes a function of the rest of the method. The arguments
    of that function have another order, and may begin with a submodule. But the method is still running then, and its first argument is
    known.
    """
    if code.resumed:
        owner = next((value for value in first_arguments() if isinstance(value, nn.Module) and id(value) in paths), None)
        return next((name for name, value in code.values.items() if value is owner), None) if owner is not None else None
    name, value = next(iter(code.values.items()), ("", None))
    return name if isinstance(value, nn.Module) and id(value) in paths else None


def here(paths: Mapping[int, str]) -> str:
    """Return the path of the innermost module whose method is running in the compiled call; ``""`` if there is none."""
    return next((paths[id(owner)] for owner in first_arguments() if id(owner) in paths and isinstance(owner, nn.Module)), "")
