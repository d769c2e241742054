"""docs/examples: regularizers as a user writes them. Each page prints what it shows; each class is compared with values by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import Noise
from graphreg.testing import check_regularizer
from pages import printed_by, registry_restored

FOLDER = Path(__file__).parents[2] / "docs" / "examples"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))


OPEN = ExitStack()


@pytest.fixture(scope="module", autouse=True)
def _pages() -> Iterator[None]:
    yield
    opened.cache_clear()
    OPEN.close()


@contextmanager
def run(name: str) -> Iterator[dict[str, Any]]:
    """What a page defines; the page itself runs once for all tests."""
    yield opened(name)


@cache
def opened(name: str) -> dict[str, Any]:
    return OPEN.enter_context(first_run(name))


@contextmanager
def first_run(name: str) -> Iterator[dict[str, Any]]:
    """What a page defines, after its blocks have printed what they should. It is a module, as Dynamo expects of code that it compiles."""
    module = ModuleType(f"page_{name}")
    with registry_restored(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        found = list(printed_by((FOLDER / f"{name}.md").read_text(), f"{name}.md", vars(module)))
        assert [printed for printed, shown in found if shown is not None] == [shown for _, shown in found if shown is not None]
        assert any(shown for _, shown in found)
        yield vars(module)


class Draws(Noise):
    """Noise whose draws are given, one after the other."""

    def __init__(self, *draws: Any) -> None:
        super().__init__(torch.zeros(2, dtype=torch.int32))
        self.draws = [torch.tensor(draw) for draw in draws]

    def keep(self, z: Tensor, p: Tensor | float, shared: Iterable[int] = ()) -> Tensor:
        return self.uniform(z, shared)

    def uniform(self, z: Tensor, shared: Iterable[int] = ()) -> Tensor:
        draw = self.draws.pop(0)
        lanes = [1 if axis in {each % z.dim() for each in shared} else size for axis, size in enumerate(z.shape)]
        return draw.expand(lanes) if draw.dim() == 0 else draw.reshape(lanes)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def value_and_gradient(y: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    return y.detach(), torch.autograd.grad(y.sum(), of)[0]


def test_there_are_seven() -> None:
    assert PAGES == ["ewc", "manifold_mixup", "mixout", "quantization_noise", "shake_shake", "spectral_norm", "token_dropout"]
    assert all(len((FOLDER / f"{name}.md").read_text().splitlines()) <= 80 for name in PAGES)


def test_mixout_by_hand() -> None:
    """p = ½, kept are 1 and 3: (w or w₀, minus w₀/2) · 2; the gradient is 2 where w is kept."""
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    state = {"start": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}
    with run("mixout") as page:
        y = page["Mixout"]("*", 0.5)(w=w, weight=number(0.5), noise=Draws([[1.0, 0.0], [1.0, 0.0]]), state=state)
    value, gradient = value_and_gradient(y, w)
    assert torch.equal(value, torch.tensor([[-3.0, 6.0], [-1.0, 8.0]]))
    assert torch.equal(gradient, torch.tensor([[2.0, 0.0], [2.0, 0.0]]))


def test_mixout_keeps_the_expectation_and_the_parameter() -> None:
    with run("mixout") as page:
        layer = nn.Linear(200, 200, bias=False)
        start = layer.weight.detach().clone()
        module = graphreg.regularize(nn.Sequential(layer), page["Mixout"]("*", 0.4), rng=0)
        torch.testing.assert_close(read(module), start, rtol=1e-5, atol=1e-6)  # mixed with itself
        with torch.no_grad():
            layer.weight += 1.0
        mixed = (read(module) - start).round(decimals=3)
        assert set(mixed.flatten().tolist()) == {0.0, torch.tensor(1 / 0.6).round(decimals=3).item()}
        assert abs(float(mixed.mean()) - 1) < 0.03
        graphreg.reset_state(module, "mixout")
        torch.testing.assert_close(read(module), layer.weight.detach(), rtol=1e-5, atol=1e-6)


def read(module: Any) -> Tensor:
    """The weight that the only layer of a module reads."""
    output: Tensor = module(torch.eye(200)).output.detach()
    return output.T


def test_quantization_noise_by_hand() -> None:
    """With 2 bits the levels are 0, ⅓, ⅔ and 1. A draw below the strength rounds; the gradient passes through all."""
    w = torch.tensor([[0.0, 0.4, 0.4, 1.0]], requires_grad=True)
    with run("quantization_noise") as page:
        splice = page["QuantizationNoise"]("*", 0.5, bits=2)
        value, gradient = value_and_gradient(splice(w=w, weight=number(0.5), noise=Draws([[0.2, 0.2, 0.7, 0.2]])), w)
        torch.testing.assert_close(value, torch.tensor([[0.0, 1 / 3, 0.4, 1.0]]))
        assert torch.equal(gradient, torch.ones(1, 4))
        flat = torch.full((2, 2), 3.0)
        assert torch.equal(splice(w=flat, weight=number(0.5), noise=Draws([[0.0, 0.0], [0.9, 0.9]])), flat)
        with pytest.raises(graphreg.RegularizerError, match="bits must be a whole number, 1 or more"):
            page["QuantizationNoise"]("*", 0.5, bits=0)


def test_token_dropout_by_hand() -> None:
    z = torch.ones(1, 3, 2, requires_grad=True)
    with run("token_dropout") as page:
        y = page["TokenDropout"]("*", 0.5)(z=z, weight=number(0.5), noise=Draws([[[1.0], [0.0], [1.0]]]))
    value, gradient = value_and_gradient(y, z)
    assert torch.equal(value, torch.tensor([[[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]])) and torch.equal(gradient, value)


def test_token_dropout_acts_on_tokens_and_not_on_positions() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.token = nn.Embedding(4, 8), nn.Embedding(9, 8)

        def forward(self, ids: Tensor) -> Tensor:
            together: Tensor = self.token(ids) + self.position(torch.arange(ids.shape[1]))
            return together

    with run("token_dropout") as page:
        sites = graphreg.report(graphreg.regularize(Tokens(), page["TokenDropout"]("*", 0.5))).sites
        assert [site.name for site in sites] == ["token"]


def test_shake_shake_by_hand() -> None:
    """Shares of ¾ in forward and ¼ in backward: the branches count 3/2 and 1/2, their gradients 1/2 and 3/2."""
    z = torch.tensor([[[2.0, 4.0]], [[6.0, 8.0]]], requires_grad=True)
    with run("shake_shake") as page:
        splice = page["ShakeShake"]("*", 1.0)
        value, gradient = value_and_gradient(splice(z=z, weight=number(1.0), noise=Draws(0.75, 0.25)), z)
        assert torch.equal(value, torch.tensor([[[3.0, 6.0]], [[3.0, 4.0]]]))
        assert torch.equal(gradient, torch.tensor([[[0.5, 0.5]], [[1.5, 1.5]]]))
        value, gradient = value_and_gradient(splice(z=z, weight=number(0.5), noise=Draws(0.75, 0.25)), z)
        assert torch.equal(value[:, 0, 0], torch.tensor([2.5, 4.5])) and torch.equal(gradient[:, 0, 0], torch.tensor([0.75, 1.25]))


def test_shake_shake_draws_for_each_example() -> None:
    with run("shake_shake") as page:
        block = page["Block"]()
        x = torch.zeros(50, 4)
        nn.init.constant_(block.a.bias, 1.0), nn.init.constant_(block.b.bias, 0.0)
        module = graphreg.regularize(block, page["ShakeShake"]("**@stack", 1.0), rng=0)
        share = module(x).output.detach()  # x is 0, a is 1 and b is 0
        assert torch.equal(share, share[:, :1].expand_as(share)) and len(share[:, 0].unique()) == 50
        assert float(share.min()) >= 0 and float(share.max()) <= 1 and abs(float(share.mean()) - 0.5) < 0.2
        assert torch.equal(module.eval()(x).output, torch.full((50, 4), 0.5))


def test_ewc_by_hand() -> None:
    """½ (2 · 1² + 3 · 2²) = 7, with a gradient of Fisher information times distance."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    with run("ewc") as page:
        penalty = page["EWC"]("*", 1.0)(w=w, state={"start": torch.zeros(2), "fisher": torch.tensor([2.0, 3.0])})
    value, gradient = value_and_gradient(penalty, w)
    assert float(value) == 7 and torch.equal(gradient, torch.tensor([2.0, 6.0]))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ewc_after_a_task(compiled: bool) -> None:
    """With zero weights both classes have ½, so the gradient of x is ±x/2: 1 and 2 for x = 2 and 4, and their mean square is 2.5."""
    with run("ewc") as page:
        model = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(model.weight)
        module = graphreg.regularize(model, page["EWC"]("*", 2.0))
        page["consolidate"](module, [(torch.tensor([2.0]), torch.tensor(0)), (torch.tensor([4.0]), torch.tensor(1))])
        nn.init.constant_(model.weight, 3.0)
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        penalty = call(torch.ones(1, 1)).penalties["ewc"]
        (gradient,) = torch.autograd.grad(penalty, model.weight)
    assert float(penalty.detach()) == 2 * (2.5 * 9 + 2.5 * 9) / 2
    assert torch.equal(gradient, torch.full((2, 1), 2 * 2.5 * 3.0))


