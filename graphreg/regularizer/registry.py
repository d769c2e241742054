"""Maps keys to regularizer classes: the built-ins of ``graphreg.passes``, those of installed entry points, and the user's own."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphreg.errors import NoMatchError, RegularizerError, suggestions_text

if TYPE_CHECKING:
    from graphreg.regularizer.base import Regularizer

GROUP = "graphreg.passes"
OPTIONS = frozenset({
    "model", "regularizers", "example_inputs", "rng", "front_end", "missing", "penalties", "compile", "scale", "own_dropout",
    "verify", "recipe", "blocks", "prove", "keep",
})  # fmt: skip
PREFIXED = frozenset(f"{role}_{kind}" for role in ("input", "hidden", "output") for kind in ("dropout", "noise"))
_classes: dict[str, type[Regularizer]] = {}


def register(cls: type[Regularizer]) -> None:
    """Register a class under its keys and its name. A class that is defined again, such as in a notebook, replaces the earlier one."""
    if not cls.keys:  # the class is abstract, or not meant to be found by a keyword
        return
    names = [key.lower() for key in (*cls.keys, cls.__name__)]
    for name in names:
        if name in OPTIONS | PREFIXED:
            raise RegularizerError(f"{cls.__name__} cannot have the key {name!r}: it is an option of graphreg.regularize.")
        known = _classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegularizerError(f"the key {name!r} of {cls.__name__} belongs to {known.__module__}.{known.__name__} already.")
    _classes.update(dict.fromkeys(names, cls))


def registered() -> dict[str, type[Regularizer]]:
    """Return all known regularizers: every key and class name, in lower case, with its class."""
    _discover()
    return dict(_classes)


def build(key: str, **options: Any) -> Regularizer:
    """Make a regularizer from its key, e.g. ``build("weight_l2", weight=0.1)``.

    Args:
        key: A key or class name, in upper or lower case.
        **options: The options of the class.

    Returns:
        The regularizer.

    Raises:
        NoMatchError: The key is unknown.
        RegularizerError: An option is unknown or out of range.
    """
    return find(key)(**options)


def find(key: str) -> type[Regularizer]:
    """Return the regularizer class that has the key or class name ``key``. Raises NoMatchError if there is none."""
    known = registered()
    if not isinstance(key, str) or key.lower() not in known:
        raise NoMatchError(
            f"no regularizer is called {key!r}.{suggestions_text(str(key).lower(), known, 'Near keys')} graphreg.registered() lists all. A "
            "class of your own is known once the module that defines it has been imported."
        )
    return known[key.lower()]


@cache
def _discover() -> None:
    """Import the built-in regularizers, which are found by scanning their package, then the entry points of other packages."""
    package = importlib.import_module(GROUP)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{GROUP}.{module.name}")
    for entry in entry_points(group=GROUP):
        try:
            loaded = entry.load()
            # A class registers itself when it is defined. One that has not done so has no keys.
            if not isinstance(loaded, ModuleType) and loaded not in _classes.values():
                found = f"{entry.value} is {loaded!r}"
                raise RegularizerError(f"{found}; an entry point must name a module, or a Regularizer class that has keys.")
        except (Exception, SystemExit) as error:
            # a faulty package of a third party must not break graphreg
            owner = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
            warnings.warn(f"graphreg: the regularizer {entry.name} = {entry.value}{owner} was not loaded: {error!r}", stacklevel=3)
