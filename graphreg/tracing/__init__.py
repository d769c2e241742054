"""Traces a model: turns an nn.Module into graphs whose values have names. The model itself stays unchanged.

``trace.py`` is the front door and chooses a front end: ``symbolic/`` (torch.fx) or ``export/`` (torch.export).
"""

from graphreg.tracing.export.export import without_caches
from graphreg.tracing.fake_inputs import Arguments, arguments
from graphreg.tracing.shape_decisions import decisions
from graphreg.tracing.symbolic.tracer import PLAIN
from graphreg.tracing.trace import FrontEnd, Traced, check_model, names, trace

__all__ = [
    "PLAIN", "Arguments", "FrontEnd", "Traced", "arguments", "check_model", "decisions", "names", "trace", "without_caches",
]  # fmt: skip
