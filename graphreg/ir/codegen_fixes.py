"""Fixes the emitted code for names that torch.fx writes wrongly: keywords, quotes, paths too deep for Python's parser.

torch.fx writes ``self.class`` for a layer called ``class``. For a path of two hundred numbers
(``0.0.0...``) it writes two hundred nested calls of ``getattr``, which Python's parser rejects.
"""

from __future__ import annotations

import ast
import keyword
import re
import unicodedata
from functools import lru_cache
from typing import Any

from torch import fx
from torch.fx.graph import PythonCode

from graphreg.errors import TraceError
from graphreg.ir.serialize import copied_graph

_DEEP = 50  # for a path with more names than this, the code calls ``get_submodule``


def spelled(graph: fx.Graph) -> fx.Graph:
    """Return a copy of the graph whose code uses ``getattr`` for the paths that torch.fx writes wrongly.

    Return the graph itself if it has no such path.
    """
    paths = list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")))
    paths = [path for path in paths if len(names := path.split(".")) > _DEEP or any(map(_is_misread, names))]
    if not paths:
        return graph
    copy = copied_graph(graph)
    for node in copy.nodes:
        if node.op in ("call_module", "get_attr") and node.target in paths:
            node.target = f"graphreg_path_{paths.index(node.target)}_"

    def python_code(root_module: str, **options: Any) -> PythonCode:
        code = fx.Graph.python_code(copy, root_module, **options)
        code.src = re.sub(rf"\b{root_module}\.graphreg_path_(\d+)_", lambda match: _text(root_module, paths[int(match[1])]), code.src)
        return code

    copy.python_code = python_code  # type: ignore[method-assign]
    return copy


@lru_cache(maxsize=4096)
def _is_misread(name: str) -> bool:
    """Return whether torch.fx writes the name so that Python rejects it or reads another name.

    This happens to keywords, and to names that contain a double quote, a backslash, a line break,
    or a character such as ``ﬁ``, which Python reads as ``fi``.
    """
    return keyword.iskeyword(name) or unicodedata.normalize("NFKC", name) != name or not {'"', "\\", "\n", "\r"}.isdisjoint(name)


def _text(root: str, path: str) -> str:
    owner, _, last = path.rpartition(".")
    names = path.split(".")
    if len(names) > _DEEP:
        return f"getattr({root}.get_submodule({owner!r}), {last!r})"
    text = root
    for name in names:
        text = f"{text}.{name}" if name.isidentifier() and not _is_misread(name) else f"getattr({text}, {name!r})"
    return text


def _reads(code: str, name: str) -> int:
    """Return how often the code reads a name.

    The code reads an argument with the name of a builtin only once, because torch.fx first assigns
    it to another name (``input_1 = input``).
    """
    occurrence = re.compile(rf"\b{name}\b")
    # one occurrence is in the signature, the other in the assignment
    if len(occurrence.findall(code)) < 3:
        return 1
    # Only the lines that contain the name are parsed: parsing all the code of a large model would
    # take longer than the rest of emission.
    lines = [line.strip() for line in code.splitlines() if occurrence.search(line)]
    try:
        parsed = [ast.parse(f"{line} pass" if line.endswith(":") else line) for line in lines]
    except SyntaxError:  # a statement extends over several lines
        parsed = [ast.parse(code)]
    return sum(isinstance(each, ast.Name) and each.id == name for tree in parsed for each in ast.walk(tree))


def check_argument_names(graph: fx.Graph, code: str, title: str) -> None:
    """Raise TraceError for an argument of forward whose name, such as ``torch``, means something else in the emitted code."""
    taken = {node.name for node in graph.nodes}
    for node in graph.nodes:
        name = str(node.target).lstrip("*")
        if node.op == "placeholder" and (name == "self" or (name not in taken and _reads(code, name) > 1)):
            raise TraceError(
                f"{title}.forward takes an argument {name!r}, and the code that torch.fx emits means something else by that name. "
                "Rename the argument."
            )
