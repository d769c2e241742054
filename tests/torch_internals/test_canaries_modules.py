"""Canaries of torch's modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from graphreg.torch_internals import hooked_calls, modules
from graphreg.torch_internals.patching import Changes


def test_bases() -> None:
    """How torch's layers are derived from base classes. It concerns the kinds of operations."""
    dropouts = (nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout())
    assert all(isinstance(layer, modules.DropoutBase) for layer in dropouts)
    norms = (nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.InstanceNorm2d(1), nn.SyncBatchNorm(1))
    assert all(isinstance(layer, modules.BatchNormBase) for layer in norms)
    assert all(isinstance(layer, modules.ConstantPadBase) for layer in (nn.ConstantPad1d(1, 0), nn.ConstantPad3d(1, 0), nn.ZeroPad2d(1)))
    assert all(
        isinstance(layer, modules.ConvolutionBase) for layer in (nn.Conv1d(1, 1, 1), nn.Conv3d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1))
    )


def test_hooks() -> None:
    """How a module keeps its hooks. It concerns the front ends and the refusals."""
    module = nn.Linear(1, 1)
    attributes: dict[str, Any] = vars(module)
    assert all(attributes[name] == {} for name in (*modules.CALL_HOOKS, *modules.STATE_HOOKS))
    hook: Any = lambda *args: None  # noqa: E731
    module.register_forward_hook(hook)
    assert modules.forward_hooks(module) == (hook,) and not modules.has_backward_hooks(module)
    module.register_forward_pre_hook(hook)
    assert modules.forward_hooks(module) == (hook, hook)
    assert modules.has_pre_hooks(module)
    module.register_full_backward_hook(hook)
    assert modules.has_backward_hooks(module) and sum(len(attributes[name]) for name in modules.CALL_HOOKS) == 3
    collecting: Any = lambda *args: None  # noqa: E731
    collecting.__module__ = modules.CAPTURING
    module.register_forward_hook(collecting)
    assert modules.forward_hooks(module) == (hook, hook) and modules.own_hooks(attributes[modules.FORWARD_HOOKS]) == (hook,)
    assert list(modules.collecting_hooks(attributes[modules.FORWARD_HOOKS]).values()) == [collecting]
    modules.drop_forward_hooks(module)
    assert modules.forward_hooks(module) == ()
    before = modules.has_global_hook()
    handle = nn.modules.module.register_module_forward_hook(hook)
    assert modules.has_global_hook() and modules.has_users_global_hook() and not before
    with Changes() as changes, changes:
        modules.put_global_hooks_aside(changes)
        assert not modules.has_global_hook() and not modules.has_users_global_hook()
    handle.remove()
    with FlopCounterMode(display=False):
        assert modules.has_global_hook() and not modules.has_users_global_hook()


def test_calls_with_hooks() -> None:
    """How a module runs its hooks. It concerns hooks on blocks."""
    runs: list[list[Any]] = []
    for own in (False, True):
        module, ran, x = nn.Identity(), list[Any](), torch.ones(1, requires_grad=True)
        assert not hooked_calls.has_users_hooks(module) and not hooked_calls.hooks_take_keywords(module)
        module.register_forward_pre_hook(lambda module, args, ran=ran: ran.append(args) or args[0] * 2)
        added: Any = lambda module, args, kwargs, ran=ran: ran.append(kwargs) or (args, {**kwargs, "a": 1})  # noqa: E731
        module.register_forward_pre_hook(added, with_kwargs=True)
        module.register_forward_hook(lambda module, args, output, ran=ran: ran.append((args, output)) or output * 3)
        module.register_forward_hook(lambda module, args, kwargs, output, ran=ran: ran.append((kwargs, output)), with_kwargs=True)
        module.register_full_backward_hook(lambda module, inputs, outputs, ran=ran: ran.append((inputs, outputs)))
        module.register_full_backward_pre_hook(lambda module, outputs, ran=ran: ran.append(outputs))
        assert hooked_calls.has_users_hooks(module) and hooked_calls.hooks_take_keywords(module)
        machinery: Any = lambda *args, ran=ran: ran.append("machinery")  # noqa: E731
        machinery.__module__ = "torch.distributed.fsdp.of_a_test"
        assert hooked_calls.is_machinery(machinery) and not hooked_calls.is_users_hook(machinery)
        module.forward = lambda x, **kwargs: x + len(kwargs)  # type: ignore[method-assign]
        if own:
            module.register_forward_hook(machinery)
            run: Any = lambda args, kwargs, module=module: module.forward(*args, **kwargs)  # noqa: E731
            output = hooked_calls.call_with_hooks(module, hooked_calls.is_users_hook, run, (x,), {})
        else:
            output = hooked_calls.plain_call(module, x)
        output.sum().backward()
        runs.append([output, *ran, x.grad])
    assert repr(runs[0]) == repr(runs[1]) and float(runs[0][-1]) == 6
    module = nn.Identity()
    setattr(module, hooked_calls.CALL, lambda *args: "called")
    assert module(1) == "called"


