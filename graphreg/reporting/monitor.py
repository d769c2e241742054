"""The monitor: how the values of a module look while it trains, as numbers by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir import RULES, Selector, select, value_sites
from graphreg.rewriting import Clock, Watch, place, remove, strip
from graphreg.runtime import Regulated, RewrittenModule, backend_handle, graphs_of, record_of, rewritten, rules_of
from graphreg.torch_internals import in_backward

Log = Callable[[str, float, int], object]


def monitor(module: Regulated, pattern: Selector = "*", *, every: int = 1, log: Log | None = None, near: float = 1e-3) -> Monitor:
    """Watch a rewritten module in train mode: penalties, and at each site that ``pattern`` selects mean, std, share near zero and norm.

    ``pattern``: a selector; ``"*"`` means the hidden values. A value is measured as the model makes it, before what is spliced in there;
    ``kept`` is the share of its elements other than 0 that a splice leaves other than 0. std divides by the number of elements; ``near``:
    |z| at most this counts as near zero. ``every``: of the calls in train mode one in so many is read, the first among them; ``log(name,
    value, step)`` is then called for each number, step counting those calls from 0: a SummaryWriter's ``add_scalar``, or any function.

    Use it as ``with graphreg.monitor(module) as watched:``, or ``close()`` it. Training goes on with the values it would have had, and
    ``state_dict`` has the model's keys. The graph is another one meanwhile: what is compiled compiles again, once, when the block begins
    and when it has ended. Raises NoMatchError, RegularizerError, and GraphRegError for what ``regularize`` did not return.
    """
    if backend_handle(module) is not None:
        raise GraphRegError(
            "a backend makes its graphs as it meets them, and no monitor is in them. monitor takes what graphreg.regularize returned."
        )
    inner, rules = rewritten(module), rules_of(module)
    if not isinstance(inner, RewrittenModule):
        raise GraphRegError("a later pass made this module anew. monitor takes what graphreg.regularize returned, before that pass.")
    if rules.watching is not None:
        raise GraphRegError(
            "this module is monitored already. Leave that block, or close() what graphreg.monitor returned; one monitor takes several "
            f"selectors. A monitor that nobody holds any more: module.{RULES}.watching.close()."
        )
    _check(every, log, near)
    sites = value_sites(inner, graphs_of(strip(inner)))
    usable = [site for site in sites if site.selectable and site.role == "hidden"]
    title = record_of(module).plan.title
    chosen = select(pattern, sites, usable, model=title, who="monitor", usual="the hidden values")
    return Monitor(inner, [site.name for site in chosen], every, log, near)


def _check(every: object, log: object, near: object) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise RegularizerError(f"every={every!r} is not allowed; give a whole number of 1 or more: of so many calls one is read.")
    if log is not None and not callable(log):
        raise RegularizerError(f"log={log!r} is not allowed; give a function log(name, value, step), as SummaryWriter().add_scalar is.")
    if isinstance(near, bool) or not isinstance(near, (int, float)) or not 0 <= near < math.inf:
        raise RegularizerError(f"near={near!r} is not allowed; give a number of 0 or more: |z| at most this counts as near zero.")


class Monitor:
    """What ``monitor`` gives. ``sites``: those that are watched. ``calls``: how many calls in train mode were counted."""

    def __init__(self, module: RewrittenModule, sites: list[str], every: int, log: Log | None, near: float) -> None:
        self.sites, self.calls = tuple(sites), 0
        self._module, self._rules = module, rules_of(module)
        self._every, self._log, self._clock = every, log, Clock()
        self._taken: list[Tensor | None] | None = None
        remove(module, self._rules)  # what a copy of a monitored module has
        self._watches: list[Watch] = place(module, self._rules, sites, near, self._clock)
        self._rules.watching = self
        module.recompile()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of the module is not watched

    def close(self) -> None:
        """Take the watches out of the module; the numbers stay. Once is enough, twice no harm."""
        if self._rules.watching is self:
            remove(self._module, self._rules)
            self._rules.watching = None
            self._module.recompile()

    def values(self) -> dict[str, float]:
        """The numbers of the last call that was read, by name: ``penalty/NAME``, ``SITE/mean``, ``std``, ``near_zero``, ``norm``,
        ``SITE/kept/NAME``. Empty before the first."""
        taken = self._taken if self._taken is not None else [watch.last for watch in self._watches]
        pairs = zip(self._watches, taken, strict=True)
        return {name: value for watch, last in pairs if last is not None for name, value in zip(watch.names, last.tolist(), strict=True)}

    def tell(self, step: int) -> None:
        """Give the numbers to ``log`` now. Where a function of yours that calls the module is compiled, nothing of Python's runs after
        a call: nothing is counted there, ``values()`` are those of the latest call, and this is how they are logged."""
        if self._log is None:
            raise GraphRegError("this monitor has no log to tell. Give it one: graphreg.monitor(module, log=writer.add_scalar).")
        for name, value in self.values().items():
            self._log(name, value, step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module) -> None:
        """Count a call that has ended, and read it if it was due."""
        if not module.training or in_backward():  # in backward: activation checkpointing runs the call again
            return
        if self.calls % self._every == 0:
            self._taken = [watch.last for watch in self._watches]
            if self._log is not None:
                self.tell(self.calls)
        self.calls += 1
        self._clock.due = self.calls % self._every == 0
