"""Decides which regularizer acts where, before anything changes: ``plan(traced, regularizers)`` returns a ``Plan`` of edits.

Nothing in this room changes a model or a graph. Open ``plan.py`` first. ``keywords.py`` turns
keywords into regularizers, ``matching.py`` finds the sites that a selector matches, and
``native_dropout.py`` decides what to do with the model's own dropout. ``dependence.py`` finds the
operations that a derivative goes through, ``depth.py`` numbers the model's blocks for a strength by
depth, and ``module_inputs.py`` finds the value that a module gets as its input. ``repeats.py``
finds values that splices act on several times in a row, ``parameter_splices.py`` finds the reads of
a parameter that a splice replaces, and ``blocks.py`` finds the modules that ``blocks=`` names.
``model_inputs.py`` checks the inputs of the model that options name, and ``practically_off.py``
finds penalties too weak to matter.
"""

from graphreg.planning.blocks import called_blocks, check_blocks, check_layers, matching_modules
from graphreg.planning.dependence import DependenceSlice
from graphreg.planning.keywords import FAMILIES, from_keywords, from_kwargs, instances, merged
from graphreg.planning.matching import (
    SiteCounts,
    check_count,
    check_sites,
    check_trainable,
    count_sites,
    counted,
    matching_sites,
    missed,
    refusals,
)
from graphreg.planning.model_inputs import check_model_inputs
from graphreg.planning.native_dropout import (
    CHOICES,
    OWN_DROPOUT,
    NativeDropoutEdit,
    OwnDropout,
    decide,
    is_rate,
    rates_are_scheduled,
    read_option,
)
from graphreg.planning.parameter_splices import readers_of
from graphreg.planning.plan import Edit, Plan, check_missing, decided, named_once, plan, require_sites
from graphreg.planning.practically_off import FAINTEST, practically_off
from graphreg.planning.repeats import Strengths, lines, warning

__all__ = [
    "CHOICES", "FAINTEST", "FAMILIES", "OWN_DROPOUT", "DependenceSlice", "Edit", "NativeDropoutEdit", "OwnDropout", "Plan", "SiteCounts",
    "Strengths", "called_blocks", "check_blocks", "check_count", "check_layers", "check_missing", "check_model_inputs",
    "check_sites", "check_trainable", "count_sites", "counted", "decide", "decided", "from_keywords", "from_kwargs", "instances", "is_rate",
    "lines", "matching_modules", "matching_sites", "merged", "missed", "named_once", "plan", "practically_off", "rates_are_scheduled",
    "read_option", "readers_of", "refusals", "require_sites", "warning",
]  # fmt: skip
