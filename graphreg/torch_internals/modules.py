"""Private parts of ``nn.Module`` and torch's layers: hooks, compiled calls, base classes, recurrent weights, ``nn.Transformer``."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as module_functions
from torch.nn.modules import transformer
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from graphreg.torch_internals.checkpointing import WRAPPED_MODULE
from graphreg.torch_internals.other_threads import only_here
from graphreg.torch_internals.patching import Changes

_T = TypeVar("_T")

# The base classes of torch's dropout layers, batch and instance norms, constant paddings, and convolutions. They have no public names.
DropoutBase = nn.modules.dropout._DropoutNd
BatchNormBase = nn.modules.batchnorm._NormBase
ConstantPadBase = nn.modules.padding._ConstantPadNd
ConvolutionBase = nn.modules.conv._ConvNd

# The attributes that hold a module's call hooks (forward and backward hooks). graphreg reads the hooks of a recurrent layer from
# ``vars(layer)``, because Dynamo refuses to read attributes of such a layer.
FORWARD_HOOKS = "_forward_hooks"
CALL_HOOKS = (FORWARD_HOOKS, "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The attributes that hold the hooks for saving and loading state. The rewritten module gets copies of the model's hooks.
STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))  # the attributes that every module has
REGISTERED = ("_parameters", "_buffers", "_modules")  # the attributes in which a module has what is registered with it
# The attributes in which a module registers tensors. The rewritten module shares these dicts and sets with the model.
TENSOR_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
COMPILED_CALL = "_compiled_call_impl"  # the attribute that ``module.compile()`` sets; torch neither copies nor pickles it

REPLICATE = "_replicate_for_data_parallel"  # the method with which ``nn.DataParallel`` makes a replica of a module for another device

# Returns whether any hook is registered for all modules, for example with ``register_module_forward_hook``. Dynamo traces calls of this
# function, so it is torch's own.
has_global_hook: Callable[[], bool] = _has_any_global_hook


_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_pre_hooks", "_global_backward_hooks")


def has_users_global_hook() -> bool:
    """Return whether a hook is registered for all modules that is not one of torch's own tools.

    ``FlopCounterMode``, for example, registers hooks that note which module runs. They change no value, and nobody waits for their calls.
    """
    hooks = (hook for name in _GLOBAL_HOOKS for hook in getattr(module_functions, name).values())
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def put_global_hooks_aside(changes: Changes) -> None:
    """Remove the hooks of all modules for this thread, until the block of ``changes`` ends."""
    for name in _GLOBAL_HOOKS:
        if hooks := getattr(module_functions, name):
            changes.put(module_functions, name, _HooksElsewhere(hooks))


class _HooksElsewhere(OrderedDict[int, Any]):
    """A dict of hooks that is empty for the thread that makes it."""

    def __init__(self, hooks: Mapping[int, Any]) -> None:
        super().__init__()
        self._hooks, self._thread = hooks, threading.get_ident()

    def _seen(self) -> Mapping[int, Any]:
        return {} if threading.get_ident() == self._thread else self._hooks

    def __len__(self) -> int:
        return len(self._seen())

    def __iter__(self) -> Iterator[int]:
        return iter(self._seen())

    def __getitem__(self, key: int) -> Any:
        return self._seen()[key]

    def items(self) -> Any:
        return self._seen().items()

    def values(self) -> Any:
        return self._seen().values()


_LISTS = "graphreg_lists"


def lists_like(own: Callable[..., _T], listing: Callable[..., _T]) -> Callable[..., _T]:
    """Mark a method ``named_modules`` of graphreg's that lists the same modules as ``listing``, for ``modules_by_path``; return it."""
    setattr(own, _LISTS, getattr(listing, _LISTS, listing))
    return own


def modules_by_path(model: nn.Module, once: bool = False) -> dict[str, nn.Module]:
    """Return the modules of a model by path, as ``dict(model.named_modules(remove_duplicate=once))`` does, but in a third of the time.

    ``named_modules`` is a generator within a generator for each level of a model. ``once``: whether a module with several paths counts only
    at the first.
    """
    found, seen = dict[str, nn.Module](), set[nn.Module]()

    def visit(module: nn.Module, path: str) -> None:
        listing = type(module).named_modules
        if getattr(listing, _LISTS, listing) is not nn.Module.named_modules:  # a class of the user's lists its modules in another way
            found.update(module.named_modules(seen, path, once))
            return
        if once:
            if module in seen:
                return
            seen.add(module)
        found[path] = module
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                visit(child, prefix + name)

    visit(model, "")
    return found


