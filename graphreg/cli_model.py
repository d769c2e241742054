"""The model that a command names: ``module:callable`` or ``file.py:callable``."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from graphreg.cli_errors import UsageError, raised
from graphreg.cli_path import on_the_path
from graphreg.errors import near_sentence


def load(text: str, kwargs: str | None) -> nn.Module:
    """The model: what the callable gives when it is called with ``kwargs`` (JSON), or the instance of that name."""
    options = _options(kwargs)
    place, _, name = text.rpartition(":")
    if not place or not name:
        package, _, last = text.rpartition(".")
        example = f"{package}:{last}" if package and last != "py" else f"{text}:build" if last == "py" else "torchvision.models:resnet18"
        raise UsageError(f"{text!r} names no model; write module:callable or file.py:callable, e.g. {example}.")
    module = _file(place) if place.endswith(".py") else _module(place)
    found = _attribute(module, place, name)
    if isinstance(found, nn.Module):
        if options:
            raise UsageError(f"{text} is a model already, so --kwargs has nothing to call. Leave it out.")
        return found
    if not callable(found):
        raise UsageError(f"{text} is of type {type(found).__name__}; name a callable that gives a torch.nn.Module, or one itself.")
    try:
        model = found(**options)
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"{text} called with ({given}) raised {raised(error, module.__file__)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{text} gives something of type {type(model).__name__}; it must give a torch.nn.Module.")
    return model


def _options(kwargs: str | None) -> dict[str, Any]:
    if kwargs is None:
        return {}
    try:
        options = json.loads(kwargs)
    except ValueError as error:
        raise UsageError(f"--kwargs {kwargs!r} is no JSON ({error}); write --kwargs '{{\"num_classes\": 10}}'.") from None
    if not isinstance(options, dict):
        raise UsageError(f"--kwargs {kwargs!r} is no JSON object; write --kwargs '{{\"num_classes\": 10}}'.")
    return options


def _file(place: str) -> ModuleType:
    """A file, imported under its own name."""
    path = Path(place).resolve()
    if not path.is_file():
        others = [str(Path(place).with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UsageError(f"there is no file {place}.{near_sentence(place, others, 'Near files')}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        raise UsageError(f"{place} has the name of a module that is loaded already, {path.stem}. Rename it.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{place} is no file that Python can import.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        with on_the_path(path.parent):  # for what it imports from beside it
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[path.stem]
        raise UsageError(f"importing {place} raised {raised(error, str(path))}") from error
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if absent != name and not name.startswith(f"{absent}."):
            raise UsageError(f"importing {name} raised {raised(error)}") from error
        raise UsageError(f"there is no module {absent}.{near_sentence(absent, _modules_near(absent), 'Near modules')}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing {name} raised {raised(error)}") from error


def _modules_near(name: str) -> list[str]:
    """The modules of the same package, or those that are installed."""
    package = name.rpartition(".")[0]
    paths = getattr(sys.modules.get(package), "__path__", None) if package else None
    return [found.name for found in pkgutil.iter_modules(paths, f"{package}." if package else "")]


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            names = [each for each in dir(found) if callable(getattr(found, each, None))]
            raise UsageError(f"{place} has no {name}.{near_sentence(part, names)}") from None
    return found
