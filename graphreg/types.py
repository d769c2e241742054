"""The types of the arguments and results of graphreg's functions. Use them in annotations. The classes also work in ``isinstance``.

Types of results:

=================  =====================================================================================================
`Site`             A named value or parameter of a traced model; its names are `Label` records.
`Names`            The list of sites that ``graphreg.names`` returns; it prints as a table.
`Traced`           A traced model: its graphs and its sites. Made by ``graphreg.trace``.
`Keywords`         The keywords of regularizers, with their classes. ``graphreg.registered`` returns it; it prints as a table.
`Plan`             An `Edit` record for each regularizer at each of its sites. Made by ``graphreg.plan``.
`RewrittenModule`  The module that ``graphreg.regularize`` and ``graphreg.rewrite`` return.
`Regularized`      The result of a call of a `RewrittenModule`: ``output`` and ``penalties``.
`Kept`             The result of a call of one that was made with ``keep=``: ``output``, ``penalties`` and ``values``.
`Samples`          The mean, spread and values of many forward passes with noise. Made by ``graphreg.sample``.
`Monitor`          Statistics of a module's values, by site, while the module trains. Made by ``graphreg.monitor``.
`Effects`          How strongly each regularizer acts: `Effect` records. Made by ``graphreg.effect``.
`Report`           The sites, strength and cost of each regularizer. Made by ``graphreg.report``.
`Diff`             The changes of graphreg to the emitted Python. Made by ``graphreg.diff``.
`Schedule`         A strength that changes while the model trains. Made by the functions of ``graphreg.schedules``.
`ParamGroups`      The groups of an optimizer. Made by ``graphreg.param_groups``.
`Diagnosis`        The result of ``graphreg.doctor``: `Finding` records.
`Audit`            The result of ``graphreg.audit``: `Remark` records.
=================  =====================================================================================================

Types of arguments: `Selector` for a selector of sites (a string, several strings, or a function of a site), and `FrontEnd`, `Missing`,
`Penalties` and `Scale` for the values of the options ``front_end=``, ``missing=``, ``penalties=`` and ``scale=``.

    from graphreg.types import Report

    def costs(report: Report) -> float: ...
"""

from graphreg.diagnosis.audit import Audit, Remark
from graphreg.diagnosis.findings import Diagnosis, Finding
from graphreg.ir.selector import Missing, Selector
from graphreg.ir.site import Label, Names, Site
from graphreg.optimizers.param_groups import ParamGroups
from graphreg.planning.plan import Edit, Plan
from graphreg.regularizer.registry import Keywords
from graphreg.reporting.diff import Diff
from graphreg.reporting.effect import Effect, Effects
from graphreg.reporting.monitor import Monitor
from graphreg.reporting.records import Report
from graphreg.runtime.attach import Penalties, Scale
from graphreg.runtime.result import Kept, Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.schedules import Schedule
from graphreg.session.sampling import Samples
from graphreg.tracing.trace import FrontEnd, Traced

__all__ = [
    "Audit", "Diagnosis", "Diff", "Edit", "Effect", "Effects", "Finding", "FrontEnd", "Kept", "Keywords", "Label", "Missing", "Monitor",
    "Names", "ParamGroups", "Penalties", "Plan", "Regularized", "Remark", "Report", "RewrittenModule", "Samples", "Scale", "Schedule",
    "Selector", "Site", "Traced",
]  # fmt: skip
