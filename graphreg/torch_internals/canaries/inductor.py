"""Canaries of the compiler's settings, AOTAutograd and Inductor.

In each ``@canary``, the first text completes "torch changed how …", the second "this concerns …"; then come the tested names.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

import graphreg.torch_internals as door
from graphreg.torch_internals.canaries.canary import canary, raising


@canary("the compiler's settings are kept", "graphreg.doctor", "compiler_config", "DYNAMO", "FUNCTORCH", "INDUCTOR", "default_of",
        "has_setting")  # fmt: skip
def settings() -> None:
    known = {
        door.FUNCTORCH: ("activation_memory_budget", 1.0),
        door.INDUCTOR: ("fallback_random", False),
        door.DYNAMO: ("suppress_errors", False),
    }
    for place, (name, default) in known.items():
        assert door.has_setting(place, name) and not door.has_setting(place, "no_such_setting")
        with door.compiler_config(place).patch(**{name: 0.5 if default else True}):
            assert door.default_of(place, name) == default != getattr(door.compiler_config(place), name)
            assert name in door.compiler_config(place).codegen_config()


@canary("AOTAutograd caches graphs", "the backend", "without_autograd_cache")
def without_autograd_cache() -> None:
    with functorch_config.patch(enable_autograd_cache=True), door.without_autograd_cache():
        assert functorch_config.enable_autograd_cache is False


@torch.library.custom_op("graphreg_canary::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype).view(x.shape)


counted.register_fake(torch.empty_like)


@canary(
    "Inductor lowers operators and calls passes",
    "the noise in compiled graphs",
    "lower",
    "pointwise",
    "strides_of",
    "graph_pass",
    "inductor_with",
)
def inductor() -> None:
    passed, lowered = list[int](), list[int]()

    def lowering(x: Any) -> Any:
        lowered.append(1)
        shape = x.get_size()

        def value(ops: Any, index: Any) -> Any:
            place = sum(i * stride for i, stride in zip(index, door.strides_of(shape), strict=True))
            return ops.to_dtype(ops.index_expr(place, torch.int32), torch.float32)

        return door.pointwise(x, torch.float32, shape, value)

    operator = torch.ops.graphreg_canary.counted.default
    assert door.lower({operator: lowering}) and door.lower({operator: lowering})
    change = door.graph_pass(lambda graph: passed.append(len(graph.nodes)), __file__)
    assert isinstance(change.uuid(), bytes) and change.uuid() == door.graph_pass(lambda graph: None, __file__).uuid()
    function = torch.compile(
        lambda x: counted(x) * 2, backend=door.inductor_with({"post_grad_custom_post_pass": change, "fx_graph_cache": False})
    )
    assert function(torch.ones(2, 3)).tolist() == [[0, 2, 4], [6, 8, 10]] and passed and lowered
    with raising(RuntimeError, match="no_such_option"):
        door.inductor_with({"no_such_option": 1})


@canary("Dynamo has a compiler for each graph that it captures", "Inductor's passes for penalties", "add_inductor_options")
def options_of_one_graph() -> None:
    passed: list[int] = []
    change = door.graph_pass(lambda graph: passed.append(len(graph.nodes)), __file__)

    @door.assume_constant_result
    def ask() -> None:
        door.add_inductor_options({"post_grad_custom_post_pass": change})

    def function(x: Tensor) -> Tensor:
        ask()
        return x * 2

    with door.compiler_config(door.INDUCTOR).patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        assert torch.compile(function)(torch.ones(2)).tolist() == [2, 2] and passed
        passed.clear()
        assert torch.compile(lambda x: x * 3)(torch.ones(2)).tolist() == [3, 3] and not passed
        assert torch.compile(function, backend="eager")(torch.ones(2)).tolist() == [2, 2] and not passed


@canary("Dynamo knows how the graph that it captures will be compiled", "noise under CUDA graphs", "inductor_option")
def option_of_one_graph() -> None:
    asked = list[Any]()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def ask() -> None:
        asked.append(door.inductor_option("triton.cudagraphs"))

    def function(x: Tensor) -> Tensor:
        ask()
        return x * 2

    for options in ({"mode": "reduce-overhead"}, {}, {"options": {"triton.cudagraphs": True}}, {"backend": "eager"}):
        torch.compiler.reset()  # two of them are equal
        torch.compile(function, **options)(torch.ones(2))
    assert asked == [True, False, True, None]
