"""Activation checkpointing on the blocks: as little is saved as for the model, and backward has the masks of the forward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, apply_activation_checkpointing, checkpoint_wrapper

import graphreg
from block_nets import Residual, Stack
from saved_tensors import saved_bytes

IMPLEMENTATIONS = [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT]


def checkpointed(module: Any, implementation: CheckpointImpl = CheckpointImpl.NO_REENTRANT) -> Any:
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(module, checkpoint_wrapper_fn=wrapper, check_fn=lambda inner: isinstance(inner, Residual))
    return module


def regularized(**more: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(Stack(4, 64), hidden_dropout=0.2, hidden_l1=0.1, weight_l2=0.1, own_dropout="seeded", rng=3, **more)


def step(module: Any, x: Tensor) -> tuple[list[Any], int]:
    module.zero_grad()
    (output, penalties), size = saved_bytes(lambda: module(x))
    (output.square().mean() + sum(penalties.values())).backward()
    return [output, penalties, [p.grad for p in module.parameters()]], size


@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl.NO_REENTRANT")  # torch 2.10
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_to_flat_and_as_little_is_saved_as_for_the_model(implementation: CheckpointImpl) -> None:
    x = torch.randn(128, 64, requires_grad=True)  # reentrant checkpointing needs an input that requires a gradient
    expected, size_flat = step(regularized(), x)
    ours, size = step(checkpointed(regularized(blocks="layers.*"), implementation), x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    plain = checkpointed(Stack(4, 64), implementation)
    _, size_plain = saved_bytes(lambda: plain(x))
    assert size <= 1.1 * size_plain < 0.5 * size_flat


def test_compiled_whole() -> None:
    x = torch.randn(8, 64)
    expected, _ = step(regularized(), x)
    module = checkpointed(regularized(blocks="layers.*"))
    output, penalties = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    (output.square().mean() + sum(penalties.values())).backward()
    torch.testing.assert_close([output, penalties, [p.grad for p in module.parameters()]], expected)


def test_penalties_on_derivatives_and_attached_ones() -> None:
    x = torch.randn(8, 64)
    expected, _ = step(regularized(contractive=0.1), x)
    ours, _ = step(checkpointed(regularized(contractive=0.1, blocks="layers.*")), x)
    torch.testing.assert_close(ours, expected)
    flat, module = regularized(penalties="attach", scale=1), checkpointed(regularized(penalties="attach", scale=1, blocks="layers.*"))
    for each in (flat, module):
        each(x).square().mean().backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in flat.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_a_wrapper_around_what_is_no_block_is_named_at_the_first_call(front_end: Any) -> None:
    """The wrapper of an opened module is never called: nothing would be recomputed, and nobody would know."""
    x = torch.randn(4, 64)
    says = r"put around layers\.0, layers\.1, layers\.2 and 1 more, .*backward recomputes nothing there.*blocks='layers\.0'\)"
    module = checkpointed(regularized(front_end=front_end, example_inputs=x))
    with pytest.warns(UserWarning, match=says):
        module(x)
    module(x)
    if front_end == "symbolic":
        with pytest.warns(UserWarning, match="backward recomputes nothing there"):
            torch.compile(checkpointed(graphreg.regularize(Stack(1), weight_l2=0.1)), backend="eager")(torch.randn(2, 8))


def test_wrappers_that_are_called_are_not_named() -> None:
    """Of blocks, of layers, and of a module that was wrapped before."""
    x = torch.randn(4, 64)
    checkpointed(regularized(blocks="layers.*"))(x)
    module = regularized()
    apply_activation_checkpointing(module, check_fn=lambda inner: isinstance(inner, torch.nn.Linear))
    module(x)
    model = Stack(1, 64)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    graphreg.regularize(model, weight_l2=0.1)(x)
