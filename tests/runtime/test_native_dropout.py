"""The model's own dropout on graphreg's streams, at other rates, or off; torch's own modules are the oracle."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers.models.swin.modeling_swin import SwinDropPath

import graphreg
from graphreg.passes import BernoulliDropout, HiddenL1
from graphreg.rewriting.substitute import restore
from lowering_check import check

P = 0.3
TORCH: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {  # module, input, the mask's shape
    "Dropout": (lambda: nn.Dropout(P), (64, 32, 9), (64, 32, 9)),
    "Dropout1d": (lambda: nn.Dropout1d(P), (64, 32, 9), (64, 32, 1)),
    "Dropout1d unbatched": (lambda: nn.Dropout1d(P), (900, 9), (900, 1)),
    "Dropout2d": (lambda: nn.Dropout2d(P), (64, 32, 3, 3), (64, 32, 1, 1)),
    "Dropout3d": (lambda: nn.Dropout3d(P), (64, 32, 2, 2, 2), (64, 32, 1, 1, 1)),
    "Dropout3d unbatched": (lambda: nn.Dropout3d(P), (900, 2, 2, 2), (900, 1, 1, 1)),
    "AlphaDropout": (lambda: nn.AlphaDropout(P), (64, 32, 9), (64, 32, 9)),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(P), (64, 32, 3, 3), (64, 32, 1, 1)),
    "StochasticDepth row": (lambda: StochasticDepth(P, "row"), (900, 3, 2), (900, 1, 1)),
    "StochasticDepth batch": (lambda: StochasticDepth(P, "batch"), (5, 3, 2), (1, 1, 1)),
}


class Around(nn.Module):
    """A dropout between two layers that leave everything as it is, save for their gradients."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(())), drop

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.drop(x * self.scale)
        return dropped


def seeded(model: nn.Module, own: Any = "seeded", **options: Any) -> Any:
    return graphreg.regularize(model, own_dropout=own, rng=options.pop("rng", 3), **options)


def out(module: Callable[..., Any], *x: Tensor) -> Any:
    return module(*x)[0]


# ---- each kind against torch's own


@pytest.mark.parametrize("name", TORCH)
def test_values_and_structure_are_those_of_torch(name: str) -> None:
    """On ones: the same two values, the same axes that share a draw, and a kept fraction that fits the rate."""
    make, shape, mask = TORCH[name]
    module, x = seeded(Around(make())), torch.ones(shape)
    torch.manual_seed(0)
    ours = [out(module, x).detach() for _ in range(20)]
    theirs = [Around(make())(x).detach() for _ in range(20)]
    for y in (ours[0], theirs[0]):
        assert torch.equal(y, y[tuple(slice(0, n) for n in mask)].expand(shape))  # what shares a draw
    values = [torch.cat([y.flatten() for y in each]).unique() for each in (ours, theirs)]
    torch.testing.assert_close(*values)
    assert len(values[0]) == 2
    dropped = values[0][0]
    small = torch.stack([y[tuple(slice(0, n) for n in mask)] for y in ours]) == dropped
    n = small.numel()
    assert abs(float(small.double().mean()) - P) < 4.5 * math.sqrt(P * (1 - P) / n)
    if mask[0] > 1 and small[0].numel() > 1:  # neighbours are independent
        for axis in range(small.dim()):
            if small.shape[axis] > 1:
                a, b = small.narrow(axis, 0, small.shape[axis] - 1), small.narrow(axis, 1, small.shape[axis] - 1)
                both = float((a & b).double().mean())
                assert abs(both - P * P) < 6 * math.sqrt(P * P / a.numel()), axis


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in TORCH),
        *((name, dtype) for name in ("Dropout", "FeatureAlphaDropout", "StochasticDepth row") for dtype in (torch.float64, torch.bfloat16)),
    ],
)
def test_given_the_mask_it_is_torchs_formula(name: str, dtype: torch.dtype) -> None:
    """Where torch drops what we drop, all agrees: the oracle's Bernoulli draws are replaced by ours, read off the zeros."""
    make, shape, mask = TORCH[name]
    module = seeded(Around(make())).to(dtype)
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype)
    with graphreg.frozen_noise(module):
        y, ones = out(module, x), out(module, torch.ones(shape, dtype=dtype))
    kept = (ones == ones.max())[tuple(slice(0, n) for n in mask)]
    torch.testing.assert_close(
        y, by_hand(name, x, kept), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )
    assert y.dtype == dtype


