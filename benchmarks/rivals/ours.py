"""graphreg's own column. Each row is a promise of docs/randomness.md, which names the tests that hold it in full."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.passes import BernoulliDropout
from rivals.measures import (
    IMAGES,
    ONES,
    Function,
    afresh,
    backward_is_forward,
    compilations,
    compiled,
    kept,
    passes,
    same_mask,
    under_a_budget,
)
from rivals.rows import Probe, yes


class Two(nn.Module):
    """Two sites, each an output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(x), torch.cos(x)


class Around(nn.Module):
    """One site between others."""

    def __init__(self, last: Function, first: Function = torch.sin) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class Own(nn.Module):
    """Batch norm and a dropout that is a function with a literal rate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(x + 1), 0.5, self.training)


def two(**dropout: float) -> Any:
    return graphreg.regularize(Two(), dropout=dropout or {"sin": 0.5}, rng=0)


def function(module: Any) -> Function:
    return lambda x: cast(Tensor, module(x).output)


def site(x: Tensor = ONES, module: Any = None, at: int = 0) -> Tensor:
    return cast(Tensor, (two() if module is None else module)(x).output[at])


def exp() -> Any:
    """Dropout of an input that is 1, and its exponential."""
    return graphreg.regularize(Around(torch.exp, torch.clone), dropout={"clone": 0.5}, rng=0)


def compiled_alike() -> str:
    afresh()
    eager, twin = two(), two()
    run = compiled(twin)
    return yes(all(same_mask(site(module=eager), site(module=run)) for _ in range(3)))


def layouts_alike() -> str:
    one = site(IMAGES)
    return yes(same_mask(one, site(IMAGES.to(memory_format=torch.channels_last))) and same_mask(one, site(torch.cat([IMAGES, IMAGES]))[:4]))


def checkpointed_when_held() -> str:
    """Around the module itself a checkpoint is refused in eager, and right in a block of frozen_noise, compiled too."""
    module = exp()
    try:
        backward_is_forward(lambda x: cast(Tensor, checkpoint(function(module), x, use_reentrant=False)))
    except graphreg.GraphRegError as error:
        assert "frozen_noise" in str(error)
    else:
        return "no"
    afresh()
    for run in (module, compiled(module)):
        with graphreg.frozen_noise(module):
            if not backward_is_forward(lambda x, run=run: cast(Tensor, checkpoint(function(run), x, use_reentrant=False))):  # type: ignore[misc]
                return "no"
    return "in `frozen_noise`"


def seeds_by_site() -> str:
    def masks(seed: int) -> tuple[Tensor, Tensor]:
        splices = [BernoulliDropout("sin", 0.5), BernoulliDropout("cos", 0.5, rng=seed)]
        output = graphreg.regularize(Two(), *splices, rng=0)(ONES).output
        return output[0], output[1]

    one, other = masks(1), masks(2)
    return yes(same_mask(one[0], other[0]) and not same_mask(one[1], other[1]))


def sites_apart() -> str:
    output = two(sin=0.5, cos=0.5)(ONES).output
    return yes(not same_mask(*output))


def others_left_alone() -> str:
    return yes(same_mask(site(module=two(cos=0.5), at=1), site(module=two(sin=0.5, cos=0.5), at=1)))


def resumes() -> str:
    module, twin = two(), two()
    site(module=module)
    state = json.loads(json.dumps(graphreg.rng_state(module)))
    graphreg.set_rng_state(twin, state)
    return yes(torch.equal(site(module=module), site(module=twin)))


def ranks_by_choice() -> str:
    """As rank 3 of several; tests/runtime/test_distributed.py has the processes."""
    alone, agree = site(), []
    with mock.patch.object(dist, "is_initialized", lambda: True), mock.patch.object(dist, "get_rank", lambda: 3):
        for ranks in ("differ", "same"):
            module = two()
            graphreg.set_ranks(module, cast(Literal["differ", "same"], ranks))
            agree.append(same_mask(site(module=module), alone))
    return yes(agree == [False, True])


def held() -> str:
    afresh()
    module = two()
    for run in (module, compiled(module)):
        with graphreg.frozen_noise(module):
            first = site(module=run)
            if not torch.equal(first, site(module=run)):
                return "no"
        if torch.equal(first, site(module=run)):
            return "no"
    return "yes"


def own(choice: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(Own(), own_dropout=choice, rng=0)


def sampled() -> str:
    module = own("seeded")
    before = copy.deepcopy(module.state_dict())
    samples = graphreg.sample(module, ONES, 4)
    still = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return yes(still and bool(samples.spread.any()) and module.training)


def moved() -> str:
    x = torch.randn(1 << 10, 64)
    rates = [float((own(choice)(x).output == 0).float().mean()) for choice in ("off", "seeded", 0.25)]
    return yes(rates[0] == 0 and abs(rates[1] - 0.5) < 0.01 and abs(rates[2] - 0.25) < 0.01)


def recompiles() -> str:
    module = two()
    return yes(compilations(module, lambda rate: graphreg.set_strength(module, "dropout", rate)) == 1)


def fused() -> str:
    """Two sites among elementwise operations: one loop, as without."""
    plain = Around(lambda x: torch.sin(torch.sin(x)))
    module = graphreg.regularize(plain, dropout={"sin": 0.5, "sin_1": 0.5}, rng=0)
    return yes(passes(plain) == 1 and passes(function(module)) == 1)


def kept_more() -> str:
    plain = Around(torch.sin)
    return kept(function(graphreg.regularize(plain, dropout={"sin": 0.5}, rng=0)), plain)


PROBES: dict[str, Probe] = {
    "compiled": compiled_alike,
    "layout": layouts_alike,
    "budget": lambda: under_a_budget(function(exp())),
    "checkpoint": checkpointed_when_held,
    "seeds": seeds_by_site,
    "apart": sites_apart,
    "added": others_left_alone,
    "resume": resumes,
    "ranks": ranks_by_choice,
    "held": held,
    "sampled": sampled,
    "moved": moved,
    "recompiles": recompiles,
    "fused": fused,
    "kept": kept_more,
}
