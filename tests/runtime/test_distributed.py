"""Two processes under DistributedDataParallel: other masks on each, and the gradients of one process that applies both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import results_of

import graphreg
from two_ranks import STEPS, data, loss_of, regularized

SCRIPT = Path(__file__).parent / "two_ranks.py"
Told = dict[str, Any]


@pytest.fixture(scope="session", params=["eager", "inductor"])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What each of the two ranks says."""
    found: list[Told] = results_of(SCRIPT, 2, tmp_path_factory.mktemp("ranks"), request.param)
    return found


def applying_both(monkeypatch: pytest.MonkeyPatch, ranks: str) -> list[Told]:
    """One process that runs each rank's batch with that rank's masks, and averages the gradients."""
    module = regularized()
    optimizer, steps = torch.optim.SGD(module.parameters(), 0.1), []
    graphreg.set_ranks(module, ranks)  # type: ignore[arg-type]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for step in range(STEPS):
        outputs = []
        optimizer.zero_grad()
        with graphreg.frozen_noise(module):  # both ranks are at the same call
            for rank in (0, 1):
                monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
                result = module(data(rank, step))
                (loss_of(result) / 2).backward()
                outputs.append(result.output.detach())
        steps.append({"outputs": outputs, "gradients": [p.grad.clone() for p in module.parameters()]})
        optimizer.step()
    return steps


@pytest.mark.parametrize("ranks", ["differ", "same"])
def test_gradients_are_those_of_one_process_that_applies_both_masks(told: list[Told], ranks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step, theirs in enumerate(applying_both(monkeypatch, ranks)):
        for rank in (0, 1):
            ours = told[rank][ranks][step]
            torch.testing.assert_close(ours["output"], theirs["outputs"][rank], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours["gradients"], theirs["gradients"], rtol=1e-9, atol=1e-12)


def test_masks_differ_across_ranks_or_are_the_same(told: list[Told]) -> None:
    """Seen on the keys, and on the same input, held and sampled."""
    first, second = told
    assert not torch.isin(first["differ keys"], second["differ keys"]).any()
    assert torch.equal(first["same keys"], second["same keys"]) and torch.equal(first["same keys"], first["differ keys"])
    for what in ("frozen", "samples"):
        ours, theirs = first[f"same {what}"], second[f"same {what}"]
        assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not any(torch.allclose(a, b) for a, b in zip(first[f"differ {what}"], second[f"differ {what}"], strict=True))


def test_held_on_each_rank(told: list[Told]) -> None:
    for rank in told:
        for ranks in ("differ", "same"):
            assert torch.equal(*rank[f"{ranks} frozen"])


def test_the_state_is_the_same_on_every_rank(told: list[Told]) -> None:
    """A checkpoint that rank 0 saves resumes all of them."""
    for ranks in ("differ", "same"):
        states = [[step["state"] for step in rank[ranks]] for rank in told]
        assert states[0] == states[1]
        assert [state["call"] for state in states[0]] == [1, 2, 3] and states[0][0]["ranks"] == ranks


@pytest.mark.parametrize("what", ["whole", "around"])
def test_compiled_whole_each_rank_has_one_graph_with_the_masks_and_gradients_of_eager(told: list[Told], what: str) -> None:
    """The module's own compile; under Inductor, in the sweep, graphreg's backend. ``around``: the backend of the wrapper."""
    for rank in told:
        steps, graphs = rank[what]
        assert graphs == 1
        for ours, theirs in zip(steps, rank["differ"], strict=True):
            torch.testing.assert_close(ours["output"], theirs["output"], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(ours["gradients"], theirs["gradients"], rtol=1e-9, atol=1e-12)
