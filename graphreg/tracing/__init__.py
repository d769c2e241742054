"""Traces a model: turns an nn.Module into graphs whose values have names. The model itself stays unchanged.

Open ``trace.py`` first: its function ``trace`` chooses a front end, ``symbolic/`` (torch.fx) or
``export/`` (torch.export).
"""

from graphreg.tracing.capturing import collecting_nothing
from graphreg.tracing.checkpoints import CHECKPOINTS, checkpoints_itself
from graphreg.tracing.dynamo_graphs import BACKEND, CapturedGraphs, captured_by
from graphreg.tracing.export.inputs import spelled_out
from graphreg.tracing.fake_inputs import Arguments, GivenCall, arguments
from graphreg.tracing.listing import names, trace_to_show, usual_inputs
from graphreg.tracing.proof.first_difference import culprit, steps_of_graph, steps_of_model
from graphreg.tracing.proof.proof import NO_INPUTS, NOT_ASKED, PROVABLE, TRACED, Claim, NotTheModel, Proving, prove
from graphreg.tracing.proof.surroundings import alike
from graphreg.tracing.proof.values import difference, leaves, snapshot, tensors
from graphreg.tracing.reads import OWN_ATTRIBUTES, WHOLE, Reads, inside
from graphreg.tracing.shape_decisions import DECISIONS, decided, decisions
from graphreg.tracing.side_effects.reachable_state import ReachableCode, is_foreign_class, is_installed, is_own, reachable_code
from graphreg.tracing.side_effects.state_places import content
from graphreg.tracing.symbolic.tracer import PLAIN
from graphreg.tracing.trace import NOT_ASSIGNED, FrontEnd, Traced, check_model, trace, traced_for_call, traced_for_proof
from graphreg.tracing.train_eval_graphs import mode_asked

__all__ = [
    "BACKEND", "CHECKPOINTS", "DECISIONS", "NOT_ASKED", "NOT_ASSIGNED", "NO_INPUTS", "OWN_ATTRIBUTES", "PLAIN", "PROVABLE", "TRACED",
    "WHOLE", "Arguments", "CapturedGraphs", "Claim", "FrontEnd", "GivenCall", "NotTheModel", "Proving", "ReachableCode", "Reads",
    "Traced", "alike", "arguments", "captured_by", "check_model", "checkpoints_itself", "collecting_nothing", "content", "culprit",
    "decided", "decisions", "difference", "inside", "is_foreign_class", "is_installed", "is_own", "leaves", "mode_asked", "names", "prove",
    "reachable_code", "snapshot", "spelled_out", "steps_of_graph", "steps_of_model", "tensors", "trace", "trace_to_show", "traced_for_call",
    "traced_for_proof", "usual_inputs",
]  # fmt: skip
