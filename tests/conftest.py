"""One thread a process: several test processes share the cores, and spinning threads stall each other.

One hypothesis profile for the whole suite: nothing depends on how fast the machine is, and each run sees the same examples.
``--hypothesis-profile=random``, as in ``make fuzz``, has each run see others, and more of them.
"""

import gc
import itertools
import os
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from browser import quit_chromium
from lowering_check import check_each_rewrite
from slow import first_cases, is_rest, is_slow, unmatched

torch.set_num_threads(1)
check_each_rewrite()
os.environ.pop("COLUMNS", None)  # a shell may say how wide to print; the tests say it themselves
# Dynamo times the guards of each graph that it compiles, for its log, and empties the processor's caches for it: nearly 30 ms a graph.
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0
# torch.manual_seed notes the stack for each accelerator that may start later: half a millisecond of each call, and each verify has dozens.
for accelerator in (torch.cuda, torch.mtia, torch.xpu):
    accelerator.traceback = SimpleNamespace(format_stack=list)

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None, print_blob=True)
settings.register_profile("steady", steady, derandomize=True, max_examples=30)
settings.register_profile("random", steady, derandomize=False)
settings.load_profile("steady")


finished = itertools.count(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Each test compiles for itself; Dynamo's limits count over a process.

    What torch, sympy and the tests keep for good is put aside now and then: the Trainer collects garbage several times a run, and that took
    half a second of each.
    """
    torch._dynamo.reset()
    if not next(finished) % 100:
        gc.collect()
        gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the first case of each test, and none that takes long")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.sweep)
        elif is_rest(item.nodeid):
            item.add_marker(pytest.mark.rest)
    if {item.path for item in items} >= set(Path(__file__).parent.rglob("test_*.py")):  # with fewer, some patterns have nothing to match
        idle = unmatched([item.nodeid for item in items])
        if idle:
            raise pytest.UsageError(f"tests/slow.py: no test is matched by {', '.join(idle)}")
    if config.getoption("quick"):
        quick = first_cases([item.nodeid for item in items if not is_slow(item.nodeid) and not is_rest(item.nodeid)])
        items[:] = [item for item in items if item.nodeid in quick]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported lives as long as the process: no collection of garbage need look at it, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)  # collections were 5 to 7 % of the run


def pytest_sessionfinish() -> None:
    quit_chromium()
