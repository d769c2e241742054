"""Canaries of torch's global state."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._C._dynamo.guards import GlobalStateGuard
from torch.overrides import BaseTorchFunctionMode

from graphreg.torch_internals import global_state
from graphreg.torch_internals.global_state import GlobalState, autocast_depth


def enter(context: Any) -> Callable[[], Any]:
    return lambda: (context.__enter__(), context)  # which keeps it: inference mode ends with its object


def functions(state: str) -> Callable[[], Any]:
    return lambda: torch._C._set_torch_function_state(getattr(torch._C._TorchFunctionState, state))  # type: ignore[attr-defined]


# What changes the state, by the names under which Dynamo's guard knows it.
GUARDED: dict[str, Callable[[], Any]] = {
    "grad_mode": lambda: torch.set_grad_enabled(False),
    "torch_function": functions("SUBCLASSES_DISABLED"),
    "torch_function_all_disabled": functions("ALL_DISABLED"),
    "deterministic_algorithms": lambda: torch.use_deterministic_algorithms(True),
    "deterministic_algorithms_warn_only": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "allow_tf32": lambda: torch.set_float32_matmul_precision("high"),
    "allow_fp16_reduce": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "allow_bf16_reduce": lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "num_threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "autocast_state": enter(torch.autocast("cpu", cache_enabled=False)),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "inference mode": enter(torch.inference_mode()),
    "torch function modes": lambda: torch.set_default_device("meta"),
    "dispatch modes": enter(torch._subclasses.FakeTensorMode()),
    "hooks on saved tensors": enter(torch.autograd.graph.saved_tensors_hooks(abs, abs)),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "fast path of attention": lambda: torch.backends.mha.set_fastpath_enabled(False),
    "sdp_use_flash": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "sdp_use_mem_efficient": lambda: torch.backends.cuda.enable_mem_efficient_sdp(False),
    "sdp_use_math": lambda: torch.backends.cuda.enable_math_sdp(False),
    "sdp_use_cudnn": lambda: torch.backends.cuda.enable_cudnn_sdp(False),
    "cudnn_enabled": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "cudnn_benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "cudnn_deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "cudnn_allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "mkldnn_enabled": lambda: torch.backends.mkldnn.set_flags(_enabled=False),
    "precision of float32 (generic all)": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "precision of float32 (cuda matmul)": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "precision of float32 (mkldnn matmul)": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "multithreading_enabled": lambda: torch.autograd.grad_mode.set_multithreading_enabled(False),
    "check_sparse_tensor_invariants": torch.sparse.check_sparse_tensor_invariants.enable,
    "warnAlways": lambda: torch.set_warn_always(True),
    "depth of autocast": enter(torch.autocast("cpu")),
}


def found() -> dict[str, Any]:
    """What torch tells, read by other functions than those of the room where there are some."""
    return json.loads(GlobalStateGuard().__getstate__()) | {  # type: ignore[attr-defined]
        "inference": torch.is_inference_mode_enabled(), "device": torch.get_default_device(), "anomaly": torch.is_anomaly_enabled(),
        "nan": torch.is_anomaly_check_nan_enabled(), "depths": torch._C._len_torch_dispatch_stack(),
        "functions": torch._C._len_torch_function_stack(), "made": torch.ones(1).dtype, "where": torch.ones(1).device,
        "flash": torch.backends.cuda.flash_sdp_enabled(), "cudnn": torch.backends.cudnn.enabled,
        "precision": torch.backends.fp32_precision, "matmul": torch.backends.cuda.matmul.fp32_precision,
    }  # fmt: skip


@pytest.fixture
def before() -> Iterator[GlobalState]:
    saved = GlobalState()
    yield saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved.restore()


@pytest.mark.parametrize("name", [*GUARDED, *OTHERS])
def test_global_state(name: str, before: GlobalState) -> None:
    """How torch's global state is read and written. It concerns forwards that change it, and whose trace ends in between."""
    saved, _kept = found(), (GUARDED | OTHERS)[name]()
    changed = before.changed()
    assert name in changed if name in OTHERS else changed, changed
    before.restore()
    assert not before.changed() and found() == saved


def test_all_that_dynamo_guards_is_known() -> None:
    """Which global state Dynamo knows. What a new torch adds belongs into ``GUARDED``, and is restored if its test passes."""
    known = json.loads(GlobalStateGuard().__getstate__())  # type: ignore[attr-defined]
    known.pop("cuda_matmul_precision", None)  # from torch 2.15 on; it is in ``OTHERS`` as a precision of float32
    assert known.keys() == GUARDED.keys() and known["autocast_state"].keys() == {"enabled", "dtype", "cached_enabled"}
    assert len(known["autocast_state"]["enabled"]) == len(global_state._AUTOCAST)


def test_a_mode_that_was_left_at_the_bottom_goes_alone(before: GlobalState) -> None:
    """How a default device goes below the modes that are there. It concerns forwards that set one, and whose trace ends in between."""
    with BaseTorchFunctionMode():
        inner = GlobalState()
        torch.device("meta").__enter__()
        assert torch.ones(1).device.type == "meta" and inner.changed()
        inner.restore()
        assert torch.ones(1).device.type == "cpu"
    assert not before.changed()


def test_a_block_of_autocast_counts_even_if_it_changes_nothing() -> None:
    before = autocast_depth()
    with torch.autocast("cpu", enabled=False):
        assert autocast_depth() == before + 1
    assert autocast_depth() == before


def test_weights_cast_within_autocast_are_forgotten(before: GlobalState) -> None:
    """How autocast keeps cast weights as long as a block is open. A block that was left open would keep them past the optimizer's step."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    torch.autocast("cpu").__enter__()
    torch.nn.functional.linear(torch.ones(1, 1), weight)
    before.restore()
    with torch.no_grad():
        weight.fill_(2)
    with torch.autocast("cpu"):
        assert torch.nn.functional.linear(torch.ones(1, 1), weight).item() == 2
