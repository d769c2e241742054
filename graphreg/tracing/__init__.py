"""A model goes in; graphs with named values come out, and the model stays as it was."""

from graphreg.tracing.export.export import without_caches
from graphreg.tracing.fake_inputs import Arguments, arguments
from graphreg.tracing.shape_decisions import decisions
from graphreg.tracing.symbolic.tracer import PLAIN
from graphreg.tracing.trace import FrontEnd, Traced, check_model, names, trace

__all__ = [
    "PLAIN", "Arguments", "FrontEnd", "Traced", "arguments", "check_model", "decisions", "names", "trace", "without_caches",
]  # fmt: skip
