"""graphreg adds dropout, noise and penalties to an existing PyTorch model, at places that you select by name.

A public name is imported at its first use, so that ``graphreg --help`` and shell completion run without importing torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from graphreg import schedules
    from graphreg.diagnosis.audit import Audit, Remark, audit
    from graphreg.diagnosis.doctor import doctor
    from graphreg.diagnosis.findings import Diagnosis, Finding
    from graphreg.drawing.draw import draw
    from graphreg.drawing.graph import to_networkx
    from graphreg.dynamo_backend.backend import Backend
    from graphreg.dynamo_backend.options import backend, backend_of
    from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, TraceError, UntestedTorchWarning
    from graphreg.in_place.in_place import regularize_, strip_
    from graphreg.ir.selector import Selector
    from graphreg.ir.site import Site
    from graphreg.ir.time_steps import mean_over_counted, mean_over_pairs
    from graphreg.optimizers.load_by_name import load_by_name
    from graphreg.optimizers.param_groups import param_groups
    from graphreg.optimizers.parameters import named_parameters
    from graphreg.pipeline import as_pass, plan, regularize
    from graphreg.planning.keywords import from_kwargs
    from graphreg.planning.plan import Plan
    from graphreg.recipes.recipe import load_recipe, recipe, save_recipe
    from graphreg.regularizer.base import Penalty, Regularizer, Splice
    from graphreg.regularizer.by_depth import by_depth
    from graphreg.regularizer.model_inputs import ModelInput
    from graphreg.regularizer.options import required
    from graphreg.regularizer.registry import build, registered
    from graphreg.regularizer.vjp import Vjp
    from graphreg.reporting.diff import Diff, diff
    from graphreg.reporting.effect import Effect, Effects, effect
    from graphreg.reporting.monitor import Monitor, monitor
    from graphreg.reporting.records import Report
    from graphreg.reporting.report import report
    from graphreg.rewriting.rewrite import rewrite
    from graphreg.rewriting.strip import strip
    from graphreg.rng.noise import Noise
    from graphreg.runtime.result import Kept, Regularized
    from graphreg.session.controls import (
        frozen_noise,
        model_state_dict,
        noise_off,
        noise_on,
        penalties_off,
        reset_state,
        rng_state,
        set_ranks,
        set_rng_state,
        set_strength,
        site_strengths,
        strength_buffers,
        strengths,
    )
    from graphreg.session.prox import prox_
    from graphreg.session.sampling import Samples, sample
    from graphreg.stages.stage import regularize_stage
    from graphreg.tracing.listing import names
    from graphreg.tracing.trace import Traced, trace
    from graphreg.verification.verify import verify

# If this import stood above the TYPE_CHECKING block, mypy would take the names that the block imports for modules.
from graphreg.old_pickles import refuse_old_modules

__version__ = "0.3.0"
refuse_old_modules(__path__)

_FILES = {
    "diagnosis.audit": ("Audit", "Remark", "audit"),
    "diagnosis.doctor": ("doctor",),
    "diagnosis.findings": ("Diagnosis", "Finding"),
    "drawing.draw": ("draw",),
    "drawing.graph": ("to_networkx",),
    "dynamo_backend.backend": ("Backend",),
    "dynamo_backend.options": ("backend", "backend_of"),
    "errors": ("GraphRegError", "NoMatchError", "RegularizerError", "TraceError", "UntestedTorchWarning"),
    "in_place.in_place": ("regularize_", "strip_"),
    "ir.selector": ("Selector",),
    "ir.site": ("Site",),
    "ir.time_steps": ("mean_over_counted", "mean_over_pairs"),
    "optimizers.load_by_name": ("load_by_name",),
    "optimizers.param_groups": ("param_groups",),
    "optimizers.parameters": ("named_parameters",),
    "pipeline": ("as_pass", "plan", "regularize"),
    "planning.keywords": ("from_kwargs",),
    "planning.plan": ("Plan",),
    "recipes.recipe": ("load_recipe", "recipe", "save_recipe"),
    "regularizer.base": ("Penalty", "Regularizer", "Splice"),
    "regularizer.by_depth": ("by_depth",),
    "regularizer.model_inputs": ("ModelInput",),
    "regularizer.options": ("required",),
    "regularizer.registry": ("build", "registered"),
    "regularizer.vjp": ("Vjp",),
    "reporting.diff": ("Diff", "diff"),
    "reporting.effect": ("Effect", "Effects", "effect"),
    "reporting.monitor": ("Monitor", "monitor"),
    "reporting.records": ("Report",),
    "reporting.report": ("report",),
    "rewriting.rewrite": ("rewrite",),
    "rewriting.strip": ("strip",),
    "rng.noise": ("Noise",),
    "runtime.result": ("Kept", "Regularized"),
    "session.controls": (
        "frozen_noise", "model_state_dict", "noise_off", "noise_on", "penalties_off", "reset_state", "rng_state", "set_ranks",
        "set_rng_state", "set_strength", "site_strengths", "strength_buffers", "strengths",
    ),
    "session.prox": ("prox_",),
    "session.sampling": ("Samples", "sample"),
    "stages.stage": ("regularize_stage",),
    "tracing.listing": ("names",),
    "tracing.trace": ("Traced", "trace"),
    "verification.verify": ("verify",),
}  # fmt: skip
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}
_MODULES = ("passes", "schedules")  # public modules that ``__getattr__`` imports when they are first used
_RENAMED = {"Pull": "Vjp"}  # public names of graphreg 0.1, each with its present name

__all__ = [
    "Audit", "Backend", "Diagnosis", "Diff", "Effect", "Effects", "Finding", "GraphRegError", "Kept", "ModelInput", "Monitor",
    "NoMatchError", "Noise", "Penalty", "Plan", "Regularized", "Regularizer", "RegularizerError", "Remark", "Report", "Samples",
    "Selector", "Site", "Splice", "TraceError", "Traced", "UntestedTorchWarning", "Vjp",
    "as_pass", "audit", "backend", "backend_of", "build", "by_depth", "diff", "doctor", "draw", "effect", "from_kwargs", "frozen_noise",
    "load_by_name", "load_recipe", "mean_over_counted", "mean_over_pairs", "model_state_dict", "monitor", "named_parameters", "names",
    "noise_off", "noise_on", "param_groups", "passes", "penalties_off", "plan", "prox_", "recipe", "registered", "regularize",
    "regularize_", "regularize_stage", "report", "required", "reset_state", "rewrite", "rng_state", "sample", "save_recipe",
    "schedules", "set_ranks", "set_rng_state", "set_strength", "site_strengths", "strength_buffers", "strengths", "strip", "strip_",
    "to_networkx", "trace", "verify",
]  # fmt: skip


def __getattr__(name: str) -> "Any":
    if name in _RENAMED:
        warnings.warn(f"graphreg.{name} is called graphreg.{_RENAMED[name]} now.", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    # Python does not call ``__getattr__`` for this name again.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