def test_manifold_mixup_by_hand() -> None:
    """The median of 0.1, 0.9 and 0.4 is 0.4: the first example is 0.4 · 1 + 0.6 · 3, with these numbers as its gradient."""
    z = torch.tensor([[1.0], [3.0]], requires_grad=True)
    with run("manifold_mixup") as page:
        y, state = page["ManifoldMixup"]("*", 1.0)(z=z, weight=number(1.0), noise=Draws(0.1, 0.9, 0.4), state={"share": torch.ones(1)})
    torch.testing.assert_close(y.detach(), torch.tensor([[2.2], [1.8]]))
    torch.testing.assert_close(value_and_gradient(y[0], z)[1], torch.tensor([[0.4], [0.6]]))
    torch.testing.assert_close(state["share"].float(), torch.tensor([0.4]))


def test_manifold_mixup_tells_the_loss_its_share() -> None:
    with run("manifold_mixup") as page:
        x, y = torch.eye(3), torch.tensor([0, 1, 2])
        module = graphreg.regularize(nn.Sequential(nn.Identity()), page["ManifoldMixup"]("input", 1.0), example_inputs=x, rng=0)
        shares = []
        for _ in range(200):
            output = module(x).output
            share = float(output[0, 0])
            torch.testing.assert_close(output, share * x + (1 - share) * x.roll(1, 0))
            shares.append(share)
        loss = nn.functional.cross_entropy
        expected = share * loss(output, y) + (1 - share) * loss(output, y.roll(1, 0))
        torch.testing.assert_close(page["mixed_loss"](module, output, y, "input").reshape(()), expected)
    spread = torch.tensor(shares)
    assert abs(float(spread.mean()) - 0.5) < 5 * (0.05 / 200) ** 0.5 and abs(float(spread.var()) - 0.05) < 0.02  # those of Beta(2, 2)


