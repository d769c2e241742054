"""``sample`` and ``Samples``: uncertainty from many passes, and several passes in one call."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, RegularizerError, Samples
from graphreg.session import sampling

LN2 = math.log(2)
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Segmenter(nn.Module):
    """Returns logits [batch, classes, height, width] under the name that torchvision's models give them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.body(x)
        return {"out": self.head(hidden), "count": 7, "aux": hidden}


def noisy(model: nn.Module, **options: Any) -> Any:
    return graphreg.regularize(model, hidden_dropout=0.5, rng=0, **options)


def kept(outputs: Tensor) -> Samples:
    return Samples(len(outputs), outputs.mean(0), outputs.std(0), outputs)


# What is computed of the passes


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize(
    ("passes", "entropy", "information"),
    [
        ([[1, 0], [0, 1]], LN2, LN2), ([[0.5, 0.5], [0.5, 0.5]], LN2, 0), ([[1, 0], [1, 0]], 0, 0),
        ([[1, 0], [0.5, 0.5]], 0.562335, 0.215762),
    ],
)  # fmt: skip
def test_by_hand(passes: list[list[float]], entropy: float, information: float, logits: bool) -> None:
    """Of the last: H(0.75, 0.25) = 0.562335, and the mean of H(1, 0) = 0 and H(½, ½) = ln 2 is 0.346574."""
    p = torch.tensor(passes, dtype=torch.float64)[:, None]
    samples = kept(p.log().clamp(min=-1000) if logits else p)
    assert samples.entropy(logits=logits).tolist() == pytest.approx([entropy], abs=1e-6)
    assert samples.mutual_information(logits=logits).tolist() == pytest.approx([information], abs=1e-6)


def test_streamed_as_stored() -> None:
    """With keep=False, sums give what the stored outputs give, in the shape of the pixels."""
    of: Callable[[Any], Tensor] = lambda output: output["out"]  # noqa: E731
    stored = graphreg.sample(noisy(Segmenter()), IMAGES, 6)
    logits = stored.outputs["out"].double()
    p = logits.softmax(2)
    entropy = -(p.mean(0) * p.mean(0).log()).sum(1)
    information = entropy + (p * p.log()).sum(2).mean(0)
    for where in ("out", of):
        options: dict[str, Any] = {"dim": 1, "of": where}
        streamed = graphreg.sample(noisy(Segmenter()), IMAGES, 6, keep=False, entropy=options)
        assert streamed.outputs is None
        for samples in (stored, streamed):
            assert samples.entropy(**options).shape == (2, 6, 6)
            torch.testing.assert_close(samples.entropy(**options).double(), entropy, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(samples.mutual_information(**options).double(), information, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(samples.variance["out"].double(), logits.var(0))
    assert stored.variance["count"] == 7


def test_quantiles_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = graphreg.sample(noisy(mlp()), X, 7)
    for q in (0.5, [0.05, 0.95]):
        expected = torch.quantile(samples.outputs, torch.tensor(q), 0)
        for limit in (sampling.QUANTILE_LIMIT, 20):
            monkeypatch.setattr(sampling, "QUANTILE_LIMIT", limit)
            assert torch.equal(samples.quantile(q), expected)
    p = samples.quantile(0.9, of=lambda z: z.softmax(-1))
    assert torch.equal(p, torch.quantile(samples.outputs.softmax(-1), 0.9, 0))


class Pair(NamedTuple):
    mean: Tensor
    log_scale: Tensor


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.net(x), x)


# Several passes in one call


def in_place(model: nn.Module) -> Any:
    return graphreg.regularize_(model, hidden_dropout=0.5, rng=0, example_inputs=X)


def compiled(model: nn.Module) -> Any:
    return noisy(model, compile={"backend": "eager"})


def wrapped(model: nn.Module) -> Any:
    return torch.compile(noisy(model), backend="eager")


MADE: list[tuple[Callable[..., Any], Callable[[], nn.Module], Tensor]] = [
    (noisy, mlp, X), (compiled, mlp, X), (wrapped, mlp, X), (in_place, mlp, X), (noisy, Segmenter, IMAGES),
    (lambda model: graphreg.regularize(model, own_dropout="seeded", example_inputs=X[None], rng=0),
     lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True), X[None]),
    (lambda model: graphreg.regularize(model, hidden_noise=0.1, contractive={"weight": 0.1, "always": True}, rng=0), mlp, X),
]  # fmt: skip


@pytest.mark.parametrize(("make", "model", "x"), MADE)
def test_at_once_is_the_loop(make: Callable[..., Any], model: Callable[[], nn.Module], x: Tensor) -> None:
    torch.manual_seed(5)
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(make(model()))
    one_by_one = graphreg.sample(modules[0], x, 7)
    random_state = torch.get_rng_state()
    at_once = graphreg.sample(modules[1], x, 7, at_once=3)
    assert torch.equal(torch.get_rng_state(), random_state) and modules[1].training
    torch.testing.assert_close(at_once.outputs, one_by_one.outputs)
    torch.testing.assert_close(at_once.spread, one_by_one.spread)
    assert graphreg.rng_state(modules[0]) == graphreg.rng_state(modules[1]) and graphreg.rng_state(modules[1])["call"] == 7
    again, other = (graphreg.sample(each, x, 1).outputs for each in modules)
    torch.testing.assert_close(again, other)


