"""Finds the blocks, which stay modules that are called: those that ``blocks=`` selects, and those that checkpoint their own forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from graphreg.errors import RegularizerError, listed
from graphreg.ir.metadata import calls_of
from graphreg.ir.selector import Missing, Pattern, Selector, select, strings
from graphreg.ir.site import Label, Site
from graphreg.planning.parameter_splices import Readers
from graphreg.regularizer.base import Regularizer
from graphreg.tracing.checkpoints import CHECKPOINTS, checkpoints_itself
from graphreg.tracing.trace import Traced


def called_blocks(traced: Traced, selector: Selector | None, missing: Missing) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths of the blocks, in the order of their first calls; and the paths of those that no string of the selector matches.

    A module that checkpoints its own forward, or whose caller checkpoints it, is a block in any
    case, because a graph that does not call the module would not checkpoint.

    Args:
        traced: The traced model.
        selector: A selector of the modules that the model calls; None selects nothing.
        missing: What to do when a string matches nothing.

    Raises:
        NoMatchError: A string matches no module that the model calls.
        RegularizerError: A string asks for a port or a role, or is ``*`` alone.
    """
    # Most models: no block is asked for, and none checkpoints.
    if selector is None and not traced.checkpoints and not any(map(checkpoints_itself, traced.operations.modules.values())):
        return (), ()
    # A graph of Dynamo's may be a part of a module, so it can call none.
    sites = _modules(traced) if traced.whole else []
    chosen = set[str]()
    if selector is not None:
        check_blocks(selector)
        matched = select(selector, sites, sites, what="called module", model=traced.title, missing=missing, who="blocks=")
        chosen = {site.name for site in matched}
    modules = traced.operations.modules
    unasked = {site.name for site in sites if site.name in traced.checkpoints or checkpoints_itself(modules[site.name])} - chosen
    names = [site.name for site in sites if site.name in chosen | unasked]
    return tuple(names), tuple(name for name in names if name in unasked)


def check_blocks(selector: Selector) -> None:
    """Raise RegularizerError unless ``selector`` is a selector that can select modules: no string is ``*`` or has a port or a role."""
    for pattern in map(Pattern.parse, strings(selector)):
        if pattern.lone or pattern.port is not None or pattern.role is not None:
            raise RegularizerError(
                f"blocks={pattern.text!r} names no modules. Give the paths of the blocks, such as blocks='layers.*', with a class after @ "
                "if you like ('**@Block'), and no port or role."
            )


def check_layers(replacing: Iterable[tuple[Site, str, Readers]], blocks: Sequence[str]) -> None:
    """Raise RegularizerError for a splice on a parameter of a layer in ``blocks``, because the splice replaces the call of the layer.

    ``replacing``: the site of each splice on a parameter, the regularizer's name, and the modules
    whose reads the splice replaces.
    """
    for site, name, readers in replacing if blocks else ():
        every = [label.name.rpartition(".")[0] for label in site.labels] if readers is None else readers
        if (layer := next((path for path in every if path in blocks), None)) is not None:
            raise RegularizerError(
                f"{name} replaces {site.name} where {layer!r} reads it, and {layer!r} is a block itself (blocks=). Leave the "
                "layer out of blocks=, or name the module around the layer."
            )


def lost_to_checkpoints(traced: Traced, regularizers: Mapping[str, Regularizer]) -> str:
    """Return a warning for selectors that would match inside modules that are opaque because they checkpoint; ``""`` for none."""
    opaque = [path for path, reason in traced.opaque_modules.items() if CHECKPOINTS in reason]
    modules = traced.operations.modules.items()
    # Stand-ins for the values that these modules would have, to try the selectors on.
    hidden = [
        Site((Label(path, type(module).__name__, module=path),), module=path, role="hidden")
        for path, module in modules
        if any(path.startswith(f"{outer}.") for outer in opaque)
    ]
    losing = [name for name, regularizer in regularizers.items() if hidden and _loses(traced, regularizer, hidden)]
    if not losing:
        return ""
    return (
        f"there are no sites for {listed(losing, 3)} inside {listed(opaque, 3)}, because a module that checkpoints activations in its "
        "forward is opaque. To have sites there, take the checkpoint out of the forward, name the module in blocks=, and put "
        "checkpoint_wrapper around the block of the result."
    )


def _loses(traced: Traced, regularizer: Regularizer, hidden: Sequence[Site]) -> bool:
    """Return whether a selector of values would match one of the ``hidden`` sites if the model had them."""
    if regularizer.on != "values" or callable(regularizer.pattern):
        return False
    patterns = [pattern for pattern in map(Pattern.parse, strings(regularizer.pattern)) if not pattern.exclude]
    if not patterns or any(pattern.lone for pattern in patterns):
        return bool(regularizer.defaults(list(hidden)))
    return any(site in hidden for pattern in patterns for site in pattern.find([*traced.values, *hidden]))


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
    """Return the paths that a selector matches before the model is traced; modules without a forward, such as an nn.ModuleList, left out.

    The paths may differ from those of ``called_blocks``, which knows the calls: a string that
    matches a called module matches no module inside it, but if the model never calls the module,
    the string may match modules inside it.
    """
    sites = [_site(path, module) for path, module in modules.items() if path and type(module).forward is not nn.Module.forward]
    return [site.name for site in select(selector, sites, sites, what="module", model="", missing="ignore", who="blocks=")]


def _site(path: str, module: nn.Module) -> Site:
    return Site((Label(path, type(module).__name__, module=path),), module=path)