def test_spectral_norm_by_hand() -> None:
    """The largest singular value s is 4. The entry 1/s has the gradient 1/s in its own place, and -1/s² at the entry that is s."""
    w = torch.tensor([[4.0, 0.0], [0.0, 1.0]], requires_grad=True)
    with run("spectral_norm") as page:
        y, state = page["SpectralNorm"]("*", 1.0)(w=w, weight=number(1.0), state={"u": torch.tensor([1.0, 0.0])})
    assert torch.equal(y, w / 4) and torch.equal(state["u"], torch.tensor([1.0, 0.0]))
    assert torch.equal(value_and_gradient(y[1, 1], w)[1], torch.tensor([[-1 / 16, 0.0], [0.0, 0.25]]))


def test_spectral_norm_is_torchs_after_some_calls_and_needs_noise_on_in_eval() -> None:
    with run("spectral_norm") as page:
        layer = nn.Linear(5, 3, bias=False)
        layer.weight.data = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        module = graphreg.regularize(nn.Sequential(layer), page["SpectralNorm"]("*", 1.0))
        for _ in range(100):
            module(torch.eye(5))
        read = module(torch.eye(5)).output.T
        assert torch.linalg.matrix_norm(read, 2).item() == pytest.approx(1.0, abs=1e-4)
        state = graphreg.rng_state(module)["state"]["spectral_norm"]["0.weight"]["u"]
        with graphreg.noise_on(module):
            torch.testing.assert_close(module.eval()(torch.eye(5)).output.T, read)
        assert torch.equal(module(torch.eye(5)).output.T, layer.weight)
        assert torch.equal(graphreg.rng_state(module)["state"]["spectral_norm"]["0.weight"]["u"], state)
        theirs = torch.nn.utils.parametrizations.spectral_norm(layer.train(), n_power_iterations=100)
        torch.testing.assert_close(read, theirs.weight)


CHECKED: dict[str, tuple[str, dict[str, Any]]] = {
    "manifold_mixup": ("ManifoldMixup", {"wrong": {"weight": [-0.1, 1.5]}}),
    "mixout": ("Mixout", {"wrong": {"weight": [1.0]}}),
    "quantization_noise": ("QuantizationNoise", {"gradients": False, "wrong": {"bits": [0, 1.5]}}),  # straight through
    "shake_shake": ("ShakeShake", {"gradients": False, "pattern": "**@stack"}),  # another share in backward
    "spectral_norm": ("SpectralNorm", {"gradients": False}),  # it keeps its estimate of u
    "token_dropout": ("TokenDropout", {"wrong": {"weight": [1.0]}}),
}


@pytest.mark.filterwarnings("ignore:.*several times in a row")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CHECKED)
def test_it_has_what_every_regularizer_must_have(name: str, compiled: bool) -> None:
    cls, options = CHECKED[name]
    with run(name) as page:
        model = {"model": page["Block"](), "inputs": torch.randn(3, 4)} if name == "shake_shake" else {}
        check_regularizer(page[cls], backend="aot_eager" if compiled else None, **options, **model)
