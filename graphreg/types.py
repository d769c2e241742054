"""The types that graphreg's functions take and return. Use them in annotations; the classes also work in ``isinstance``.

What the functions return:

=================  =====================================================================================================
`Site`             A named value or parameter of a traced model; its names are `Label` records.
`Names`            The list of sites that ``graphreg.names`` returns; it prints as a table.
`Traced`           A traced model: its graphs and its sites. Made by ``graphreg.trace``.
`Plan`             What each regularizer does at which site: `Edit` records. Made by ``graphreg.plan``.
`RewrittenModule`  The module that ``graphreg.regularize`` and ``graphreg.rewrite`` return.
`Regularized`      What a call of that module returns: ``output`` and ``penalties``.
`Samples`          The mean, spread and values of many forward passes with noise. Made by ``graphreg.sample``.
`Monitor`          Statistics of a module's values, by site, while the module trains. Made by ``graphreg.monitor``.
`Report`           Which regularizer acts where, and what it costs. Made by ``graphreg.report``.
`Diff`             What graphreg added to the emitted Python. Made by ``graphreg.diff``.
`Schedule`         A strength that changes while the model trains. Made by ``graphreg.schedules``.
`Diagnosis`        What ``graphreg.doctor`` found: `Finding` records.
`Audit`            What ``graphreg.audit`` found: `Remark` records.
=================  =====================================================================================================

What the functions take: `Selector` (which sites: a string, several strings, or a function of a site), and the values of the options
``front_end=`` (`FrontEnd`), ``missing=`` (`Missing`), ``penalties=`` (`Penalties`) and ``scale=`` (`Scale`).

    from graphreg.types import Report

    def costs(report: Report) -> float: ...
"""

from graphreg.diagnosis import Audit, Diagnosis, Finding, Remark
from graphreg.ir import Label, Missing, Names, Selector, Site
from graphreg.planning import Edit, Plan
from graphreg.reporting import Diff, Monitor, Report
from graphreg.runtime import Penalties, Regularized, RewrittenModule, Samples, Scale
from graphreg.schedules import Schedule
from graphreg.tracing import FrontEnd, Traced

__all__ = [
    "Audit", "Diagnosis", "Diff", "Edit", "Finding", "FrontEnd", "Label", "Missing", "Monitor", "Names", "Penalties", "Plan", "Regularized",
    "Remark", "Report", "RewrittenModule", "Samples", "Scale", "Schedule", "Selector", "Site", "Traced",
]  # fmt: skip