def test_own_hooks() -> None:
    """How a module keeps hooks of its own. It concerns blocks, which share everything except hooks with the model's modules."""
    module, twin, seen = nn.Linear(1, 1), nn.Linear(1, 1), list[Any]()
    module.register_forward_hook(lambda inner, args, kwargs, output: seen.append("theirs"), with_kwargs=True)
    module.register_state_dict_pre_hook(lambda *args: None)  # type: ignore[no-untyped-call]
    vars(twin).update(vars(module))
    modules.renew_hooks(twin)
    twin.register_forward_hook(lambda inner, args, kwargs, output: seen.append("ours"), with_kwargs=True, always_call=True)
    twin(torch.ones(1, 1))
    assert seen == ["ours"]
    module(torch.ones(1, 1))
    assert seen == ["ours", "theirs"]
    assert (
        len(vars(twin)["_state_dict_pre_hooks"]) == 1 and vars(twin)["_state_dict_pre_hooks"] is not vars(module)["_state_dict_pre_hooks"]
    )


def test_replicate() -> None:
    """How DataParallel asks a module for a replica. It concerns the refusal of replicas of a model that is regularized in place."""
    module = nn.Linear(1, 1)
    assert getattr(module, modules.REPLICATE)().__dict__["_is_replica"] and "_is_replica" not in vars(module)


def test_state_hooks() -> None:
    """How hooks of state_dict are kept. It concerns rewritten modules, which take them over."""
    module, hook = nn.Linear(1, 1), lambda *args: None
    module._register_state_dict_hook(hook)  # type: ignore[no-untyped-call]
    module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    assert [len(vars(module)[name]) for name in modules.STATE_HOOKS] == [1, 1, 1, 1]


def test_tensor_registries() -> None:
    """How a module keeps its tensors. It concerns rewritten modules, which share them."""
    module = nn.Module()
    module.register_buffer("b", torch.ones(1), persistent=False)
    module.p = nn.Parameter(torch.ones(1))
    assert [list(vars(module)[name]) for name in modules.TENSOR_REGISTRIES] == [["p"], ["b"], ["b"]]
    own = {"in_features", "out_features"}  # what a layer adds
    assert set(modules.REGISTERED) < modules.OWN_ATTRIBUTES == vars(nn.Linear(1, 1)).keys() - own


def test_compiled_modules() -> None:
    """How module.compile() and torch.compile(module) refer to the module. It concerns the handles and the front ends."""
    module = nn.Linear(1, 1)
    assert not modules.compiles_itself(module) and modules.original_of(module) is None
    assert modules.original_of(torch.compile(module, backend="eager")) is module
    assert getattr(torch.compile(module, backend="eager"), modules.COMPILED_MODULE) is module
    module.compile(backend="eager")
    assert modules.compiles_itself(module) and vars(module)[modules.COMPILED_CALL] is not None


def test_bound_call() -> None:
    """How a module is called. It concerns the symbolic front end."""
    module, seen = nn.Identity(), list[int]()
    module.register_forward_hook(lambda *args: seen.append(1))
    with Changes() as changes, changes:
        changes.put(nn.Module, "__call__", None)
        assert modules.bound_call(module)(3) == 3 and seen == [1]


def test_take_state_version() -> None:
    """How a module writes its version into a state_dict. It concerns rewritten modules."""

    class Versioned(nn.Module):
        _version = 7

    module = nn.Linear(1, 1)
    modules.take_state_version(module, Versioned())
    assert module.state_dict()._metadata[""]["version"] == 7  # type: ignore[attr-defined]


def test_kernel_weights() -> None:
    """How a recurrent layer keeps its weights. It concerns recurrent layers that are compiled."""
    layer = nn.LSTM(1, 1)
    assert modules.weight_names(vars(layer)) == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert all(getattr(layer, name) is weight for name, weight in modules.kernel_weights(vars(layer)))


def test_read_weights_again() -> None:
    """How a recurrent layer reads its weights again. It concerns splices on the weights of recurrent layers."""
    layer, x = nn.LSTM(1, 1), torch.ones(1, 1, 1)
    weight = layer.get_parameter("weight_hh_l0")
    torch.func.functional_call(layer, {"weight_hh_l0": weight * 2}, (x,))
    modules.read_weights_again(layer)
    assert dict(modules.kernel_weights(vars(layer)))["weight_hh_l0"] is weight


def test_leave_mask_unread() -> None:
    """How nn.Transformer detects a causal mask. It concerns the export front end."""
    asked = nn.modules.transformer._detect_is_causal_mask
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    assert "_detect_is_causal_mask" in nn.TransformerEncoder.forward.__code__.co_names and asked(mask, None, 3)
    with Changes() as changes, changes:
        modules.leave_mask_unread(changes)
        assert nn.modules.transformer._detect_is_causal_mask(mask, None, 3) is False
        assert nn.modules.transformer._detect_is_causal_mask(mask, True) is True
    assert nn.modules.transformer._detect_is_causal_mask is asked


def test_plain_transformers() -> None:
    """How nn.TransformerEncoder takes its fused kernel. It concerns the export front end."""
    assert torch.backends.mha.get_fastpath_enabled()
    with Changes() as changes, changes:
        modules.plain_transformers(changes)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_cached_weights() -> None:
    layer = parametrizations.orthogonal(nn.Linear(2, 2))
    with parametrize.cached():
        weight = layer.weight
        with Changes() as changes, changes:
            modules.without_cached_weights(changes)
            assert layer.weight is not layer.weight
        assert layer.weight is weight