def by_hand(name: str, x: Tensor, kept: Tensor) -> Tensor:
    if "Alpha" not in name:
        return torch.where(kept, x / (1 - P), 0.0).to(x.dtype)
    saturated, scale = -1.7580993408473766, ((1 - P) * (1 + P * 1.7580993408473766**2)) ** -0.5
    return (scale * torch.where(kept, x, saturated) - scale * P * saturated).to(x.dtype)


@pytest.mark.parametrize("name", ["AlphaDropout", "FeatureAlphaDropout"])
def test_alpha_dropout_keeps_mean_and_variance(name: str) -> None:
    make = TORCH[name][0]
    torch.manual_seed(0)
    x = torch.randn(1024, 512, 1, 1)
    y = out(seeded(Around(make())), x).double()
    n = x.numel()
    assert abs(float(y.detach().mean())) < 5 / math.sqrt(n)
    theirs = make()(x).double()
    for statistic in (y.var(), (y**3).mean(), (y**4).mean()):
        assert bool(statistic.isfinite())
    torch.testing.assert_close(y.var().detach(), torch.tensor(1.0, dtype=torch.double), rtol=0.01, atol=0)
    torch.testing.assert_close((y**3).mean().detach(), (theirs**3).mean(), rtol=0.03, atol=0)
    torch.testing.assert_close((y**4).mean().detach(), (theirs**4).mean(), rtol=0.03, atol=0)


