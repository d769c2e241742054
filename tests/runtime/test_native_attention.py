"""Attention with its dropout on graphreg's streams, against torch's own formula with the same mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.runtime.dropout import attention, multi_head

P = 0.4
Q, K, V = (torch.randn(2, 4, n, 8, dtype=torch.double, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
MASK = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) > P


def drop(weights: Tensor) -> Tensor:
    """One mask for all: what torch's formula is given too."""
    return weights * MASK.reshape(-1)[: weights.numel()].view(weights.shape) / (1 - P)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bool mask": {"attn_mask": torch.arange(7) < torch.tensor([[3], [7], [1], [2], [7]])},
    "nothing left": {"attn_mask": torch.arange(7) < torch.tensor([[3], [0], [1], [2], [7]])},
    "additive mask": {"attn_mask": torch.linspace(-2, 2, 35, dtype=torch.double).view(5, 7)},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
}


@pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing")
@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_torchs(case: str) -> None:
    """The oracle takes a dropout mask: the unfused kernel, which is there to check the fused ones; it wants an additive mask."""
    options = CASES[case]
    additive = dict(options)
    if "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
        additive["attn_mask"] = torch.zeros(5, 7, dtype=torch.double).masked_fill(~options["attn_mask"], -torch.inf)
    q, k, v = (t.clone().requires_grad_() for t in (Q, K, V))
    theirs, _ = torch._scaled_dot_product_attention_math(q, k, v, dropout_p=P, dropout_mask=MASK, **additive)
    ours = attention(drop, q, k, v, **options)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sin().sum(), (q, k, v)), torch.autograd.grad(theirs.sin().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(attention(lambda w: w, Q, K, V, **options), F.scaled_dot_product_attention(Q, K, V, **options))


def test_grouped_queries() -> None:
    ours = attention(lambda w: w, Q, K[:, :2], V[:, :2], enable_gqa=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(Q, K[:, :2], V[:, :2], enable_gqa=True))


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the layer, of the call
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights by head": ({}, {"average_attn_weights": False}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "other sizes": ({"kdim": 6, "vdim": 10}, {}),
    "bias_k": ({"add_bias_kv": True}, {}),
    "zero": ({"add_zero_attn": True}, {"need_weights": False}),
    "both": ({"add_zero_attn": True, "add_bias_kv": True}, {"average_attn_weights": False}),
    "mask": ({}, {"attn_mask": torch.arange(7) > torch.tensor([[3], [6], [1], [2], [6]])}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False] * 5 + [True] * 2, [False] * 7]), "need_weights": False}),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("case", HEADS)