def parameters_by_name(model: nn.Module, once: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that are registered in a model by name, also where its class overrides ``named_parameters``.

    ``once``: whether a tied parameter counts only under its first name.
    """
    return dict(nn.Module.named_parameters(model, remove_duplicate=once))


def buffers_by_name(model: nn.Module, once: bool = False) -> dict[str, torch.Tensor]:
    """Return the buffers of a model; otherwise as ``parameters_by_name``."""
    return dict(nn.Module.named_buffers(model, remove_duplicate=once))


# The module of the library transformers whose hooks collect outputs (``output_hidden_states=True``). It installs them at the first call
# that asks, and they stay. They act only while the model's own forward collects, so they do nothing around a call that a graph makes.
CAPTURING = "transformers.utils.output_capturing"


def own_hooks(hooks: Mapping[int, Callable[..., Any]]) -> tuple[Callable[..., Any], ...]:
    """Return the hooks in a dict of hooks, without those by which the library transformers collects outputs."""
    return tuple(hook for hook in hooks.values() if getattr(hook, "__module__", "") != CAPTURING) if hooks else ()


def collecting_hooks(hooks: Mapping[int, Callable[..., Any]]) -> OrderedDict[int, Callable[..., Any]]:
    """Return those in a dict of hooks by which the library transformers collects outputs."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if getattr(hook, "__module__", "") == CAPTURING)


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return a module's forward hooks and forward pre-hooks. Their code is part of the model."""
    after, before = module._forward_hooks, module._forward_pre_hooks
    return own_hooks(after) + own_hooks(before) if after or before else ()


def has_pre_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward pre-hooks, which may replace the arguments of its calls."""
    return bool(own_hooks(module._forward_pre_hooks))


def drop_forward_hooks(module: nn.Module) -> None:
    """Remove the forward hooks and forward pre-hooks of a module.

    Use this only on a copy of the user's module. graphreg calls such a copy in order to observe which arguments a layer writes into.
    """
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


def renew_hooks(module: nn.Module) -> None:
    """Give a module that shares all attributes with another module its own dicts of hooks.

    After the call, the module has no call hooks. It has copies of the other module's hooks for saving and loading state.
    """
    for name, value in list(vars(module).items()):
        if name in CALL_HOOKS or (name.startswith(CALL_HOOKS) and isinstance(value, dict)):
            vars(module)[name] = OrderedDict()
        elif name in STATE_HOOKS:
            vars(module)[name] = copy(value)


def has_backward_hooks(module: nn.Module) -> bool:
    """Return whether a module has backward hooks, which a graph cannot contain."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def bound_call(module: nn.Module) -> Callable[..., Any]:
    """Return the method that calls a module with its hooks. The method also works during a trace, when torch.fx replaces ``__call__``."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiles_itself(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called. If so, calls of the module go through torch.compile, and cannot be traced."""
    return getattr(module, COMPILED_CALL) is not None


COMPILED_MODULE = "_orig_mod"  # the attribute in which torch.compile's wrapper holds the original module


def original_of(module: Any) -> Any:
    """Return the original module inside the wrapper that ``torch.compile`` made; None if ``module`` is not such a wrapper."""
    return getattr(module, COMPILED_MODULE, None)


_WRAPPERS = {  # each key is the name of a wrapper's class; the value is the attribute that holds the module
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": COMPILED_MODULE,
    "CheckpointWrapper": WRAPPED_MODULE,
}


def wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper of torch's: of torch.compile, checkpointing, or parallel training. None for any other module."""
    kinds = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    attribute = next((_WRAPPERS[name] for name in kinds if name in _WRAPPERS), "")
    if attribute not in module._modules:  # in a module of torch.jit this is no dict, and has no ``get``
        return None
    return module._modules[attribute]


def modules_in_wrappers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Yield the modules of a model without wrappers of torch's: the path that each would have, the module, and the wrappers around it."""
    wrappers = list[nn.Module]()
    while (inner := wrapped_module(module)) is not None:
        wrappers.append(module)
        module = inner
    yield path, module, wrappers
    for name, child in module._modules.items():
        if child is not None:
            yield from modules_in_wrappers(child, f"{path}.{name}" if path else name)


def take_state_version(module: nn.Module, model: nn.Module) -> None:
    """Make ``module``, which replaces ``model``, write the model's ``_version`` into ``state_dict()._metadata``."""
    module.__dict__["_version"] = model._version


def weight_names(attributes: Mapping[str, Any]) -> list[str]:
    """Return the names of a recurrent layer's weights, in the order in which the layer's kernel takes the weights.

    ``attributes``: ``vars(layer)``, because Dynamo refuses to read attributes of the layer.
    """
    names: list[str] = attributes["_flat_weights_names"]
    return names


def kernel_weights(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return (name, weight) for each weight that a recurrent layer passes to its kernel.

    The weights need not be parameters: with ``weight_norm``, for example, they are not.

    ``attributes``: ``vars(layer)``.
    """
    return zip(attributes["_flat_weights_names"], attributes["_flat_weights"], strict=True)


def read_weights_again(module: nn.Module) -> None:
    """Make the recurrent layers of a module collect their weights again.

    A recurrent layer keeps a list of its weights. After ``functional_call``, this list still holds the weights of that call.
    """
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer._update_flat_weights()


def leave_mask_unread(changes: Changes) -> None:
    """Prevent ``nn.Transformer`` from comparing its mask with a causal mask, until the block of ``changes`` ends.

    The comparison needs the values of the mask, which a trace does not have. ``nn.Transformer`` passes the result of the comparison to the
    attention as ``is_causal``. With ``is_causal=False``, the attention uses the mask itself, and computes the same output.
    """
    original = transformer._detect_is_causal_mask

    def detected(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        is_causal_mask: bool = original(mask, bool(is_causal), size)
        return is_causal_mask

    changes.put(transformer, "_detect_is_causal_mask", only_here(detected, original))


def plain_transformers(changes: Changes) -> None:
    """Make ``nn.TransformerEncoder`` and similar layers call their sublayers, as in train mode, until the block of ``changes`` ends.

    In eval mode, these layers would call a fused kernel instead, and the values inside a kernel are not sites. The public
    ``torch.backends.mha.set_fastpath_enabled`` is a switch for all threads. So the function replaces the one that the layers ask.
    """
    changes.put(torch.backends.mha, "get_fastpath_enabled", only_here(lambda: False, torch.backends.mha.get_fastpath_enabled))


def without_cached_weights(changes: Changes) -> None:
    """Compute parametrized weights anew, also within ``parametrize.cached()``, until the block of ``changes`` ends; leave its cache alone.

    Otherwise the cache would have fake tensors, or those of a run whose graph autograd has forgotten.
    """
    changes.put(parametrize, "_cache_enabled", 0)
    changes.put(parametrize, "_cache", {})
