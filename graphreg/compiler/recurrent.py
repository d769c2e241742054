"""The custom operator ``graphreg::recurrent``, which runs a whole recurrent layer and has a backward, for torch.compile.

Dynamo refuses nn.RNN, nn.LSTM and nn.GRU ("Attempted to wrap RNN, GRU, or LSTM"). Inductor unrolls
the time steps of ``aten.lstm``: 60 steps take two minutes to compile, and another length is
compiled anew. This operator runs torch's fused kernels, as eager does.

The forward saves the autograd graph that the kernel records, as eager does. So backward does not
run the forward again, and uses the same masks of the layer's native dropout. The autograd graph
lives exactly as long as the storage of the output tensor ``saved``. If that storage is gone,
because a hook copied autograd's saved tensors elsewhere and back, backward runs the forward again;
if the layer has dropout and is in train mode, backward raises instead.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphreg.errors import GraphRegError
from graphreg.torch_internals.autograd import in_backward, recorded_in_operator
from graphreg.torch_internals.torch_modes import without_modes

KERNELS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu,
}  # fmt: skip
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class SavedGraph(bytearray):
    """The memory of the tensor ``saved`` that the operator returns. Its content is an int64: the key of this object in ``_saved``.

    Attributes:
        edges: The autograd edges of the kernel's outputs.
        leaves: The tensors whose gradients backward computes.
    """

    edges: tuple[GradientEdge, ...]
    leaves: tuple[Tensor, ...]


_numbers = itertools.count(1)
_saved: weakref.WeakValueDictionary[int, SavedGraph] = weakref.WeakValueDictionary()


@torch.library.custom_op("graphreg::recurrent", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def recurrent(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], call: Tensor, mode: str, layers: int, biases: bool,
    dropout: float, training: bool, bidirectional: bool, wanted: Sequence[bool], autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a recurrent layer with torch's fused kernel.

    Args:
        x: the input, [time, batch, features].
        states: h_0, and for an LSTM also c_0.
        weights: the layer's flat weights, in torch's order.
        call: a new tensor for each call. Without it, a compiler would merge two calls with equal
            arguments, though each call draws other dropout masks.
        mode: ``"LSTM"``, ``"GRU"``, ``"RNN_TANH"`` or ``"RNN_RELU"``.
        layers: the number of stacked layers.
        biases: whether the layer has biases.
        dropout: the rate of the dropout between stacked layers, in [0, 1].
        training: whether the layer is in train mode.
        bidirectional: whether the layer runs in both directions.
        wanted: for x, each state and each weight, whether it needs a gradient.
        autocast: the dtype of autocast; None if autocast is off.

    Returns:
        The output; the last h; the last c, empty if the layer is no LSTM; a copy of x for backward;
        and the tensor ``saved``. The copy and ``saved`` are empty if no gradient is wanted.
    """
    kernel = mode, layers, biases, dropout, training, bidirectional, autocast
    if not any(wanted):
        with torch.no_grad():
            out, *last = _run(x, states, weights, *kernel)
        return out.contiguous(), last[0].clone(), last[1].clone() if len(last) > 1 else _none(x), _none(x), _none(x, torch.int64)

    if dropout and training and in_backward():
        raise GraphRegError(
            "a recurrent layer with dropout was run a second time within a backward pass, and would draw other masks than the "
            "forward did. Leave activation_memory_budget and aggressive_recomputation of torch._functorch.config at their "
            "defaults, and do not checkpoint a part of the model that contains the layer."
        )

    # Copy inputs and outputs: the compiler does not know that the autograd graph refers to them,
    # and may reuse their memory.
    copied = x.clone(memory_format=torch.contiguous_format)
    saved, outputs = _recorded(copied, [s.clone() for s in states], weights, kernel, wanted)
    out, *last = (t.clone(memory_format=torch.contiguous_format) for t in outputs)

    # this tensor keeps ``saved`` and its attributes alive
    number = torch.frombuffer(saved, dtype=torch.int64)
    number[0] = next(_numbers)
    _saved[int(number)] = saved
    return out, last[0], last[1] if len(last) > 1 else _none(x), copied, number


