"""graphreg regularizes an existing PyTorch model by name."""

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

__all__ = [
    "Backend", "Diagnosis", "Diff", "Finding", "GraphRegError", "Monitor", "NoMatchError", "Noise", "Penalty", "Plan", "Pull",
    "Regularized", "Regularizer", "RegularizerError", "Report", "Samples", "Selector", "Site", "Splice", "TraceError", "Traced",
    "as_pass", "backend", "backend_of", "build", "diff", "doctor", "draw", "from_kwargs", "frozen_noise", "mean_over_pairs",
    "monitor", "names", "noise_on", "plan", "registered", "regularize", "report", "rewrite", "rng_state", "sample", "set_ranks",
    "set_rng_state", "set_strength", "strengths", "strip", "to_networkx", "trace",
]  # fmt: skip
__version__ = "0.1.0"
