"""Private parts of torch are named in ``graphreg/torch_internals/`` alone: whoever moves to a new torch reads that folder, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd import Function

TOP = Path(__file__).parents[2]
DOOR = TOP / "graphreg" / "torch_internals"
FILES = [path for folder in ("graphreg", "passes") for path in sorted((TOP / folder).rglob("*.py")) if DOOR not in path.parents]

# Names with an underscore that are no private part of torch, and why.
ALLOWED = {
    "_parameters": "the registries of nn.Module: they stand in the state of every module, whoever made it, also of graphreg's own",
    "_buffers": "as _parameters",
    "_modules": "as _parameters",
    "_apply": "the method of nn.Module that .to() calls on every submodule; a module that moves its tensors otherwise overrides it",
    "_graph": "of fx.GraphModule, which a rewritten module is: it has two graphs, and puts the one that runs there",
    "_code": "as _graph: what torch.fx made of it",
    "_fields": "of Python's named tuples, documented",
    "_no_weight_decay": "a mark that mamba_ssm, and models made after it, set on a parameter",
    "_abc_impl": "of Python's own abc",
    "_inst": "of Python's own random: the generator that all share",
    "_rand": "of numpy's, the same",
    "_lru_cache_wrapper": "of Python's own functools, a type that has no other name",
    "_getframe": "of Python's own sys; what may be read of a frame is another test's",
    "_option_string_actions": "of Python's own argparse",
}
# Files that read Python's stack, and what they look for there: code of the user's, never of torch.
STACK_READERS = {
    "graphreg/dynamo_backend/capture_place.py": "the name of the code of a decorated forward, which Dynamo captures first",
    "graphreg/errors.py": "the first caller outside graphreg, for the line that a warning names",
    "graphreg/tracing/reads.py": "whether it is the model's code that reads an attribute",
    "graphreg/in_place/fingerprint.py": "the variables of the functions around the model's, and the file of a function",
    "graphreg/ir/contents.py": "whether it is the model's code that asks",
    "graphreg/ir/convolution_axes.py": "the functions that layers of torch call",
    "graphreg/ir/source_location.py": "the line of the user's code that makes a node",
    "graphreg/regularizer/purity.py": "the line of a formula that draws or writes",
    "graphreg/tracing/frames.py": "whether it is the model's code that asks a stand-in, and whether it catches what is raised",
    "graphreg/tracing/global_queries.py": "whether it is the model's code that asks a question of its surroundings",
    "graphreg/tracing/symbolic/opaque_functions.py": "the frames of an error, for the function in which a trace failed",
    "graphreg/tracing/side_effects/state_places.py": "as global_queries.py, and the variables of the functions around the model's",
    "graphreg/tracing/side_effects/reachable_state.py": "the names that the model's code mentions",
    "graphreg/tracing/side_effects/snapshot.py": "as state_places.py",
    "graphreg/tracing/side_effects/stand_ins.py": "as contents.py",
    "graphreg/tracing/shape_decisions.py": "as frames.py",
    "graphreg/tracing/symbolic/holders.py": "as frames.py",
    "graphreg/tracing/symbolic/questions.py": "as frames.py",
    "graphreg/tracing/symbolic/proxies.py": "as global_queries.py",
    "graphreg/tracing/symbolic/tracer.py": "the instruction of the model's code at which torch asks for a size, and then records the call",
    "graphreg/tracing/export/op_record.py": "the instruction of the model's code that calls: x / y, or x.div(y)",
}
FRAME = {"f_globals", "f_locals", "f_code", "f_back", "f_lasti", "f_lineno", "tb_frame", "gi_frame", "_getframe", "currentframe"}
# What tells of the inside of a function or a piece of code.
INSIDE = {"__closure__", "cell_contents", "co_freevars", "co_name", "co_filename", "co_names", "co_code"}


def _private_names() -> set[str]:
    """Private names of the classes of torch that graphreg meets, for names that are read by string."""
    graph = fx.Graph()
    things: list[Any] = [
        nn.Module(), nn.LSTM(1, 1), Tensor, Function, fx.Node, graph, fx.Tracer(), fx.GraphModule({}, graph), torch.ops.aten.relu,
        torch.ops.aten.relu.default, torch.amp.GradScaler, torch.compile(nn.Identity()), torch.library.custom_op, nn.modules.module,
    ]  # fmt: skip
    found = {name for thing in things for name in dir(thing) if _is_private(name)}
    return found | {"_orig_mod", "_torchdynamo_orig_backend", "_scale", "_enabled", "_backward_fn", "_dynamo_source"}


MODULE = re.compile(r"torch(\.\w+)*\._\w+(\.\w+)*")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in ALLOWED and name != "_"


PRIVATE = _private_names()
# Of the classes that graphreg derives from: to assign one of these makes no name of graphreg's own of it.
INHERITED = {name for thing in (nn.Module(), fx.GraphModule({}, fx.Graph()), fx.Tracer()) for name in dir(thing)} | {"_dynamo_source"}


def _own_names(tree: ast.AST) -> set[str]:
    """Private names of attributes that classes of a file have: methods, class variables, what a method assigns to ``self``."""
    found = set[str]()
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        found |= {node.name for node in kind.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in ast.walk(kind):
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    parts = target.elts if isinstance(target, ast.Tuple) else [target]
                    found |= {part.attr for part in parts if isinstance(part, ast.Attribute) and _is_self(part.value)}
                    found |= {part.id for part in parts if isinstance(part, ast.Name) and node in kind.body}
    return found - INHERITED


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    """Strings that are statements: nothing reads an attribute by them."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


