"""On a GPU: masks are the CPU's bit for bit, values and gradients are the CPU's, compiled and under CUDA graphs too, and with FSDP2.

``make gpu`` runs these tests. ``GRAPHREG_TEST_DEVICE=cpu pytest -m gpu tests/gpu`` runs their code where there is no GPU.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphreg
from graphreg import Noise
from graphreg.rng import kernels

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("GRAPHREG_TEST_DEVICE", "cuda"))
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU")
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # both sides in float32
    yield DEVICE
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


class Net(nn.Module):
    """A convolution, an attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.qkv, self.up, self.head = nn.Linear(16, 48), nn.Linear(16, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(z).chunk(3, -1)
        z = z + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(torch.tanh(self.up(z)).mean(1))


REGULARIZERS: dict[str, dict[str, Any]] = {
    "dropout": {"hidden_dropout": 0.3},
    "all three": {"hidden_dropout": 0.3, "hidden_l1": 1e-2, "weight_l2": 1e-2},
    "channels": {"channel_dropout": {"weight": 0.3, "pattern": "conv"}},
    "weights": {"drop_connect": {"weight": 0.2, "pattern": "up.weight"}},
    "schedule": {"hidden_dropout": graphreg.schedules.linear(0.0, 0.5, 3), "hidden_l1": 1e-2},
    "noise": {"noise": 0.1, "hidden_l2": 1e-2},
    "state": {"spectral": 0.1, "hidden_dropout": 0.3},
}


def modules(keywords: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """The same regularized module on the CPU and on the GPU."""
    torch.manual_seed(0)
    model = Net()
    return tuple(graphreg.regularize(each, rng=0, **keywords, **options) for each in (copy.deepcopy(model), model.to(DEVICE)))  # type: ignore[return-value]


def steps(module: Any, call: Callable[[Tensor], Any], device: torch.device, count: int = 4) -> list[Tensor]:
    """Outputs, penalties and gradients of some steps of training, on the CPU."""
    found = list[Tensor]()
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for i in range(count):
        optimizer.zero_grad()
        output, penalties = call((X * (1 + i)).to(device))
        total = sum(penalties.values(), output.square().mean())
        total.backward()
        found += [each.detach().cpu().clone() for each in (output, total, *(p.grad for p in module.parameters()))]
        optimizer.step()
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)  # type: ignore[arg-type]


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_draws_are_the_cpus(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and uniform values bit for bit; normal values to rounding, because the GPU computes other logarithms and cosines."""
    if not triton:
        monkeypatch.setattr(kernels, "_triton", lambda: None)
    elif DEVICE.type == "cuda":
        pytest.importorskip("triton", reason="Triton is not installed")
    key = torch.tensor([0x1234567, -0x7654321], dtype=torch.int32)
    noises, zs = (Noise(key), Noise(key.to(DEVICE))), [torch.empty(300, 41, dtype=dtype, device=d) for d in ("cpu", DEVICE)]
    for p in (0.0, 0.3, torch.tensor(0.7)):
        cpu, gpu = (noise.keep(z, p) for noise, z in zip(noises, zs, strict=True))
        assert torch.equal(gpu.cpu(), cpu) and gpu.dtype == cpu.dtype
        cpu, gpu = (noise.uniform(z) for noise, z in zip(noises, zs, strict=True))
        assert torch.equal(gpu.cpu(), cpu)
        cpu, gpu = (noise.normal(z) for noise, z in zip(noises, zs, strict=True))
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-2 if dtype.itemsize < 4 else 1e-5)


def test_a_mask_is_one_launch() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("a CPU launches nothing")
    pytest.importorskip("triton", reason="Triton is not installed")
    z, key = torch.empty(64, 64, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    rate = torch.tensor(0.3, device=DEVICE)
    Noise(key).keep(z, rate)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        Noise(key).keep(z, rate)
        torch.cuda.synchronize()
    launched = [event.key for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == 1 and "keep" in launched[0]


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_eager_is_the_cpus(kind: str) -> None:
    cpu, gpu = modules(REGULARIZERS[kind])
    assert_close(steps(gpu, gpu, DEVICE), steps(cpu, cpu, torch.device("cpu")))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", REGULARIZERS)
def test_compiled_is_the_cpus(kind: str, mode: str) -> None:
    cpu, gpu = modules(REGULARIZERS[kind])
    compiled = torch.compile(gpu, mode=mode, fullgraph=True)
    assert_close(steps(gpu, compiled, DEVICE), steps(cpu, cpu, torch.device("cpu")))


def test_cuda_graphs_are_recorded_once_and_replayed() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("a CPU has no CUDA graphs")
    from torch._inductor.cudagraph_trees import get_container  # noqa: PLC0415

    torch._dynamo.utils.counters.clear()
    _, gpu = modules(REGULARIZERS["all three"])
    compiled = torch.compile(gpu, mode="reduce-overhead", fullgraph=True)
    steps(gpu, compiled, DEVICE, 4)
    manager = get_container(torch.cuda.current_device()).tree_manager
    assert manager is not None
    recorded = manager.new_graph_id().id
    assert recorded >= 2  # the forward and the backward
    steps(gpu, compiled, DEVICE, 8)
    assert manager.new_graph_id().id == recorded + 1 and torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_frozen_noise_and_strengths_under_cuda_graphs() -> None:
    _, gpu = modules({"hidden_dropout": 0.3})
    compiled = torch.compile(gpu, mode="reduce-overhead", fullgraph=True)
    x = X.to(DEVICE)
    with graphreg.frozen_noise(gpu):
        first, second = (compiled(x).output.detach().clone() for _ in range(2))
    assert torch.equal(first, second)
    third, fourth = (compiled(x).output.detach().clone() for _ in range(2))
    assert not torch.equal(second, third) and not torch.equal(third, fourth)  # the block counts as one call
    graphreg.set_strength(gpu, "hidden_dropout", 0.0)
    with graphreg.noise_off(gpu):
        off = compiled(x).output.detach().clone()
    torch.testing.assert_close(compiled(x).output, off, **CLOSE)  # type: ignore[arg-type]


def test_autocast_keeps_penalties_in_float32() -> None:
    _, gpu = modules(REGULARIZERS["all three"])
    for call in (gpu, torch.compile(gpu, fullgraph=True)):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output, penalties = call(X.to(DEVICE))
        assert output.dtype == torch.bfloat16 and {each.dtype for each in penalties.values()} == {torch.float32}
        sum(penalties.values(), output.float().sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in gpu.parameters())


def test_moved_there_and_back_it_draws_the_same() -> None:
    cpu, gpu = modules({"hidden_dropout": 0.3})
    first, second = (cpu(X).output for _ in range(2))
    torch.testing.assert_close(gpu(X.to(DEVICE)).output.cpu(), first, **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(gpu.cpu()(X).output, second, **CLOSE)  # type: ignore[arg-type]


@pytest.fixture
def one_rank(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_on_one_rank(one_rank: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    torch.manual_seed(0)
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)], nn.Linear(16, 4))
    keywords: dict[str, Any] = {"hidden_dropout": 0.3, "hidden_l1": 1e-2, "weight_l2": 1e-2, "rng": 0}
    cpu = graphreg.regularize(copy.deepcopy(blocks), **keywords)
    gpu: Any = graphreg.regularize(blocks.to(DEVICE), **keywords, blocks=["0", "1"])
    mesh = init_device_mesh(DEVICE.type, (1,))
    for name in ("0", "1"):
        fully_shard(gpu.get_submodule(name), mesh=mesh)
    fully_shard(gpu, mesh=mesh)
    x = torch.randn(8, 16)
    for _ in range(3):
        found = []
        for module, given in ((cpu, x), (gpu, x.to(DEVICE))):
            module.zero_grad()
            output, penalties = module(given)
            sum(penalties.values(), output.square().mean()).backward()
            gradients = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in module.parameters()]
            found.append([each.detach().cpu() for each in (output, *penalties.values(), *gradients)])
        assert_close(found[1], found[0])
