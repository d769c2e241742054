"""Reads the regularizers' keys from source files, without importing them, so that help and completion need not import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

# as in the registry, which cannot be imported here because it imports torch
GROUP = "graphreg.passes"

HELP = {
    "dropout": "rate of dropout at the sites that GLOB names; without a GLOB, at the hidden values",
    "noise": "standard deviation of Gaussian noise at the sites that GLOB names; without a GLOB, at the hidden values",
}


def written_keys() -> dict[str, str]:
    """Return a line of help for every key.

    The keys are ``dropout`` and ``noise``, each alone and with a role in front
    (``hidden_dropout``), and the keys of every class. The classes are those of ``graphreg.passes``
    and of installed packages that announce regularizers by an entry point.
    """
    keys = {f"{role}_{family}": f"{family} at the {role} sites" for family in HELP for role in ("input", "hidden", "output")}
    keys |= HELP
    for path in _sources():
        for key, line in _keys_in(path):
            keys.setdefault(key, line)
    return keys


def _sources() -> Iterator[Path]:
    package = find_spec(GROUP)
    for folder in (package.submodule_search_locations or ()) if package else ():
        yield from sorted(Path(folder).glob("*.py"))
    for entry in entry_points(group=GROUP):
        yield from _source(entry.module)


def _source(module: str) -> Iterator[Path]:
    """Yield the path of a module's source file, if it is found without importing the packages around it."""
    # ``find_spec`` of a submodule would import the packages around it.
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin)
    if inner:
        path = path.parent.joinpath(*inner)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if path.suffix == ".py" and path.is_file():
        yield path


def _keys_in(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each key in ``class WeightL2(Penalty, keys=("weight_l2", ...))``, with the first line of the class's docstring."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        # in a file of another package; the registry warns of it when it imports the package
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            text = (ast.get_docstring(node) or node.name).splitlines()[0].replace("``", "")
            for keyword in node.keywords:
                if keyword.arg == "keys" and isinstance(keyword.value, (ast.Tuple, ast.List)):
                    for key in keyword.value.elts:
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            yield key.value.lower(), text
