"""What runs when a rewritten module is called: the module class itself, and the runtime modules that its graph calls.

Open ``module.py`` first: ``RewrittenModule`` is the class of what ``graphreg.regularize`` returns. Each addition to its graph is a call
of a *runtime module*, a small ``nn.Module`` registered under ``graphreg_rules``: ``leaf.py`` has their base class, splices and the keys
of the noise; ``penalty.py``, ``vjp.py``, ``dropout.py`` and ``attach.py`` have the other kinds. ``controls.py`` and ``sampling.py`` are
what a user does with the module afterwards.
"""

from graphreg.runtime.attach import AttachRule, Penalties, Scale, check_penalties, check_scale, collect, current, end_of, loss_of
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.controls import Regulated, frozen_noise, noise_on, rng_state, set_ranks, set_rng_state, set_strength, strengths
from graphreg.runtime.dropout import OwnRule
from graphreg.runtime.handle import BACKEND, BackendHandle, backend_handle, graphs_of, own_draws, record_of, rewritten, rules_of
from graphreg.runtime.join import Way, identity, in_place, refuse_twice, storage_of
from graphreg.runtime.keys import KeyRule
from graphreg.runtime.leaf import Drawing, Leaf, Rules, SpliceRule, accumulation
from graphreg.runtime.module import RewrittenModule, lowering
from graphreg.runtime.noise_state import BACKEND_STATE, checked_state, written_state
from graphreg.runtime.penalty import Measure, MeasureSteps, Total, Whole
from graphreg.runtime.result import Regularized
from graphreg.runtime.sampling import Samples, sample
from graphreg.runtime.vjp import Derivative, Track

__all__ = [
    "BACKEND", "BACKEND_STATE", "AttachRule", "BackendHandle", "BuildRecord", "Derivative", "Drawing", "KeyRule", "Leaf", "Measure",
    "MeasureSteps", "OwnRule", "Penalties", "Regularized", "Regulated", "RewrittenModule", "Rules", "Samples", "Scale", "SpliceRule",
    "Total", "Track", "Way", "Whole", "accumulation", "backend_handle", "check_penalties", "check_scale", "checked_state", "collect",
    "current", "end_of", "frozen_noise", "graphs_of", "identity", "in_place", "loss_of", "lowering", "noise_on", "own_draws", "record_of",
    "refuse_twice", "rewritten", "rng_state", "rules_of", "sample", "set_ranks", "set_rng_state", "set_strength", "storage_of",
    "strengths", "written_state",
]  # fmt: skip
