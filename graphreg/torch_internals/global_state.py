"""Saves and restores torch's global state: what no tensor and no module holds, and what decides how operations compute.

A forward may change this state and change it back, as ``torch.no_grad().__enter__()`` and ``__exit__`` do. If its trace ends in between,
the change stays, for all that the thread, or the process, computes from then on.

torch has no list of this state. But the names of its functions make one: of the functions of ``torch._C``, each ``set_<name>`` writes what
``get_<name>`` or ``is_<name>`` reads. What follows no such pattern is listed in ``_entries``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils._device
from torch._ops import mode_stack_state_for_pre_dispatch

from graphreg.torch_internals.functorch import leave_levels, levels

# With the parameters of autocast, which are one for each type of device; what can be set only once; and what has more than one number.
_OTHERWISE = ("autocast", "interop", "deterministic_algorithms", "anomaly")
# The types of devices that have an autocast. torch has no list of them in Python.
_AUTOCAST = ("cpu", "cuda", "mtia", "maia", "xpu", "ipu", "hpu", "xla", "privateuseone", "mps")
# The operations that have a precision of float32 of their own. What is set for "all" acts on the others, so it is restored first.
_PRECISIONS = [("generic", "all"), *((backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "conv", "rnn", "matmul"))]
_UNREADABLE = object()  # stands for state that torch cannot tell, such as a precision that was set in the old way and in the new way

_Entry = tuple[str, Callable[[], Any], Callable[[Any], Any]]  # a name, what reads it, what writes it
_torch: Any = torch._C  # torch's own functions: while graphreg traces, it answers what a forward asks through ``torch``
_guards: list[Any] = []  # inference mode ends when the object that began it is freed


class GlobalState:
    """torch's global state at the time when this object is made."""

    def __init__(self) -> None:
        self._saved = [_value(read) for _, read, _ in _ENTRIES]

    def changed(self) -> dict[str, Any]:
        """Return the present values of what has changed since, by name."""
        now = ((name, before, _value(read)) for (name, read, _), before in zip(_ENTRIES, self._saved, strict=True))
        return {name: value for name, before, value in now if before is not _UNREADABLE and value != before}

    def restore(self) -> None:
        """Restore what has changed since. All threads share some of it, as they do in torch's own context managers."""
        for (_, read, write), before in zip(_ENTRIES, self._saved, strict=True):
            if before is not _UNREADABLE and _value(read) != before:
                write(before)


def _value(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RuntimeError, TypeError):  # TypeError: it needs an argument, so it is no state
        return _UNREADABLE


def _entries() -> Iterator[_Entry]:
    # first, since a mode may intercept the functions that write the rest
    yield "torch function modes", _function_modes, _set_function_modes
    yield "dispatch modes", _dispatch_modes, _set_dispatch_modes
    yield "levels of torch.func", levels, leave_levels
    yield "default device", _default_device, _set_default_device
    # before grad mode, which it sets, too
    yield "inference mode", torch.is_inference_mode_enabled, _set_inference_mode
    yield from _named_alike()
    yield "deterministic algorithms", _deterministic, _set_deterministic
    yield "anomaly detection", _anomaly, lambda value: _torch.set_anomaly_enabled(*value)
    yield "fast path of attention", torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled
    yield "autocast cache", _torch.is_autocast_cache_enabled, _torch.set_autocast_cache_enabled
    for device in _AUTOCAST:
        yield f"autocast on {device}", partial(_autocast, device), partial(_set_autocast, device)
    yield "depth of autocast", autocast_depth, _setautocast_depth
    yield "hooks on saved tensors", _saved_tensors_hooks, _set_saved_tensors_hooks
    for where in _PRECISIONS:
        read, write = (partial(getattr(_torch, f"_{what}_fp32_precision_{what}ter"), *where) for what in ("get", "set"))
        yield f"precision of float32 ({' '.join(where)})", read, write


