"""The rooms of docs/architecture.md: which may import which, what their files may say twice, and who may edit a graph."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import graphreg
import graphreg.passes
from graphreg import Regularizer

TOP = Path(__file__).parents[1]
PAGE = (TOP / "docs" / "architecture.md").read_text(encoding="utf-8")
ENGINE, PASSES = sorted((TOP / "graphreg").rglob("*.py")), sorted((TOP / "passes").glob("*.py"))
FRONT_DOOR = {"__init__", "__main__"}  # they offer the rooms to users, and no room imports them
EDITS = {"inserting_after", "inserting_before", "erase_node", "replace_all_uses_with", "replace_input_with", "eliminate_dead_code"}
MAKES = {"create_node", "call_function", "call_module", "call_method", "get_attr"}
OPTIONAL = {"pygraphviz", "resvg_py", "rich.console", "rich.syntax", "yaml"}  # extras, imported where they are needed


def rooms() -> list[set[str]]:
    """The rooms in the order of the page's section, from the top; those on one line do not import each other."""
    block = PAGE.split("\n## What may import what\n")[1].split("```text\n")[1].split("```")[0]
    return [set(re.findall(r"\w+", line.partition("#")[0])) for line in block.splitlines()]


ORDER = {room: place for place, line in enumerate(rooms()) for room in line}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


def place(path: Path) -> str:
    return str(path.relative_to(TOP))


def room_of(path: Path) -> str:
    """``planning`` for graphreg/planning/plan.py, ``errors`` for graphreg/errors.py."""
    inner = path.relative_to(TOP / "graphreg")
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def imports(nodes: Iterable[ast.AST]) -> list[tuple[str, str]]:
    """(module, name) of each import, those for type checkers among them: ("graphreg.ir", "Site"), ("torch", "")."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            yield child
            yield from outside_functions(child)


@cache
def called(path: Path) -> set[str]:
    """The names of the methods that a file calls."""
    return {node.func.attr for node in nodes(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)}


# Rooms


def test_the_page_names_every_room_once() -> None:
    names = [name for line in rooms() for name in line]
    assert sorted(names) == sorted({room_of(path) for path in ENGINE} - FRONT_DOOR)
    described = re.findall(r"^\*\*`(?:graphreg/)?(\w+)(?:/|\.py)`\*\*", PAGE.split("\n## The rooms\n")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(described) == sorted(names)  # a paragraph each


def test_the_files_that_the_page_names_are_there() -> None:
    """In a room's paragraph by their names, elsewhere by the room and the name; ``file.py`` behind ``room/file.py`` is of that room."""
    for paragraph in PAGE.split("\n\n"):
        room = re.match(r"\*\*`(\w+)/`\*\*", paragraph)
        folder = TOP / "graphreg" / (room[1] if room else "")
        for name in re.findall(r"`([\w/.]+\.(?:py|js))`", paragraph):
            inside = [base for base in (folder, TOP, TOP / "graphreg") if (base / name).exists()]
            assert inside, (name, paragraph[:60])
            folder = (inside[0] / name).parent if "/" in name and not room else folder


def test_a_file_imports_public_names_of_rooms_above_its_own() -> None:
    for path in ENGINE:
        own = room_of(path)
        for module, name in imports(nodes(path)) if own not in FRONT_DOOR else ():
            package, _, inner = module.partition(".")
            if package != "graphreg":
                continue
            if not inner:  # the command line comes to the library by the door that users come by
                assert own == "cli" and (not name or name in graphreg.__all__), (place(path), module)
                continue
            assert not name.startswith("_"), f"{place(path)}: {name} is private to {module}"
            room = inner.split(".")[0]
            assert room == own or ORDER[room] < ORDER[own], f"{place(path)}: {own} is not below {room}"


def test_no_files_import_each_other() -> None:
    files = {".".join(path.relative_to(TOP).with_suffix("").parts): path for path in ENGINE if path.name != "__init__.py"}
    TopologicalSorter({
        name: {
            each for node in tree(path).body if isinstance(node, ast.ImportFrom)
            for each in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)) if each in files
        } for name, path in files.items()
    }).prepare()  # fmt: skip


def test_a_room_says_what_it_is_for() -> None:
    for path in sorted((TOP / "graphreg").glob("*/__init__.py")):
        body = tree(path)
        assert len(ast.get_docstring(body) or "") > 30, path
        assert len(body.body) == 1 or path.parent.name == "testing", path  # whose function users import from there


