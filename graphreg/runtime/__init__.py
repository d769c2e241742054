"""What stands in the emitted module: the module itself, and a runtime module for each thing that was added."""

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
from graphreg.runtime.handle import KNOBS, Knobs, graphs_of, knobs_of, own_draws, rewritten, rules_of
from graphreg.runtime.leaf import Drawing, KeyRule, Leaf, Rules, SpliceRule, accumulation
from graphreg.runtime.module import Regularized, RewrittenModule, lowering
from graphreg.runtime.penalty import Measure, MeasureSteps, Total, Whole
from graphreg.runtime.sampling import Samples, sample
from graphreg.runtime.vjp import Derivative, Track

__all__ = [
    "KNOBS", "AttachRule", "Derivative", "Drawing", "KeyRule", "Knobs", "Leaf", "Measure", "MeasureSteps", "OwnRule", "Penalties",
    "Regularized", "Regulated", "RewrittenModule", "Rules", "Samples", "Scale", "SpliceRule", "Total", "Track", "Way", "Whole",
    "accumulation", "check_penalties", "check_scale", "current", "end_of", "frozen_noise", "graphs_of", "identity", "in_place",
    "knobs_of", "loss_of", "lowering", "noise_on", "own_draws", "refuse_twice", "rewritten", "rng_state", "rules_of", "sample",
    "set_ranks", "set_rng_state", "set_strength", "storage_of", "strengths",
]  # fmt: skip