def _named_alike() -> Iterator[_Entry]:
    """Yield what torch._C reads and writes by functions of matching names."""
    for name in dir(torch._C):
        private, is_setter, what = name.partition("set_")
        if not is_setter or private not in ("", "_") or any(each in what for each in _OTHERWISE):
            continue
        readers = [f"{start}{what}" for start in ("_get_", "get_", "_is_", "is_", "_")]
        if what.startswith("sdp_use_"):  # the kernels of attention
            readers = [f"_get_{what.removeprefix('sdp_use_')}_sdp_enabled"]
        write = getattr(torch._C, name)
        for reader in readers:
            if hasattr(torch._C, reader):
                yield what, getattr(torch._C, reader), partial(_write, write)
                break


def _write(write: Callable[..., Any], value: Any) -> None:
    write(*value) if isinstance(value, tuple) else write(value)


def _function_modes() -> tuple[Any, ...]:
    return tuple(_torch._get_function_stack_at(i) for i in range(_torch._len_torch_function_stack()))


def _set_function_modes(modes: tuple[Any, ...]) -> None:
    while _torch._len_torch_function_stack():
        _torch._pop_torch_function_stack()
    for mode in modes:
        _torch._push_on_torch_function_stack(mode)


def _dispatch_modes() -> tuple[int, tuple[Any, Any]]:
    """Return how many dispatch modes are active, and torch.export's two modes."""
    exporting = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    return _torch._len_torch_dispatch_stack(), (exporting.get(0), exporting.get(1))


def _set_dispatch_modes(value: tuple[int, tuple[Any, Any]]) -> None:
    """End all dispatch modes but the outer ones, so many as were active, and restore torch.export's two modes."""
    depth, exporting = value
    while _torch._len_torch_dispatch_stack() > depth:
        _torch._pop_torch_dispatch_stack(None)
    now = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    if (now.get(0), now.get(1)) != exporting:
        now.set(0, exporting[0])
        now.set(1, exporting[1])
        _torch._dispatch_tls_set_dispatch_key_included(_torch.DispatchKey.PreDispatch, any(exporting))


def _default_device() -> tuple[Any, Any]:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None), torch.utils._device.CURRENT_DEVICE


def _set_default_device(value: tuple[Any, Any]) -> None:
    torch._GLOBAL_DEVICE_CONTEXT.device_context, torch.utils._device.CURRENT_DEVICE = value


def _set_inference_mode(mode: bool) -> None:
    guard = _torch._InferenceMode(mode)
    guard.__enter__()
    _guards.append(guard)


def _deterministic() -> tuple[bool, bool]:
    return _torch._get_deterministic_algorithms(), _torch._get_deterministic_algorithms_warn_only()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])  # which tells Inductor, too


def _anomaly() -> tuple[bool, bool]:
    return _torch.is_anomaly_enabled(), _torch.is_anomaly_check_nan_enabled()


def _autocast(device: str) -> tuple[bool, Any]:
    return _torch.is_autocast_enabled(device), _torch.get_autocast_dtype(device)


def _set_autocast(device: str, value: tuple[bool, Any]) -> None:
    _torch.set_autocast_enabled(device, value[0])
    _torch.set_autocast_dtype(device, value[1])


def autocast_depth() -> int:
    """Return how many blocks of autocast this thread has open, those included that switch off what is off.

    At the end of the outermost, torch forgets the weights that it has cast.
    """
    _torch.autocast_increment_nesting()
    return int(_torch.autocast_decrement_nesting())


def _setautocast_depth(depth: int) -> None:
    while (now := autocast_depth()) != depth:
        _torch.autocast_increment_nesting() if now < depth else _torch.autocast_decrement_nesting()
    _torch.clear_autocast_cache()


def _saved_tensors_hooks() -> tuple[Any, ...]:
    """Return the pairs of hooks, the outermost first."""
    found = list[Any]()
    while (pair := _torch._autograd._top_saved_tensors_default_hooks(True)) is not None:
        found.append(pair)
        _torch._autograd._pop_saved_tensors_default_hooks()
    hooks = tuple(reversed(found))
    for pair in hooks:
        _torch._autograd._push_saved_tensors_default_hooks(*pair)
    return hooks


def _set_saved_tensors_hooks(hooks: tuple[Any, ...]) -> None:
    for _ in _saved_tensors_hooks():
        _torch._autograd._pop_saved_tensors_default_hooks()
    for pair in hooks:
        _torch._autograd._push_saved_tensors_default_hooks(*pair)


_ENTRIES = tuple(_entries())
