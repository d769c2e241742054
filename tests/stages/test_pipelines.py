"""Two processes with torch.distributed.pipelining: gradients, outputs and penalties are those of the whole model on the microbatches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import results_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleavedZeroBubble, SplitPoint, pipeline
from torch.nn.parallel import DistributedDataParallel

import graphreg
from stage_nets import net, stage_of
from two_stages import ALL, STEPS, WAYS, Way, data, loss_of

SCRIPT = Path(__file__).parent / "two_stages.py"
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks ends with, by way."""
    return results_of(SCRIPT, 2, tmp_path_factory.mktemp("stages"), *WAYS)


def whole_model(way: Way) -> list[dict[str, Any]]:
    """The whole model, called on the microbatches in turn, with the loss and the penalties averaged or added as the schedule does."""
    module = graphreg.regularize(net(0.3), rng=5, **way.options)
    found = []
    for step in range(STEPS):
        module.zero_grad()
        outputs, last = [], {}
        x, target = data(step)
        for microbatch, wanted in zip(x.chunk(way.microbatches), target.chunk(way.microbatches), strict=True):
            output, last = module(microbatch)
            loss = loss_of(output, wanted) / (way.microbatches if way.scale_grads else 1)
            (loss + sum(last.values()) / way.microbatches).backward()
            outputs.append(output.detach())
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        found.append({"output": torch.cat(outputs), "gradients": gradients, "penalties": {n: p.detach() for n, p in last.items()}})
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_are_the_whole_model(told: list[dict[str, Any]], way: str) -> None:
    for step, theirs in enumerate(whole_model(WAYS[way])):
        first, last = (rank[way][step] for rank in told)
        torch.testing.assert_close(last["output"], theirs["output"], **CLOSE)
        torch.testing.assert_close({**first["gradients"], **last["gradients"]}, theirs["gradients"], **CLOSE)
        each = [*first["penalties"], *last["penalties"]]
        total = {name: sum(penalties[name] for penalties in each) for name in each[0]}
        torch.testing.assert_close(total, theirs["penalties"], **CLOSE)
        assert {*first["calls"], *last["calls"]} == {(step + 1) * WAYS[way].microbatches}


# One process, whose pipeline has one stage


@pytest.fixture
def alone() -> Iterator[None]:
    hook = sys.excepthook
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()
    sys.excepthook = hook


def step(stage: Any, kind: Any = ScheduleGPipe, microbatches: int = 2, **options: Any) -> None:
    x, target = data(0)
    schedule = kind(stage, n_microbatches=microbatches, loss_fn=loss_of, **options)
    schedule.step(x, target=target)


def one_stage(**options: Any) -> Any:
    module = graphreg.regularize_stage(net(0.3), whole=net(0.3), rng=5, **{"microbatches": 2, **ALL, **options})
    return module, PipelineStage(module, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("told", "schedule"),
    [({"microbatches": 4}, {}), ({}, {"microbatches": 4}), ({"scale_grads": False}, {}), ({}, {"scale_grads": False})],
)
def test_another_schedule_than_was_told(alone: None, told: dict[str, Any], schedule: dict[str, Any]) -> None:
    """It would scale the penalties otherwise. A module in eval mode has no gradients to scale."""
    module, stage = one_stage(**told)
    with pytest.raises(graphreg.GraphRegError, match=r"and regularize_stage was told microbatches=.*Give regularize_stage what the"):
        step(stage, **schedule)
    module.eval()
    step(PipelineStage(module, 0, 1, torch.device("cpu")), **schedule)


def test_a_rehearsal_is_no_call(alone: None) -> None:
    """Torch runs a stage once, before the first step, to find out the shapes of its values."""
    module, stage = one_stage(l2_sp=0.1)
    twin = graphreg.regularize(net(0.3), rng=5, penalties="attach", scale=1, l2_sp=0.1, **ALL)
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    step(stage)
    assert len(seen) == 3 and graphreg.rng_state(module)["call"] == 2
    torch.testing.assert_close(torch.cat(seen[1:]), torch.cat([twin(x) for x in data(0)[0].chunk(2)]), **CLOSE)


@pytest.mark.parametrize("by", ["torch.compile", "DistributedDataParallel", "mesh"])
def test_compiled_and_wrapped(alone: None, by: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    module, stage = one_stage()
    step(stage)
    other: Any = one_stage()[0]
    if by == "mesh":
        graphreg.set_ranks(other, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "pp")), data="dp")
    wrapped: Any = torch.compile(other, backend="aot_eager") if by == "torch.compile" else other
    step(PipelineStage(DistributedDataParallel(other) if by[0] == "D" else wrapped, 0, 1, torch.device("cpu")))
    assert not counters["graph_break"] and graphreg.rng_state(other)["call"] == 2
    ours, theirs = ({name: p.grad for name, p in each.named_parameters()} for each in (other, module))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_penalties_on_parameters_and_a_backward_pass_in_two_parts(alone: None) -> None:
    """Such a schedule loses their gradients, or torch fails."""
    module, _ = one_stage()
    stages = [PipelineStage(module, 0, 1, torch.device("cpu"))]
    with pytest.raises(graphreg.GraphRegError, match=r"weight_l2 acts on parameters, and ScheduleInterleavedZeroBubble computes"):
        step(stages, ScheduleInterleavedZeroBubble)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own, of torch's own
def test_stages_of_pipeline_have_no_values_inside_modules() -> None:
    model = net()
    x = data(0)[0]
    stage = pipeline(model, (x,), split_spec={"layers.2": SplitPoint.BEGINNING}).get_stage_module(0)
    message = r"the stage calls 'layers\.0' as a whole, and something acts inside it in Net.*pipeline\(\) made has no such values"
    with pytest.raises(graphreg.NoMatchError, match=message):
        graphreg.regularize_stage(stage, whole=model, microbatches=2, rng=0, hidden_dropout=0.1)
    module = graphreg.regularize_stage(stage, whole=model, microbatches=2, weight_l2=0.1)
    twin = graphreg.regularize_stage(stage_of(model, 0), whole=model, microbatches=2, weight_l2=0.1)
    torch.testing.assert_close(module(x), twin(x), **CLOSE)
    torch.testing.assert_close(module.penalties(), twin.penalties(), **CLOSE)
