"""Which operations draw random numbers: those that torch tags so, by whatever name they are called, unless their arguments say no."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphreg
from graphreg import RegularizerError
from graphreg.ir.random_ops import is_random

ATEN = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")}
RANDOM = sorted(
    {
        overload
        for name in ATEN
        if not name.startswith("__") and (packet := getattr(torch.ops.aten, name, None)) is not None and hasattr(packet, "overloads")
        for overload in (getattr(packet, each) for each in packet.overloads())
        if torch.Tag.nondeterministic_seeded in overload.tags
    },
    key=str,
)


def test_each_operator_that_torch_tags_is_found_by_each_of_its_names() -> None:
    graph, found = fx.Graph(), 0
    for overload in RANDOM:
        name = overload._schema.name.removeprefix("aten::")
        functions = [getattr(home, name, None) for home in (torch, F, torch._C._nn, torch.ops.aten)]
        nodes = [graph.call_function(each) for each in (*functions, overload) if callable(each)]
        nodes += [graph.call_method(name)] if hasattr(Tensor, name) else []
        for node in nodes:
            assert is_random(node), node.target
        found += len(nodes)
    assert found > 200


class Calls(nn.Module):
    """A linear layer, then a function."""

    def __init__(self, function: Callable[[Calls, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.a(x))


DRAWS: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda m, h: torch.native_dropout(h, 0.5, m.training)[0], "native_dropout"),
    (lambda m, h: torch.ops.aten.native_dropout(h, 0.5, m.training)[0], "native_dropout"),
    (lambda m, h: torch._C._nn.rrelu_with_noise(h, torch.zeros_like(h), 0.1, 0.3, m.training), "rrelu_with_noise"),
    (lambda m, h: F.rrelu(h, training=m.training), "rrelu"),
]


@pytest.mark.parametrize(
    ("function", "text", "front_end"), [*((*each, "symbolic") for each in DRAWS), (*DRAWS[0], "export"), (*DRAWS[3], "export")]
)
def test_what_draws_and_cannot_be_moved_is_listed(function: Any, text: str, front_end: Any) -> None:
    x = torch.randn(2, 8)
    (dropout,) = graphreg.trace(Calls(function), x, front_end=front_end).native_dropout
    assert dropout.site.name == text
    assert dropout.why_not == f"it draws random numbers by {text}, which is no dropout that graphreg knows"
    with pytest.raises(RegularizerError, match=rf"own_dropout='off' cannot be applied to Calls: {text} .* cannot be moved"):
        graphreg.regularize(Calls(function), own_dropout="off", example_inputs=x, front_end=front_end)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, h: F.rrelu(h), lambda m, h: torch.rrelu(h), lambda m, h: torch.native_dropout(h, 0.5, False)[0],
        lambda m, h: torch.native_dropout(h, 0.0, True)[0], lambda m, h: F.scaled_dot_product_attention(h, h, h),
        lambda m, h: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(h[None, None], h[None, None], h[None, None])[0][0, 0],
        lambda m, h: torch.gru(h[None], h.new_zeros(1, 2, 8), [h.new_zeros(24, 8)] * 2, False, 1, 0.5, True, False, False)[0],
    ],
)  # fmt: skip
def test_what_never_draws_with_its_arguments_is_not(function: Any) -> None:
    assert graphreg.trace(Calls(function), torch.randn(2, 8)).native_dropout == ()


@pytest.mark.parametrize(
    ("layers", "rate", "train", "draws"), [(2, 0.5, True, 1), (1, 0.5, True, 0), (2, 0.0, True, 0), (2, 0.5, False, 0)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_functions_draw_between_stacked_layers(packed: bool, layers: int, rate: float, train: bool, draws: int) -> None:
    """The two overloads have the same number of arguments, in another order."""

    def function(m: Calls, h: Tensor) -> Tensor:
        state, weights = h.new_zeros(layers, 2, 8), [h.new_zeros(24, 8)] * 2 * layers
        more: Any = (False, layers, rate, train, False)
        if packed:
            return torch.gru(h, torch.tensor([2]), state, weights, *more)[0]
        return torch.gru(h[None], state, weights, *more, False)[0][0]

    assert len(graphreg.trace(Calls(function), torch.randn(2, 8)).native_dropout) == draws


def test_an_aten_dropout_is_moved_like_the_function_of_its_name() -> None:
    x, found = torch.randn(2, 8), []
    for dropout in (F.dropout, torch.dropout, torch.ops.aten.dropout, torch.ops.aten.dropout.default):
        torch.manual_seed(0)
        model = Calls(lambda m, h, dropout=dropout: dropout(h, 0.5, m.training))  # type: ignore[misc]
        off = graphreg.regularize(model, own_dropout="off", example_inputs=x)
        torch.testing.assert_close(off(x).output, model.a(x), rtol=0, atol=0)
        found.append(graphreg.regularize(model, own_dropout="seeded", rng=1, example_inputs=x)(x).output)
    assert (found[0] == 0).any()
    for each in found[1:3]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=0)
    # an overload has another name in the graph, so it has other masks
    kept = found[3] != 0
    torch.testing.assert_close(found[3][kept], 2 * model.a(x)[kept])
