"""Finds the modules that ``blocks=`` selects. The rewritten module still calls these as modules."""

from __future__ import annotations

from graphreg.errors import RegularizerError
from graphreg.ir import Label, Missing, Pattern, Selector, Site, calls_of, select, strings
from graphreg.tracing import Traced


def called_blocks(traced: Traced, selector: Selector | None, missing: Missing) -> tuple[str, ...]:
    """Return the paths of the modules that a selector matches, in the order of their first calls.

    Args:
        traced: The traced model.
        selector: A selector of the modules that the model calls; None selects nothing.
        missing: What to do when a string matches nothing.

    Raises:
        NoMatchError: A string matches no module that the model calls.
        RegularizerError: A string asks for a port or a role, or is ``*`` alone.
    """
    if selector is None:
        return ()
    for pattern in map(Pattern.parse, strings(selector)):
        if pattern.lone or pattern.port is not None or pattern.role is not None:
            raise RegularizerError(
                f"blocks={pattern.text!r} names no modules. Give the paths of the blocks, such as blocks='layers.*', with a class after @ "
                "if you like ('**@Block'), and no port or role."
            )
    sites = _modules(traced)
    return tuple(
        site.name for site in select(selector, sites, sites, what="called module", model=traced.title, missing=missing, who="blocks=")
    )


def _modules(traced: Traced) -> list[Site]:
    """Return a site for each submodule that the model calls. Its label has the module's path and class, for selectors to match."""
    paths: dict[str, None] = {}
    for graph in traced.graphs.values():
        for node in graph.nodes:
            paths |= dict.fromkeys(path for path, _ in calls_of(node) or ())
            if node.op == "call_module":
                paths[str(node.target)] = None
    modules = traced.operations.modules
    return [Site((Label(path, type(modules[path]).__name__, module=path),), module=path) for path in paths if path in modules]
