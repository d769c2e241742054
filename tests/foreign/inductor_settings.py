"""Known answers of masks under random settings of Inductor, by torch's own ``ConfigFuzzer``."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.fuzzer import ConfigFuzzer, SamplingMethod

import graphreg
from graphreg.passes import BernoulliDropout, GaussianNoise

# Of the first call with seed 7: where the mask keeps an element, and the first normal draws. tests/fuzz/draws.py has the same.
KEPT = "10111011110000010000000111101000"
NOISE = (0.17733538, -1.19388413, -1.55304945, -0.04822016)
# Settings that say how to compile, run or report elsewhere, and not what: they start processes, write files, or need what is not here.
LEFT_ALONE = (
    "force_disable_caches",
    "compile_threads",
    "worker_start_method",
    "quiesce_async",
    "trace",
    "profil",
    "cpp.cxx",
    "cpp_wrapper",
    "aot_inductor",
    "debug",
    "remote",
    "autotune",
    "benchmark",
    "fallback_random",
    "rocm",
    "cuda",
    "xpu",
    "halide",
    "disable_cpp_codegen",
    "abi",
    "cache",
    "precompile",
    "freezing",
    "joint_custom",
    "post_grad_custom",
    "custom_partitioner",
    "custom_ops",
    "fx_graph",
    "test_configs",
    "graph_partition",
    "file_lock",
    "fx_wrapper",
    "_backend",
    "force_inline",
    "nvtx",
    "TYPE_CHECKING",
    "standalone",
    "emulate",
    "annotate",
    "max_autotune",
    "use_joint_graph_passes",
    "disabled_passes",
    "aten_distributed",
)
TOGGLED = 0.15  # the share of the settings that one try changes


class Net(nn.Module):
    """Ones go in; the first output is the mask times 2, the second the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x * self.scale
        noisy = torch.sigmoid(x) * self.scale
        return kept * 1.0, noisy - torch.sigmoid(x)


def regularized() -> nn.Module:
    regularizers = (BernoulliDropout("mul", 0.5, rng=7), GaussianNoise("mul_1", 1.0, rng=7))
    return graphreg.regularize(Net(), *regularizers, example_inputs=torch.ones(4, 8), front_end="symbolic")


def masks(module: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The mask that the forward applied, the one that backward multiplied by, and the noise."""
    x = torch.ones(4, 8, requires_grad=True)
    (kept, noisy), _ = module(x)
    (gradient,) = torch.autograd.grad(kept.sum(), x, retain_graph=True)
    return kept.detach(), gradient, noisy.detach()


def agrees(module: Any) -> bool:
    """Whether the masks of the first call are the known ones bit for bit, forward and backward, and the noise to its rounding."""
    kept, gradient, noisy = masks(module)
    expected = torch.tensor([float(bit) for bit in KEPT]).view(4, 8) * 2.0
    return (
        bool(torch.equal(kept, expected))
        and bool(torch.equal(gradient, expected))
        and bool(torch.allclose(noisy.flatten()[:4], torch.tensor(NOISE), rtol=1e-5, atol=1e-5))
    )


def tried(seed: int) -> dict[str, str]:
    """One random set of settings. A wrong mask is ours; an error that the plain model raises under the same settings is torch's."""
    return {"settings": _tried(seed)}


def _tried(seed: int) -> str:
    settings = _drawn(seed)
    with config.patch(settings):
        ours = _outcome(lambda: agrees(torch.compile(regularized(), backend="inductor", fullgraph=True)))
        if ours == "ok":
            return "ok"
        plain = _outcome(lambda: bool(torch.isfinite(torch.compile(Net(), backend="inductor", fullgraph=True)(torch.ones(4, 8))[0]).all()))
    if plain != "ok":
        return f"torch: the plain model: {plain}"
    return f"wrong: {ours}, with {_fewest(settings)}"


def _outcome(run: Callable[[], bool]) -> str:
    torch._dynamo.reset()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "ok" if run() else "other masks"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _drawn(seed: int) -> dict[str, Any]:
    """Values that ConfigFuzzer samples for some of the settings."""
    rng = random.Random(seed)
    random.seed(seed)  # of what samples
    sample = SamplingMethod.dispatch(SamplingMethod.RANDOM if rng.random() < 0.5 else SamplingMethod.TOGGLE)
    fuzzer = ConfigFuzzer(config, lambda: lambda: True, seed)
    held = fuzzer.new_config()
    found: dict[str, Any] = {}
    for name, entry in fuzzer.fields.items():
        if name in held or name.startswith("_") or "TESTING_ONLY" in name or any(word in name for word in LEFT_ALONE):
            continue
        if rng.random() < TOGGLED:
            with contextlib.suppress(Exception):  # a type that it has no values of
                value = sample(name, entry.value_type, entry.default)
                if not callable(value):  # a pass of one's own, which is no setting
                    found[name] = value
    return found


def _fewest(settings: dict[str, Any]) -> dict[str, Any]:
    """A smaller set of settings that has other masks, too."""
    left = dict(settings)
    for name in settings:
        fewer = {key: value for key, value in left.items() if key != name}
        with config.patch(fewer):
            if _outcome(lambda: agrees(torch.compile(regularized(), backend="inductor", fullgraph=True))) != "ok":
                left = fewer
    return left