class Functions(nn.Module):
    """Every function of torch that drops, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(6, 6), nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        h, t = self.a(x), self.training
        wide = h[:, :, None, None].expand(-1, -1, 2, 2)
        return [
            F.dropout(h, 0.4, t), F.dropout(torch.relu(h), training=t, p=0.4), F.dropout(input=h, p=0.4, training=t),
            F.dropout1d(h[:, :, None].expand(-1, -1, 3), 0.4, t), F.dropout2d(wide, 0.4, t), F.dropout3d(wide[..., None], 0.4, t),
            F.alpha_dropout(h, 0.4, t), F.feature_alpha_dropout(wide, 0.4, t), torch.dropout(h, 0.4, t),
            torch.feature_dropout(wide, 0.4, t), torch.alpha_dropout(h, 0.4, t), torch.feature_alpha_dropout(wide, 0.4, t),
            F.dropout(h * 1, 0.4, t, inplace=True), torch.dropout_(h * 1, 0.4, t), torch.alpha_dropout_(h * 1, 0.4, t),
        ]  # fmt: skip


FUNCTION_NAMES = [
    "dropout", "dropout_1", "dropout_2", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_3",
    "feature_dropout", "alpha_dropout_1", "feature_alpha_dropout_1", "dropout_4", "dropout_", "alpha_dropout_",
]  # fmt: skip


def test_every_function_is_found_and_moved() -> None:
    torch.manual_seed(0)
    model, x = Functions(), torch.randn(40, 6)
    traced = graphreg.trace(model)
    assert [(own.site.name, own.rate, own.when, own.why_not) for own in traced.native_dropout] == [
        (name, 0.4, "mode", "") for name in FUNCTION_NAMES
    ]
    module = seeded(model)
    state = torch.get_rng_state()
    drawn, again = out(module, x), out(module, x)
    assert torch.equal(torch.get_rng_state(), state)  # nothing came from torch's generator
    plain = out(module.eval(), x)
    for y, z, p, own in zip(drawn, again, plain, model.eval()(x), strict=True):
        assert not torch.equal(y, z) and torch.equal(p, own)
        changed = (y != p).double().mean()
        assert float(changed) > 0.5
    assert graphreg.rng_state(module)["call"] == 2
    patterns = {tuple((y == 0).flatten()[:200].tolist()) for y in drawn[:3] + drawn[8:9]}
    assert len(patterns) == 4  # each has a stream of its own


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_compiled_is_eager_bit_for_bit(backend: str, layout: str) -> None:
    """Masks, and here all values: everything drawn in one graph, forward and backward; alpha's affine to the last bit or two."""
    torch.manual_seed(0)
    model = Functions()
    x = torch.randn(40, 6) if layout == "contiguous" else torch.randn(6, 40).T
    module, twin = seeded(model), seeded(copy.deepcopy(model))
    run = torch.compile(twin, fullgraph=True, backend=backend)
    for _ in range(2):
        ours, theirs = out(run, x), out(module, x)
        for name, a, b in zip(FUNCTION_NAMES, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
            assert torch.equal(a == 0, b == 0), name
        for m, results in ((module, theirs), (twin, ours)):
            m.zero_grad()
            sum(y.square().sum() for y in results).backward()
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", TORCH)
def test_compiled_modules(name: str, backend: str) -> None:
    make, shape, _ = TORCH[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    module, twin = seeded(Around(make())), seeded(Around(make()))
    run = torch.compile(twin, fullgraph=True, backend=backend)
    ours, theirs = out(run, x), out(module, x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if "Alpha" in name else 0)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(module.scale.grad, twin.scale.grad)


def test_the_gradient_is_the_masks() -> None:
    module = seeded(Around(nn.Dropout(0.25))).double()
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    y = out(module, x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.where(y != 0, 4 / 3, 0.0).double())
    with graphreg.frozen_noise(module):
        assert torch.autograd.gradcheck(lambda x: out(module, x), (x,))


class Behind(nn.Module):
    """A dropout behind a ReLU, whose splice is recomputed in backward when compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.b = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.d(torch.relu(self.a(x))))
        return h


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_recomputed_in_backward(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Behind(), torch.randn(6, 8)
    module, twin = seeded(model), seeded(copy.deepcopy(model))
    assert module.graphreg_rules.d_own.recomputed
    run = torch.compile(twin, fullgraph=True, backend=backend)
    for m, f in ((module, module), (twin, run)):
        out(f, x).square().sum().backward()
        assert m.a.weight.grad is not None
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# ---- in place, always, never, other modes


class InPlace(nn.Module):
    def __init__(self, drop: nn.Module | None) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(8, 8), drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = F.dropout(h, 0.5, self.training, inplace=True) if self.drop is None else self.drop(h)
        return h + y


@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5, inplace=True), nn.AlphaDropout(0.5, inplace=True)])
@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_in_place_writes_into_the_value(drop: nn.Module | None, backend: str) -> None:
    torch.manual_seed(0)
    module, x = seeded(InPlace(drop)), torch.randn(64, 8)
    run: Any = torch.compile(module, fullgraph=True, backend=backend) if backend else module
    y, h = out(run, x), module.a(x)
    if not isinstance(drop, nn.AlphaDropout):
        assert bool(((y == 0) | ((y - 4 * h).abs() < 1e-5)).all()) and 0.3 < float((y == 0).double().mean()) < 0.7
    y.sum().backward()
    assert module.a.weight.grad is not None
    watched = graphreg.regularize(InPlace(drop), HiddenL1("a", 1.0), own_dropout="seeded", rng=3)  # the value before the write
    torch.testing.assert_close(watched(x).penalties["hidden_l1"], watched.a(x).abs().mean())


class Ignored(nn.Module):
    """Returns a value to which a dropout was applied, and not the result."""

    def __init__(self, drop: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(8, 8), drop

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)[..., None]
        self.drop(h, 0.5, self.training, True) if self.drop is F.alpha_dropout else self.drop(h)
        return h


@pytest.mark.parametrize(
    "drop", [nn.Dropout(0.5, True), nn.Dropout1d(0.5, True), nn.AlphaDropout(0.5, True), nn.FeatureAlphaDropout(0.5, True), F.alpha_dropout]
)
def test_what_is_written_is_what_torch_writes(drop: Callable[..., Any]) -> None:
    """torch's layers of alpha dropout take the option ``inplace``, and write nothing."""
    model, x = Ignored(drop), torch.randn(64, 8)
    written = [not torch.equal(y, model.a(x)[..., None]) for y in (model(x), out(seeded(model), x), out(seeded(model, 0.4), x))]
    assert written == [not isinstance(drop, (nn.AlphaDropout, nn.FeatureAlphaDropout))] * 3


class Whenever(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(self.a(x), 0.5), F.dropout(self.a(x), 0.5, training=False)


def test_always_and_never() -> None:
    """``F.dropout(x)`` acts in eval mode too, and goes on doing so; what never acts is left alone."""
    model, x = Whenever(), torch.randn(30, 8)
    assert [(own.site.name, own.when) for own in graphreg.trace(model).native_dropout] == [("dropout", "always"), ("dropout_1", "never")]
    module = seeded(model)
    assert "key = self.graphreg_rules.key(True)" in module.code and "torch.nn.functional.dropout(" in module.code
    for mode in (True, False):
        module.train(mode)
        first, second = out(module, x), out(module, x)
        assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1]) and (first[0] == 0).any()
    assert graphreg.rng_state(module)["call"] == 4
    off = seeded(model, "off")
    assert torch.equal(*out(off, x)) and not hasattr(off.graphreg_rules, "key")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Behind(), Behind()
        self.second.a = nn.Linear(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.second(self.first(x))
        return h


def test_each_follows_its_own_module() -> None:
    """A dropout set apart keeps its own mode, as it does in the model; calls in eval mode draw nothing; noise_on draws in all."""
    torch.manual_seed(0)
    module, x = seeded(Blocks()), torch.randn(5, 8)
    module.first.d.eval()
    taken: list[Tensor] = []
    module.graphreg_rules.first_d_own.register_forward_hook(lambda m, a, y: taken.append(y))
    out(module, x)
    assert torch.equal(taken[0], torch.relu(module.first.a(x)))
    module.eval()
    plain = out(module, x)
    assert torch.equal(plain, out(module, x)) and graphreg.rng_state(module)["call"] == 1
    with graphreg.noise_on(module):
        assert not torch.equal(out(module, x), out(module, x))
    assert (taken[-1] == 0).sum() > (taken[0] == 0).sum() and torch.equal(out(module, x), plain)
    samples = graphreg.sample(module, x, 8)
    assert bool((samples.spread > 0).all())


def test_a_rate_changed_later_is_followed() -> None:
    """As the model would; a rate that graphreg was given stays."""
    module, given, x = seeded(Around(nn.Dropout(0.5))), seeded(Around(nn.Dropout(0.5)), 0.25), torch.ones(4000)
    for m in (module, given):
        m.drop.p = 0.0
    assert torch.equal(out(module, x), x) and 0.2 < float((out(given, x) == 0).double().mean()) < 0.3
    for rate in (1.0, 1 - 2**-25):  # float32 rounds the second to 1
        module.drop.p = rate
        assert not out(module, x).any()


# ---- rates, off, selectors


def test_off_and_other_rates() -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(5, 8)
    off = seeded(model, "off")
    assert torch.equal(out(off, x), model.eval()(x)) and model.first.d.p == 0.5
    model.train()
    assert "first_d_own(first_relu)" in off.code or "noise" not in off.code
    for y, rate in ((seeded(Around(nn.Dropout(0.5)), r), r) for r in (0.1, 0.9)):
        dropped = out(y, torch.ones(20000))
        assert abs(float((dropped == 0).double().mean()) - rate) < 0.015
        torch.testing.assert_close(dropped.detach().max(), torch.tensor(1 / (1 - rate)))
    assert torch.equal(out(seeded(model, 0), x), out(off, x)) and torch.equal(out(seeded(model, 0.0), x), out(off, x))


def test_by_selector() -> None:
    """Patterns are matched over the dropouts alone, the last that names one counts, and the rest stays torch's."""
    model = Blocks()
    plan = graphreg.plan(graphreg.trace(model), [], own_dropout={"*": "off", "second*": 0.2, "**@Dropout": "seeded", "first.d": "keep"})
    assert [(e.dropout.site.name, e.action, e.matched) for e in plan.native_dropout] == [("second.d", "seeded", "**@Dropout")]
    plan = graphreg.plan(graphreg.trace(model), [], own_dropout={("first*", "second*"): "off", lambda site: site.name == "second.d": 0.2})
    assert [(e.dropout.site.name, e.action) for e in plan.native_dropout] == [("first.d", "off"), ("second.d", "seeded at 0.2")]
    plan = graphreg.plan(graphreg.trace(model), [], own_dropout={"!first*": 0.4})
    assert [(e.dropout.site.name, e.action) for e in plan.native_dropout] == [("second.d", "seeded at 0.4")]
    module = seeded(model, {"first*": "off"})
    assert "self.second.d(" in module.code and "self.first.d(" not in module.code


def test_keep_changes_nothing() -> None:
    model = Blocks()
    assert graphreg.regularize(model).code == graphreg.regularize(model, own_dropout="keep").code
    assert graphreg.regularize(model, own_dropout={}).code == graphreg.regularize(model).code


# ---- streams


def test_a_stream_is_the_sites_own() -> None:
    """Neither other dropouts, nor splices, nor the order change a mask; seeds do; two sites have two."""
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(50, 8)
    taken: dict[str, Tensor] = {}

    def mask(module: Any, which: str) -> Tensor:
        leaf = getattr(module.graphreg_rules, f"{which}_d_own")
        handle = leaf.register_forward_hook(lambda m, a, y: taken.update(mask=y == 0))
        out(module, x)
        handle.remove()
        return taken["mask"]

    both = mask(seeded(model), "first")
    assert torch.equal(both, mask(seeded(model, {"first.d": "seeded"}), "first"))
    assert torch.equal(both, mask(seeded(model, regularizers=BernoulliDropout("second.b", 0.5)), "first"))
    assert torch.equal(both, mask(seeded(model, {"second*": "seeded", "first*": 0.5}), "first"))
    assert not torch.equal(both, mask(seeded(model, rng=4), "first")) and not torch.equal(both, mask(seeded(model), "second"))


def test_the_state_resumes_and_copies_go_on_alike() -> None:
    torch.manual_seed(0)
    module, x = seeded(Blocks()), torch.randn(5, 8)
    out(module, x)
    state = graphreg.rng_state(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [copy.deepcopy(module), torch.load(file, weights_only=False)]
    expected = out(module, x)
    for twin in twins:
        assert torch.equal(out(twin, x), expected)
        assert graphreg.report(twin) == graphreg.report(module)
        assert graphreg.strip(twin).code == graphreg.strip(module).code
    other = seeded(Blocks(), rng=99)
    other.load_state_dict(module.state_dict())
    graphreg.set_rng_state(other, state)
    assert torch.equal(out(other, x), expected)


# ---- strip, and what stays


@pytest.mark.parametrize("own", ["seeded", "off", 0.2])
def test_strip_gives_the_original_back(own: Any) -> None:
    torch.manual_seed(0)
    model, x = Functions(), torch.randn(6, 6)
    plain = graphreg.strip(graphreg.regularize(model))
    module = seeded(model, own, regularizers=[BernoulliDropout("a", 0.5), HiddenL1("a", 0.1)])
    stripped = graphreg.strip(module)
    assert stripped.code == plain.code and "graphreg" not in stripped.code
    torch.manual_seed(5)
    ours = stripped(x)
    torch.manual_seed(5)
    for a, b in zip(ours, model(x), strict=True):
        assert torch.equal(a, b)
    again = seeded(stripped, own)  # and can be moved again
    assert len(graphreg.trace(stripped).native_dropout) == 15 and torch.equal(out(again, x)[0], out(seeded(model, own), x)[0])


def test_state_dict_and_modules_stay() -> None:
    model = Blocks()
    module = seeded(model)
    assert list(module.state_dict()) == list(model.state_dict()) and module.first.d is model.first.d
    with pytest.raises(graphreg.TraceError, match="rewritten already"):
        seeded(module)


def test_as_a_pass() -> None:
    torch.manual_seed(0)
    model, x = Blocks(), torch.randn(5, 8)
    result = graphreg.as_pass(own_dropout="seeded", rng=3)(torch.fx.symbolic_trace(model))
    assert result is not None and result.modified
    assert torch.equal(out(result.graph_module, x), out(seeded(model), x))
    again = torch.fx.GraphModule(result.graph_module, result.graph_module.graph)  # a later pass
    assert out(again, x).shape == (5, 2) and "d_own" in again.code


# ---- what it prints


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.drop = nn.LSTM(4, 4, 2, dropout=0.25, batch_first=True), nn.Dropout(0.5)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x)
        return self.encoder(self.drop(h)) + torch.rand_like(x)


OPAQUE = "encoder is an opaque module (torch.fx cannot see into it; torch.export can, with example_inputs)"
STAYS = f"""\
rnn (LSTM 0.25) cannot be moved: torch applies it between the stacked layers, inside one operator
encoder.self_attn (MultiheadAttention 0.1) cannot be moved: {OPAQUE}
encoder.dropout (Dropout 0.1) cannot be moved: {OPAQUE}
encoder.dropout1 (Dropout 0.1) cannot be moved: {OPAQUE}
encoder.dropout2 (Dropout 0.1) cannot be moved: {OPAQUE}
rand_like (rand_like) cannot be moved: it draws random numbers by rand_like, which is no dropout that graphreg knows"""


def test_plan_report_and_names() -> None:
    traced = graphreg.trace(Mixed())
    text = str(graphreg.plan(traced, graphreg.build("dropout", weight=0.1, pattern="encoder"), own_dropout="seeded"))
    table = """\
native dropout: 7 chosen, 1 replaced
site  op       rate  acts  becomes  matched by
drop  Dropout  0.5   mode  seeded   *
"""
    assert text.endswith(table + STAYS)
    module = graphreg.regularize(Mixed(), hidden_l1={"weight": 0.1, "pattern": "encoder"}, own_dropout="seeded")
    own = {row.site: (row.becomes, row.why_not) for row in graphreg.report(module).own_dropout}
    assert own == {"drop": ("seeded", "")} | {line.split()[0]: ("kept", line.split("cannot be moved: ")[1]) for line in STAYS.splitlines()}
    listing = str(graphreg.names(Mixed()))
    assert "native dropout: drop (Dropout 0.5)" in listing and f"native dropout: {STAYS.splitlines()[-1]}" in listing


def test_the_log() -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("graphreg")
    logger.addHandler(handler)
    try:
        graphreg.regularize(Mixed(), own_dropout=0.2)
    finally:
        logger.removeHandler(handler)
    assert len([line for line in told if line.startswith("WARNING native dropout keeps drawing from torch's generator: ")]) == 6


# ---- errors


@pytest.mark.parametrize(
    "value", ["seed", "Seeded", "", -0.1, 1, 1.0, 1.5, math.nan, math.inf, True, None, ["seeded"], {"d": "on"}, {"d": 2}]
)
def test_an_unknown_word_and_a_rate_out_of_range(value: Any) -> None:
    for use in (lambda: seeded(Behind(), value), lambda: graphreg.as_pass(own_dropout=value)):
        with pytest.raises(graphreg.RegularizerError, match=r"is not allowed; it is 'keep', 'seeded', 'off', or a rate in \[0, 1\)"):
            use()


def test_a_near_word() -> None:
    with pytest.raises(graphreg.RegularizerError, match="Near words: seeded"):
        seeded(Behind(), "seed")


def test_a_selector_that_matches_no_dropout() -> None:
    with pytest.raises(
        graphreg.NoMatchError, match=r"own_dropout: 'third\*' names no dropout of Blocks. .*Its dropouts: first.d, second.d."
    ):
        seeded(Blocks(), {"first*": "off", "third*": "off"})
    with pytest.raises(graphreg.NoMatchError, match="'first.relu' names no dropout"):
        seeded(Blocks(), {"first.relu": "off"})
    with pytest.warns(UserWarning, match=r"third\*"):
        module = seeded(Blocks(), {"first*": "off", "third*": "off"}, missing="warn")
    assert "first_d_own" in module.code


def test_a_model_without_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(
        graphreg.NoMatchError, match="own_dropout has nothing to act on, because Sequential contains no dropout. Leave own_dropout at"
    ):
        seeded(model)
    with pytest.raises(graphreg.NoMatchError, match=r"'0\*' names no dropout of Sequential, because Sequential contains no dropout"):
        seeded(model, {"0*": 0.5})
    assert seeded(model, missing="ignore")(torch.ones(2, 3)).output.shape == (2, 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, 2, dropout=0.25)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(x)
        return torch.rand_like(h) * h


def test_a_model_whose_randomness_cannot_be_moved() -> None:
    with pytest.raises(graphreg.RegularizerError) as told:
        seeded(Recurrent())
    assert str(told.value) == (
        "own_dropout='seeded' cannot be applied to Recurrent: rnn (GRU 0.25) cannot be moved: torch applies it between the stacked "
        "layers, inside one operator; rand_like (rand_like) cannot be moved: it draws random numbers by rand_like, which is no dropout "
        "that graphreg knows. "
        "Use own_dropout='keep', or change these calls in the model. graphreg can replace only torch's dropouts, stochastic depth "
        "and attention dropout, and only where it can trace them."
    )


def test_hooks_keep_a_dropout_where_it_is() -> None:
    model = Blocks()
    model.first.d.register_forward_hook(lambda m, a, y: None)
    own = graphreg.trace(model).native_dropout
    assert [bool(each.why_not) for each in own] == [True, False]
    assert "not movable: first.d: it has hooks" in graphreg.report(seeded(model)).text(None)


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_stochastic_depth_of_another_library_is_that_of_timm(front_end: Any) -> None:
    x, made = torch.randn(40, 3, 2), []
    for kind in (timm.layers.DropPath, SwinDropPath):
        model, state = Around(kind(P)), torch.get_rng_state()
        made.append(graphreg.regularize(model, example_inputs=x, own_dropout="seeded", rng=0, front_end=front_end))
        assert list(graphreg.trace(model, x, front_end=front_end).graphs) == ["both"] and torch.equal(torch.get_rng_state(), state)
        assert model.drop.drop_prob == P and torch.equal(graphreg.regularize(model, example_inputs=x, own_dropout="off")(x).output, x)
        kept = graphreg.regularize(model, example_inputs=x, hidden_l2={"drop": 0.0}, front_end=front_end)
        torch.manual_seed(3)
        ours = kept(x).output
        torch.manual_seed(3)
        assert torch.equal(ours, model(x)) and not torch.equal(ours, x)
    theirs, ours = (module(x).output for module in made)
    assert torch.equal(ours, theirs) and not torch.equal(ours, x)


class OfElementsDropPath(SwinDropPath):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.drop_prob, self.training)


class LearnedDropPath(SwinDropPath):
    def __init__(self) -> None:
        super().__init__(P)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x * self.gain, self.drop_prob, self.training)


