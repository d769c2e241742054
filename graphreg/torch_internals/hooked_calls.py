"""How torch runs the hooks of a module around its forward, and which hooks these are.

``call_with_hooks`` does what ``nn.Module._call_impl`` does, but runs only some of the hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as module_functions
from torch.utils.hooks import BackwardHook

from graphreg.torch_internals.dynamo_marks import skip_as_outermost
from graphreg.torch_internals.modules import CAPTURING
from graphreg.torch_internals.other_threads import is_compiling

CALL = "_call_impl"  # the method by which ``nn.Module.__call__`` and ``module.compile()`` call a module
plain_call: Callable[..., Any] = nn.Module._call_impl

# Where the hooks are defined that act on whatever crosses the border of a call, and need all of it. FSDP2 frees parameters after a forward,
# and gathers them when the gradient of any result comes. The composable checkpoint calls the module again in backward.
_MACHINERY = (CAPTURING, "torch.distributed.fsdp", "torch.distributed._composable")
Hook = Callable[..., Any]
HookChoice = Callable[[Hook], bool]


def is_users_hook(hook: Hook) -> bool:
    """Return whether a hook of a module looks at the model's call, and not at whatever crosses the border of the call."""
    if isinstance(hook, functools.partial):  # in which Dynamo finds no attribute
        return True
    return not str(getattr(hook, "__module__", "")).startswith(_MACHINERY)


def is_machinery(hook: Hook) -> bool:
    """Return the opposite of ``is_users_hook``."""
    return not is_users_hook(hook)


def has_users_hooks(module: nn.Module) -> bool:
    """Return whether hooks of the user's act on the calls of a module: its own, or those of all modules that are not torch's own tools."""
    if not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or module_functions._global_forward_hooks or module_functions._global_forward_pre_hooks
    ):  # fmt: skip
        return False
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(is_users_hook(hook) for hooks in own for hook in hooks.values()):
        return True
    of_all = (module_functions._global_forward_hooks, module_functions._global_forward_pre_hooks)
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hooks in of_all for hook in hooks.values())


def hooks_take_keywords(module: nn.Module) -> bool:
    """Return whether a hook of a module takes the keyword arguments of a call."""
    globally = module_functions._global_forward_hooks_with_kwargs
    return bool(module._forward_hooks_with_kwargs or module._forward_pre_hooks_with_kwargs or globally)


def call_with_hooks(module: nn.Module, chosen: HookChoice, call: Callable[[Any, Any], Any], args: Any, kwargs: Any) -> Any:
    """Return ``call(args, kwargs)``, with those hooks of a module around it that ``chosen`` chooses."""
    before = _chosen(chosen, module_functions._global_forward_pre_hooks, module._forward_pre_hooks)
    after = _chosen(chosen, module_functions._global_forward_hooks, module._forward_hooks)
    always = [*module_functions._global_forward_hooks_always_called, *module._forward_hooks_always_called]
    takes = [*module_functions._global_forward_hooks_with_kwargs, *module._forward_hooks_with_kwargs]
    untyped: Any = module
    full, other = untyped._get_backward_hooks() if module._backward_hooks else ([], [])
    full, early = [*filter(chosen, full)], [*filter(chosen, untyped._get_backward_pre_hooks() if module._backward_pre_hooks else [])]
    if any(chosen(hook) for hook in other):
        raise RuntimeError("a block takes no hook of register_backward_hook; register_full_backward_hook gets the gradients of its inputs")
    ran: list[int] = []
    output: Any = None

    def inner() -> Any:
        nonlocal args, kwargs, output
        for key, hook in before:
            if key in module._forward_pre_hooks_with_kwargs:
                if (changed := hook(module, args, kwargs)) is not None:
                    args, kwargs = changed
            elif (changed := hook(module, args)) is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        backward: Any = BackwardHook(module, full, early) if full or early else None
        if backward is not None:
            args = backward.setup_input_hook(args)
        output = call(args, kwargs)
        for key, hook in after:
            ran.append(key)
            changed = hook(module, args, kwargs, output) if key in takes else hook(module, args, output)
            output = output if changed is None else changed
        return output if backward is None else backward.setup_output_hook(output)

    if is_compiling():
        return inner()
    try:
        return inner()
    except Exception:
        for key, hook in after:
            if key in always and key not in ran:
                with suppress(Exception):
                    hook(module, args, kwargs, output) if key in takes else hook(module, args, output)
        raise


def _chosen(chosen: HookChoice, *hooks: Mapping[int, Hook]) -> list[tuple[int, Hook]]:
    return [(key, hook) for key, hook in chain.from_iterable(each.items() for each in hooks) if chosen(hook)]


# A block that FSDP2 wraps is compiled without FSDP2's hooks, which Dynamo refuses to trace.
for _function in (is_users_hook, is_machinery, has_users_hooks, call_with_hooks, _chosen, is_compiling):
    skip_as_outermost(_function)
