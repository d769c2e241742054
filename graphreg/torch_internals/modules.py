"""Private parts of ``nn.Module`` and torch's layers: hooks, compiled calls, base classes, recurrent weights, ``nn.Transformer``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer
from torch.nn.modules.module import _has_any_global_hook

from graphreg.torch_internals.patching import Changes

# Base classes without a public name: of torch's dropout layers, batch and instance norms, constant paddings, and convolutions.
DropoutBase = nn.modules.dropout._DropoutNd
BatchNormBase = nn.modules.batchnorm._NormBase
ConstantPadBase = nn.modules.padding._ConstantPadNd
ConvolutionBase = nn.modules.conv._ConvNd

# The attributes that hold a module's call hooks. For a recurrent layer they are read from ``vars(layer)``, because Dynamo refuses to read
# attributes of the layer.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# The attributes that hold the hooks for saving and loading state. A module that replaces another takes them over.
STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
# The attributes in which a module registers tensors. A module that replaces another shares them with it.
TENSOR_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
COMPILED_CALL = "_compiled_call_impl"  # the attribute that ``module.compile()`` sets; it is neither copied nor pickled

REPLICATE = "_replicate_for_data_parallel"  # the method that ``nn.DataParallel`` calls for a replica on another device

# Returns whether a hook is registered for all modules (``register_module_forward_hook``). Dynamo traces it, so it is torch's own function.
has_global_hook: Callable[[], bool] = _has_any_global_hook


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return a module's forward hooks and forward pre-hooks. Their code is part of the model."""
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def drop_forward_hooks(module: nn.Module) -> None:
    """Remove the forward hooks and pre-hooks of a module. Only for a copy that graphreg calls to observe what the module does."""
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


def renew_hooks(module: nn.Module) -> None:
    """Separate a module's hooks from those of another module with which it shares its attributes.

    Afterwards the module has no call hooks, and its own copies of the hooks for saving and loading state.
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
    """Return the function that calls a module with its hooks, also while torch.fx has replaced ``nn.Module.__call__``."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiles_itself(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called. Calls of the module then go through torch.compile, and cannot be traced."""
    return getattr(module, COMPILED_CALL) is not None


COMPILED_MODULE = "_orig_mod"  # the attribute of torch.compile's wrapper that holds the module


def original_of(module: Any) -> Any:
    """Return the module from which ``torch.compile`` made ``module``; None for any other object."""
    return getattr(module, COMPILED_MODULE, None)


def take_state_version(module: nn.Module, model: nn.Module) -> None:
    """Make a module write the version of the model that it replaces into ``state_dict()._metadata``."""
    module.__dict__["_version"] = model._version


def weight_names(attributes: Mapping[str, Any]) -> list[str]:
    """Return the names of a recurrent layer's weights in the order in which its kernel takes them.

    ``attributes``: ``vars(layer)``, because Dynamo refuses to read attributes of the layer.
    """
    names: list[str] = attributes["_flat_weights_names"]
    return names


def kernel_weights(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Return the weights that a recurrent layer passes to its kernel, by name. With ``weight_norm``, for example, they are not parameters.

    ``attributes``: ``vars(layer)``.
    """
    return zip(attributes["_flat_weights_names"], attributes["_flat_weights"], strict=True)


def read_weights_again(module: nn.Module) -> None:
    """Make a module's recurrent layers read their weights again. After ``functional_call``, they still hold the weights of that call."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer._update_flat_weights()


def leave_mask_unread(changes: Changes) -> None:
    """Until the changes end, keep ``nn.Transformer`` from comparing a mask with the causal one: a trace does not have the mask's values.

    nn.Transformer would pass the result to the attention as ``is_causal``. If it is False, the attention uses the mask itself, and computes
    the same.
    """
    original = transformer._detect_is_causal_mask

    def detected(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        is_causal_mask: bool = original(mask, bool(is_causal), size)
        return is_causal_mask

    changes.put(transformer, "_detect_is_causal_mask", detected)


def plain_transformers(changes: Changes) -> None:
    """Until the changes end, have ``nn.TransformerEncoder`` and the like run layer by layer, as in training.

    In eval mode, they would call a fused kernel, inside which there are no sites. This sets the attribute that
    ``torch.backends.mha.set_fastpath_enabled`` sets, because ``changes`` can restore an attribute.
    """
    changes.put(torch.backends.mha, "_is_fastpath_enabled", False)