def _run(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], mode: str, layers: int, biases: bool, dropout: float,
    training: bool, bidirectional: bool, autocast: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    hx = tuple(states) if mode == "LSTM" else states[0]
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        return KERNELS[mode](x, hx, tuple(weights), biases, layers, dropout, training, bidirectional, False)


def _recorded(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], kernel: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[SavedGraph, tuple[Tensor, ...]]:
    """Run the kernel under autograd. Return what the kernel's backward needs, and the kernel's outputs, detached."""
    # torch runs a custom operator with autograd's dispatch key excluded. Without
    # recorded_in_operator nothing would be recorded.
    with torch.enable_grad(), recorded_in_operator():
        leaves = tuple(t.detach().requires_grad_(need) for t, need in zip((x, *states, *weights), wanted, strict=True))
        # Pass views of x and the states, not the leaves. Autocast converts a leaf only once, so the
        # gradients of its uses would be summed in the lower precision. It converts any other tensor
        # at each use.
        inputs = [leaf.view(leaf.shape) for leaf in leaves[: 1 + len(states)]]
        outputs = _run(inputs[0], inputs[1:], leaves[len(inputs) :], *kernel)
        saved = SavedGraph(8)
        saved.edges, saved.leaves = tuple(map(get_gradient_edge, outputs)), tuple(t for t in leaves if t.requires_grad)
        return saved, tuple(t.detach() for t in outputs)


def _none(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=dtype, device=x.device if dtype is None else "cpu")


@recurrent.register_fake
def _(
    x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], call: Tensor, mode: str, layers: int, biases: bool,
    dropout: float, training: bool, bidirectional: bool, wanted: Sequence[bool], autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x, states, weights, mode, layers * (2 if bidirectional else 1), autocast)
    inputs = x.dtype, states[0].dtype, weights[0].dtype
    dtypes = _dtypes(x.device.type, inputs, mode, states[0].shape[2] != states[-1].shape[2], autocast)
    directions = 2 if bidirectional else 1
    shapes = [(*x.shape[:2], directions * states[0].shape[2]), *(s.shape for s in states)]
    out, *last = (x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    saved = x.new_empty(1 if any(wanted) else 0, dtype=torch.int64, device="cpu")
    return out, last[0], last[1] if len(last) > 1 else _none(x), x.new_empty(x.shape) if any(wanted) else _none(x), saved


def _check(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], mode: str, depth: int, autocast: torch.dtype | None) -> None:
    """Raise GraphRegError at compile time for inputs that the layer refuses; the kernel would raise only when the graph runs."""
    if x.dim() != 3:
        raise GraphRegError(f"the {mode} takes an input of 3 dims, or of 2 without a batch, and this input has {x.dim()}.")
    features, hidden = weights[0].shape[1], weights[1].shape[0] // GATES[mode]
    if x.shape[2] != features:
        raise GraphRegError(f"the {mode} takes {features} features, and the input has {x.shape[2]}: its last axis must be {features}.")
    if x.dtype != weights[0].dtype and autocast is None:
        raise GraphRegError(f"the input is {x.dtype} and the weights of the {mode} are {weights[0].dtype}. Convert one of the two.")
    for state, units in zip(states, (weights[1].shape[1], hidden), strict=False):
        if state.dim() != 3 or state.shape[0] != depth or state.shape[1] != x.shape[1] or state.shape[2] != units:
            got, right = tuple(state.shape), (depth, x.shape[1], units)
            raise GraphRegError(f"an initial state of the {mode} must be {right}, not {got}: [layers x directions, batch, units].")


