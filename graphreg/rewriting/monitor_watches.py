"""Watches, the runtime modules that measure values for ``graphreg.monitor``.

``place_watches`` adds them to a module, and ``remove`` takes them out. A watch returns nothing to the graph. It keeps one small tensor,
which the monitor turns into numbers only when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphreg.errors import RegularizerError
from graphreg.ir.containers import end_of
from graphreg.ir.metadata import Addition, Kind, addition_of, is_added, is_kind, mark
from graphreg.ir.module_record import RULES
from graphreg.ir.naming import identifier
from graphreg.ir.operations import Operations
from graphreg.ir.precision import widest
from graphreg.ir.roles import site_nodes
from graphreg.runtime.clock import clock_of, scheduled_elements
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import Rules, RuntimeModule, accumulation
from graphreg.session.hosts import graphs_of
from graphreg.torch_internals.other_threads import is_compiling

STATISTICS = ("mean", "std", "near_zero", "norm")


@dataclass(eq=False)
class Clock:
    """Tells all watches of one monitor whether to measure the next call (``due``). A copied or unpickled watch has None as its clock."""

    due: bool = True

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class Watch(RuntimeModule):
    """Measures, in train mode, a site's value before all splices, and the share of nonzero elements that each splice there keeps.

    In eager mode it measures only in calls that are due; in a compiled module it measures in every call, because Dynamo would compile a
    graph for each value of ``due``.

    Attributes:
        site: The site's name.
        names: The names of the numbers in ``last``.
        last: The numbers of the last call that was measured, [4 + splices]; None before that.
    """

    _is_impure = True  # otherwise torch.fx takes a node without users for dead code

    def __init__(self, site: str, splices: Sequence[str], near: float, clock: Clock) -> None:
        super().__init__(f"watch {site}")
        self.site, self.near, self.clock = site, near, clock
        self.names = (*(f"{site}/{each}" for each in STATISTICS), *(f"{site}/kept/{each}" for each in splices))
        self.target = ""  # the target of the nodes that call it
        self.last: Tensor | None = None

    def acts(self) -> bool:
        clock: Clock | None = self.clock
        return clock is not None and self.owner[0].training and (is_compiling() or clock.due)

    def forward(self, z: Tensor, *spliced: tuple[Tensor, Tensor]) -> None:
        if not self.acts():
            return
        if not isinstance(z, Tensor) or not z.is_floating_point():
            what = str(z.dtype) if isinstance(z, Tensor) else type(z).__name__
            raise RegularizerError(
                f"{self.description}: the value is {what}, and only floating-point tensors have statistics. Leave the site out."
            )
        with torch.no_grad():
            self.last = torch.stack([*statistics(z.detach(), self.near), *(kept(a.detach(), b.detach()) for a, b in spliced)])


class WatchPenalties(Watch):
    """Records the values of a call's penalties."""

    def __init__(self, names: Sequence[str], clock: Clock) -> None:
        super().__init__("the penalties", (), 0.0, clock)
        self.names = tuple(f"penalty/{name}" for name in names)

    def forward(self, *values: Tensor) -> None:  # type: ignore[override]
        if self.acts():
            self.last = torch.stack([value.detach().to(widest(value.device)) for value in values])


class WatchSchedules(Watch):
    """Records, for each call, the strengths that have a schedule. Of a strength that differs by site, the value furthest from 0 counts.

    ``places``: for each strength, the indices of its elements in the tensor that the clock returns.
    """

    def __init__(self, places: Mapping[str, tuple[int, ...]], clock: Clock) -> None:
        super().__init__("the schedules", (), 0.0, clock)
        self.names = tuple(f"strength/{name}" for name in places)
        self.places = tuple(places.values())

    def forward(self, strengths: Tensor) -> None:  # type: ignore[override]
        if self.acts():
            self.last = torch.stack([furthest(torch.stack([strengths[i] for i in places])) for places in self.places])


