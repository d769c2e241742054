"""What runs when a rewritten module is called: the module class itself, and the runtime modules that its graph calls.

Open ``rewritten_module.py`` first: ``RewrittenModule`` is the class of the module that ``graphreg.regularize`` returns. Each addition
to its graph is a call of a *runtime module*, a small ``nn.Module`` registered under ``graphreg_rules``. ``runtime_module.py`` has the
base class of runtime modules, and ``splice.py`` the class for splices. ``noise_keys.py`` has the runtime module that returns the keys of
the noise, and ``clock.py`` that of schedules; ``penalty.py``, ``derivative_penalty.py``, ``stateful.py``, ``dropout.py`` and ``attach.py``
have the other runtime modules. ``controls.py`` and ``sampling.py`` have the functions that a user calls on the finished module.
"""

from graphreg.runtime.around_call import AroundCall
from graphreg.runtime.attach import AttachRule, Penalties, Scale, check_penalties, check_scale, collect, current, factors, fed
from graphreg.runtime.averaging import follow_averages
from graphreg.runtime.build_record import GIVEN_IN_THE_CALL, Asked, BuildRecord, written_scale
from graphreg.runtime.clock import CLOCK, ClockRule, ScheduledElement, SharedClock, clock_of, scheduled_elements, set_to_zero
from graphreg.runtime.counter import Counter
from graphreg.runtime.derivative_penalty import Derivative, Track
from graphreg.runtime.distributed_values import with_plain_gradient
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.gradient_join import Views, Way, in_place, link, refuse_twice, storage_of
from graphreg.runtime.noise_keys import KeyRule, SharedKeyRule, key_of
from graphreg.runtime.owned_state import State, states_in, zeros
from graphreg.runtime.penalty import AllSitesTotal, Measure, MeasureCounted, MeasureSteps, MeasureUnits, Total
from graphreg.runtime.rank_layout import is_dtensor, lead
from graphreg.runtime.rank_mesh import RankMesh, batch_notes, rank_notes, unplace
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule, lowering
from graphreg.runtime.runtime_module import DrawingRule, Rules, RuntimeModule, accumulation, device_with_values, strengths_on
from graphreg.runtime.sharding import shard_measured
from graphreg.runtime.splice import SpliceRule
from graphreg.runtime.stateful import SpliceTotal, StatefulSplice, StatefulTotal, StateHolder, StateHoldingTotal, owned_by
from graphreg.runtime.unfinished import begin_counting, end_counting, take_back
from graphreg.runtime.unseen_changes import UnseenChanges

__all__ = [
    "CLOCK", "GIVEN_IN_THE_CALL", "AllSitesTotal", "AroundCall", "Asked", "AttachRule", "BuildRecord", "ClockRule", "Counter", "Derivative",
    "DrawingRule", "KeyRule", "Measure", "MeasureCounted", "MeasureSteps", "MeasureUnits", "NativeDropoutRule", "Penalties", "RankMesh",
    "Regularized", "RewrittenModule", "Rules", "RuntimeModule", "Scale", "ScheduledElement", "SharedClock", "SharedKeyRule", "SpliceRule",
    "SpliceTotal", "State", "StateHolder", "StateHoldingTotal", "StatefulSplice", "StatefulTotal", "Total", "Track", "UnseenChanges",
    "Views", "Way", "accumulation", "batch_notes", "begin_counting", "check_penalties", "check_scale", "clock_of", "collect", "current",
    "device_with_values", "end_counting", "factors", "fed", "follow_averages", "in_place", "is_dtensor", "key_of", "lead", "link",
    "lowering", "owned_by", "rank_notes", "refuse_twice", "scheduled_elements", "set_to_zero", "shard_measured", "states_in", "storage_of",
    "strengths_on", "take_back", "unplace", "with_plain_gradient", "written_scale", "zeros",
]  # fmt: skip
