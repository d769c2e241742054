"""A process without a GPU in which Inductor generates Triton, and Triton compiles it to PTX: ``python mocked_gpu.py`` prints what came out.

A module is captured and partitioned on the CPU. Then each of its graphs is moved to fake CUDA tensors and given to Inductor, which believes
in a GPU, because what it asks of one is answered here. The process is one of its own, since it changes torch for good.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface as interfaces
import torch._inductor.compile_fx as inductor
import triton
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import graphreg
from graphreg.rng import operators, triton_kernels
from graphreg.rng.hash import _M1, _S1

ARCHITECTURES = (80, 90)
MULTIPLIERS = (_M1, _S1)
SIZES = {
    "name": "mocked", "gcnArchName": "", "multi_processor_count": 108, "regs_per_multiprocessor": 1 << 16, "warp_size": 32,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "total_memory": 80 << 30, "L2_cache_size": 40 << 20,
    "shared_memory_per_block_optin": 163 << 10,
}  # fmt: skip
PROPERTIES = SimpleNamespace(major=8, minor=0, **SIZES)


class Interface(interfaces.CudaInterface):
    """What Inductor asks of a GPU."""

    class Worker(interfaces.CudaInterface.Worker):
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: PROPERTIES)

    is_available = staticmethod(lambda: True)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_compute_capability = staticmethod(lambda device=None: 80)
    get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    get_raw_stream = staticmethod(lambda device: 0)
    synchronize = staticmethod(lambda device=None: None)


class Driver:
    """What Triton asks of a GPU."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))
    get_current_device = staticmethod(lambda: 0)
    is_active = staticmethod(lambda: True)


class CodegenDoneError(Exception):
    """Ends a compilation once Inductor has generated the code."""


def mock() -> None:
    torch._C._ensureCUDADeviceGuardSet()
    interfaces.get_interface_for_device("cuda")  # fills the table
    interfaces.device_interfaces.update({"cuda": Interface, "cuda:0": Interface})
    torch.cuda.current_device = lambda: 0
    torch.cuda._exchange_device = lambda device: 0  # torch 2.15 enters the device while it compiles
    torch.cuda._maybe_exchange_device = lambda device: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    # A build of torch for CUDA takes the mocked GPU for one, and Dynamo saves the state of its generator.
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": None
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.accelerator.is_available = lambda: False  # else Dynamo asks for the current stream
    fake_tensor.init_gpu_context = lambda device: None  # torch 2.10, built for CUDA, makes a tensor there
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]


def on_cuda(graph: fx.GraphModule, inputs: list[Any]) -> tuple[fx.GraphModule, list[Any], FakeTensorMode]:
    """A copy of a graph whose values are fake CUDA tensors, and its inputs."""
    moved, mode = copy.deepcopy(graph), FakeTensorMode(shape_env=ShapeEnv())
    for node in moved.graph.nodes:
        node.kwargs = {name: torch.device("cuda", 0) if isinstance(value, torch.device) else value for name, value in node.kwargs.items()}
    moved.recompile()
    with mode:
        given = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda") if isinstance(each, Tensor) else each
            for each in inputs
        ]
    FakeTensorProp(moved, mode).propagate(*given)
    return moved, given, mode


