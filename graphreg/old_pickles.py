"""Refuses pickles made by another version of graphreg, with an error that says what to save and load instead.

A pickle of graphreg 0.1 imports modules that no longer exist. Importing such a module raises OldModuleError instead of ModuleNotFoundError.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from graphreg.errors import GraphRegError

# The modules of 0.1 whose classes may occur in a pickle of a rewritten module, a trace, a plan, a report or a noise state.
MODULES_OF_0_1 = frozenset({
    "accounts", "attach", "census", "cone", "control", "cost", "derivatives", "diff", "fxpass", "given", "keys", "knobs", "ledger",
    "leaves", "listing", "measures", "module", "monitor", "naming", "noise", "operators", "own_choice", "own_dropout", "own_rules",
    "parts", "plan", "pull", "repeats", "report", "rules", "sampling", "selection", "selector", "sites", "source", "state", "steps",
    "storage", "streams", "summary", "trace", "validation", "viewed", "watches",
})  # fmt: skip
CURE = (
    "A pickle of a rewritten module loads only with the version of graphreg that made it. With that version, save module.state_dict() "
    "and graphreg.rng_state(module). With the present version, regularize the model in the same way, and load both, with "
    "module.load_state_dict and graphreg.set_rng_state."
)


class OldModuleError(GraphRegError, ImportError):
    """A module of graphreg 0.1 was imported, for example by loading a pickle that graphreg 0.1 made."""


def refuse_other(version: int | None, made_with: str, expected: int, present: str) -> None:
    """Raise GraphRegError unless a pickle has the format version ``expected``.

    Args:
        version: The pickle's format version; None if it has none.
        made_with: The version of graphreg that made the pickle.
        expected: The format version that can be loaded.
        present: The version of graphreg that loads it.
    """
    if version != expected:
        raise GraphRegError(
            f"this pickle was made by graphreg {made_with}, in format version {version}; graphreg {present} reads version {expected}. "
            f"{CURE}"
        )


class OldModules:
    """Finds the modules of graphreg 0.1 in a folder that does not exist: to import one raises OldModuleError.

    The folder is the last of the package's ``__path__``. So Python asks this finder only for modules of graphreg that do not exist.
    """

    def find_spec(self, name: str, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.rpartition(".")[2] in MODULES_OF_0_1 else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        raise OldModuleError(f"{spec.name} was a module of graphreg 0.1, and no longer exists. {CURE}", name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, because ``create_module`` always raises. Without this method, importlib would not call ``create_module``."""


def refuse_old_modules(path: list[str]) -> None:
    """Refuse the modules of graphreg 0.1. ``path``: the ``__path__`` of the package, to which their folder is added."""
    folder = f"{path[0]}{os.sep}modules of graphreg 0.1"
    sys.path_importer_cache[folder] = OldModules()  # Python looks the finder of a folder up here
    path.append(folder)
