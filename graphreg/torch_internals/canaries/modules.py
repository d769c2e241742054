"""Canaries of torch's modules.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphreg.torch_internals as door
from graphreg.torch_internals import Changes
from graphreg.torch_internals.canaries.canary import canary

if dist.is_available():
    pass


@canary("torch's layers are derived from base classes", "the kinds of operations", "DropoutBase", "BatchNormBase", "ConstantPadBase",
        "ConvolutionBase")  # fmt: skip
def bases() -> None:
    dropouts = (nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    assert all(isinstance(layer, door.DropoutBase) for layer in dropouts)
    norms = (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.InstanceNorm2d(1), nn.SyncBatchNorm(1))
    assert all(isinstance(layer, door.BatchNormBase) for layer in norms)
    assert all(isinstance(layer, door.ConstantPadBase) for layer in (nn.ConstantPad1d(1, 0), nn.ConstantPad3d(1, 0), nn.ZeroPad2d(1)))
    assert all(isinstance(layer, door.ConvolutionBase) for layer in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)))


@canary("a module keeps its hooks", "the front ends and the refusals", "CALL_HOOKS", "STATE_HOOKS", "forward_hooks", "drop_forward_hooks",
        "has_backward_hooks", "has_global_hook", "has_users_global_hook", "put_global_hooks_aside", "own_hooks", "collecting_hooks",
        "CAPTURING", "FORWARD_HOOKS", "has_pre_hooks")  # fmt: skip
def hooks() -> None:
    module = nn.Linear(1, 1)
    attributes: dict[str, Any] = vars(module)
    assert all(attributes[name] == {} for name in (*door.CALL_HOOKS, *door.STATE_HOOKS))
    hook: Any = lambda *args: None  # noqa: E731
    module.register_forward_hook(hook)
    assert door.forward_hooks(module) == (hook,) and not door.has_backward_hooks(module)
    module.register_forward_pre_hook(hook)
    assert door.forward_hooks(module) == (hook, hook)
    assert door.has_pre_hooks(module)
    module.register_full_backward_hook(hook)
    assert door.has_backward_hooks(module) and sum(len(attributes[name]) for name in door.CALL_HOOKS) == 3
    collecting: Any = lambda *args: None  # noqa: E731
    collecting.__module__ = door.CAPTURING
    module.register_forward_hook(collecting)
    assert door.forward_hooks(module) == (hook, hook) and door.own_hooks(attributes[door.FORWARD_HOOKS]) == (hook,)
    assert list(door.collecting_hooks(attributes[door.FORWARD_HOOKS]).values()) == [collecting]
    door.drop_forward_hooks(module)
    assert door.forward_hooks(module) == ()
    before = door.has_global_hook()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert door.has_global_hook() and door.has_users_global_hook() and not before
    with door.Changes() as changes, changes:
        door.put_global_hooks_aside(changes)
        assert not door.has_global_hook() and not door.has_users_global_hook()
    handle.remove()
    with FlopCounterMode(display=False):
        assert door.has_global_hook() and not door.has_users_global_hook()


@canary("a module runs its hooks", "hooks on blocks", "CALL", "plain_call", "call_with_hooks", "has_users_hooks", "hooks_take_keywords",
        "is_users_hook", "is_machinery")  # fmt: skip
def calls_with_hooks() -> None:
    runs: list[list[Any]] = []
    for own in (False, True):
        module, ran, x = nn.Identity(), list[Any](), torch.ones(1, requires_grad=True)
        assert not door.has_users_hooks(module) and not door.hooks_take_keywords(module)
        module.register_forward_pre_hook(lambda module, args, ran=ran: ran.append(args) or args[0] * 2)
        added: Any = lambda module, args, kwargs, ran=ran: ran.append(kwargs) or (args, {**kwargs, "a": 1})  # noqa: E731
        module.register_forward_pre_hook(added, with_kwargs=True)
        module.register_forward_hook(lambda module, args, output, ran=ran: ran.append((args, output)) or output * 3)
        module.register_forward_hook(lambda module, args, kwargs, output, ran=ran: ran.append((kwargs, output)), with_kwargs=True)
        module.register_full_backward_hook(lambda module, inputs, outputs, ran=ran: ran.append((inputs, outputs)))
        module.register_full_backward_pre_hook(lambda module, outputs, ran=ran: ran.append(outputs))
        assert door.has_users_hooks(module) and door.hooks_take_keywords(module)
        machinery: Any = lambda *args, ran=ran: ran.append("machinery")  # noqa: E731
        machinery.__module__ = "torch.distributed.fsdp.of_a_test"
        assert door.is_machinery(machinery) and not door.is_users_hook(machinery)
        module.forward = lambda x, **kwargs: x + len(kwargs)  # type: ignore[method-assign]
        if own:
            module.register_forward_hook(machinery)
            run: Any = lambda args, kwargs, module=module: module.forward(*args, **kwargs)  # noqa: E731
            output = door.call_with_hooks(module, door.is_users_hook, run, (x,), {})
        else:
            output = door.plain_call(module, x)
        output.sum().backward()
        runs.append([output, *ran, x.grad])
    assert repr(runs[0]) == repr(runs[1]) and float(runs[0][-1]) == 6
    module = nn.Identity()
    setattr(module, door.CALL, lambda *args: "called")
    assert module(1) == "called"


@canary("a module keeps hooks of its own", "blocks, which share everything except hooks with the model's modules", "renew_hooks")
def own_hooks() -> None:
    module, twin, seen = nn.Linear(1, 1), nn.Linear(1, 1), list[Any]()
    module.register_forward_hook(lambda inner, args, kwargs, output: seen.append("theirs"), with_kwargs=True)
    module.register_state_dict_pre_hook(lambda *args: None)  # type: ignore[no-untyped-call]
    vars(twin).update(vars(module))
    door.renew_hooks(twin)
    twin.register_forward_hook(lambda inner, args, kwargs, output: seen.append("ours"), with_kwargs=True, always_call=True)
    twin(torch.ones(1, 1))
    assert seen == ["ours"]
    module(torch.ones(1, 1))
    assert seen == ["ours", "theirs"]
    assert (
        len(vars(twin)["_state_dict_pre_hooks"]) == 1 and vars(twin)["_state_dict_pre_hooks"] is not vars(module)["_state_dict_pre_hooks"]
    )


@canary("DataParallel asks a module for a replica", "the refusal of replicas of a model that is regularized in place", "REPLICATE")
def replicate() -> None:
    module = nn.Linear(1, 1)
    assert getattr(module, door.REPLICATE)().__dict__["_is_replica"] and "_is_replica" not in vars(module)


@canary("hooks of state_dict are kept", "rewritten modules, which take them over", "STATE_HOOKS")
def state_hooks() -> None:
    module, hook = nn.Linear(1, 1), lambda *args: None
    module._register_state_dict_hook(hook)  # type: ignore[no-untyped-call]
    module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    assert [len(vars(module)[name]) for name in door.STATE_HOOKS] == [1, 1, 1, 1]


@canary("a module keeps its tensors", "rewritten modules, which share them", "TENSOR_REGISTRIES")
def tensor_registries() -> None:
    module = nn.Module()
    module.register_buffer("b", torch.ones(1), persistent=False)
    module.p = nn.Parameter(torch.ones(1))
    assert [list(vars(module)[name]) for name in door.TENSOR_REGISTRIES] == [["p"], ["b"], ["b"]]


@canary("module.compile() and torch.compile(module) refer to the module", "the handles and the front ends", "COMPILED_CALL",
        "compiles_itself", "original_of", "COMPILED_MODULE")  # fmt: skip
def compiled_modules() -> None:
    module = nn.Linear(1, 1)
    assert not door.compiles_itself(module) and door.original_of(module) is None
    assert door.original_of(torch.compile(module, backend="eager")) is module
    module.compile(backend="eager")
    assert door.compiles_itself(module) and vars(module)[door.COMPILED_CALL] is not None


@canary("a module is called", "the symbolic front end", "bound_call")
def bound_call() -> None:
    module, seen = nn.Identity(), list[int]()
    module.register_forward_hook(lambda *args: seen.append(1))
    with Changes() as changes, changes:
        changes.put(nn.Module, "__call__", None)
        assert door.bound_call(module)(3) == 3 and seen == [1]


@canary("a module writes its version into a state_dict", "rewritten modules", "take_state_version")
def take_state_version() -> None:
    class Versioned(nn.Module):
        _version = 7

    module = nn.Linear(1, 1)
    door.take_state_version(module, Versioned())
    assert module.state_dict()._metadata[""]["version"] == 7  # type: ignore[attr-defined]


@canary("a recurrent layer keeps its weights", "recurrent layers that are compiled", "weight_names", "kernel_weights")
def kernel_weights() -> None:
    layer = nn.LSTM(1, 1)
    assert door.weight_names(vars(layer)) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert all(getattr(layer, name) is weight for name, weight in door.kernel_weights(vars(layer)))


@canary("a recurrent layer reads its weights again", "splices on the weights of recurrent layers", "read_weights_again")
def read_weights_again() -> None:
    layer, x = nn.LSTM(1, 1), torch.ones(1, 1, 1)
    weight = layer.get_parameter("weight_hh_l0")
    torch.func.functional_call(layer, {"weight_hh_l0": weight * 2}, (x,))
    door.read_weights_again(layer)
    assert dict(door.kernel_weights(vars(layer)))["weight_hh_l0"] is weight


@canary("nn.Transformer detects a causal mask", "the export front end", "leave_mask_unread")
def leave_mask_unread() -> None:
    asked = nn.modules.transformer._detect_is_causal_mask
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert "_detect_is_causal_mask" in nn.TransformerEncoder.forward.__code__.co_names and asked(mask, None, 3)
    with Changes() as changes, changes:
        door.leave_mask_unread(changes)
        assert nn.modules.transformer._detect_is_causal_mask(mask, None, 3) is False
        assert nn.modules.transformer._detect_is_causal_mask(mask, True) is True
    assert nn.modules.transformer._detect_is_causal_mask is asked


@canary("nn.TransformerEncoder takes its fused kernel", "the export front end", "plain_transformers")
def plain_transformers() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with Changes() as changes, changes:
        door.plain_transformers(changes)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
