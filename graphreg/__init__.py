"""graphreg adds dropout, noise and penalties to an existing PyTorch model, at places that you select by name.

A public name is imported at its first use, so that ``graphreg --help`` and shell completion run without importing torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from graphreg import schedules
    from graphreg.diagnosis import Audit, Diagnosis, Finding, Remark, audit, doctor
    from graphreg.drawing import draw, to_networkx
    from graphreg.dynamo_backend import Backend, backend, backend_of
    from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, TraceError, UntestedTorchWarning
    from graphreg.in_place import regularize_, strip_
    from graphreg.ir import Selector, Site, mean_over_counted, mean_over_pairs
    from graphreg.pipeline import as_pass, plan, regularize
    from graphreg.planning import Plan, from_kwargs
    from graphreg.recipes import load_recipe, recipe, save_recipe
    from graphreg.regularizer import ModelInput, Penalty, Regularizer, Splice, Vjp, build, by_depth, registered, required
    from graphreg.reporting import Diff, Monitor, Report, diff, monitor, report
    from graphreg.rewriting import rewrite, strip
    from graphreg.rng import Noise
    from graphreg.runtime import Regularized
    from graphreg.session import (
        Samples,
        frozen_noise,
        model_state_dict,
        noise_off,
        noise_on,
        penalties_off,
        reset_state,
        rng_state,
        sample,
        set_ranks,
        set_rng_state,
        set_strength,
        site_strengths,
        strength_buffers,
        strengths,
    )
    from graphreg.stages import regularize_stage
    from graphreg.tracing import Traced, names, trace
    from graphreg.verification import verify

# If this import stood above the TYPE_CHECKING block, mypy would take the names that the block imports for modules.
from graphreg.old_pickles import refuse_old_modules

__version__ = "0.3.0"
refuse_old_modules(__path__)

_ROOMS = {
    "diagnosis": ("Audit", "Diagnosis", "Finding", "Remark", "audit", "doctor"),
    "drawing": ("draw", "to_networkx"),
    "dynamo_backend": ("Backend", "backend", "backend_of"),
    "errors": ("GraphRegError", "NoMatchError", "RegularizerError", "TraceError", "UntestedTorchWarning"),
    "in_place": ("regularize_", "strip_"),
    "ir": ("Selector", "Site", "mean_over_counted", "mean_over_pairs"),
    "pipeline": ("as_pass", "plan", "regularize"),
    "planning": ("Plan", "from_kwargs"),
    "recipes": ("load_recipe", "recipe", "save_recipe"),
    "regularizer": ("ModelInput", "Penalty", "Regularizer", "Splice", "Vjp", "build", "by_depth", "registered", "required"),
    "reporting": ("Diff", "Monitor", "Report", "diff", "monitor", "report"),
    "rewriting": ("rewrite", "strip"),
    "rng": ("Noise",),
    "runtime": ("Regularized",),
    "session": (
        "Samples", "frozen_noise", "model_state_dict", "noise_off", "noise_on", "penalties_off", "reset_state", "rng_state", "sample",
        "set_ranks", "set_rng_state", "set_strength", "site_strengths", "strength_buffers", "strengths",
    ),
    "stages": ("regularize_stage",),
    "tracing": ("Traced", "names", "trace"),
    "verification": ("verify",),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_MODULES = ("schedules",)  # public modules that ``__getattr__`` imports when they are first used
_RENAMED = {"Pull": "Vjp"}  # public names of graphreg 0.1, each with its present name

__all__ = [
    "Audit", "Backend", "Diagnosis", "Diff", "Finding", "GraphRegError", "ModelInput", "Monitor", "NoMatchError", "Noise", "Penalty",
    "Plan", "Regularized", "Regularizer", "RegularizerError", "Remark", "Report", "Samples", "Selector", "Site", "Splice", "TraceError",
    "Traced", "UntestedTorchWarning", "Vjp",
    "as_pass", "audit", "backend", "backend_of", "build", "by_depth", "diff", "doctor", "draw", "from_kwargs", "frozen_noise",
    "load_recipe", "mean_over_counted", "mean_over_pairs", "model_state_dict", "monitor", "names", "noise_off", "noise_on", "penalties_off",
    "plan", "recipe", "registered", "regularize", "regularize_", "regularize_stage", "report", "required", "reset_state", "rewrite",
    "rng_state", "sample",
    "save_recipe", "schedules", "set_ranks", "set_rng_state", "set_strength", "site_strengths", "strength_buffers", "strengths", "strip",
    "strip_", "to_networkx", "trace", "verify",
]  # fmt: skip


def __getattr__(name: str) -> "Any":
    if name in _RENAMED:
        warnings.warn(f"graphreg.{name} is called graphreg.{_RENAMED[name]} now.", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
