"""What runs when a rewritten module is called: the module class itself, and the runtime modules that its graph calls.

Open ``module.py`` first: ``RewrittenModule`` is the class of what ``graphreg.regularize`` returns. Each addition to its graph is a call
of a *runtime module*, a small ``nn.Module`` registered under ``graphreg_rules``: ``leaf.py`` has their base class, splices and the keys
of the noise; ``penalty.py``, ``vjp.py``, ``dropout.py`` and ``attach.py`` have the other kinds. ``controls.py`` and ``sampling.py`` are
what a user does with the module afterwards.
"""

from graphreg.runtime.attach import (
    AttachRule,
    Penalties,
    Scale,
    Way,
    check_penalties,
    check_scale,
    current,
    end_of,
    identity,
    in_place,
    loss_of,
    refuse_twice,
    storage_of,
)
from graphreg.runtime.controls import Regulated, frozen_noise, noise_on, rng_state, set_ranks, set_rng_state, set_strength, strengths
from graphreg.runtime.dropout import OwnRule
from graphreg.runtime.handle import KNOBS, Knobs, compiler_of, graphs_of, knobs_of, own_draws, rewritten, rules_of
from graphreg.runtime.leaf import Drawing, KeyRule, Leaf, Rules, SpliceRule, accumulation
from graphreg.runtime.module import Regularized, RewrittenModule, lowering
from graphreg.runtime.penalty import Measure, MeasureSteps, Total, Whole
from graphreg.runtime.sampling import Samples, sample
from graphreg.runtime.vjp import Derivative, Track

__all__ = [
    "KNOBS", "AttachRule", "Derivative", "Drawing", "KeyRule", "Knobs", "Leaf", "Measure", "MeasureSteps", "OwnRule", "Penalties",
    "Regularized", "Regulated", "RewrittenModule", "Rules", "Samples", "Scale", "SpliceRule", "Total", "Track", "Way", "Whole",
    "accumulation", "check_penalties", "check_scale", "compiler_of", "current", "end_of", "frozen_noise", "graphs_of", "identity",
    "in_place", "knobs_of", "loss_of", "lowering", "noise_on", "own_draws", "refuse_twice", "rewritten", "rng_state", "rules_of",
    "sample", "set_ranks", "set_rng_state", "set_strength", "storage_of", "strengths",
]  # fmt: skip
