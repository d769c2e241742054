"""Finds the blocks: the modules that ``blocks=`` selects, and those that checkpoint their own forward. The result calls them as modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from graphreg.errors import RegularizerError
from graphreg.ir import Label, Missing, Pattern, Selector, Site, calls_of, select, strings
from graphreg.tracing import Traced, checkpoints_itself


def called_blocks(traced: Traced, selector: Selector | None, missing: Missing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths of the blocks, in the order of their first calls; and the paths of those that no string of the selector matches.

    A module that checkpoints its own forward is a block in any case, because a graph without the module would not checkpoint.

    Args:
        traced: The traced model.
        selector: A selector of the modules that the model calls; None selects nothing.
        missing: What to do when a string matches nothing.

    Raises:
        NoMatchError: A string matches no module that the model calls.
        RegularizerError: A string asks for a port or a role, or is ``*`` alone.
    """
    sites = _modules(traced) if traced.whole else []
    chosen = set[str]()
    if selector is not None:
        check_blocks(selector)
        matched = select(selector, sites, sites, what="called module", model=traced.title, missing=missing, who="blocks=")
        chosen = {site.name for site in matched}
    unasked = {site.name for site in sites if checkpoints_itself(traced.operations.modules[site.name])} - chosen
    names = [site.name for site in sites if site.name in chosen | unasked]
    return tuple(names), tuple(name for name in names if name in unasked)


def check_blocks(selector: Selector) -> None:
    """Raise RegularizerError unless ``selector`` can select modules: it is a selector, and its strings have no port and no role."""
    for pattern in map(Pattern.parse, strings(selector)):
        if pattern.lone or pattern.port is not None or pattern.role is not None:
            raise RegularizerError(
                f"blocks={pattern.text!r} names no modules. Give the paths of the blocks, such as blocks='layers.*', with a class after @ "
                "if you like ('**@Block'), and no port or role."
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
    return [_site(path, modules[path]) for path in paths if path in modules]


def matching_modules(modules: Mapping[str, nn.Module], selector: Selector) -> list[str]:
    """Return the paths that a selector matches, before the model is traced. Modules without a forward, such as an nn.ModuleList, are left out.

    A trace may find other blocks: a selector that matches a module does not match the modules inside, unless the model never calls it.
    """
    sites = [_site(path, module) for path, module in modules.items() if path and type(module).forward is not nn.Module.forward]
    return [site.name for site in select(selector, sites, sites, what="module", model="", missing="ignore", who="blocks=")]


def _site(path: str, module: nn.Module) -> Site:
    return Site((Label(path, type(module).__name__, module=path),), module=path)
