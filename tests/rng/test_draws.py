"""The draws of a formula, one after the other: each has words of its own, which depend on its number alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import Noise, Penalty, Splice, Vjp
from graphreg.errors import GraphRegError
from graphreg.rng.hash import kept_words, lane_keys
from graphreg.rng.noise import bits
from scores import correlation

KEY = torch.tensor([0x1234567, -0x7654321], dtype=torch.int32)
N = 1 << 12


def unit(lane: int, count: int = N, key: Tensor = KEY) -> Tensor:
    """The first 24 bits of a lane, in [0, 1)."""
    return ((bits(key, (count,), lane).to(torch.int64) & 0xFFFFFFFF) >> 8).double() * 2.0**-24


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
KINDS: list[Callable[[Noise, Tensor], Tensor]] = [lambda n, z: n.keep(z, 0.3), Noise.uniform, Noise.normal]
AHEAD = list(itertools.product(KINDS, DTYPES))


@pytest.mark.parametrize("ahead", [[], *([one] for one in AHEAD), AHEAD])
def test_a_draw_depends_on_its_number_and_on_nothing_that_was_drawn_before(ahead: list[Any]) -> None:
    def drawn(kind: Callable[[Noise, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        noise = Noise(KEY)
        for other, its_dtype in ahead:
            other(noise, torch.empty(7, dtype=its_dtype))
        return kind(noise, torch.empty(N, dtype=dtype))

    lane = 4 * len(ahead)
    assert torch.equal(drawn(KINDS[1], torch.float32).double(), unit(lane))
    assert torch.equal(drawn(KINDS[0], torch.float32).to(torch.int32), kept_words(bits(KEY, (N,), lane), torch.tensor(0.3)))
    high, low = ((bits(KEY, (N,), lane + i).to(torch.int64) & 0xFFFFFFFF) >> by for i, by in ((0, 5), (1, 6)))
    assert torch.equal(drawn(KINDS[1], torch.float64), (high.double() * 2.0**26 + low.double()) * 2.0**-53)
    shift = Noise(torch.stack(lane_keys(KEY[0], KEY[1], lane)))  # the first draw of the key that the lane makes
    assert torch.equal(drawn(KINDS[0], torch.float32), shift.keep(torch.empty(N), 0.3))


def test_a_new_noise_repeats_the_draws() -> None:
    z, noise = torch.empty(N), Noise(KEY)
    first, second = noise.uniform(z), noise.uniform(z)
    again = Noise(noise.key)
    assert torch.equal(again.uniform(z), first) and torch.equal(again.uniform(z), second)
    assert not torch.equal(first, second)


def test_no_two_of_many_draws_resemble_each_other() -> None:
    """64 of them: kept where they agree in as many elements as chance has it, and nothing correlates, shifted by one or not."""
    noise = Noise(KEY)
    drawn = [noise.uniform(torch.empty(N)) for _ in range(64)]
    scores = [abs(correlation(a, b)) for a, b in itertools.combinations(drawn, 2)]
    scores += [abs(correlation(a[1:], b[:-1])) for a, b in itertools.permutations(drawn[:16], 2)]
    assert max(scores) < 5  # of 2256, normal: 5 is passed once in 800
    assert len(torch.cat(drawn).unique()) > 64 * N * 0.99


@pytest.mark.parametrize("first", [Noise.uniform, Noise.normal])
def test_the_second_draw_does_not_tell_of_the_first(first: Callable[[Noise, Tensor], Tensor]) -> None:
    z, noise = torch.empty(1 << 16), Noise(KEY)
    one = first(noise, z)
    assert abs(correlation(one, noise.keep(z, 0.5))) < 4.5 and abs(correlation(one[:100], noise.uniform(z[:100]))) < 4.5


def test_the_keys_of_a_thousand_draws_are_a_thousand() -> None:
    words = {(int(k0), int(k1)) for lane in range(4000) for k0, k1 in [lane_keys(KEY[0], KEY[1], lane)]}
    assert len(words) == 4000


class Twice(Splice, keys=("twice_drawn",)):
    """Several draws of each kind."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        kept = noise.keep(z, weight) * noise.keep(z, weight)
        return (z + noise.normal(z) * noise.uniform(z)) * kept + (noise.uniform(z) - noise.normal(z)) * z.sigmoid()


def test_compiled_draws_are_eagers() -> None:
    """Behind a tanh, where a splice is recomputed in backward, and behind a layer, where it is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    x = torch.randn(4, 5)

    def gradients(run: Any, module: nn.Module) -> list[Tensor]:
        output = run(x).output
        return [output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))]

    module = graphreg.regularize(model, Twice(["1", "2"], 0.3), rng=1)
    expected = gradients(module, module)
    module.graphreg_rules.key.seek(0)
    torch.testing.assert_close(gradients(torch.compile(module, backend="aot_eager", fullgraph=True), module), expected)


def test_inductor_lowers_the_lane_of_a_draw() -> None:
    def drawn(key: Tensor) -> Tensor:
        noise, z = Noise(key), torch.empty(70)
        return torch.stack([noise.keep(z, 0.3).float(), noise.keep(z, 0.3).float(), noise.uniform(z), noise.uniform(z)])

    assert torch.equal(torch.compile(drawn, fullgraph=True)(KEY), drawn(KEY))


class Checkpointed(Splice, keys=("checkpointed_draw",)):
    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        made: Tensor = checkpoint(lambda z: z * noise.keep(z, weight) * noise.uniform(z), z, use_reentrant=False)
        return made


def test_a_draw_that_backward_would_draw_again_is_refused() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), Checkpointed("0", 0.5), rng=1)
    output = module(torch.ones(3, 4)).output
    with pytest.raises(GraphRegError, match="a formula must not draw inside torch.utils.checkpoint"):
        output.sum().backward()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_a_module_that_is_checkpointed_while_the_noise_is_held_draws_the_same_again() -> None:
    module = graphreg.regularize(Block(), Twice("tanh", 0.3), rng=1)
    x = torch.randn(4, 5, requires_grad=True)
    with graphreg.frozen_noise(module):
        expected = torch.autograd.grad(module(x).output.square().sum(), [x, *module.parameters()])
        output = checkpoint(lambda x: module(x).output, x, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), [x, *module.parameters()]), expected)


class Directions(Penalty, keys=("two_directions",)):
    """Two directions, drawn one after the other."""

    def __call__(self, vjp: Vjp) -> Tensor:
        ((name, z),) = vjp.sites.items()
        drawn = [2 * vjp.noise[name].keep(z, 0.5) - 1 for _ in range(2)]
        return torch.stack([g.square().sum() for v in drawn for g in vjp({name: v}).values()]).mean()


def test_directions_are_drawn_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, keep = list[Tensor](), Noise.keep
    module = graphreg.regularize(Block(), Directions("tanh", 0.1), rng=1)
    key = module.graphreg_rules.key.keys[0].clone()
    with monkeypatch.context() as patch:

        def noted(noise: Noise, z: Tensor, p: Any) -> Tensor:
            seen.append(keep(noise, z, p))
            return seen[-1]

        patch.setattr(Noise, "keep", noted)
        module(torch.randn(64, 5))
    first, second = seen
    noise = Noise(key)
    assert all(torch.equal(each, keep(noise, each, 0.5)) for each in (first, second)) and not torch.equal(first, second)
