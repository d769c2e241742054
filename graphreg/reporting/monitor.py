"""``graphreg.monitor`` measures statistics of the values in a rewritten module while the module trains."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TextIO

from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, first_line, shown
from graphreg.ir.module_record import RULES
from graphreg.ir.roles import value_sites
from graphreg.ir.selector import Selector, select
from graphreg.ir.terminal import Lines, Paragraph, Printed
from graphreg.ir.text_table import Table
from graphreg.rewriting.monitor_watches import Clock, Watch, place_watches, remove
from graphreg.rewriting.strip import without_additions
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.session.controls import Regulated
from graphreg.session.hosts import backend_host, graphs_of, record_of, rewritten, rules_of
from graphreg.torch_internals.autograd import in_backward
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.patching import Changes

Log = Callable[[str, float, int], object]


def monitor(
    module: Regulated,
    pattern: Selector = "*",
    *,
    every: int = 1,
    log: Log | None = None,
    near: float = 1e-3,
    file: str | os.PathLike[str] | None = None,
) -> Monitor:
    """Watch a rewritten module in train mode: its penalties, its scheduled strengths, and statistics of the values at selected sites.

    Use the monitor as ``with graphreg.monitor(module) as watched:``, or call its ``close()`` at the end. A monitor changes neither the
    results of the training nor the keys of ``state_dict``. A monitor does change the graph, so torch.compile compiles the module again
    twice: at the first call within the ``with`` statement, and at the first call after it.

    The statistics are the mean, the standard deviation (which divides by the number of elements), the share of elements near zero, and the
    Euclidean norm. They describe the value that the model computes, before a splice (a regularizer that replaces the value, such as
    dropout) acts at the site. For each splice at the site, ``kept`` is the share of the nonzero elements of the splice's input that are
    still nonzero in its output.

    Args:
        module: The module that ``regularize`` returned, which may be compiled or wrapped.
        pattern: A selector of sites; ``"*"`` means all hidden values.
        every: Read the numbers of every n-th call in train mode, beginning with the first; n is ``every``.
        log: A function like ``SummaryWriter().add_scalar``. It is called as ``log(name, value, step)``, where ``step`` is the number of the
            call in train mode, counted from 0.
        near: An element z counts as near zero if ``|z| <= near``.
        file: A path. The file gets a line of JSON for each call whose numbers are read: ``{"step": 0, "values": {...}}``. An older file
            is replaced. ``graphreg.draw(module, "page.html", values=file)`` shows the numbers on the drawing.

    Raises:
        NoMatchError: ``pattern`` selects nothing.
        RegularizerError: An option is not allowed.
        GraphRegError: ``module`` is not what ``regularize`` returned, or is monitored already.
    """
    if backend_host(module) is not None:
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

    # The sites of the model: a stripped copy has no nodes of graphreg's.
    sites = value_sites(inner, graphs_of(without_additions(inner)))
    usable = [site for site in sites if site.selectable and site.role == "hidden"]
    title = record_of(module).plan.title
    chosen = select(pattern, sites, usable, model=title, who="monitor", usual="the hidden values")
    return Monitor(inner, [site.name for site in chosen], every, log, near, opened_file(file))


def _check(every: object, log: object, near: object) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise RegularizerError(f"every={every!r} is not allowed; give a whole number, 1 or more: 10 reads every tenth call.")
    if log is not None and not callable(log):
        raise RegularizerError(f"log={log!r} is not allowed; give a function log(name, value, step), as SummaryWriter().add_scalar is.")
    if isinstance(near, bool) or not isinstance(near, (int, float)) or not 0 <= near < math.inf:
        raise RegularizerError(f"near={near!r} is not allowed; give a number of 0 or more: |z| at most this counts as near zero.")


def opened_file(file: object) -> TextIO | None:
    """Open the file that the numbers are written to; None for None."""
    if file is None:
        return None
    if not isinstance(file, (str, os.PathLike)):
        raise RegularizerError(f"file={shown(file)} is not allowed; give a path, such as 'monitor.jsonl'.")
    try:
        return open(file, "w", encoding="utf-8")
    except OSError as error:
        raise GraphRegError(f"file={str(file)!r} cannot be written ({first_line(error)}). Give another path.") from error


class Monitor(Printed):
    """The object that ``graphreg.monitor`` returns. It holds the latest numbers; ``close()`` ends the measurements.

    Attributes:
        sites: The names of the sites that are watched.
        calls: The number of calls in train mode so far.
    """

    def __init__(
        self, module: RewrittenModule, sites: list[str], every: int, log: Log | None, near: float, file: TextIO | None = None
    ) -> None:
        self.sites, self.calls = tuple(sites), 0
        self._module, self._rules = module, rules_of(module)
        self._every, self._log, self._file, self._clock = every, log, file, Clock()
        self._taken: list[Tensor | None] | None = None
        remove(module, self._rules)  # a copy of a monitored module has watches, but no monitor
        self._watches: list[Watch] = place_watches(module, self._rules, sites, near, self._clock)
        self._rules.watching = self
        self._recompile()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy or a pickle of the module has None in place of the monitor

    def close(self) -> None:
        """End the measurements: remove the watches from the module. ``values()`` keeps the last numbers. A second call does nothing."""
        # A second call must not end a monitor that was opened since.
        if self._rules.watching is self:
            remove(self._module, self._rules)
            self._rules.watching = None
            self._recompile()
        if self._file is not None:
            self._file.close()

    def pause(self, changes: Changes) -> None:
        """Miss the calls until the block of ``changes`` ends."""
        changes.put(self._rules, "watching", None)
        changes.put(self._clock, "due", False)

    def _recompile(self) -> None:
        """Recompile the module. Watches are additions, so the module's graph does not count as edited."""
        edited = self._rules.is_edited
        self._module.recompile()
        self._rules.is_edited = edited

    def values(self) -> dict[str, float]:
        """Return the numbers of the last call that the monitor read, by name; an empty dict if the monitor has read no call yet.

        The names are ``penalty/NAME``, ``strength/NAME`` for a strength that has a schedule, ``SITE/mean``, ``SITE/std``,
        ``SITE/near_zero``, ``SITE/norm`` and ``SITE/kept/NAME``.
        """
        # In a function that is compiled as a whole, ``after`` does not run, and takes no numbers.
        taken = self._taken if self._taken is not None else [watch.last for watch in self._watches]
        pairs = zip(self._watches, taken, strict=True)
        return {name: value for watch, last in pairs if last is not None for name, value in zip(watch.names, last.tolist(), strict=True)}

    def _blocks(self) -> Iterator[Paragraph]:
        yield Lines((f"monitor of {len(self.sites)} site{'s' * (len(self.sites) != 1)}, {self.calls} calls so far",), "bold")
        yield Table(("name", "value"), tuple((name, f"{value:.4g}") for name, value in self.values().items()))

    def tell(self, step: int) -> None:
        """Pass the numbers to ``log`` now, and write them to the file.

        You need this method only if you compile a function that calls the module. No Python code of the module then runs after a call. So
        the monitor neither counts nor logs calls, and ``values()`` returns the numbers of the latest call.

        Raises:
            GraphRegError: The monitor has neither ``log`` nor ``file``.
        """
        if self._log is None and self._file is None:
            raise GraphRegError("this monitor has no log function. Give it one: graphreg.monitor(module, log=writer.add_scalar).")
        values = self.values()
        for name, value in values.items() if self._log is not None else ():
            self._log(name, value, step)  # type: ignore[misc]
        if self._file is not None and not self._file.closed:
            numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": step, "values": numbers}) + "\n")
            self._file.flush()  # so that a page can read what a training that still runs has written

    @disable()
    def after(self, module: nn.Module) -> None:
        """Count the call that has just ended, and read its numbers if it is an ``every``-th call. The module calls this after each call."""
        if not module.training or in_backward():  # in backward, activation checkpointing repeats a call
            return
        if self.calls % self._every == 0:
            self._taken = [watch.last for watch in self._watches]
            if self._log is not None or self._file is not None:
                self.tell(self.calls)
        self.calls += 1
        # Set for the next call, whose watches measure only if it is due.
        self._clock.due = self.calls % self._every == 0
