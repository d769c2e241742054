"""Loads what a command works on: the model, given as ``module:callable`` or ``file.py:callable``, and its example inputs.

Inputs are random tensors of a shape (``--input 1x3x224x224``), or tensors that torch.save wrote
(``--inputs FILE``).
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.cli.errors import UsageError, raised
from graphreg.cli.parser import on_the_path
from graphreg.errors import suggestions_text
from graphreg.recipes.files import of_json


def load(text: str, kwargs: str | None) -> nn.Module:
    """Load the model that ``text`` names as ``module:callable`` or ``file.py:callable``.

    The callable is called with ``kwargs``, a JSON object, and returns the model. If it is a
    ``torch.nn.Module`` itself, it is the model.

    Raises:
        UsageError: ``kwargs`` is no JSON object; the module, file or name does not exist; the
            import or the call raises an error; or the callable does not return a
            ``torch.nn.Module``.
    """
    options = json_object("--kwargs", kwargs, '{"num_classes": 10}')
    place, _, name = text.rpartition(":")
    if not place or not name:
        # The likely slips are ``net.Net``, with a dot, and ``net.py``, without a callable.
        package, _, last = text.rpartition(".")
        example = f"{package}:{last}" if package and last != "py" else f"{text}:build" if last == "py" else "torchvision.models:resnet18"
        raise UsageError(f"{text!r} names no model; write module:callable or file.py:callable, e.g. {example}.")

    module = _file(place) if place.endswith(".py") else _module(place)
    target = _attribute(module, place, name)

    if isinstance(target, nn.Module):
        if options:
            raise UsageError(f"{text} is a model already, so --kwargs has nothing to call. Leave it out.")
        return target
    if not callable(target):
        raise UsageError(f"{text} is of type {type(target).__name__}; name a torch.nn.Module, or a callable that returns one.")

    try:
        model = target(**options)
    except (Exception, SystemExit) as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise UsageError(f"{text} called with ({arguments}) raised {raised(error, module.__file__)}") from error

    if not isinstance(model, nn.Module):
        raise UsageError(f"{text} gives something of type {type(model).__name__}; it must give a torch.nn.Module.")
    return model


def json_object(option: str, text: str | None, example: str) -> dict[str, Any]:
    """Return the JSON object that is an option's value; an empty one for None. Raises UsageError for anything else."""
    if text is None:
        return {}
    try:
        found = of_json(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no JSON ({str(error).rstrip('.')}); write {option} '{example}'.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{option} {text!r} is no JSON object; write {option} '{example}'.")
    return found


def _file(place: str) -> ModuleType:
    """Import a file as the module that its name says: ``net.py`` as ``net``."""
    path = Path(place).resolve()
    if not path.is_file():
        others = [str(Path(place).with_name(other.name)) for other in path.parent.glob("*.py")]
        raise UsageError(f"there is no file {place}.{suggestions_text(place, others, 'Near files')}")

    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        raise UsageError(f"{place} has the name of a module that is loaded already, {path.stem}. Rename the file.")

    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{place} is no file that Python can import.")

    module = importlib.util.module_from_spec(spec)
    # Before the file runs, as Python does it: dataclasses look up their module by its name.
    sys.modules[path.stem] = module
    try:
        with on_the_path(path.parent):  # so that the file can import other files of its folder
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
        # The module itself is there, but it imports one that is not.
        if absent != name and not name.startswith(f"{absent}."):
            raise UsageError(f"importing {name} raised {raised(error)}") from error
        # suggest one of the modules in the same package, or of all top-level modules
        package = absent.rpartition(".")[0]
        paths = getattr(sys.modules.get(package), "__path__", None) if package else None
        beside = [module.name for module in pkgutil.iter_modules(paths, f"{package}." if package else "")]
        raise UsageError(f"there is no module {absent}.{suggestions_text(absent, beside, 'Near modules')}") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing {name} raised {raised(error)}") from error


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            names = [each for each in dir(value) if callable(getattr(value, each, None))]
            raise UsageError(f"{place} has no {name}.{suggestions_text(part, names)}") from None
    return value


GRAMMAR = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<bound>\d+))?")
# without a bound, integers are 0 or 1, which are valid in a mask and as indices into a table of 2
# rows or more
BELOW = 2
EXAMPLE = "write [name=]SHAPE[:dtype][<bound], e.g. 1x3x224x224, 8x16:float64, 'input_ids=1x16:int64<100'"
KINDS = re.compile(r"bool|bfloat16|float(16|32|64)|complex(64|128)|int(8|16|32|64)|uint8")
DTYPES: dict[str, torch.dtype] = {name: value for name, value in vars(torch).items() if KINDS.fullmatch(name)}


