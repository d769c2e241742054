"""``graphreg.monitor`` measures statistics of the values in a rewritten module while the module trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir import RULES, Selector, select, value_sites
from graphreg.rewriting import Clock, Watch, place, remove, strip
from graphreg.runtime import Regulated, RewrittenModule, backend_handle, graphs_of, record_of, rewritten, rules_of
from graphreg.torch_internals import disable, in_backward

Log = Callable[[str, float, int], object]


def monitor(module: Regulated, pattern: Selector = "*", *, every: int = 1, log: Log | None = None, near: float = 1e-3) -> Monitor:
    """Watch a rewritten module in train mode: its penalties, its scheduled strengths, and statistics of the values at selected sites.

    Use the monitor as ``with graphreg.monitor(module) as watched:``, or call its ``close()`` at the end. A monitor changes neither the
    results of the training nor the keys of ``state_dict``. A monitor does change the graph, so torch.compile compiles the module again once
    after the block begins, and once after the block ends.

    The statistics are the mean, the standard deviation (which divides by the number of elements), the share of elements near zero, and the
    Euclidean norm. They describe the value that the model computes, before any splice at the site. For each splice at the site,
    ``kept`` is the share of the nonzero elements of the splice's input that are still nonzero in its output.

    Args:
        module: The module that ``regularize`` returned, which may be compiled or wrapped.
        pattern: A selector of sites; ``"*"`` means all hidden values.
        every: Read the numbers of every n-th call in train mode, beginning with the first; n is ``every``.
        log: A function like ``SummaryWriter().add_scalar``. It is called as ``log(name, value, step)``, where ``step`` is the number of the
            call in train mode, counted from 0.
        near: An element z counts as near zero if |z| <= ``near``.

    Raises:
        NoMatchError: ``pattern`` selects nothing.
        RegularizerError: An option is not allowed.
        GraphRegError: ``module`` is not what ``regularize`` returned, or is monitored already.
    """
    if backend_handle(module) is not None:
        raise GraphRegError(
            "a backend makes its graphs while the model runs, and none can be monitored. monitor takes what graphreg.regularize returned."
        )
    inner, rules = rewritten(module), rules_of(module)
    if not isinstance(inner, RewrittenModule):
        raise GraphRegError("a later pass rebuilt this module. monitor takes what graphreg.regularize returned, before that pass.")
    if rules.watching is not None:
        raise GraphRegError(
            "this module is monitored already. Leave that block, or close() what graphreg.monitor returned; one monitor takes several "
            f"selectors. If you have lost the monitor: module.{RULES}.watching.close()."
        )
    _check(every, log, near)
    sites = value_sites(inner, graphs_of(strip(inner)))
    usable = [site for site in sites if site.selectable and site.role == "hidden"]
    title = record_of(module).plan.title
    chosen = select(pattern, sites, usable, model=title, who="monitor", usual="the hidden values")
    return Monitor(inner, [site.name for site in chosen], every, log, near)


def _check(every: object, log: object, near: object) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise RegularizerError(f"every={every!r} is not allowed; give a whole number, 1 or more: 10 reads every tenth call.")
    if log is not None and not callable(log):
        raise RegularizerError(f"log={log!r} is not allowed; give a function log(name, value, step), as SummaryWriter().add_scalar is.")
    if isinstance(near, bool) or not isinstance(near, (int, float)) or not 0 <= near < math.inf:
        raise RegularizerError(f"near={near!r} is not allowed; give a number of 0 or more: |z| at most this counts as near zero.")


class Monitor:
    """The object that ``graphreg.monitor`` returns. It holds the latest numbers; ``close()`` ends the measurements.

    Attributes:
        sites: The names of the sites that are watched.
        calls: The number of calls in train mode so far.
    """

    def __init__(self, module: RewrittenModule, sites: list[str], every: int, log: Log | None, near: float) -> None:
        self.sites, self.calls = tuple(sites), 0
        self._module, self._rules = module, rules_of(module)
        self._every, self._log, self._clock = every, log, Clock()
        self._taken: list[Tensor | None] | None = None
        remove(module, self._rules)  # a copy of a monitored module has watches, but no monitor
        self._watches: list[Watch] = place(module, self._rules, sites, near, self._clock)
        self._rules.watching = self
        module.recompile()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy or a pickle of the module has None in place of the monitor

    def close(self) -> None:
        """End the measurements: remove the watches from the module. ``values()`` keeps the last numbers. A second call does nothing."""
        if self._rules.watching is self:
            remove(self._module, self._rules)
            self._rules.watching = None
            self._module.recompile()

    def values(self) -> dict[str, float]:
        """Return the numbers of the last call that the monitor read, by name; an empty dict if the monitor has read no call yet.

        The names are ``penalty/NAME``, ``strength/NAME`` for a strength that has a schedule, ``SITE/mean``, ``SITE/std``,
        ``SITE/near_zero``, ``SITE/norm`` and ``SITE/kept/NAME``.
        """
        taken = self._taken if self._taken is not None else [watch.last for watch in self._watches]
        pairs = zip(self._watches, taken, strict=True)
        return {name: value for watch, last in pairs if last is not None for name, value in zip(watch.names, last.tolist(), strict=True)}

    def tell(self, step: int) -> None:
        """Pass the numbers to ``log`` now.

        You need this method only if you compile a function that calls the module. No Python code of the module then runs after a call. So
        the monitor neither counts nor logs calls, and ``values()`` returns the numbers of the latest call.

        Raises:
            GraphRegError: The monitor has no ``log``.
        """
        if self._log is None:
            raise GraphRegError("this monitor has no log function. Give it one: graphreg.monitor(module, log=writer.add_scalar).")
        for name, value in self.values().items():
            self._log(name, value, step)

    @disable()
    def after(self, module: nn.Module) -> None:
        """Count the call that has just ended, and read its numbers if it is an ``every``-th call. The module calls this after each call."""
        if not module.training or in_backward():  # in backward, activation checkpointing repeats a call
            return
        if self.calls % self._every == 0:
            self._taken = [watch.last for watch in self._watches]
            if self._log is not None:
                self.tell(self.calls)
        self.calls += 1
        self._clock.due = self.calls % self._every == 0
