"""Pickles made by another graphreg: refused with a sentence that says what to load instead.

A pickle of graphreg 0.1 names modules that are gone. Importing one of them raises, before Python says that there is no such module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from graphreg.errors import GraphRegError

# The modules of 0.1 whose classes are named in pickles: of rewritten modules, traces, plans, reports and states of noise.
MODULES_OF_0_1 = frozenset({
    "accounts", "attach", "census", "cone", "control", "cost", "derivatives", "diff", "fxpass", "given", "keys", "knobs", "ledger",
    "leaves", "listing", "measures", "module", "monitor", "naming", "noise", "operators", "own_choice", "own_dropout", "own_rules",
    "parts", "plan", "pull", "repeats", "report", "rules", "sampling", "selection", "selector", "sites", "source", "state", "steps",
    "storage", "streams", "summary", "trace", "validation", "viewed", "watches",
})  # fmt: skip
CURE = (
    "A pickle of a rewritten module is for the graphreg that made it. There, save module.state_dict() and graphreg.rng_state(module); "
    "here, regularize the model as it was done then, and give them to module.load_state_dict and graphreg.set_rng_state."
)


class OldModuleError(GraphRegError, ImportError):
    """An import of a module of graphreg 0.1, which is what unpickling does."""


def refuse_other(version: int | None, made_with: str, expected: int, present: str) -> None:
    """Refuse a pickle of another version than ``expected``; ``made_with`` and ``present`` are versions of graphreg."""
    if version != expected:
        raise GraphRegError(
            f"this pickle was made by graphreg {made_with}, in version {version} of its form; graphreg {present} reads version {expected}. "
            f"{CURE}"
        )


class OldModules:
    """Finds the modules of graphreg 0.1, as the last of Python's finders, and raises in place of loading one."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "graphreg" and module in MODULES_OF_0_1 else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        raise OldModuleError(f"{spec.name} was a module of graphreg 0.1, which a pickle may name, and is gone. {CURE}", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Never called; importlib asks whether it is there."""


def refuse_old_modules() -> None:
    """Have the imports of such modules refused from now on."""
    if not any(type(finder).__name__ == OldModules.__name__ for finder in sys.meta_path):
        sys.meta_path.append(OldModules())