def test_every_room_is_installed() -> None:
    """The list of packages is written by hand, since passes/ and examples/ stand beside the engine."""
    packages = {".".join(path.parent.relative_to(TOP).parts) for path in ENGINE if path.name == "__init__.py"}
    listed = tomllib.loads((TOP / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert packages | {"graphreg.passes", "graphreg.examples"} == set(listed)


def test_no_import_inside_a_function_dodges_a_circle() -> None:
    """What is private to torch and slow to import is another matter, and that of ``torch_internals``."""
    for path in ENGINE:
        inside = {module for module, _ in imports(nodes(path))} - {module for module, _ in imports(outside_functions(tree(path)))}
        inside -= OPTIONAL | ({"importlib"} if path == TOP / "graphreg" / "__init__.py" else set())
        assert not [module for module in inside if not module.startswith(("torch._", "torch.distributed.tensor"))], path


# Files


def test_few_files_stand_outside_the_rooms() -> None:
    assert len(list((TOP / "graphreg").glob("*.py"))) <= 8


def code_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that could be said once: no imports, no parameters, no lists of names, nothing of brackets alone."""
    left_out: set[int] = set()
    for node in nodes(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out.update(range(node.lineno, (node.end_lineno or 0) + 1))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            left_out.update(range(node.lineno, node.body[0].lineno))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if number not in left_out and re.search(r"\w", line)]


def test_no_two_places_share_six_lines() -> None:
    seen: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in ENGINE:
        lines = code_lines(path) if path.name != "__init__.py" else []
        for start in range(len(lines) - 5):
            six = lines[start : start + 6]
            seen[tuple(text for _, text in six)].append(f"{place(path)}:{six[0][0]}")
    assert [places for places in seen.values() if len(places) > 1] == []


# Graphs


def test_who_edits_a_graph() -> None:
    """The room ``rewriting``. Front ends edit the graph that they are making, ``compiler`` those that are Inductor's own."""
    edit = {room_of(path) for path in ENGINE if EDITS & called(path)}
    assert "rewriting" in edit and edit <= {"rewriting", "tracing", "compiler"}
    make = {room_of(path) for path in ENGINE if MAKES & called(path)}  # of graphs of their own
    # a graph of Dynamo's and back; a pickled graph, and what is asserted of sizes; the graphs of blocks
    assert make <= edit | {"dynamo_backend", "ir", "blocks"}
    assert not [path for path in PASSES if (EDITS | MAKES) & called(path)]


# Passes


def classes_of(path: Path) -> list[str]:
    """The regularizers that a file of ``passes/`` defines."""
    name = f"graphreg.passes.{path.stem}"
    found = vars(importlib.import_module(name)).items()
    return [key for key, thing in found if isinstance(thing, type) and issubclass(thing, Regularizer) and thing.__module__ == name]


PASS_FILES = {path.stem: path for path in PASSES if path.stem != "__init__"}


def test_the_list_of_passes_is_complete() -> None:
    defined = {stem: classes_of(path) for stem, path in PASS_FILES.items()}
    assert len(defined) > 7 and all(len(classes) == 1 for classes in defined.values()), defined
    names = [classes[0] for classes in defined.values()]
    assert sorted(names) == sorted(graphreg.passes.__all__)
    listed = imports(nodes(TOP / "passes" / "__init__.py"))
    assert listed == sorted((f"graphreg.passes.{stem}", classes[0]) for stem, classes in defined.items())
    built_in = {cls.__name__ for cls in graphreg.registered().values() if cls.__module__.startswith("graphreg.passes.")}
    assert built_in == set(names)


def test_a_pass_imports_the_front_door_torch_and_the_standard_library() -> None:
    for path in PASS_FILES.values():
        found = imports(nodes(path))
        others = {module for module, _ in found if module.partition(".")[0] not in {"torch", *sys.stdlib_module_names}}
        assert others == {"graphreg"}, path
        assert {name for module, name in found if module == "graphreg"} <= set(graphreg.__all__), path


def test_the_engine_names_no_pass() -> None:
    """Built-ins are found by scanning their package."""
    classes = {name for file in PASS_FILES.values() for name in classes_of(file)}
    for path in ENGINE:
        names = set[str]()
        for node in nodes(path):
            if isinstance(node, ast.Attribute):
                if not (isinstance(node.value, ast.Name) and node.value.id == "nn"):  # nn.AlphaDropout is torch's
                    names.add(node.attr)
            elif isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
        modules = {part for module, name in imports(nodes(path)) if module.startswith("graphreg") for part in (*module.split("."), name)}
        assert not classes & (names | modules), path
        assert not set(PASS_FILES) & modules and "passes" not in modules, path


MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "scalar_tensor", "tensor", "zeros"}


def test_a_tensor_that_a_module_has_names_its_device() -> None:
    """Otherwise it would be made on torch's default device, which is meta where somebody makes a model without values."""
    of_modules = [path for path in ENGINE if room_of(path) in {"rng", "compiler", "runtime", "rewriting", "dynamo_backend"}]
    for path in (*of_modules, *PASSES):
        calls = [node for node in nodes(path) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        makes = [call for call in calls if getattr(call.func, "attr", "") in MAKERS and ast.unparse(call.func).startswith("torch.")]
        assert not [ast.unparse(call) for call in makes if "device" not in {keyword.arg for keyword in call.keywords}], path