@cache
def _dtypes(
    device: str, inputs: tuple[torch.dtype, ...], mode: str, projects: bool, autocast: torch.dtype | None
) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a kernel's outputs. Under autocast each kernel has its own rules, so the kernel is run on a tiny example."""
    if autocast is None:
        return (inputs[0],) * (3 if mode == "LSTM" else 2)
    gates = GATES[mode]
    shapes = [(2 * gates, 2), (2 * gates, 1 if projects else 2), (2 * gates,), (2 * gates,), *[(1, 2)] * projects]
    with without_modes(), torch.no_grad():
        x, h = torch.zeros(2, 2, 2, dtype=inputs[0], device=device), torch.zeros(1, 2, 1 if projects else 2, dtype=inputs[1], device=device)
        states = [h, torch.zeros(1, 2, 2, dtype=inputs[1], device=device)] if mode == "LSTM" else [h]
        weights = [torch.zeros(shape, dtype=inputs[2], device=device) for shape in shapes]
        return tuple(t.dtype for t in _run(x, states, weights, mode, 1, True, 0.0, False, False, autocast))


@torch.library.custom_op("graphreg::recurrent_backward", mutates_args=())
def recurrent_backward(
    grads: Sequence[Tensor | None], saved: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], mode: str, layers: int,
    biases: bool, dropout: float, training: bool, bidirectional: bool, wanted: Sequence[bool], autocast: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of those tensors among x, states and weights that are ``wanted``.

    ``grads``: the gradients of the output, h and c; None for a tensor that has no gradient.
    """
    memory = _saved.get(int(saved))
    if memory is None:
        if dropout and training:
            raise GraphRegError(
                "the backward pass of a recurrent layer with dropout needs the masks of the forward, and they are gone: the layer's saved "
                "tensors were copied by saved-tensor hooks (such as save_on_cpu). Leave the hooks out, or set the layer's dropout to 0."
            )
        memory, _ = _recorded(x, states, weights, (mode, layers, biases, dropout, training, bidirectional, autocast), wanted)
    pairs = [(edge, grad) for edge, grad in zip(memory.edges, grads, strict=False) if grad is not None]
    edges, received = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(edges, memory.leaves, received, retain_graph=True, materialize_grads=True)
    return _apart(gradients, received)


def _apart(gradients: Sequence[Tensor], received: Sequence[Tensor]) -> list[Tensor]:
    """Make the tensors contiguous, each with memory of its own: the two biases of a layer share one gradient tensor."""
    taken, apart = {t.untyped_storage().data_ptr() for t in received}, list[Tensor]()
    for grad in gradients:
        contiguous = grad.contiguous()
        apart.append(contiguous.clone() if contiguous.untyped_storage().data_ptr() in taken else contiguous)
        taken.add(contiguous.untyped_storage().data_ptr())
    return apart


@recurrent_backward.register_fake
def _(
    grads: Sequence[Tensor | None], saved: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], mode: str, layers: int,
    biases: bool, dropout: float, training: bool, bidirectional: bool, wanted: Sequence[bool], autocast: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, need in zip((x, *states, *weights), wanted, strict=True) if need]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, states, weights, _, *ctx.kernel = inputs
    wanted = ctx.kernel[-2]
    if any(t.requires_grad and not want for t, want in zip((x, *states, *weights), wanted, strict=True)):
        raise GraphRegError("graphreg::recurrent was called with wanted=False for a tensor that requires a gradient.")
    *_, copied, saved = output
    ctx.mark_non_differentiable(copied, saved)
    ctx.set_materialize_grads(False)
    ctx.states = len(states)
    ctx.save_for_backward(saved, copied, *states, *weights)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, x, *rest = ctx.saved_tensors
    states, weights, wanted = rest[: ctx.states], rest[ctx.states :], ctx.kernel[-2]
    gradients = iter(recurrent_backward(list(grads[:3]), saved, x, states, weights, *ctx.kernel))
    every = [next(gradients) if need else None for need in wanted]
    return every[0], every[1 : 1 + len(states)], every[1 + len(states) :], *[None] * (1 + len(ctx.kernel))


recurrent.register_autograd(_backward, setup_context=_set_up)


def _refused(ctx: Any, *grads: Any) -> Any:
    raise GraphRegError(
        "a compiled recurrent layer cannot be differentiated twice. Call the module without compiling it: in eager, torch's own layer "
        "runs, which can be differentiated twice (on CUDA, under torch.backends.cudnn.flags(enabled=False))."
    )


recurrent_backward.register_autograd(_refused)