def furthest(values: Tensor) -> Tensor:
    """Return, as a 0-d tensor, that one of the values [n] which is furthest from 0."""
    least, most = values.aminmax()
    return torch.where(most.abs() >= least.abs(), most, least)


def statistics(z: Tensor, near: float) -> list[Tensor]:
    """Return mean, standard deviation (divided by the number of elements), share with |z| <= near, and Euclidean norm of a value.

    Each is 0-d, float32 or wider.
    """
    wide = z.to(accumulation(z.dtype))
    variance, mean = torch.var_mean(wide, correction=0)
    return [mean, variance.sqrt(), (wide.abs() <= near).to(wide.dtype).mean(), torch.linalg.vector_norm(wide)]


def kept(z: Tensor, y: Tensor) -> Tensor:
    """Return the share of the nonzero elements of ``z`` that are nonzero in ``y``, the value after a splice; nan if ``z`` has none."""
    there = z != 0
    return ((y != 0) & there).sum().to(accumulation(z.dtype)) / there.sum()


def place_watches(module: RewrittenModule, rules: Rules, sites: Sequence[str], near: float, clock: Clock) -> list[Watch]:
    """Put a watch at each of the sites in all graphs, one at the penalties and one at the clock. The caller must recompile the module.

    ``near``: an element counts as near zero if |z| <= ``near``. ``clock``: decides which calls are measured.
    """
    watches: dict[str, Watch] = {}
    operations = Operations(module)

    def add(watch: Watch, name: str, args: tuple[Any, ...]) -> None:
        # It is new. A watch that both modes' graphs call is made once.
        if watch.rules == ():
            watch.rules, watch.owner, watch.training = (rules,), (module,), rules.training
            while hasattr(rules, name):
                name += "_"
            watch.target = f"{RULES}.{name}"
            rules.add_module(name, watch)
        node = graph.create_node("call_module", watch.target, args, name=watch.target.rpartition(".")[2])
        mark(node, Addition(Kind.WATCH, site=watch.site))

    for graph in graphs_of(module).values():
        known = {name: n for name, n in site_nodes(graph, operations).items() if not is_added(n)}
        top = max((n for n in graph.nodes if n.op == "placeholder"), default=None)
        splices: dict[str, dict[str, fx.Node]] = {}
        for node in graph.nodes:
            if (added := addition_of(node)) is not None and added.kind == Kind.SPLICE:
                splices.setdefault(str(added.site), {})[str(added.regularizer)] = node
        for site in [site for site in sites if site in known]:
            splices_here = splices.get(site, {})
            last = max([known[site], *splices_here.values()])
            # torch.fx wants all placeholders at the beginning of a graph.
            with graph.inserting_after(top if top is not None and last.op == "placeholder" else last):
                watch = watches.setdefault(site, Watch(site, list(splices_here), near, clock))
                add(watch, f"{identifier(site)}_watch", (known[site], *((node.args[0], node) for node in splices_here.values())))
        if (clock_node := next((n for n in graph.nodes if is_kind(n, Kind.CLOCK)), None)) is not None:
            with graph.inserting_after(clock_node):
                counted = clock_of(rules)
                assert counted is not None
                places = {name: counted.places(of) for name, of in scheduled_elements(rules).items()}
                add(watches.setdefault("schedules", WatchSchedules(places, clock)), "schedules_watch", (clock_node,))
        totals = {str(a.regularizer): n for n in graph.nodes if (a := addition_of(n)) is not None and a.kind == Kind.TOTAL}
        if totals:
            with graph.inserting_before(end_of(graph.output_node())):
                add(watches.setdefault("", WatchPenalties(list(totals), clock)), "penalties_watch", tuple(totals.values()))
    return list(watches.values())


def remove(module: RewrittenModule, rules: Rules) -> None:
    """Remove all watches. The caller must recompile the module."""
    for graph in graphs_of(module).values():
        for node in [n for n in graph.nodes if is_kind(n, Kind.WATCH)]:
            graph.erase_node(node)
    for name in [name for name, runtime_module in rules.named_children() if isinstance(runtime_module, Watch)]:
        delattr(rules, name)
