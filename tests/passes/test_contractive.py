from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import graphreg
from graphreg.passes import Contractive
from two_layers import BEFORE, TwoLayers, X, number, text


def penalty(model: nn.Module, regularizer: Contractive, *inputs: Tensor) -> Tensor:
    return next(iter(graphreg.regularize(model, regularizer, rng=0)(*inputs).penalties.values()))


def test_before_and_after() -> None:
    module = graphreg.regularize(TwoLayers(), contractive=1.0)
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
x_wrt = self.graphreg_rules.x_wrt(x)
a = self.a(x_wrt)
act = self.act(a)
contractive = self.graphreg_rules.contractive({'act': act}, {'x': x_wrt}, key)
b = self.b(act)
return graphreg_Regularized(b, {'contractive': contractive})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_before_and_after_among_splices_with_respect_to_a_hidden_value() -> None:
    """What it differentiates by is the value before the splices there, and what it differentiates is behind them."""
    module = graphreg.regularize(
        TwoLayers(), dropout={"act": 0.5}, output_noise=0.1, contractive={"weight": 1.0, "pattern": ("act", "b"), "wrt": ("x", "act")}
    )
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
x_wrt = self.graphreg_rules.x_wrt(x)
a = self.a(x_wrt)
act = self.act(a)
act_wrt = self.graphreg_rules.act_wrt(act)
act_dropout = self.graphreg_rules.act_dropout(act_wrt, key)
b = self.b(act_dropout)
b_output_noise = self.graphreg_rules.b_output_noise(b, key)
contractive = self.graphreg_rules.contractive({'act': act_dropout, 'b': b_output_noise}, {'x': x_wrt, 'act': act_wrt}, key)
return graphreg_Regularized(b_output_noise, {'contractive': contractive})"""
    )
    assert text(graphreg.strip(module).code) == BEFORE


def test_by_hand() -> None:
    """x A: (1, 2), (3, -0.5). dh/dx: diag(1, -1), diag(1, 0); dy/dx: (2, -4), (2, 0); dy/dh: (2, 4). The same by any signs."""
    for estimator in ("exact", "projection"):
        for site, wrt, value in (("act", "*", (2 + 1) / 2), ("b", "*", (20 + 4) / 2), ("b", "act", 20), ("act", "act", 2)):
            found = penalty(TwoLayers(), Contractive(site, 0.5, wrt=wrt, estimator=estimator), X)
            assert number(found) == 0.5 * value, (estimator, site, wrt)
            assert found.dim() == 0 and found.dtype == torch.float32


def test_several_sites_and_several_wrt_by_hand() -> None:
    """Averaged over the sites, of which one is reached from one of the two, summed over what it differentiates by."""
    found = penalty(TwoLayers(), Contractive(("act", "b"), 1.0, wrt=("x", "a"), estimator="exact"), X)
    of_act, of_b = (3 + 3) / 2, (24 + 24) / 2  # with respect to x, and to x A
    assert number(found) == (of_act + of_b) / 2


def test_gradient_by_hand() -> None:
    """Of (sum over active units of |A_j|²) / 2: unit 1 is active twice, unit 2 once."""
    model = TwoLayers()
    penalty(model, Contractive("act", 1.0, estimator="exact"), X).backward()
    assert model.a.weight.grad.tolist() == [[2, 0], [0, -1]]
    assert model.b.weight.grad is None


def test_the_mean_by_hand() -> None:
    """mean(h) = (h11 + h12 + h21 + h22) / 4: slopes (1, -1), (1, 0) over 4, squared and averaged over the four elements of x."""
    model = TwoLayers()
    found = penalty(model, Contractive("act", 1.0, estimator="mean"), X)
    assert number(found) == (3 / 16) / 4
    found.backward()
    # slopes of x: columns of A summed over the active units, so (A_1j + A_2j, A_1j), each 2 s / 16 / 4
    assert model.a.weight.grad.tolist() == [[2 * (1 + 1) / 64, 2 * -1 / 64], [2 * 1 / 64, 2 * -1 / 64]]


def test_the_closed_form_of_a_sigmoid_layer() -> None:
    """Rifai et al. 2011, section 3: the sum over units of (h (1 - h))² |W_j|²."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 5), nn.Sigmoid(), nn.Linear(5, 2)).double(), torch.randn(6, 7, dtype=torch.float64)
    found = penalty(model, Contractive("1", 1.0, estimator="exact"), x)
    h = model[1](model[0](x))
    closed = ((h * (1 - h)).square() * model[0].weight.square().sum(1)).sum() / 6
    torch.testing.assert_close(found, closed, rtol=1e-12, atol=0)
    parameters = list(model[0].parameters())
    for ours, theirs in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(closed, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# --- the Jacobian of the batch, by torch.func -----------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Conv(nn.Module):
    """Batch norm in train mode, which couples the examples; a residual; both kinds of pooling; a group norm."""

    def __init__(self, statistics: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=statistics)
        self.pool, self.mean, self.group = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.GroupNorm(2, 4)
        self.again, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.norm(self.conv(x))))
        h = self.mean(self.group(h + torch.tanh(self.again(h))))
        return self.head(h.flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(F.gelu(self.up(x + context)))


class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


# by name: the model, the site (all is differentiated up to there), what computes that, and the shape of its input
ORACLES: dict[str, tuple[Callable[[], nn.Module], str, Callable[..., Tensor], tuple[int, ...]]] = {
    "mlp": (Mlp, "layers.3", lambda m, x: m.layers[:4](x), (3, 5)),
    "conv": (Conv, "head", lambda m, x: m(x), (3, 2, 4, 4)),
    "attention": (Attention, "down", lambda m, x: m(x), (2, 3, 4)),
    "nn.MultiheadAttention": (MultiheadAttention, "norm", lambda m, x: m.norm(x + m.attention(x, x, x, need_weights=False)[0]), (2, 3, 4)),
    "gru": (lambda: Recurrent(nn.GRU), "rnn:out", lambda m, x: m.rnn(x)[0], (2, 3, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM), "rnn:out", lambda m, x: m.rnn(x)[0], (2, 3, 3)),
    "elman": (lambda: Recurrent(nn.RNN), "rnn:out", lambda m, x: m.rnn(x)[0], (2, 3, 3)),
}


def by_jacrev(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """The squared norm of the Jacobian of the batch, an example."""
    twin = model
    if isinstance(model, Conv):  # the update of running statistics cannot run under vmap
        twin = Conv(statistics=False).double()
        for own, other in zip(twin.modules(), model.modules(), strict=True):
            own._parameters.update(other._parameters)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda x: ORACLES[name][2](twin, x), chunk_size=1)(x)
    assert isinstance(jacobian, Tensor)
    return jacobian.square().sum() / len(x)


@pytest.mark.parametrize("name", ORACLES)
def test_the_jacobian_of_the_batch(name: str) -> None:
    make, site, _, shape = ORACLES[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    found, oracle = penalty(model, Contractive(site, 1.0, estimator="exact"), x), by_jacrev(name, model, x)
    torch.testing.assert_close(found, oracle, rtol=1e-10, atol=1e-12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options: Any = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(oracle, parameters, **options)
    for ours, theirs in zip(torch.autograd.grad(found, parameters, **options), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp", "conv", "attention"])
def test_many_projections_average_to_the_exact_value(name: str) -> None:
    """Within four standard errors, on two sites at once; of four directions a call the variance is a quarter."""
    many, other = (100, "layers.1") if name == "mlp" else (500, "tanh" if name == "conv" else "up")
    make, site, _, shape = ORACLES[name]
    torch.manual_seed(1)
    model, x, sites = make().double(), torch.randn(shape, dtype=torch.float64), (site, other)
    exact = number(penalty(model, Contractive(sites, 1.0, estimator="exact"), x))
    variances = []
    for n, calls in ((1, 4 * many), (4, many)):
        module = graphreg.regularize(model, Contractive(sites, 1.0, n=n), rng=n)
        draws = [number(module(x).penalties["contractive"]) for _ in range(calls)]
        error = statistics.stdev(draws) / math.sqrt(calls)
        assert abs(statistics.fmean(draws) - exact) < 4 * error
        assert error < 0.05 * exact
        variances.append(statistics.variance(draws))
    assert 0.15 < variances[1] / variances[0] < 0.4


# --- bad input ------------------------------------------------------------------------------------------------------


def test_options_out_of_range() -> None:
    for options, sentence in (
        ({"weight": -1.0}, "Contractive: weight=-1.0 is not allowed; weight must be 0 or more."),
        ({"estimator": "trace"}, "Contractive: estimator='trace' is not allowed; estimator must be 'projection', 'exact' or 'mean'."),
        ({"n": 0}, "Contractive: n=0 is not allowed; n must be a whole number, 1 or more."),
        ({"n": 1.0}, "Contractive: n=1.0 is not allowed; n must be a whole number, 1 or more."),
        ({"n": True}, "Contractive: n=True is not allowed; n must be a whole number, 1 or more."),
        ({"n": 2, "estimator": "exact"}, "Contractive: n=2 is not allowed; n must be left out: estimator='exact' draws nothing."),
        ({"always": "yes"}, "Contractive: always='yes' is not allowed; always must be True or False."),
    ):
        with pytest.raises(graphreg.RegularizerError, match=f"^{re.escape(sentence)}$"):
            Contractive(**{"weight": 1.0, **options})  # type: ignore[arg-type]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


TOKENS = torch.tensor([[0, 1, 2], [3, 4, 0]])


def test_a_wrt_that_selects_nothing() -> None:
    with pytest.raises(graphreg.NoMatchError, match=r"'nope' of wrt of Contractive matches no value of TwoLayers|'nope' matches no value"):
        graphreg.regularize(TwoLayers(), Contractive("act", 1.0, wrt="nope"))
    with pytest.raises(graphreg.NoMatchError, match="floating-point inputs"):
        graphreg.regularize(Tokens(), Contractive("tanh", 1.0))


class Counts(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_wrt_of_integers() -> None:
    """Without example inputs it shows at the call; a hidden value has a derivative."""
    sentence = re.escape(
        "Contractive contractive: wrt selects integers only (x), which have no derivative. "
        "Select a hidden value, e.g. wrt='embedding'; graphreg.names(model) lists them."
    )
    module = graphreg.regularize(Counts(), Contractive("act", 1.0))
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        module(torch.tensor([[1, 2], [3, 4]]))
    model = Tokens()
    found = penalty(model, Contractive("tanh", 1.0, wrt="embedding", estimator="exact"), TOKENS)
    h = torch.tanh(model.body(model.embedding(TOKENS)))
    torch.testing.assert_close(found, ((1 - h * h).square() * model.body.weight.square().sum(1)).sum() / 2)


class Masked(TwoLayers):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


def test_an_optional_argument_that_is_left_out() -> None:
    """Without example inputs, the trace does not know that it is None."""
    found = [graphreg.regularize(model, Contractive("act", 1.0, estimator="exact"))(X).penalties for model in (Masked(), TwoLayers())]
    assert found[0] == found[1]


def test_an_exact_jacobian_that_cannot_finish() -> None:
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2))
    sentence = (
        "Contractive contractive: the exact Jacobian at 1 (64 x 300) has 19200 rows, each a backward pass that is kept for the gradient; "
        "8192 are the most. Use estimator='projection', which takes n backward passes, or fewer examples."
    )
    with pytest.raises(graphreg.RegularizerError, match=f"^{re.escape(sentence)}$"):
        penalty(model, Contractive("1", 1.0, estimator="exact"), torch.randn(64, 4))
    penalty(model, Contractive("1", 1.0), torch.randn(64, 4))


def test_a_site_that_nothing_can_train() -> None:
    with pytest.raises(graphreg.RegularizerError, match="no parameter that can train reaches its sites"):
        graphreg.regularize(TwoLayers(), Contractive("x", 1.0))