class ScaledDropPath(SwinDropPath):
    """Without ``rescale``, what is kept stays as it is; ``survives``: the rate is that of what is kept."""

    def __init__(self, rate: float, rescale: bool = True, survives: bool = False) -> None:
        super().__init__(rate)
        self.rescale, self.survives = rescale, survives

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = self.drop_prob if self.survives else 1 - self.drop_prob
        mask = (torch.rand(len(x), *[1] * (x.dim() - 1)) < kept).to(x)
        return x * mask / kept if self.rescale else x * mask


class LoggingDropPath(SwinDropPath):
    def __init__(self) -> None:
        super().__init__(P)
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(len(x))
        return super().forward(x)


CALLS: list[int] = []


class CountedDropPath(SwinDropPath):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return super().forward(x)


def test_each_is_tried_with_its_options_and_none_that_holds_an_object() -> None:
    assert not graphreg.trace(Around(CountedDropPath(P))).native_dropout[0].why_not and not CALLS
    assert all(not own.why_not for own in graphreg.trace(Around(ScaledDropPath(P))).native_dropout)
    for odd in (ScaledDropPath(P, rescale=False), ScaledDropPath(P, survives=True), LoggingDropPath()):
        with pytest.raises(graphreg.RegularizerError, match="does something else than to drop whole examples"):
            seeded(Around(odd))
    assert odd.log == []


