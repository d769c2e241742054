"""How busy the machine is, apart from the benchmark itself, and whether that is too busy to measure."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.1  # cores that other processes may keep busy
LOAD_LIMIT = 0.5  # the load average that may be left where /proc/stat does not tell how busy the cores are
SECONDS = 3.0  # of looking, before the first part
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Clock:
    """Seconds since some moment: of the day, of all cores' work, of the work of this process and the processes that it has waited for."""

    wall: float
    work: float | None  # None where nothing tells it
    own: float


@dataclass(frozen=True)
class Load:
    """What kept the machine busy during a measurement.

    Attributes:
        average: The load average of the last minute, at the end. The benchmark's own processes are part of it.
        others: How many cores other processes kept busy, on average; None where nothing tells it.
        cores: The number of cores.
    """

    average: float
    others: float | None
    cores: int

    def __str__(self) -> str:
        others = "" if self.others is None else f", other processes kept {self.others:.2f} of {self.cores} cores busy"
        return f"load average {self.average:.2f}{others}"


def clock() -> Clock:
    return Clock(time.monotonic(), _work(), _own())


def _work() -> float | None:
    """Seconds of work of all cores, waiting for a disk left out; time that a hypervisor took counts, because it is lost as well."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = (int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


def _own() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def between(start: Clock, end: Clock, average: float, cores: int) -> Load:
    """The load from one reading to another."""
    others = None
    if start.work is not None and end.work is not None:
        others = max(0.0, (end.work - start.work) - (end.own - start.own)) / max(end.wall - start.wall, 1e-9)
    return Load(average, others, cores)


def since(start: Clock) -> Load:
    return between(start, clock(), os.getloadavg()[0], os.cpu_count() or 1)


def looked(seconds: float = SECONDS, sleep: Callable[[float], None] = time.sleep) -> Load:
    """The load while this process does nothing."""
    start = clock()
    sleep(seconds)
    return since(start)


def busy(load: Load, idle: bool) -> str | None:
    """Why figures that were measured under this load are not to be trusted; None if they are.

    ``idle``: whether this process did nothing meanwhile. Otherwise the load average says nothing, because its own processes count.
    """
    if load.others is not None:
        if load.others > LIMIT:
            return f"other processes kept {load.others:.2f} of {load.cores} cores busy, and {LIMIT:g} is the limit"
        return None
    if idle and load.average > LOAD_LIMIT:
        return f"the load average is {load.average:.2f}, and {LOAD_LIMIT:g} is the limit"
    return None
