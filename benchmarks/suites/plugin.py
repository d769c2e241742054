"""The pytest plugin that runs in the process of a shard: it regularizes the models that the tests create, and notes each outcome.

It is the only place where something of another library is patched, and it holds for this process alone.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import transformers
from torch import nn

import graphreg
from suites.suites import REGULARIZERS

WORK = "GRAPHREG_SUITES"  # the variable that names the file with the work of this process


def regularized(model: nn.Module) -> nn.Module:
    return graphreg.regularize_(model, rng=0, missing="ignore", **REGULARIZERS)


def patch_timm() -> None:
    """What ``timm.create_model`` gives is regularized. timm itself creates parts of models by the function that is left as it is."""
    create = timm.create_model

    @functools.wraps(create)
    def create_model(*args: Any, **kwargs: Any) -> nn.Module:
        return regularized(create(*args, **kwargs))

    timm.create_model = timm.models.create_model = create_model


def patch_transformers() -> None:
    """A model of transformers is regularized at the end of its constructor; a model within a model is left as it is."""
    base = transformers.PreTrainedModel
    initialize = base.__init_subclass__.__func__  # type: ignore[attr-defined]
    state = threading.local()

    def wrapped(constructor: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(constructor)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            outermost = not getattr(state, "within", False)
            state.within = True
            try:
                constructor(self, *args, **kwargs)
            finally:
                state.within = not outermost
            if outermost:
                regularized(self)

        return __init__

    def __init_subclass__(cls: type[nn.Module], **kwargs: Any) -> None:
        if "__init__" in vars(cls):
            cls.__init__ = wrapped(cls.__init__)  # type: ignore[method-assign]
        initialize(cls, **kwargs)

    base.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]


PATCHES = {"timm": patch_timm, "transformers": patch_transformers}


class Late(Exception):
    """A test took too long."""


@dataclass
class Notes:
    """Appends a line to the log when a test begins, and one when it has ended."""

    log: Path
    way: str
    seconds: int
    wanted: frozenset[str] | None  # None: list the tests, and run none
    problems: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    def note(self, line: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is None:
            self.note({"listed": [item.nodeid for item in items]})
        else:
            items[:] = [item for item in items if item.nodeid in self.wanted]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        record: dict[str, Any] = {"way": self.way, "test": item.nodeid}
        self.note(record | {"outcome": "began"})
        start = time.monotonic()
        signal.alarm(self.seconds)
        try:
            answer = yield
        finally:
            signal.alarm(0)
        message = {"message": self.problems[item.nodeid]} if item.nodeid in self.problems else {}
        outcome = self.outcomes.get(item.nodeid, "skipped")
        self.note(record | {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)} | message)
        return answer

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has failed if one of its phases, or of its subtests, has; an expected failure counts as skipped."""
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
            self.problems.setdefault(report.nodeid, said(report))
        elif report.when == "call" and report.passed and not hasattr(report, "wasxfail"):
            self.outcomes.setdefault(report.nodeid, "passed")


def said(report: pytest.TestReport) -> str:
    """What went wrong, as pytest's last line of it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:2000]


def late(*_: Any) -> None:
    raise Late


def pytest_configure(config: pytest.Config) -> None:
    work = json.loads(Path(os.environ[WORK]).read_text())
    resource.setrlimit(resource.RLIMIT_DATA, (work["memory"],) * 2)
    signal.signal(signal.SIGALRM, late)
    wanted = None if work["tests"] is None else frozenset(work["tests"])
    config.pluginmanager.register(Notes(Path(work["log"]), work["way"], work["seconds"], wanted))
    if work["way"] == "in place":
        PATCHES[work["library"]]()
