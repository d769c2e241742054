"""Maps keys to regularizer classes: the built-ins of ``graphreg.passes``, those of installed entry points, and the user's own."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphreg.errors import NoMatchError, RegularizerError, suggestions_text
from graphreg.ir.site import ROLES
from graphreg.ir.terminal import Paragraph, Printed
from graphreg.ir.text_table import Table

if TYPE_CHECKING:
    from graphreg.regularizer.base import Regularizer

GROUP = "graphreg.passes"
OPTIONS = frozenset({
    "model", "regularizers", "example_inputs", "rng", "front_end", "missing", "penalties", "compile", "scale", "own_dropout",
    "verify", "recipe", "blocks", "prove", "keep",
})  # fmt: skip
FAMILIES = ("dropout", "noise")  # the keys that a keyword may have with a role in front
# each such keyword, with its key and its selector: ``"*"`` means the hidden values
PREFIXED = {f"{role}_{key}": (key, "*" if role == "hidden" else f"**#{role}") for key in FAMILIES for role in ROLES}
_classes: dict[str, type[Regularizer]] = {}


def register(cls: type[Regularizer]) -> None:
    """Register a class under its keys and its name. A class that is defined again, such as in a notebook, replaces the earlier one."""
    if not cls.keys:  # the class is abstract, or not meant to be found by a keyword
        return
    names = [key.lower() for key in (*cls.keys, cls.__name__)]
    for name in names:
        if name in OPTIONS or name in PREFIXED:
            raise RegularizerError(f"{cls.__name__} cannot have the key {name!r}: it is an option of graphreg.regularize.")
        known = _classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RegularizerError(f"the key {name!r} of {cls.__name__} belongs to {known.__module__}.{known.__name__} already.")
    _classes.update(dict.fromkeys(names, cls))


class Keywords(Printed, Mapping[str, "type[Regularizer]"]):
    """A mapping of each keyword to its regularizer class, which prints as a table.

    A keyword is found by each of its names, in upper or lower case: ``registered()["weight_decay"]`` and ``registered()["WeightL2"]`` are
    ``registered()["weight_l2"]``.
    """

    def __init__(self, classes: Mapping[str, type[Regularizer]]) -> None:
        self._classes = dict(classes)

    def __iter__(self) -> Iterator[str]:
        for name, cls in self._classes.items():
            if name == cls.keys[0].lower():
                yield name
                yield from (keyword for keyword, (key, _) in PREFIXED.items() if key == name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, keyword: str) -> type[Regularizer]:
        name = keyword.lower()
        return self._classes[PREFIXED[name][0] if name in PREFIXED else name]

    def __contains__(self, keyword: object) -> bool:
        return isinstance(keyword, str) and (keyword.lower() in self._classes or keyword.lower() in PREFIXED)

    @property
    def spellings(self) -> frozenset[str]:
        """All names that ``graphreg.regularize`` accepts as keywords of regularizers, in lower case."""
        return frozenset({*self._classes, *PREFIXED})

    def aliases(self, keyword: str) -> tuple[str, ...]:
        """Return the other names of a keyword, the last of them the name of its class: ``("weight_decay", "weightl2")`` for ``weight_l2``.

        Raises:
            KeyError: The keyword is unknown.
        """
        name, cls = keyword.lower(), self[keyword]
        return () if name in PREFIXED else tuple(other for other, each in self._classes.items() if each is cls and other != name)

    def _blocks(self) -> Iterator[Paragraph]:
        # The name of the class, which is a name of the keyword too, has a column of its own.
        rows = [
            (keyword, ", ".join(other for other in self.aliases(keyword) if other != cls.__name__.lower()), cls.__name__)
            for keyword, cls in self.items()
        ]
        yield Table(("keyword", "also", "class"), tuple(rows))


def registered() -> Keywords:
    """Return the keywords of all known regularizers.

    Returns:
        A mapping of each keyword to its class. It prints as a table, and ``aliases(keyword)`` returns the other names of a keyword.
    """
    _discover()
    return Keywords(_classes)


def build(key: str, **options: Any) -> Regularizer:
    """Make a regularizer from its keyword, e.g. ``build("weight_l2", strength=0.1)``.

    Args:
        key: A keyword, one of its other names, or the name of the class, in upper or lower case.
        **options: The options of the class. A keyword with a role in its name, such as ``hidden_dropout``, takes no ``pattern``, because
            the role says where to act.

    Returns:
        The regularizer.

    Raises:
        NoMatchError: The key is unknown.
        RegularizerError: An option is unknown or out of range.
    """
    cls = find(key)
    if key.lower() in PREFIXED:
        family, pattern = PREFIXED[key.lower()]
        if "pattern" in options:
            raise RegularizerError(f"{key} names its own sites; write build({family!r}, pattern=...) to choose others.")
        options = {"pattern": pattern, "name": key.lower(), **options}
    return cls(**options)


def find(key: str) -> type[Regularizer]:
    """Return the regularizer class of a keyword. Raises NoMatchError if there is none."""
    known = registered()
    if key not in known:
        near = suggestions_text(str(key).lower(), known.spellings, "Near keys")
        raise NoMatchError(
            f"no regularizer is called {key!r}.{near} graphreg.registered() lists all. A "
            "class of your own is known once the module that defines it has been imported."
        )
    return known[key]


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
