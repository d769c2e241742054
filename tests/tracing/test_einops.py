"""Functions and layers of einops: each is one value of the graph, with a name, a role and its own code, without inputs, too."""

from __future__ import annotations

import copy
import pickle
import threading
from types import FunctionType

import einops
import pytest
import torch
from einops import einsum, pack, parse_shape, rearrange, reduce, repeat, unpack
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn

import graphreg

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
FUNCTIONS = (rearrange, reduce, repeat, einsum, pack, unpack, parse_shape)


class Attention(nn.Module):
    """Every function, as vit_pytorch and x_transformers call them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.cls = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([repeat(self.cls, "1 1 d -> b 1 d", b=x.shape[0]), x], 1)
        q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=2) for each in self.qkv(x).chunk(3, -1))
        scores = einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        y = rearrange(einsum(scores, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")
        both, shapes = pack([y, x], "b * d")
        y, _ = unpack(both, shapes, "b * d")
        return reduce(self.out(y), "b n d -> b d", "mean") * parse_shape(x, "_ n _")["n"]


class Layers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            EinMix("b n d -> b n e", weight_shape="d e", bias_shape="e", d=8, e=8), nn.ReLU(), Rearrange("b n (h d) -> b h n d", h=2),
            nn.Linear(4, 4), Reduce("b h n d -> b (h d)", "sum"), nn.Linear(8, 3),
        )  # fmt: skip


@pytest.mark.parametrize("example_inputs", [None, X], ids=["bare", "inputs"])
def test_functions_are_values_with_names_and_roles(example_inputs: Tensor | None) -> None:
    traced = graphreg.trace(Attention(), example_inputs, front_end="symbolic")
    assert not traced.opaque_modules
    names = [site.name for site in traced.values]
    for name in ("repeat", "rearrange", "rearrange_1", "rearrange_2", "einsum", "einsum_1", "rearrange_3", "pack:0", "unpack:0", "reduce"):
        assert name in names
    hidden = {site.name for site in traced.values if site.role == "hidden"}
    # what is packed is read by a linear layer; q, k and v are no hidden values, as without einops
    assert hidden == {"pack:0"}
    assert {site.name for site in traced.values if site.selectable} >= {"rearrange", "einsum", "pack:0", "unpack:0"}


def test_layers_are_values_with_names_and_roles() -> None:
    traced = graphreg.trace(Layers(), front_end="symbolic")
    assert not traced.opaque_modules
    assert [site.name for site in traced.values if site.role == "hidden"] == ["1", "4"]
    assert not graphreg.trace(Layers(), X, front_end="symbolic").opaque_modules


@pytest.mark.parametrize("make", [Attention, Layers])
@pytest.mark.parametrize("example_inputs", [None, X], ids=["bare", "inputs"])
def test_the_result_is_the_models(make: type[nn.Module], example_inputs: Tensor | None) -> None:
    torch.manual_seed(0)
    model = make()
    verify = example_inputs is not None
    module = graphreg.regularize(model, example_inputs=example_inputs, hidden_dropout=0.0, weight_l2=1e-3, verify=verify)
    # the graph is the same without inputs
    compiled = torch.compile(copy.deepcopy(module), backend="eager", fullgraph=True) if verify else module
    for x in (X, torch.randn(3, 7, 8)) if make is Attention else (X,):
        expected = model(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), next(model.parameters()))
        for each in (module, pickle.loads(pickle.dumps(module)), *([compiled] if x is X else [])):
            output, penalties = each(x)
            assert torch.equal(output, expected)
            assert penalties.keys() == {"weight_l2"}
            (again,) = torch.autograd.grad(output.square().sum(), next(each.parameters()))
            torch.testing.assert_close(again, gradient)
    assert torch.equal(graphreg.strip(module)(X), model(X))


def test_in_place() -> None:
    torch.manual_seed(0)
    model = Attention()
    expected = model(X)
    graphreg.regularize_(model, hidden_dropout=0.0)
    assert torch.equal(model(X), expected)


class Fails(Attention):
    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b n d -> n b d")
        return x if x.sum() > 0 else -x


def test_functions_are_left_as_they_were() -> None:
    codes = [function.__code__ for function in FUNCTIONS]
    graphreg.trace(Attention())
    with pytest.raises(graphreg.TraceError):
        graphreg.trace(Fails(), front_end="symbolic")
    assert [function.__code__ for function in FUNCTIONS] == codes
    assert torch.equal(rearrange(X, "b n d -> n b d"), X.transpose(0, 1))


class Meets(nn.Module):
    """Another thread calls a function of einops while this one is traced; so does the forward itself, on a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(8, 8), X

    def forward(self, x: Tensor) -> Tensor:
        same = list[bool]()
        other = threading.Thread(target=lambda: same.append(torch.equal(rearrange(X, "b n d -> n b d"), X.transpose(0, 1))))
        other.start()
        other.join()
        assert same == [True]
        return self.layer(rearrange(x, "b n d -> n b d")) + rearrange(self.kept, "b n d -> n b d")[:1, :1]


def test_calls_without_traced_values_run_as_ever() -> None:
    assert "rearrange_1" not in [site.name for site in graphreg.trace(Meets(), front_end="symbolic").values]


def test_a_function_with_the_name_of_one_is_no_function_of_einops() -> None:
    def rearrange(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    assert isinstance(einops.rearrange, FunctionType)
    wrapped = torch.fx.Graph()
    node = wrapped.call_function(rearrange, (wrapped.placeholder("x"), wrapped.placeholder("w")))
    assert graphreg.ir.operations.Operations(nn.Module()).is_opaque(node)
