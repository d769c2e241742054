"""graphreg regularizes an existing PyTorch model by name.

A public name is imported when it is first asked for: ``graphreg --help`` and shell completion do without torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphreg.backend import Backend
    from graphreg.compiling import backend, backend_of
    from graphreg.control import frozen_noise, noise_on, rng_state, set_ranks, set_rng_state, set_strength, strengths
    from graphreg.diagnosis import Diagnosis, Finding
    from graphreg.diff import Diff, diff
    from graphreg.doctor import doctor
    from graphreg.drawing import draw
    from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, TraceError
    from graphreg.fxpass import as_pass
    from graphreg.graph import to_networkx
    from graphreg.keywords import from_kwargs
    from graphreg.module import Regularized
    from graphreg.monitor import Monitor, monitor
    from graphreg.noise import Noise
    from graphreg.pipeline import regularize
    from graphreg.plan import Plan, plan
    from graphreg.pull import Pull
    from graphreg.registry import build, registered
    from graphreg.regularizer import Penalty, Regularizer, Splice
    from graphreg.report import report
    from graphreg.rewrite import rewrite
    from graphreg.sampling import Samples, sample
    from graphreg.selector import Selector
    from graphreg.sites import Site
    from graphreg.steps import mean_over_pairs
    from graphreg.strip import strip
    from graphreg.summary import Report
    from graphreg.trace import Traced, names, trace
    from graphreg.validation import verify

__all__ = [
    "Backend", "Diagnosis", "Diff", "Finding", "GraphRegError", "Monitor", "NoMatchError", "Noise", "Penalty", "Plan", "Pull",
    "Regularized", "Regularizer", "RegularizerError", "Report", "Samples", "Selector", "Site", "Splice", "TraceError", "Traced",
    "as_pass", "backend", "backend_of", "build", "diff", "doctor", "draw", "from_kwargs", "frozen_noise", "mean_over_pairs", "monitor",
    "names", "noise_on", "plan", "registered", "regularize", "report", "rewrite", "rng_state", "sample", "set_ranks", "set_rng_state",
    "set_strength", "strengths", "strip", "to_networkx", "trace", "verify",
]  # fmt: skip
__version__ = "0.1.0"

_PLACES = {
    "backend": ("Backend",),
    "compiling": ("backend", "backend_of"),
    "control": ("frozen_noise", "noise_on", "rng_state", "set_ranks", "set_rng_state", "set_strength", "strengths"),
    "diagnosis": ("Diagnosis", "Finding"),
    "diff": ("Diff", "diff"),
    "doctor": ("doctor",),
    "drawing": ("draw",),
    "errors": ("GraphRegError", "NoMatchError", "RegularizerError", "TraceError"),
    "fxpass": ("as_pass",),
    "graph": ("to_networkx",),
    "keywords": ("from_kwargs",),
    "module": ("Regularized",),
    "monitor": ("Monitor", "monitor"),
    "noise": ("Noise",),
    "pipeline": ("regularize",),
    "plan": ("Plan", "plan"),
    "pull": ("Pull",),
    "registry": ("build", "registered"),
    "regularizer": ("Penalty", "Regularizer", "Splice"),
    "report": ("report",),
    "rewrite": ("rewrite",),
    "sampling": ("Samples", "sample"),
    "selector": ("Selector",),
    "sites": ("Site",),
    "steps": ("mean_over_pairs",),
    "strip": ("strip",),
    "summary": ("Report",),
    "trace": ("Traced", "names", "trace"),
    "validation": ("verify",),
}
_PLACE = {name: place for place, names in _PLACES.items() for name in names}


class _Package(ModuleType):
    """Python binds a submodule on its package when it is imported. ``graphreg.trace`` stays the function all the same."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PLACE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _PLACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_PLACE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