def test_what_only_has_the_name_of_stochastic_depth() -> None:
    with pytest.raises(graphreg.RegularizerError, match="cannot be moved: OfElementsDropPath does something else than to drop"):
        seeded(Around(OfElementsDropPath(P)))
    model = Around(LearnedDropPath())  # traced into: its parameter is a site, and its dropout can be moved
    (own,) = graphreg.trace(model).native_dropout
    assert own.site.name == "drop.dropout" and not own.why_not
    assert "drop.gain" in graphreg.names(model)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, on: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.5, on.any())  # type: ignore[arg-type]


def test_a_computed_training_flag_is_named() -> None:
    with pytest.raises(graphreg.RegularizerError, match="whether it acts is computed in the graph"):
        seeded(Computed())


# ---- two graphs, other options, and the check


class TwoGraphs(nn.Module):
    """Its structure differs by mode, so that the module holds two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.d(self.a(x))
        return F.dropout(h.tanh(), 0.25, self.training) if self.training else h * 2


@pytest.mark.parametrize("backend", ["", "eager"])
def test_a_module_of_two_graphs(backend: str) -> None:
    torch.manual_seed(0)
    model, x = TwoGraphs(), torch.randn(30, 8)
    module = seeded(model)
    assert list(module.graphs) == ["train", "eval"]
    run: Any = torch.compile(module, fullgraph=True, backend=backend) if backend else module
    first = out(run, x)
    assert not torch.equal(first, out(run, x)) and bool((first == 0).any())
    module.eval()
    assert torch.equal(out(run, x), model.a(x) * 2)
    with graphreg.noise_on(module):
        noisy = out(run, x)
    assert bool(((noisy == 0) | ((noisy - 4 * model.a(x)).abs() < 1e-5)).all()) and bool((noisy == 0).any())
    stripped = graphreg.strip(module)
    assert list(stripped.graphs) == ["train", "eval"] and torch.equal(stripped(x), model(x))


def test_beside_splices_penalties_and_attached_ones() -> None:
    """A splice at a dropout's own site acts on what the dropout gives; a penalty there reads it."""
    torch.manual_seed(0)
    x = torch.ones(400)
    module = seeded(Around(nn.Dropout(0.5)), regularizers=[BernoulliDropout("drop", 0.5), HiddenL1("drop", 1.0)])
    result = module(x)
    assert set(result.output.detach().unique().tolist()) == {0.0, 4.0}
    torch.testing.assert_close(result.penalties["hidden_l1"], result.output.mean())
    clean = seeded(Around(nn.Dropout(0.5)), regularizers=[BernoulliDropout("drop", 0.5), HiddenL1("drop", 1.0, clean=True)])
    value = clean(x).penalties["hidden_l1"].detach()
    assert 0.8 < float(value) < 1.2 and torch.equal(value * 200, (value * 200).round())  # twos and zeros
    attached = seeded(Blocks(), hidden_l1=0.1, penalties="attach", scale=1.0)
    attached(torch.randn(3, 8)).sum().backward()
    assert set(attached.penalties()) == {"hidden_l1"}