def test_several_heads_are_torchs(case: str, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is torch's own function with ``F.dropout`` replaced by the same mask, within the layer's own forward."""
    layer_options, call = HEADS[case]
    if not batched and ("key_padding_mask" in call or layer_options.get("batch_first")):
        return
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 2, dropout=P, **layer_options).double()
    q, k, v = (torch.randn(n, 2, size, dtype=torch.double) for n, size in ((5, 12), (7, layer.kdim), (7, layer.vdim)))
    if layer.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if not batched:
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
    mask = torch.rand(2, 2, 5, 9, generator=torch.Generator().manual_seed(1)) > P

    def same(weights: Tensor, p: float = P, **_: Any) -> Tensor:
        heads = weights if weights.dim() == 4 else weights.unflatten(0, (-1, 2))
        shape = heads.shape
        return (heads * mask[: shape[0], :, :, : shape[3]] / (1 - P)).view(weights.shape)

    with_weights = {**call, "need_weights": True}
    monkeypatch.setattr(F, "dropout", same)
    theirs, their_weights = layer(q, k, v, **with_weights)
    monkeypatch.undo()
    original = F.multi_head_attention_forward
    monkeypatch.setattr(
        F, "multi_head_attention_forward", lambda *a, **k: multi_head(same, *a, **k) if k["training"] else original(*a, **k)
    )
    ours, weights = layer(q, k, v, **call)
    torch.testing.assert_close(ours, theirs)
    if call.get("need_weights", True):
        torch.testing.assert_close(weights, their_weights)
    else:
        assert weights is None


class Attending(nn.Module):
    """Self-attention by the function, and by the layer."""

    def __init__(self, by: str, p: float = P) -> None:
        super().__init__()
        self.by, self.p = by, p
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mha = nn.MultiheadAttention(16, 4, dropout=p, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "layer":
            h, _ = self.mha(x, x, x, need_weights=False)
        elif self.by == "layer with weights":
            h, w = self.mha(x, x, x)
            h = h + w.sum()
        elif self.by == "heads":
            m = self.mha
            h, _ = F.multi_head_attention_forward(
                x,
                x,
                x,
                16,
                4,
                m.in_proj_weight,
                m.in_proj_bias,
                None,
                None,
                False,
                self.p,
                m.out_proj.weight,
                m.out_proj.bias,
                self.training,
            )
        else:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            rate = self.p if self.training or self.by == "always" else 0.0
            h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.by == "causal").transpose(1, 2).flatten(2)
        y: Tensor = self.out(h)
        return y


BY = ("function", "causal", "always", "layer", "layer with weights", "heads")


def seeded(by: str, own: Any = "seeded", p: float = P) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(Attending(by, p), own_dropout=own, rng=1)


X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("by", BY)
def test_moved(by: str) -> None:
    module = seeded(by)
    (own,) = graphreg.trace(Attending(by)).native_dropout
    assert own.rate == P and not own.why_not and own.when == ("always" if by == "always" else "mode")
    state = torch.get_rng_state()
    first, second = module(X).output, module(X).output
    assert torch.equal(torch.get_rng_state(), state) and not torch.allclose(first, second)
    torch.manual_seed(0)
    model = Attending(by)
    if by != "always":
        assert torch.equal(module.eval()(X).output, model.eval()(X))
        with torch.no_grad():
            assert torch.equal(module(X).output, model(X))  # the layer's fast path too
    stripped = graphreg.strip(module)
    assert stripped.code == graphreg.strip(graphreg.regularize(model)).code
    torch.manual_seed(7)
    ours = stripped.train()(X)
    torch.manual_seed(7)
    assert torch.equal(ours, model.train()(X))


@pytest.mark.parametrize("by", BY)
def test_the_mean_over_masks_is_the_attention_without(by: str) -> None:
    """Inverted dropout on the weights, and all else linear in them."""
    module = seeded(by)
    samples = graphreg.sample(module, X, 500, keep=False)
    plain = seeded(by, "off")(X).output
    error = (samples.mean - plain) / (samples.spread / 500**0.5 + 1e-7)
    if by == "layer with weights":  # the sum of all weights is one draw for all outputs
        assert float(error.detach().abs().max()) < 5.5
    else:
        assert float(error.detach().abs().max()) < 5 and float(error.detach().square().mean()) < 1.6


@pytest.mark.parametrize("by", BY)
def test_off_and_rates(by: str) -> None:
    off, zero = seeded(by, "off"), seeded(by, p=0.0)
    torch.manual_seed(0)
    torch.testing.assert_close(off(X).output, Attending(by, 0.0)(X))
    torch.testing.assert_close(zero(X).output, without_dropout(by))
    spreads = [float(graphreg.sample(seeded(by, rate), X, 30).spread.mean()) for rate in (0.1, 0.5)]
    assert spreads[0] < 0.6 * spreads[1]
    if by != "always":  # a place that is given the rate 0 by its own words can be given another
        raised = seeded(by, 0.5, p=0.0)
        assert not torch.equal(raised(X).output, raised(X).output)
        assert torch.equal(raised.eval()(X).output, raised(X).output)


@pytest.mark.parametrize("rate", [1.0, 1 - 2**-25])
def test_at_rate_1_all_attention_is_dropped(rate: float) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(4, 2, dropout=rate, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x, x, x)[0]
            return y + F.scaled_dot_product_attention(x, x, x, dropout_p=rate)

    for own in ("keep", "seeded"):
        module = graphreg.regularize(Attention(), own_dropout=own, rng=0)
        assert not module(torch.randn(3, 2, 4)).output.any()


def without_dropout(by: str) -> Tensor:
    torch.manual_seed(0)
    y: Tensor = Attending(by, 0.0)(X)
    return y


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(by: str, backend: str) -> None:
    """The same masks: outputs and gradients are eager's to rounding, and so are samples in eval mode."""
    module, twin = seeded(by), seeded(by)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    run: Callable[..., Any] = torch.compile(twin, fullgraph=True, backend=counter)
    for _ in range(2):
        ours, theirs = run(X).output, module(X).output
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    torch.testing.assert_close(graphreg.sample(run, X, 2).outputs, graphreg.sample(module, X, 2).outputs, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    torch.testing.assert_close(run(X).output, module(X).output, rtol=1e-4, atol=1e-5)
