"""Traces a model: turns an nn.Module into graphs whose values have names. The model itself stays unchanged.

Open ``trace.py`` first: its function ``trace`` chooses a front end, ``symbolic/`` (torch.fx) or ``export/`` (torch.export).
"""

from graphreg.tracing.checkpoints import CHECKPOINTS, checkpoints_itself
from graphreg.tracing.export.export import without_caches
from graphreg.tracing.fake_inputs import Arguments, arguments
from graphreg.tracing.listing import On, names, trace_to_show, usual_inputs
from graphreg.tracing.shape_decisions import DECISIONS, decisions
from graphreg.tracing.side_effects.reachable_state import ReachableCode, is_foreign_class, is_foreign_name, reachable_code
from graphreg.tracing.symbolic.tracer import PLAIN
from graphreg.tracing.trace import FrontEnd, Traced, check_model, trace
from graphreg.tracing.train_eval_graphs import mode_asked

__all__ = [
    "CHECKPOINTS", "DECISIONS", "PLAIN", "Arguments", "FrontEnd", "On", "ReachableCode", "Traced", "arguments", "check_model",
    "checkpoints_itself", "decisions", "is_foreign_class", "is_foreign_name", "mode_asked", "names", "reachable_code", "trace",
    "trace_to_show", "usual_inputs", "without_caches",
]  # fmt: skip