def drop_noise(node: torch.fx.Node) -> None:
    node.kwargs = {}


def call_the_model(node: torch.fx.Node) -> None:
    restore(node)


def another_leaf(node: torch.fx.Node) -> None:
    node.target = "graphreg_rules.second_d_own" if "first" in str(node.target) else "graphreg_rules.first_d_own"


@pytest.mark.parametrize(
    ("mutation", "sentence"),
    [
        (drop_noise, "first_d does not take the key of the call"),
        (call_the_model, "first_d still calls the native dropout"),
        (another_leaf, "first_d does not do what was planned"),
    ],
)
def test_the_check_sees_a_wrong_substitution(mutation: Callable[[torch.fx.Node], None], sentence: str) -> None:
    traced = graphreg.trace(Blocks())
    plan = graphreg.plan(traced, [], own_dropout="seeded")
    module = graphreg.rewrite(traced, plan, rng=0)
    check(module, traced, plan)
    mutation(next(node for node in module.graph.nodes if node.name == "first_d"))
    with pytest.raises(graphreg.GraphRegError, match=sentence):
        check(module, traced, plan)


def test_a_plan_for_another_model() -> None:
    plan = graphreg.plan(graphreg.trace(Blocks()), [], own_dropout="seeded")
    with pytest.raises(graphreg.GraphRegError, match="the plan is for Blocks and names 'first.d', which Behind does not have"):
        graphreg.rewrite(graphreg.trace(Behind()), plan)
