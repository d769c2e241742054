"""Canaries of the compiler's settings, AOTAutograd and Inductor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from graphreg.torch_internals import config, dynamo_marks, inductor


def test_settings() -> None:
    """How the compiler's settings are kept. It concerns graphreg.doctor."""
    known = {
        config.FUNCTORCH: ("activation_memory_budget", 1.0),
        config.INDUCTOR: ("fallback_random", False),
        config.DYNAMO: ("suppress_errors", False),
    }
    for place, (name, default) in known.items():
        assert config.setting_of(place, "no_such_setting") is None
        with config.compiler_config(place).patch(**{name: 0.5 if default else True}):
            assert config.setting_of(place, name) == (getattr(config.compiler_config(place), name), default) != (default, default)
            assert name in config.compiler_config(place).codegen_config()


def test_without_autograd_cache() -> None:
    """How AOTAutograd caches graphs. It concerns the backend."""
    with functorch_config.patch(enable_autograd_cache=True), inductor.without_autograd_cache():
        assert functorch_config.enable_autograd_cache is False


@torch.library.custom_op("graphreg_canary::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype).view(x.shape)


counted.register_fake(torch.empty_like)


def test_inductor() -> None:
    """How Inductor lowers operators and calls passes. It concerns the noise in compiled graphs."""
    passed, lowered = list[int](), list[int]()

    def lowering(x: Any) -> Any:
        lowered.append(1)
        shape = x.get_size()

        def value(ops: Any, index: Any) -> Any:
            place = sum(i * stride for i, stride in zip(index, inductor.strides_of(shape), strict=True))
            return ops.to_dtype(ops.index_expr(place, torch.int32), torch.float32)

        return inductor.pointwise(x, torch.float32, shape, value)

    operator = torch.ops.graphreg_canary.counted.default
    assert inductor.register_lowerings({operator: lowering}) and inductor.register_lowerings({operator: lowering})
    change = inductor.graph_pass(lambda graph: passed.append(len(graph.nodes)), __file__)
    assert isinstance(change.uuid(), bytes) and change.uuid() == inductor.graph_pass(lambda graph: None, __file__).uuid()
    function = torch.compile(
        lambda x: counted(x) * 2, backend=inductor.inductor_with({"post_grad_custom_post_pass": change, "fx_graph_cache": False})
    )
    assert function(torch.ones(2, 3)).tolist() == [[0, 2, 4], [6, 8, 10]] and passed and lowered
    with pytest.raises(RuntimeError, match="no_such_option"):
        inductor.inductor_with({"no_such_option": 1})


def test_options_of_one_graph() -> None:
    """How Dynamo has a compiler for each graph that it captures. It concerns Inductor's passes for penalties."""
    passed: list[int] = []
    change = inductor.graph_pass(lambda graph: passed.append(len(graph.nodes)), __file__)

    @dynamo_marks.assume_constant_result
    def ask() -> None:
        inductor.add_inductor_options({"post_grad_custom_post_pass": change})

    def function(x: Tensor) -> Tensor:
        ask()
        return x * 2

    with config.compiler_config(config.INDUCTOR).patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        assert torch.compile(function)(torch.ones(2)).tolist() == [2, 2] and passed
        passed.clear()
        assert torch.compile(lambda x: x * 3)(torch.ones(2)).tolist() == [3, 3] and not passed
        assert torch.compile(function, backend="eager")(torch.ones(2)).tolist() == [2, 2] and not passed


def test_option_of_one_graph() -> None:
    """How Dynamo knows how the graph that it captures will be compiled. It concerns noise under CUDA graphs."""
    asked = list[Any]()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def ask() -> None:
        asked.append(inductor.inductor_option("triton.cudagraphs"))

    def function(x: Tensor) -> Tensor:
        ask()
        return x * 2

    for options in ({"mode": "reduce-overhead"}, {}, {"options": {"triton.cudagraphs": True}}, {"backend": "eager"}):
        torch.compiler.reset()  # two of them are equal
        torch.compile(function, **options)(torch.ones(2))
    assert asked == [True, False, True, None]
