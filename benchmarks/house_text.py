"""What ``house.py`` measures by reading the source of graphreg: names with several meanings, short functions, lines."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef | Function

SHORT = 3  # lines


@dataclass(frozen=True)
class File:
    """A source file of graphreg; ``name`` is its path in the package, such as ``passes/drop_path.py``."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Yield each function and method with its qualified name."""

        def walk(scope: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
            for node in ast.iter_child_nodes(scope):
                inner = f"{prefix}{node.name}." if isinstance(node, Scope) and not isinstance(node, ast.Module) else prefix
                if isinstance(node, Function):
                    yield inner[:-1], node
                yield from walk(node, inner)

        return walk(self.tree, "")


def files(package: Path, passes: Path) -> list[File]:
    """The files of graphreg and its passes, without the canaries, which are tests and were once in the package."""
    paths = {path: path.relative_to(package) for path in package.rglob("*.py")}
    paths |= {path: Path("passes") / path.relative_to(passes) for path in passes.rglob("*.py")}
    return [File(str(name), path.read_text(encoding="utf-8")) for path, name in sorted(paths.items()) if "canaries" not in name.parts]


def homonyms(sources: list[File]) -> dict[str, list[str]]:
    """Names that several files give to different things: classes together with aliases of types, and public functions.

    The names count exactly as written, at the top of a file. What is the integrations' alone is left out: each has the name that its
    framework's users expect.
    """
    classes, functions = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for file in sources:
        for node in file.tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(file.name)
            elif isinstance(node, Function) and not node.name.startswith("_"):
                functions[node.name].add(file.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.strip("_")[:1].isupper() and not name.isupper():
                    classes[name].add(file.name)

    def several(places: dict[str, set[str]]) -> list[str]:
        shared = {name: at for name, at in places.items() if len(at) > 1 and not all(file.startswith("integrations/") for file in at)}
        return [f"{name}: {', '.join(sorted(at))}" for name, at in sorted(shared.items())]

    return {"names of several classes": several(classes), "names of several public functions": several(functions)}


def both_write(sources: list[File]) -> list[str]:
    """The methods, except ``__dunder__`` ones, that the class ``Backend`` writes and a class of modules or models in place writes, too.

    A class of which nothing but the names is written (a Protocol or an abstract base) does not count.
    """
    backend, modules = set[str](), defaultdict[str, list[str]](list)
    for file in sources:
        room = file.name.partition("/")[0]
        for made in ast.walk(file.tree):
            if isinstance(made, ast.ClassDef) and (made.name == "Backend" or room in ("runtime", "in_place", "stages", "session")):
                for method in made.body:
                    if not isinstance(method, Function) or method.name.startswith("__") or not statements(method):
                        continue
                    if made.name == "Backend":
                        backend.add(method.name)
                    else:
                        modules[method.name].append(f"{made.name} in {file.name}")
    return [f"{name}: {', '.join(modules[name])}" for name in sorted(backend & modules.keys())]


def statements(function: Function) -> list[ast.stmt]:
    """The statements of a function without its docstring; empty for ``...`` alone."""
    return [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]


def single_callers(sources: list[File]) -> list[str]:
    """The functions and methods of at most three lines, without docstring, that one place alone uses, and that this place calls.

    A private name is looked for in its file, another in all files. What has a decorator that registers or wraps it, a name that several
    functions have there, and functions inside functions do not count.
    """
    uses, calls, defined = ({file.name: Counter[str]() for file in sources} for _ in range(3))
    for file in sources:
        uses[file.name].update(names(file.tree))
        calls[file.name].update(
            name for node in ast.walk(file.tree) if isinstance(node, ast.Call) for name in names(node.func, inside=False)
        )
        defined[file.name].update(node.name for _, node in file.functions())
    everywhere = [sum(counts.values(), Counter[str]()) for counts in (uses, calls, defined)]

    found = []
    for file in sources:
        inside = {id(inner) for _, node in file.functions() for inner in ast.walk(node) if inner is not node}
        here = [counts[file.name] for counts in (uses, calls, defined)]
        for qualified, node in file.functions():
            private = node.name.startswith("_") and not node.name.endswith("__")
            once = all(counts[node.name] == 1 for counts in (here if private else everywhere))
            if not once or id(node) in inside or node.name in names(node):
                continue

            body = statements(node)
            is_plain = {ast.unparse(mark) for mark in node.decorator_list} <= {"staticmethod", "classmethod"}
            if is_plain and body and (body[-1].end_lineno or 0) - body[0].lineno < SHORT:
                found.append(f"{file.name}:{node.lineno} {qualified}")
    return found


def names(tree: ast.AST, inside: bool = True) -> Iterator[str]:
    """Yield each name and attribute that is read, outside imports. ``inside=False``: only that which the tree itself is."""
    for node in ast.walk(tree) if inside else [tree]:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr


@dataclass(frozen=True)
class Lines:
    """How many lines there are: all, those that are not blank, those with code, those of imports. ``comments``: also at a line's end."""

    lines: int
    filled: int
    code: int
    imports: int
    comments: int
    characters: int  # of the filled lines, without indentation

    def __add__(self, other: Lines) -> Lines:
        return Lines(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    @classmethod
    def of(cls, file: File) -> Lines:
        """Count a file's lines. A docstring is no code."""
        lines = [line.strip() for line in file.text.splitlines()]
        docstrings, imports = set[int](), set[int]()
        for node in ast.walk(file.tree):
            within = range(getattr(node, "lineno", 0), (getattr(node, "end_lineno", 0) or 0) + 1)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                docstrings |= set(within)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                imports |= set(within)
        tokens = tokenize.generate_tokens(io.StringIO(file.text).readline)
        return cls(
            lines=len(lines),
            filled=sum(bool(line) for line in lines),
            code=sum(bool(line) and not line.startswith("#") and at not in docstrings for at, line in enumerate(lines, 1)),
            imports=len(imports),
            comments=sum(token.type == tokenize.COMMENT for token in tokens),
            characters=sum(map(len, lines)),
        )
