"""What ``nn.Module`` and torch's layers keep for themselves: hooks, compiled calls, base classes, what a recurrent layer knows of its
weights, switches of ``nn.Transformer``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import transformer
from torch.nn.modules.module import _has_any_global_hook

from graphreg.torch_internals.patching import Changes

# Base classes of torch's layers that have no public name. ``nn.Dropout`` and its like, batch norms, ``nn.ConstantPad1d`` and so on.
DropoutBase = nn.modules.dropout._DropoutNd
BatchNormBase = nn.modules.batchnorm._NormBase
ConstantPadBase = nn.modules.padding._ConstantPadNd
ConvolutionBase = nn.modules.conv._ConvNd

# Where a module keeps the hooks that run when it is called, by attribute: Dynamo does not look at a recurrent layer, but at its dict.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# ... and those that run when its state is saved or loaded: a module that stands for another takes them over.
STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
# The dicts of tensors, which a module that stands for another shares with it.
TENSOR_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
COMPILED_CALL = "_compiled_call_impl"  # what ``module.compile()`` sets: neither copied nor pickled

# Whether a hook is registered for all modules (``register_module_forward_hook``): Dynamo traces the question, so it is torch's own.
has_global_hook: Callable[[], bool] = _has_any_global_hook


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """The hooks that run before and behind a module's forward: their code is the model's, too."""
    return (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def drop_forward_hooks(module: nn.Module) -> None:
    """Take the hooks from a module that is a copy, whose calls are experiments."""
    module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that run in backward: a graph cannot carry them."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def bound_call(module: nn.Module) -> Callable[..., Any]:
    """A module's call with its hooks, as Python would find it if torch.fx had not its own in the place of ``nn.Module.__call__``."""
    call: Callable[..., Any] = module._call_impl
    return call


def compiles_itself(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called: its calls go through torch.compile then, and cannot be traced."""
    return getattr(module, COMPILED_CALL) is not None


def original_of(module: Any) -> Any:
    """The module inside what ``torch.compile(module)`` gives; None for anything else."""
    return getattr(module, "_orig_mod", None)


def take_state_version(module: nn.Module, model: nn.Module) -> None:
    """Have a module write the version of another class into ``state_dict()._metadata``, as the model that it stands for does."""
    module.__dict__["_version"] = model._version


def weight_names(attributes: Mapping[str, Any]) -> list[str]:
    """The names of a recurrent layer's weights in the order in which its kernel takes them. ``attributes``: ``vars(layer)``, for Dynamo
    refuses to look at the layer itself."""
    names: list[str] = attributes["_flat_weights_names"]
    return names


def kernel_weights(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The weights that a recurrent layer gives to its kernel, by name: others than its parameters under weight_norm and the like."""
    return zip(attributes["_flat_weights_names"], attributes["_flat_weights"], strict=True)


def leave_mask_unread(changes: Changes) -> None:
    """Until the changes end: have ``nn.Transformer`` not look into a mask for whether it is the causal one.

    It does so to say it to the attention beside the mask, and a trace has no values to look at. Not said, the attention reads the mask,
    which is the same function.
    """
    theirs = transformer._detect_is_causal_mask

    def detected(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        is_causal_mask: bool = theirs(mask, bool(is_causal), size)
        return is_causal_mask

    changes.put(transformer, "_detect_is_causal_mask", detected)


def plain_transformers(changes: Changes) -> None:
    """Until the changes end: have ``nn.TransformerEncoder`` and its like run by their layers, as in training, and not by the fused kernel
    of inference, which has no sites. The attribute behind ``torch.backends.mha.set_fastpath_enabled``, as that is what goes back."""
    changes.put(torch.backends.mha, "_is_fastpath_enabled", False)
