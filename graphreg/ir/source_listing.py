"""Finds the lines of the model's own code that made the sites of a trace."""

from __future__ import annotations

import ast
import linecache
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from graphreg.ir.call_records import recorded_calls
from graphreg.ir.metadata import is_added, surrounding_calls
from graphreg.ir.operations import Operations
from graphreg.ir.roles import labels_of
from graphreg.ir.source_function import SourceFunction, SourceLine
from graphreg.ir.source_location import Origin, forward_line, origin_of, short
from graphreg.torch_internals import pytree


@dataclass(frozen=True, eq=False)
class _Span:
    """The lines of a function in its file, and of its docstring. ``arguments``: the line of each argument, and for ``""`` of ``def``."""

    file: str
    first: int
    last: int
    name: str
    arguments: Mapping[str, int]
    docstring: range

    def surrounds(self, other: _Span) -> bool:
        return self.file == other.file and self.first <= other.first and other.last <= self.last and self != other


def source_listing(
    model: nn.Module, graphs: Sequence[fx.Graph], operations: Operations, listed: Collection[str]
) -> tuple[SourceFunction, ...]:
    """List the functions of the model's own code that ran in a trace, each once, in the order in which they ran.

    The output of a module is at the line that calls the module, and an input at the argument. Docstrings are left out, and so is
    torch's code, and code that Python cannot find, such as that of an interactive session.

    Args:
        model: The traced model.
        graphs: Its graphs.
        operations: Facts about their operations.
        listed: The names to show.
    """
    files = dict[str, list[_Span]]()
    modules = dict[_Span, dict[str, None]]()
    sites = dict[Origin, dict[str, None]]()

    def ran(origin: Origin | None, path: str) -> _Span | None:
        span = _innermost(files, origin) if origin is not None else None
        if span is not None:
            modules.setdefault(span, {})[path] = None
        return span

    inputs = (origin_of(node) for graph in graphs for node in graph.nodes if node.op == "placeholder")
    root = ran(forward_line(model) or next(filter(None, inputs), None), "")
    for graph in graphs:
        callers = {
            (path, leaf.node): record.origin
            for (path, _), record in recorded_calls(graph).items()
            for leaf in pytree.tree_leaves(record.output)
            if leaf.node
        }
        for node in graph.nodes:
            if is_added(node):
                continue
            owner = ""  # the innermost module with code of its own, so none of torch's containers
            for path, _ in surrounding_calls(node) or ():
                if path in operations.modules and ran(forward_line(operations.modules[path]), path) is not None:
                    owner = path
            ran(origin_of(node), owner)
            for i, label in enumerate(labels_of(node, operations)):
                # of the names that one operation gives, the first; of modules that return the value, each at its call
                if label.text not in listed or (i and label.module is None):
                    continue
                origin = callers.get((label.module or "", node.name)) or origin_of(node)
                if node.op == "placeholder" and root is not None:
                    origin = (root.file, root.arguments.get(str(node.target), root.arguments[""]))
                if origin is not None:
                    sites.setdefault(origin, {})[label.text] = None

    if not sites:  # the graphs record no lines, as after pickling
        return ()
    shown = [span for span in modules if not any(other.surrounds(span) for other in modules)]
    return tuple(_function(span, modules, sites) for span in shown)


def _function(span: _Span, modules: Mapping[_Span, Iterable[str]], sites: Mapping[Origin, Iterable[str]]) -> SourceFunction:
    text = "".join(linecache.getlines(span.file)[span.first - 1 : span.last])
    codes = enumerate(textwrap.dedent(text.expandtabs(4)).split("\n"), span.first)
    lines = tuple(
        SourceLine(number, code.rstrip(), tuple(sites.get((span.file, number), ())))
        for number, code in codes
        if number <= span.last and number not in span.docstring
    )
    within = dict.fromkeys(path for each in modules if each == span or span.surrounds(each) for path in modules[each])
    return SourceFunction(span.name, short((span.file, span.first)).rpartition(":")[0], tuple(within), lines)


def _innermost(files: dict[str, list[_Span]], origin: Origin) -> _Span | None:
    """Return the innermost function around a line; None if there is none. ``files``: filled with the functions of each file."""
    file, line = origin
    if file not in files:
        linecache.checkcache(file)
        try:
            files[file] = list(_spans(file, ast.parse("".join(linecache.getlines(file))), ""))
        except (SyntaxError, ValueError):  # no Python, such as a file of Cython's
            files[file] = []
    around = [span for span in files[file] if span.first <= line <= span.last]
    return min(around, key=lambda span: span.last - span.first, default=None)


def _spans(file: str, tree: ast.AST, owner: str) -> Iterator[_Span]:
    """Yield the functions in a piece of code. ``owner``: the class around it, with a dot, or ``""``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            name = "lambda" if isinstance(node, ast.Lambda) else node.name
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            takes = node.args
            each = [*takes.posonlyargs, *takes.args, *takes.kwonlyargs, *filter(None, (takes.vararg, takes.kwarg))]
            arguments = {argument.arg: argument.lineno for argument in each}
            text = None if isinstance(node, ast.Lambda) or ast.get_docstring(node) is None else node.body[0]
            docstring = range(0) if text is None else range(text.lineno, (text.end_lineno or text.lineno) + 1)
            yield _Span(file, first, node.end_lineno or first, f"{owner}{name}", {**arguments, "": node.lineno}, docstring)
        yield from _spans(file, node, f"{node.name}." if isinstance(node, ast.ClassDef) else owner)
