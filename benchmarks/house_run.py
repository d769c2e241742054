"""What ``house.py`` measures by running graphreg, in a process of its own, so that an earlier version can be measured as well.

Each function returns the members of its measures; they are printed as JSON.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Members = dict[str, list[str]]

# What torch's modules and classes hold that a patch would replace; the rest are counters and caches of torch's own.
REPLACEABLE = (type, property, staticmethod, classmethod, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def touched(run: Callable[[], Any]) -> Members:
    """The functions that a run calls, the types of their first arguments ``self`` and ``cls``, and their files, of graphreg alone.

    Lambdas and comprehensions are no functions here. The ``__init__`` of a dataclass is none either, but shows its class.
    """
    graphreg, passes = (Path(importlib.import_module(name).__file__ or "").parent for name in ("graphreg", "graphreg.passes"))
    codes, classes = set[types.CodeType](), set[type]()

    def profile(frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code.co_filename.startswith((str(graphreg), str(passes))) and not code.co_name.startswith("<"):
            codes.add(code)
        if code.co_argcount and code.co_varnames[0] in ("self", "cls"):
            first: Any = frame.f_locals.get(code.co_varnames[0])
            classes.add(first if issubclass(type(first), type) else type(first))  # isinstance would ask a proxy for its class

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)

    def short(file: str) -> str:
        path = Path(file)
        return str(path.relative_to(graphreg) if path.is_relative_to(graphreg) else Path("passes") / path.relative_to(passes))

    return {
        "functions": sorted(f"{short(code.co_filename)}:{code.co_firstlineno} {code.co_qualname}" for code in codes),
        "classes": sorted(f"{made.__module__}.{made.__qualname__}" for made in classes if made.__module__.startswith("graphreg")),
        "files": sorted({short(code.co_filename) for code in codes}),
    }


def calls() -> Members:
    """What ``regularize(mlp, hidden_dropout=0.1)`` and one call touch, without and with the proof, and what a warm call touches.

    Everything has run before, so that what is imported and cached once in a process does not count, nor what the first calls compute for
    those that follow.
    """
    graphreg = importlib.import_module("graphreg")
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.ones(2, 8)
    can_prove = "prove" in inspect.signature(graphreg.regularize).parameters  # graphreg 0.2 has no proof
    found: Members = {}

    for prove in (False, True) if can_prove else (False,):
        regularized = partial(graphreg.regularize, model, rng=0, hidden_dropout=0.1, **({"prove": prove} if can_prove else {}))
        module = regularized()
        for _ in range(5):  # from the second call on, masks are drawn ahead, and from the fifth on, they are only taken
            module(x)
        proof = ", with the proof" if prove else ""
        found |= {f"{what} of regularize and a call{proof}": names for what, names in touched(lambda: regularized()(x)).items()}  # noqa: B023
        found[f"functions of a warm call{proof}"] = touched(lambda: module(x))["functions"]  # noqa: B023
    return found


def strength_attributes() -> Members:
    """The names of graphreg's attributes that change when the strength at a site is set.

    The strengths are numbers and schedules, of dropout and of a penalty. They are set by name and by site, in a rewritten module, in
    one with blocks, in a model in place and in a backend. An attribute changes if it, or a container that it holds, holds another value.
    """
    graphreg = importlib.import_module("graphreg")
    found = set[str]()
    for make in (rewritten, in_blocks, in_place, backend):
        for strength in (0.1, graphreg.schedules.linear(0.1, 0.3, 10)):
            for by_site in (False, True):
                handle, holders = make(graphreg, hidden_dropout=strength, hidden_l1=strength)
                sites = {name: next(iter(at)) for name, at in graphreg.site_strengths(handle).items()}
                before = dict(held(holders))
                for name, site in sites.items():
                    graphreg.set_strength(handle, name, {site: 0.2} if by_site else 0.2)
                after = dict(held(holders))
                found |= {path[-1] for path, value in after.items() if before.get(path) != value}
    return {"attributes that hold a strength": sorted(found)}


def rewritten(graphreg: Any, **keywords: Any) -> tuple[Any, Any]:
    module = graphreg.regularize(mlp(), rng=0, **keywords)
    return module, module


def in_blocks(graphreg: Any, **keywords: Any) -> tuple[Any, Any]:
    module = graphreg.regularize(nn.Sequential(mlp(), nn.Linear(4, 8), mlp()), rng=0, blocks="0", **keywords)
    return module, module


def in_place(graphreg: Any, **keywords: Any) -> tuple[Any, Any]:
    model = graphreg.regularize_(mlp(), rng=0, **keywords)
    model(torch.ones(2, 8))
    return model, model


def backend(graphreg: Any, **keywords: Any) -> tuple[Any, Any]:
    torch.compiler.reset()
    made = graphreg.backend(inner="eager", rng=0, **keywords)
    torch.compile(mlp(), backend=made)(torch.ones(2, 8))
    return made, made


def held(holder: Any) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield each number, text and tensor that an object holds, with the names of the attributes that lead to it."""
    seen = set[int]()

    def walk(value: Any, path: tuple[str, ...], inside: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
        """``inside``: the keys and places in the containers since the last attribute."""
        if isinstance(value, (bool, int, float, str, bytes)) or value is None:
            yield (*inside, *path), repr(value)
        elif isinstance(value, Tensor):
            yield (*inside, *path), repr(value.tolist())
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                for key, item in value.items():
                    yield from walk(item, path, (*inside, repr(key)))
            elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
                for place, item in enumerate(value):
                    yield from walk(item, path, (*inside, str(place)))
            elif isinstance(value, nn.Module) or type(value).__module__.startswith("graphreg"):
                for name, item in attributes(value):
                    yield from walk(item, (*inside, *path, name), ())

    return walk(holder, (), ())


def attributes(holder: Any) -> list[tuple[str, Any]]:
    """The attributes of an object; a module's buffers and children are attributes, too."""
    if isinstance(holder, tuple):
        return list(holder._asdict().items()) if hasattr(holder, "_asdict") else []
    of_torch = vars(nn.Module()).keys() if isinstance(holder, nn.Module) else ()
    own = {name: value for name, value in getattr(holder, "__dict__", {}).items() if name not in of_torch}
    slots = {name: getattr(holder, name, None) for made in type(holder).__mro__ for name in getattr(made, "__slots__", ())}
    tables = [vars(holder)[name] for name in ("_buffers", "_modules") if isinstance(holder, nn.Module)]
    return [pair for table in (own, slots, *tables) for pair in table.items()]


def changed_in_torch() -> Members:
    """The attributes of torch's modules and classes that the import of graphreg replaces or adds, and those that its use does.

    Its use: a trace, a call, a call in place and in a backend, and an average of the weights. Each module of torch that graphreg imports
    is imported before. The finders of ``sys.meta_path`` and lists of callbacks count as attributes.
    """
    for name in json.loads(sys.argv[2]):
        importlib.import_module(name)
    torch.compile(mlp(), backend="eager")(torch.ones(2, 8))  # Dynamo patches torch's optimizers at its first compilation

    before = torch_now()
    import_rooms()
    imported = torch_now()
    use()
    return {"torch changed by an import": changed(before, imported), "torch changed by a trace": changed(imported, torch_now())}


def torch_modules() -> Members:
    """The modules of torch that are imported after graphreg was imported and used."""
    import_rooms()
    use()
    return {"modules": sorted(name for name in sys.modules if name.partition(".")[0] == "torch" and not name.startswith("torch.ops"))}


def import_rooms() -> None:
    """Import every module of graphreg that needs no optional package."""
    graphreg = importlib.import_module("graphreg")
    for module in pkgutil.walk_packages(graphreg.__path__, "graphreg."):
        if not any(part in module.name for part in ("__main__", ".integrations.", ".canaries", ".triton", ".examples")):
            importlib.import_module(module.name)


def use() -> None:
    graphreg = importlib.import_module("graphreg")
    x = torch.ones(2, 8)
    module, _ = rewritten(graphreg, hidden_dropout=0.1)
    module(x)
    torch.optim.swa_utils.AveragedModel(module).update_parameters(module)
    in_place(graphreg, hidden_dropout=0.1)
    backend(graphreg, hidden_dropout=0.1)


def torch_now() -> dict[str, Any]:
    """What each attribute of torch's modules, their classes and objects is; a list's items, so that a change of the list shows."""
    now: dict[str, Any] = {"sys.meta_path": list(map(type, sys.meta_path))}
    seen = set[int]()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "torch" or name.startswith("torch.ops") or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            now[f"{name}.{key}"] = value
            of_torch = (value if isinstance(value, type) else type(value)).__module__.startswith("torch")
            if of_torch and hasattr(value, "__dict__") and not isinstance(value, types.ModuleType) and id(value) not in seen:
                seen.add(id(value))  # a class or an object counts once, by the first of its names
                inner = list(vars(value).items())
                now |= {f"{name}.{key}.{inner_key}": list(item) if type(item) is list else item for inner_key, item in inner}
    return now


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names that stand for another function, class or property, or for a list of others. What Dynamo compiles is left out."""

    def replaceable(value: Any) -> list[int]:
        items = value if isinstance(value, list) else [value]
        return [id(item) for item in items if isinstance(item, REPLACEABLE)]

    names = {name for name in before.keys() | after.keys() if replaceable(before.get(name)) != replaceable(after.get(name))}
    return sorted(name for name in names if "__compiled_fn" not in name)


MEASURES = (calls, strength_attributes, changed_in_torch, torch_modules)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(next(measure for measure in MEASURES if measure.__name__ == sys.argv[1])()))
