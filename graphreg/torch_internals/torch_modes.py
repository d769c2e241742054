"""torch's modes (``TorchFunctionMode``, ``TorchDispatchMode``, modes of tracers): finds the active modes, and turns modes off."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils._python_dispatch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._ops import _set_mode_pre_dispatch, mode_stack_state_for_pre_dispatch, unset_mode_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import has_side_effect
from torch.jit._script import call_prepare_scriptable_func_impl
from torch.utils._python_dispatch import _disable_current_modes

from graphreg.torch_internals.dynamo_marks import assume_constant_result, disable
from graphreg.torch_internals.functorch import innermost_transform
from graphreg.torch_internals.fx import traces_here
from graphreg.torch_internals.interpreter import outwards
from graphreg.torch_internals.other_threads import exports_here
from graphreg.torch_internals.patching import Changes

# Opens a block in which no dispatch mode is active, not even a tracer's, so that operators run directly on the tensors.
without_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
# ``operator_modes`` returns the number of active dispatch modes. ``jit_trace`` returns the state of the running torch.jit trace, or None.
# Both are torch's own functions, because each draw of noise calls them, and Python wrappers would be slower.
operator_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
jit_trace: Callable[[], Any] = torch._C._get_tracing_state


def jit_namespace() -> dict[str, Any]:
    """Return the global namespace of the code by which ``torch.jit.isinstance`` checks a class."""
    namespace: dict[str, Any] = torch.jit.isinstance.__globals__["_isinstance"].__globals__
    return namespace


def is_scripted_within() -> bool:
    """Return whether torch.jit.script compiles a module that contains another one, whose ``__prepare_scriptable__`` calls this function."""
    code = call_prepare_scriptable_func_impl.__code__
    frame = next(frame for frame in outwards(sys._getframe(1)) if frame.f_code is code or frame.f_back is None)
    return frame.f_back is not None and frame.f_back.f_code is code


class _Stance:
    """torch.compile's stance, which is "force_eager" as long as ``blocks`` is not empty. All threads share it.

    Attributes:
        blocks: The blocks that ``uncompiled`` has opened.
        own: The stance that was there before; None if nothing has replaced it.
    """

    def __init__(self) -> None:
        self.lock, self.blocks = threading.Lock(), set[object]()
        self.own: Any = None

    def settle(self) -> None:
        """Set the stance. It is right again after an interrupt at any step, once this is called again."""
        if (dynamo := sys.modules.get(_FRAMES)) is None:  # then nothing is compiled
            return
        if self.blocks and self.own is None:
            self.own = vars(dynamo)["_stance"]
        if self.blocks:
            vars(dynamo)["_stance"] = vars(dynamo)["DynamoStance"]("force_eager")
        elif self.own is not None:
            vars(dynamo)["_stance"] = self.own
            self.own = None


_FRAMES = "torch._dynamo.eval_frame"
_stance = _Stance()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let code that was given to torch.compile run in eager within the block.

    The block has trial runs of a model, under a dispatch mode or on fake tensors. There, Dynamo would leave such code to eager, too, but
    for good: it never again looks at a code object that it has met under a dispatch mode. Or it would compile the code for fake tensors.
    """
    if get_eval_frame_callback():  # code that is compiled may not change the stance
        yield
        return
    block = object()

    def leave() -> None:
        with _stance.lock:
            _stance.blocks.discard(block)
            _stance.settle()

    with Changes() as changes, changes:
        changes.later(leave)
        with _stance.lock:
            _stance.blocks.add(block)
            _stance.settle()
        yield


class TorchDispatchMode(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """torch's base class of dispatch modes, whose subclasses do not import Dynamo at their first use.

    torch wraps ``__torch_dispatch__`` of each class, so that Dynamo does not compile it. The wrapper imports Dynamo. Here, a mark does the
    same.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: code that is compiled for the first time within the block, such as ``torch.cond``, is compiled as outside of it."""
        return True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]
        disable()(cls.__torch_dispatch__)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@assume_constant_result
def is_exporting() -> bool:
    """Return whether torch.export is tracing in this thread.

    The public ``torch.compiler.is_exporting()`` is True in all threads meanwhile, and up to torch 2.12 in all code that Dynamo traces.
    """
    return bool(torch.compiler._is_exporting_flag) and exports_here()


def tracer_here() -> str:
    """Return what traces this thread, or has its tensors without data: a tracer of torch or ``FakeTensorMode``; ``""`` if nothing does."""
    if jit_trace() is not None:
        return "torch.jit.trace"
    if is_exporting():
        return "torch.export"
    if traces_here():
        return "a trace of torch.fx (symbolic_trace, make_fx)"
    if innermost_transform() is not None:
        return "a transform of torch.func"
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return "FakeTensorMode" if any(isinstance(mode, FakeTensorMode) for mode in modes) else ""


def is_functionalized() -> bool:
    """Return whether AOTAutograd is tracing.

    If outputs of its graph share storage, AOTAutograd makes these outputs again after the graph has run, as views of their base.
    """
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def is_gradient_switch(function: object) -> bool:
    """Return whether a function that a ``TorchFunctionMode`` intercepts is the one with which ``torch.no_grad`` switches grad mode."""
    return function is torch._C._set_grad_enabled


@has_side_effect
def gradients_switched(on: bool) -> bool:
    """Switch grad mode, and return whether it was on. In a graph, two such nodes stand for a block of ``torch.no_grad``."""
    was: bool = torch.is_grad_enabled()
    torch._C._set_grad_enabled(on)
    return was


@contextmanager
def without_functions() -> Iterator[None]:
    """Open a block in which neither function modes nor tensor subclasses intercept calls.

    ``torch._C.DisableTorchFunction`` does the same, but an interrupt may come at the end of its block, before Python calls ``__exit__``.
    Then no mode intercepts calls in this thread any more, and torch.fx cannot trace.
    """
    with Changes() as changes, changes:
        torchs: Any = torch._C
        changes.later(partial(torchs._set_torch_function_state, torchs._get_torch_function_state()))
        torchs._set_torch_function_state(torchs._TorchFunctionState.ALL_DISABLED)
        yield


@contextmanager
def without_proxies() -> Iterator[None]:
    """Open a block in which torch.export records nothing.

    ``proxy_tensor.disable_proxy_modes_tracing`` does the same, but is slow: at the end of its block, it clears the caches of all operators
    that were used before. This function sets the mode directly. That is safe, because torch's own dispatch of operators does the same.
    """
    modes = mode_stack_state_for_pre_dispatch()  # type: ignore[no-untyped-call]
    mode = modes.get(0)
    try:
        unset_mode_pre_dispatch(torch._C._TorchDispatchModeKey.PROXY)  # type: ignore[no-untyped-call]
        yield
    finally:
        if modes.get(0) is None:
            _set_mode_pre_dispatch(mode)  # type: ignore[no-untyped-call]