def test_at_once_in_frozen_noise_repeats_one_mask() -> None:
    module = noisy(mlp())
    with graphreg.frozen_noise(module):
        samples = graphreg.sample(module, X, 4, at_once=4)
        once = graphreg.sample(module, X, 1).outputs[0]
    torch.testing.assert_close(samples.outputs, once.expand(4, -1, -1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(self.cell(self.a(x))[0])
        return result


def refused(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=f"^{re.escape(text)}"):
        call()


def test_a_model_that_vmap_refuses() -> None:
    module = graphreg.regularize(Recurrent(), dropout={"a": 0.5}, example_inputs=X, rng=0)
    refused(GraphRegError, "at_once=2: the model cannot run under torch.vmap (RuntimeError: Batching rule not implemented for aten::lstm",
            lambda: graphreg.sample(module, X, 4, at_once=2))  # fmt: skip
    assert graphreg.rng_state(module)["call"] == 0 and module.training
    assert graphreg.sample(module, X, 2).n == 2


def test_errors() -> None:
    module, both = noisy(mlp()), noisy(Both())
    samples, pairs = graphreg.sample(module, X, 2), graphreg.sample(both, X, 2)
    streamed = graphreg.sample(module, X, 2, keep=False, entropy={"dim": 1})
    bare = graphreg.sample(module, X, 2, keep=False)

    def sampled(**options: Any) -> Callable[[], Any]:
        return lambda: graphreg.sample(module, X, 2, **options)

    for text, call in (
        ("at_once=0 is not allowed; at_once is the number of passes in one call, a whole number of 1 or more.", sampled(at_once=0)),
        ("entropy=1 is not allowed; give the arguments of Samples.entropy: {'dim': 1}.", sampled(entropy=1)),
        ("entropy: 'dims' is unknown. Near names: dim, logits. Names: dim, logits, of.", sampled(entropy={"dims": 1})),
        ("dim='class' is not allowed; give the number of the axis of the classes.", lambda: samples.entropy("class")),  # type: ignore[arg-type]
        ("logits=1 is not allowed; give True for logits, False for probabilities.", lambda: samples.entropy(logits=1)),  # type: ignore[arg-type]
        ("dim=2 is no axis of classes in an output of shape (5, 3) and torch.float32.", lambda: samples.entropy(2)),
        ("axis dim=-1 has 1 class (shape (5, 1)), whose entropy is 0. If it is the logit of a sigmoid, give of=lambda z: torch.cat([z, "
         "torch.zeros_like(z)], -1).", lambda: samples.entropy(of=lambda z: z[:, :1])),
        ("logits=False, but the values are no probabilities: the least is ", lambda: samples.entropy(logits=False)),
        ("the output has 2 tensors (mean, log_scale). Give of=, the name of one of them or a function", pairs.entropy),
        ("of='means' gives no tensor, but None. Near names: mean. Give the name of a tensor", lambda: pairs.quantile(0.5, of="means")),
        ("of=3 is not allowed; give the name of a field or key, or a function of the output.",
         lambda: samples.quantile(0.5, of=3)),  # type: ignore[arg-type]
        ("q=1.5 is not allowed; give a number in [0, 1], or a list of such numbers.", lambda: samples.quantile(1.5)),
        ("the outputs were not kept (keep=False), and entropy needs them. Give sample keep=True, or entropy={'dim': 1} with", bare.entropy),
        ("the outputs were not kept (keep=False), and quantile needs them. Give sample keep=True.", lambda: streamed.quantile(0.5)),
        ("the passes were summed up with dim=1, logits=True, of=None, and not with dim=-1, logits=True, of=None, which", streamed.entropy),
    ):  # fmt: skip
        refused(RegularizerError, text, call)
    assert pairs.entropy(of="mean").shape == (5,)
    backend = graphreg.backend(hidden_dropout=0.5, inner="eager")
    model = torch.compile(mlp(), backend=backend)
    model(X)
    refused(GraphRegError, "at_once is not possible with a backend", lambda: graphreg.sample(model, X, 2, at_once=2))


def test_passes_that_depend_on_one_another_are_not_run_at_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            masked: Tensor = self.layer(x).masked_fill(torch.tensor([True, False, False, False]), -torch.inf) + self.n
            return masked

    module, x = graphreg.regularize(Counts(), dropout={"layer": 0.5}, rng=0, example_inputs=torch.ones(2, 4)), torch.ones(2, 4)
    module(x)
    state = graphreg.rng_state(module)
    with pytest.raises(GraphRegError, match=r"at_once=3: the model writes into n in eval mode"):
        graphreg.sample(module, x, 3, at_once=3)
    assert module.n.item() == 1 and graphreg.rng_state(module) == state
    samples = graphreg.sample(module, x, 3)
    assert samples.mean[:, 0].tolist() == [-torch.inf] * 2 and samples.spread[:, 0].tolist() == [0.0] * 2
    torch.testing.assert_close(samples.mean, samples.outputs.mean(0))
