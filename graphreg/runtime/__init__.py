"""What runs when a rewritten module is called: the module class itself, and the runtime modules that its graph calls.

Open ``rewritten_module.py`` first: ``RewrittenModule`` is the class of the module that ``graphreg.regularize`` returns. Each addition
to its graph is a call of a *runtime module*, a small ``nn.Module`` registered under ``graphreg_rules``. ``runtime_module.py`` has the
base class of runtime modules, and ``splice.py`` the class for splices. ``noise_keys.py`` has the runtime module that returns the keys of
the noise, and ``clock.py`` that of schedules; ``penalty.py``, ``derivative_penalty.py``, ``stateful.py``, ``dropout.py`` and ``attach.py``
have the other runtime modules. ``controls.py`` and ``sampling.py`` have the functions that a user calls on the finished module.
"""

from graphreg.runtime.attach import AttachRule, Penalties, Scale, check_penalties, check_scale, collect, current, factors, fed
from graphreg.runtime.averaging import averages_follow
from graphreg.runtime.build_record import GIVEN_IN_THE_CALL, Asked, BuildRecord, written_scale
from graphreg.runtime.clock import CLOCK, ClockRule, SharedClock, clock_of, set_to_zero
from graphreg.runtime.controls import (
    Regulated,
    asked_of,
    changed_strengths,
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
    strengths,
)
from graphreg.runtime.counter import Counter
from graphreg.runtime.derivative_penalty import Derivative, Track
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.forward import call_within
from graphreg.runtime.gradient_join import Views, Way, in_place, link, refuse_twice, storage_of
from graphreg.runtime.handle import (
    BackendHandle,
    InPlaceHandle,
    backend_handle,
    graphs_of,
    in_place_handle,
    native_draws,
    record_of,
    regularized,
    rewritten,
    rules_of,
)
from graphreg.runtime.module_handle import ModuleHandle, checked_strength, handle_of, no_noise, one_for_all
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule, key_of
from graphreg.runtime.noise_state import BACKEND_STATE, IN_PLACE_STATE, checked_state, clock_of_state, written_state
from graphreg.runtime.noise_switches import NoiseSwitches
from graphreg.runtime.owned_state import State, states_in, zeros
from graphreg.runtime.penalty import AllSitesTotal, Measure, MeasureCounted, MeasureSteps, MeasureUnits, Total
from graphreg.runtime.rank_layout import is_dtensor, lead
from graphreg.runtime.rank_mesh import batch_notes, rank_notes, unplace
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule, lowering
from graphreg.runtime.runtime_module import Drawing, Rules, RuntimeModule, accumulation, device_with_values
from graphreg.runtime.sampling import Samples, sample
from graphreg.runtime.sharding import shard_measured
from graphreg.runtime.shared_state import EVERYWHERE, SharedState, StreamName, own_strength_of_rates, strengths_on
from graphreg.runtime.site_strengths import OWN, Places
from graphreg.runtime.splice import SpliceRule
from graphreg.runtime.stateful import SpliceTotal, StatefulSplice, StatefulTotal, StateHolder, StateHoldingTotal, owned_by
from graphreg.runtime.strengths_now import strength_text, strengths_now
from graphreg.runtime.unfinished import begin_counting, end_counting, take_back
from graphreg.runtime.unseen_changes import UnseenChanges

__all__ = [
    "BACKEND_STATE", "CLOCK", "EVERYWHERE", "GIVEN_IN_THE_CALL", "IN_PLACE_STATE", "OWN", "AllSitesTotal", "Asked", "AttachRule",
    "BackendHandle", "BuildRecord", "ClockRule", "Counter", "Derivative", "Drawing", "InPlaceHandle", "KeyRule", "Measure",
    "MeasureCounted", "MeasureSteps", "MeasureUnits", "ModuleHandle", "NativeDropoutRule", "NoiseSwitches", "Penalties", "Places",
    "Regularized", "Regulated", "RewrittenModule", "Rules", "RuntimeModule", "Samples", "Scale", "SharedClock", "SharedKeyRule",
    "SharedState", "SpliceRule", "SpliceTotal", "State", "StateHolder", "StateHoldingTotal", "StatefulSplice", "StatefulTotal",
    "StreamName", "Total", "Track", "UnseenChanges", "Views", "Way", "accumulation", "asked_of", "averages_follow", "backend_handle",
    "batch_notes", "begin_counting", "call_within", "changed_strengths", "check_penalties", "check_scale", "checked_state",
    "checked_strength", "clock_of", "clock_of_state", "collect", "current", "device_with_values", "end_counting", "factors", "fed",
    "frozen_noise", "graphs_of", "handle_of", "in_place", "in_place_handle", "is_dtensor", "key_of", "lead", "link", "lowering",
    "model_state_dict", "native_draws", "no_noise", "noise_off", "noise_on", "one_for_all", "own_strength_of_rates", "owned_by",
    "penalties_off", "rank_notes", "record_of", "refuse_twice", "regularized", "reset_state", "rewritten", "rng_state", "rules_of",
    "sample", "set_ranks", "set_rng_state", "set_strength", "set_to_zero", "shard_measured", "site_strengths", "states_in", "storage_of",
    "strength_text", "strengths", "strengths_now", "strengths_on", "take_back", "unplace", "with_plain_gradient", "written_scale",
    "written_state", "zeros",
]  # fmt: skip