READS = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "get", "pop", "put", "keep"}  # an attribute by its name


@cache
def names_of_room(*room: str) -> frozenset[str]:
    """Those of all files of a room: a class may have its base in another."""
    paths = [path for path in FILES if path.relative_to(TOP).parts[:-1][:2] == room]
    return frozenset().union(*(_own_names(ast.parse(path.read_text())) for path in paths))


def violations(source: str, folder: str = "") -> Iterator[tuple[int, str]]:
    """The lines of a file that name private parts of torch, and the names. ``folder``: where it is."""
    tree = ast.parse(source)
    own, docstrings = names_of_room(*Path(folder).parts[:2]) if folder else _own_names(tree), _docstrings(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, each.name) for each in names if MODULE.fullmatch(each.name))
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "torch":
                yield from ((node.lineno, f"{module}.{n.name}") for n in names if MODULE.fullmatch(f"{module}.{n.name}"))
            case ast.Attribute(attr=name) if _is_private(name) and name not in own:
                yield node.lineno, name
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=given) if called in READS:
                texts = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
                yield from ((node.lineno, repr(text)) for text in texts if _is_private(text) and text not in own | PRIVATE)
            case ast.Constant(value=str(text)) if node not in docstrings and (text in PRIVATE - own or MODULE.fullmatch(text)):
                yield node.lineno, repr(text)


def readers(source: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """The lines of a file that read one of these attributes, or have its name in a string of its own."""
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.Attribute) and node.attr in names) or (isinstance(node, ast.Constant) and node.value in names):
            yield node.lineno, node.attr if isinstance(node, ast.Attribute) else repr(node.value)


def _told(path: Path, found: list[tuple[int, str]]) -> str:
    lines = ", ".join(f"line {line} {name}" for line, name in found)
    return f"{path.relative_to(TOP)} names private parts of torch, which only graphreg/torch_internals/ may do: {lines}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TOP)))
def test_no_private_name_of_torch(path: Path) -> None:
    found = sorted(violations(path.read_text(), str(path.relative_to(TOP).parent)))
    assert not found, _told(path, found)


def test_the_stack_is_read_where_it_is_explained() -> None:
    texts = {path: path.read_text() for path in FILES}
    named = {path: text for path, text in texts.items() if any(name in text for name in FRAME | INSIDE)}  # the others need not be parsed
    found = {str(path.relative_to(TOP)): lines for path, text in named.items() if (lines := sorted(readers(text, FRAME | INSIDE)))}
    for path, lines in found.items():
        assert path in STACK_READERS, _told(TOP / path, lines)
    assert not STACK_READERS.keys() - found.keys(), f"{STACK_READERS.keys() - found.keys()} read it no more: take them off the list"


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_is_allowed_in_vain(name: str) -> None:
    """The list stays as short as it can be."""
    assert any(re.search(rf"\b{name}\b", path.read_text()) for path in FILES)


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo", "import torch._inductor.config as config", "from torch._C import _functorch",
        "from torch.fx._symbolic_trace import Tracer", "from torch.utils import _pytree as tree", "from torch.fx.graph import _snake_case",
        "import torch\ntorch._C._current_graph_task_id()", "torch.fx._lazy", "torch.overrides._get_overloaded_args",
        "schema = operator._schema", "getattr(x, '_version', 0)", "vars(module)['_forward_hooks']",
        "changes.put(torch.backends.mha, '_is_fastpath_enabled', False)", "layer._flat_weights",
        "importlib.import_module('torch._dynamo.trace_rules')", "sys.modules.get('torch._guards')", "getattr(model, '_orig_mod', model)",
        "class A(nn.Module):\n    def forward(self):\n        return self._backward_hooks",
    ],
)  # fmt: skip
def test_it_finds(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch.utils.checkpoint", "from torch import fx", "self._parameters", "point._fields", "x.__class__",
        "class A:\n    def __init__(self):\n        self._made = []\n\ndef f(a):\n    return a._made",
        '"""torch._dynamo refuses it."""', "raise ValueError(f'leave torch._dynamo.config.{name} alone')",
    ],
)  # fmt: skip
def test_it_lets_pass(source: str) -> None:
    assert not list(violations(source))


def test_it_finds_readers_of_the_stack() -> None:
    assert list(readers("sys._getframe(1).f_locals.get('self')", FRAME))
    assert list(readers("getattr(function, '__closure__', None)", INSIDE))


def test_the_door_imports_nothing_of_graphreg_but_errors() -> None:
    for path in DOOR.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                own = [module for module in modules if module.partition(".")[0] == "graphreg"]
                assert all(module.startswith(("graphreg.errors", "graphreg.torch_internals")) for module in own), (path.name, own)