def example_inputs(texts: Sequence[str] | None, file: str | None) -> Any:
    """Make the example inputs for ``trace``.

    Args:
        texts: The values of ``--input``, one shape each.
        file: The value of ``--inputs``.

    Returns:
        A tuple of tensors, or a dict if the inputs are named; or the content of the file; None if
        neither option is given.

    Raises:
        UsageError: Both are given, a shape is wrong, or the file cannot be read.
    """
    if texts and file is not None:
        raise UsageError("--input and --inputs are both given; one is enough.")
    if file is not None:
        return _read(file)
    if not texts:
        return None
    # The same command has the same inputs each time, and torch's own generator is left alone.
    draws = torch.Generator().manual_seed(0)
    made = [_tensor(text, draws) for text in texts]
    names = [name for name, _ in made if name is not None]
    if not names:
        return tuple(tensor for _, tensor in made)
    if len(names) < len(made):
        raise UsageError(f"some inputs have a name and some have none ({', '.join(texts)}); name all of them, or none.")
    if len(set(names)) < len(names):
        raise UsageError(f"an input is given twice ({', '.join(texts)}); give each once.")
    return dict(zip(names, (tensor for _, tensor in made), strict=True))


def _tensor(text: str, draws: torch.Generator) -> tuple[str | None, Tensor]:
    match = GRAMMAR.fullmatch(text)
    if match is None:
        raise UsageError(f"--input {text!r} is no shape; {EXAMPLE}.")

    name, dtype_name, bound = match["name"], match["dtype"] or "float32", match["bound"]
    if dtype_name not in DTYPES:
        suggested = suggestions_text(dtype_name, DTYPES)
        raise UsageError(f"--input {text!r}: there is no dtype {dtype_name}.{suggested} All: {', '.join(DTYPES)}.")

    dtype, shape = DTYPES[dtype_name], tuple(map(int, match["shape"].split("x")))
    integers = not dtype.is_floating_point and not dtype.is_complex
    if bound is not None and not integers:
        raise UsageError(
            f"--input {text!r}: a bound is for integers, and {dtype_name} is no integer type. Leave the bound out, or write :int64<{bound}."
        )

    # ``iinfo`` refuses bool, of which the largest bound is 2: False and True.
    largest = 2 if dtype is torch.bool else torch.iinfo(dtype).max if integers else 0
    if bound is not None and not 0 < int(bound) <= largest:
        raise UsageError(f"--input {text!r}: the bound of {dtype_name} is from 1 to {largest}.")

    try:
        if integers:
            return name, torch.randint(BELOW if bound is None else int(bound), shape, generator=draws).to(dtype)
        return name, torch.randn(shape, dtype=dtype, generator=draws)
    except (RuntimeError, TypeError) as error:  # too large for memory, or for an index
        raise UsageError(f"--input {text!r} cannot be made: {raised(error)}") from error


def _read(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--inputs: there is no file {file}.")
    try:
        inputs = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many kinds for a damaged file
        raise UsageError(
            f"--inputs {file} cannot be read; write tensors in a tuple or a dict to it with torch.save ({raised(error)})"
        ) from error
    if isinstance(inputs, dict) and not all(isinstance(key, str) for key in inputs):
        raise UsageError(f"--inputs {file} holds a dict whose keys are not all strings; name the arguments.")
    return tuple(inputs) if isinstance(inputs, list) else inputs
