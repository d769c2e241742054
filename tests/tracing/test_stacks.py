"""Layers made of layers (nn.TransformerEncoder and its like): torch.fx keeps one whole, and with example inputs torch.export opens it."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, TraceError


def encoder(layers: int = 1) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True), layers)


class Reader(nn.Module):
    """Reads under a mask that it makes itself, and that torch would look at: is it causal?"""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = encoder(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x, mask))


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_with_example_inputs_its_layers_have_names() -> None:
    model = Reader()
    traced = graphreg.trace(model, X)
    made = graphreg.from_kwargs(traced, hidden_l1=0.1, dropout={"encoder.layers.0.linear1": 0.0})
    module = graphreg.rewrite(traced, graphreg.plan(traced, made), rng=0)
    assert "front end: export, because torch.fx cannot see into encoder" in graphreg.report(module).text(None)
    assert traced.front_end == "export" and not traced.opaque_modules
    names = {name for site in traced.values for name in site.names}
    called = {"self_attn", "dropout1", "norm1", "linear1", "dropout", "linear2", "dropout2", "norm2"}
    assert {"encoder", "encoder.layers.0", *(f"encoder.layers.0.{name}" for name in called)} <= names
    assert [site.name for site in traced.values if site.role == "hidden"] == [
        "encoder.layers.0.norm1",
        "encoder.layers.0.relu",
        "encoder.layers.0.norm2",
    ]
    x = torch.randn(5, 4, 4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(module(x).output, expected)
    torch.testing.assert_close(module.eval()(x).output, model.eval()(x), atol=1e-6, rtol=0)


def test_without_them_or_by_choice_it_is_one_site_and_that_is_said() -> None:
    for given in ({}, {"example_inputs": X, "front_end": "symbolic"}):
        traced = graphreg.trace(nn.Sequential(encoder(), nn.Linear(4, 2)), **given)  # type: ignore[arg-type]
        assert traced.front_end == "symbolic" and "0.layers.0.linear1" not in {site.name for site in traced.values}
        assert traced.opaque_modules == {"0": "torch.fx cannot see into it; torch.export can, with example_inputs"}


class Foreign(nn.Module):
    """What torch.export cannot run."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().sum() > -1e9)


def test_where_torch_export_cannot_trace_it_it_is_opaque() -> None:
    stack = encoder()
    stack.layers[0].dropout = Foreign()
    traced = graphreg.trace(nn.Sequential(stack, nn.Linear(4, 2)), X)
    assert traced.front_end == "symbolic" and list(traced.opaque_modules) == ["0"]
    assert traced.notes[0].startswith("front end: symbolic, because Sequential cannot be exported")


class Cell(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        value: Any = self.layer(x)
        while isinstance(value, (tuple, list)):
            value = value[1]
        return self.out(value)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.LSTM, nn.GRU, nn.Linear])
def test_a_trace_knows_the_tuples_of_torchs_layers(kind: type[nn.Module]) -> None:
    model, x = Cell(kind(4, 4)), torch.ones(3, 4)
    module = graphreg.regularize(model, hidden_l1=0.1)  # no inputs: nothing would show that it went the wrong way
    assert torch.equal(module(x).output, model(x))


class Opaque(nn.Module):
    """An opaque module that returns a tuple as far as a trace can know."""

    def forward(self, x: Tensor) -> Any:
        return (x, x * 2) if x.sum() > -1e9 else x


class Asks(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        value = self.inner(x)
        return self.out(value[0] if builtins.type(value) is tuple else value)  # no trace can answer that one


def test_a_wrong_branch_goes_on_to_export_and_is_no_bare_error() -> None:
    class Shown(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return tuple(x.unbind(0)) if x.dim() else x

    class Kept(Shown):
        """It is opaque to torch.fx because of its hooks."""

    inner = Kept()
    inner.register_full_backward_hook(lambda m, i, o: None)
    x = torch.ones(2, 3, 4)
    with pytest.raises(TraceError, match=r"^Asks cannot be traced symbolically: it runs on the example_inputs, and its trace does not"):
        graphreg.trace(Asks(inner), x, front_end="symbolic")
    assert graphreg.trace(Asks(inner), x).front_end == "export"
    with pytest.raises(GraphRegError, match="torch.export cannot trace it either"):
        graphreg.trace(Asks(Opaque()), torch.ones(3, 4))


def test_a_failed_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TraceError, match="cannot be exported"):
        graphreg.trace(Opaque(), torch.ones(2, 4), front_end="export")
    assert capfd.readouterr() == ("", "")