def generated(module: Callable[..., Any], x: Tensor) -> list[str]:
    """The code of the forward graph and of the backward graph, as Inductor writes it for a GPU."""
    codes = list[str]()

    def keep_code(lowering: GraphLowering) -> Any:
        code = lowering.codegen()[0]
        codes.append(getattr(code, "value", code))
        raise CodegenDoneError

    def compile_graph(graph: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        with unset_fake_temporarily(), torch.no_grad():
            moved, given, mode = on_cuda(graph, inputs)
            with tracing(TracingContext(mode)):
                compile_once(moved, given, options)
        return make_boxed_func(graph.forward)

    def compile_once(moved: fx.GraphModule, given: list[Any], options: dict[str, Any]) -> None:
        before = len(codes)
        try:
            inductor.compile_fx_inner(moved, given, **options)
        except Exception:
            if len(codes) == before:
                raise

    backend = lambda graph, inputs: inductor.compile_fx(graph, inputs, inner_compile=compile_graph)  # noqa: E731
    original = GraphLowering._compile_to_module
    GraphLowering._compile_to_module = keep_code  # type: ignore[method-assign]
    output, penalties = torch.compile(module, backend=backend, fullgraph=True)(x)
    (output.sum() + sum(penalties.values())).backward()
    GraphLowering._compile_to_module = original  # type: ignore[method-assign]
    return codes


@contextlib.contextmanager
def imported(name: str, source: str) -> Iterator[Any]:
    """A kernel's tuner, imported from a file, because Triton reads the source of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name[-40:]}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield getattr(module, name)


def ptx_of(name: str, source: str) -> dict[str, str]:
    """The PTX of a kernel of Inductor's, by architecture."""
    with imported(name, source) as tuner:
        meta, config = tuner.triton_meta, tuner.configs[0]
        constants = {**meta["constants"], **config.kwargs}
        return {
            f"sm_{each}": triton.compile(
                ASTSource(tuner.fn, meta["signature"], constants, meta["configs"][0]),
                target=GPUTarget("cuda", each, 32), options={"num_warps": config.num_warps},
            ).asm["ptx"]
            for each in ARCHITECTURES
        }  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def draws(source: str) -> bool:
    """Whether a kernel computes random words or keys, by the first multiplier of each."""
    return any(re.search(rf"\D{re.escape(str(multiplier))}\D", source) for multiplier in MULTIPLIERS)


def eager_kernels() -> dict[str, dict[str, str]]:
    """The PTX of graphreg's own kernels, which draw in eager, by name and architecture."""
    words = {"key": "*i32", "count": "i32", "start": "i32", "add": "i32", "flip": "i32", "BLOCK": "constexpr"}
    mask = {"mask": "*bf16", "rate": "*fp64", **{name: kind for name, kind in words.items() if name != "start"}}
    keys = {"keys": "*i32", "streams": "*i64", "call": "*i64", "count": "i32", "BLOCK": "constexpr"}
    signatures = {"_words_kernel": {"drawn": "*i32", **words}, "_keep_kernel": mask, "_keys_kernel": keys}
    return {
        name: {
            f"sm_{each}": triton.compile(
                ASTSource(kernel := getattr(triton_kernels, name), {n: signature[n] for n in kernel.arg_names}, {"BLOCK": 64}),
                target=GPUTarget("cuda", each, 32),
            ).asm["ptx"]
            for each in ARCHITECTURES
        }
        for name, signature in signatures.items()
    }


def recorded() -> list[str]:
    """What the forward and the backward run under CUDA graphs: the code of their outermost functions."""
    operators.RECORDED_ON = ("cpu",)  # where Dynamo captures it
    operators._records = torch.compiler.assume_constant_result(lambda: True)
    torch._dynamo.reset()
    module = graphreg.regularize(net(), hidden_dropout=0.1, rng=0)
    with config.patch({"triton.cudagraphs": True}):
        codes = generated(module, torch.randn(64, 512))
    return [re.search(r"    def call\(self, args\):\n(.*?)\nrunner = ", code, re.S)[1] for code in codes]  # type: ignore[index]


def main() -> None:
    torch.compiler.config.force_disable_caches = True
    mock()
    module = graphreg.regularize(net(), hidden_dropout=0.1, hidden_l1=1e-3, noise=0.1, rng=0)
    found = []
    for phase, code in zip(("forward", "backward"), generated(module, torch.randn(64, 512)), strict=True):
        kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
        found += [{"phase": phase, "source": source, "ptx": ptx_of(name, source) if draws(source) else {}} for name, source in kernels]
    print(json.dumps({"kernels": found, "recorded": recorded(), "eager": eager_kernels()}))


if __name__ == "__main__":
    main()
