"""``torch.nn.functional.dropout`` and ``nn.Dropout``, eager and compiled by Inductor."""

from __future__ import annotations

import inspect

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from rivals.measures import IMAGES, ONES, afresh, checkpointed, compilations, compiled, kept, passes, same_mask, under_a_budget
from rivals.rows import Probe, yes


def drop(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def seeded(function: Probe | object, x: Tensor = ONES, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    y = function(x)  # type: ignore[operator]
    assert isinstance(y, Tensor)
    return y


def compiled_alike() -> str:
    """``fallback_random`` would have them alike, and not fused: said beside the verdict."""
    with torch._inductor.config.patch(fallback_random=True):
        afresh()
        assert same_mask(seeded(drop), seeded(compiled(drop))) and passes(lambda x: torch.sin(drop(torch.tanh(x)))) == 2
    afresh()
    return yes(same_mask(seeded(drop), seeded(compiled(drop))))


def layouts_alike() -> str:
    return yes(same_mask(seeded(drop, IMAGES), seeded(drop, IMAGES.to(memory_format=torch.channels_last))))


def sites_apart() -> str:
    """One generator is drawn from in turn."""
    torch.manual_seed(0)
    return yes(not same_mask(drop(ONES), drop(ONES)))


def others_left_alone() -> str:
    alone = seeded(drop)
    seeded(drop)  # the site that was added, before it
    return yes(same_mask(alone, drop(ONES)))


def resumes() -> str:
    afresh()
    for run in (drop, compiled(drop)):
        run(ONES)
        state = torch.get_rng_state()
        first = run(ONES)
        torch.set_rng_state(state)
        if not torch.equal(first, run(ONES)):
            return "no"
    return "yes"


def ranks_by_seed() -> str:
    assert not same_mask(seeded(drop, seed=0), seeded(drop, seed=1)) and same_mask(seeded(drop), seeded(drop))
    return "by hand"


def held_by_hand() -> str:
    afresh()
    for run in (drop, compiled(drop)):
        assert not torch.equal(run(ONES), run(ONES))
        with torch.random.fork_rng():
            assert torch.equal(seeded(run), seeded(run))
    return "by hand"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x + 1))  # type: ignore[no-any-return]


def sampled_by_hand() -> str:
    net = Net().eval()
    assert torch.equal(net(ONES), net(ONES))
    for module in net.modules():
        module.train(isinstance(module, nn.Dropout))
    assert not torch.equal(net(ONES), net(ONES)) and not net.norm.training
    return "by hand"


def moved_by_hand() -> str:
    net = Net()
    for rate in (0.0, 0.25):
        net.drop.p = rate
        dropped = float((net.drop(torch.ones(1 << 16)) == 0).float().mean())
        assert abs(dropped - rate) < 0.01
    return "by hand"


def recompiles() -> str:
    net = Net()

    def change(rate: float) -> None:
        net.drop.p = rate

    return yes(compilations(net, change) == 1)


def fused() -> str:
    return yes(passes(lambda x: torch.sin(drop(torch.tanh(x)))) == 1)


PROBES: dict[str, Probe] = {
    "compiled": compiled_alike,
    "layout": layouts_alike,
    "budget": lambda: under_a_budget(lambda x: torch.exp(drop(x))),
    "checkpoint": lambda: checkpointed(lambda x: torch.exp(drop(x))),
    "seeds": lambda: yes(bool({"generator", "seed"} & set(inspect.signature(F.dropout).parameters))),
    "apart": sites_apart,
    "added": others_left_alone,
    "resume": resumes,
    "ranks": ranks_by_seed,
    "held": held_by_hand,
    "sampled": sampled_by_hand,
    "moved": moved_by_hand,
    "recompiles": recompiles,
    "fused": fused,
    "kept": lambda: kept(lambda x: torch.sin(drop(torch.sin(x))), lambda x: torch.sin(torch.sin(x))),
}
