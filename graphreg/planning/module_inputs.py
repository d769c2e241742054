"""Finds the input of a module for a splice that takes ``module_input``, and checks the sites of a splice that takes ``previous``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from graphreg.errors import RegularizerError, listed
from graphreg.ir.cell_states import cell_call, state_before
from graphreg.ir.metadata import scope_of
from graphreg.ir.roles import labels_of, signal_nodes, site_nodes
from graphreg.ir.selector import Pattern, strings
from graphreg.ir.site import Site
from graphreg.regularizer.base import Regularizer
from graphreg.tracing.trace import Traced

_NAMELESS = "a value without a name"


def module_inputs(traced: Traced, regularizer: Regularizer, matched: Mapping[Site, str]) -> dict[Site, str]:
    """Return a dict from each site of a regularizer to the name of a value: the input of the module whose output the site is.

    Args:
        traced: The traced model.
        regularizer: The regularizer, which takes ``module_input``.
        matched: The regularizer's sites, each with the string that matched it.

    Returns:
        The dict.

    Raises:
        RegularizerError: A site is not the output of a module, or it is not certain which single
            value the module gets.
    """
    who = type(regularizer).__name__
    if not strings(regularizer.pattern):
        raise RegularizerError(f"{who}: a selector that is a function selects values, not modules. Select the modules by a string.")
    return {site: _input_of(traced, site, text, f"{who} at {site.name}") for site, text in matched.items()}


def check_cells(traced: Traced, regularizer: Regularizer, sites: Sequence[Site]) -> None:
    """Check the sites of a regularizer that takes ``previous``.

    Raises:
        RegularizerError: A site is not a state that one of torch's cells returns, or the graph does
            not show which state the cell got.
    """
    for site in sites:
        who = f"{type(regularizer).__name__} at {site.name}"
        for graph in traced.graphs.values():
            node = site_nodes(graph, traced.operations).get(site.name)
            if node is None:
                continue
            if cell_call(node, traced.operations) is None:
                layer = " A recurrent layer computes all steps in one operation: write its loop with a cell." if site.sequence else ""
                raise RegularizerError(
                    f"{who}: it acts on the states that nn.RNNCell, nn.GRUCell and nn.LSTMCell return, and this value is not such a "
                    f"state.{layer}"
                )
            try:
                state_before(node, traced.operations)
            except LookupError as error:
                raise RegularizerError(f"{who}: {error}. Pass them as a tuple of two, cell(x, (h, c)).") from None


def _input_of(traced: Traced, site: Site, text: str, who: str) -> str:
    pattern = Pattern.parse(text)
    paths = [label.module for label in site.labels if label.module is not None and (pattern.lone or pattern.names(label, site))]
    if not paths:
        raise RegularizerError(
            f"{who}: {text!r} selects a value that is no module's output. Name a module: its input takes the place of its output."
        )

    path = min(paths, key=len)
    calls = [each.name for each in traced.values for label in each.labels if label.module == path and label.default]
    if len(calls) > 1:
        raise RegularizerError(f"{who}: {path} is called {len(calls)} times, and its calls cannot be told apart. Leave it out.")

    found = {name: None for graph in traced.graphs.values() for name in _entering(traced, graph, path, site.name)}
    if len(found) != 1:
        what = f"several values ({listed(list(found), 4)})" if found else "no value"
        raise RegularizerError(
            f"{who}: {path} gets {what} from the rest of the model, so it is not certain what takes the place of its output. Leave it out."
        )

    name = next(iter(found))
    if name == _NAMELESS:
        raise RegularizerError(
            f"{who}: {path} gets a value that has no name, such as a tensor that the forward itself makes (torch.zeros), so this value "
            "cannot be passed to the formula. Leave the module out."
        )

    shape = next((each.shape for each in traced.values if each.name == name), None)
    if shape is not None and site.shape is not None and shape != site.shape:
        raise RegularizerError(
            f"{who}: {path} gets {shape} and returns {site.shape}, so its input cannot take the place of its output. Leave the site out."
        )
    return name


def _entering(traced: Traced, graph: fx.Graph, path: str, site: str) -> list[str]:
    """Return the names of the values that a module gets in a graph.

    If the graph calls the module, this is the module's first argument. Otherwise these are the
    values from outside the module that operations inside the module read.
    """
    node = site_nodes(graph, traced.operations).get(site)
    if node is None:  # only the graph of the other mode has the site
        return []
    if node.op == "call_module" and node.target == path:
        read = [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
    else:
        signals = signal_nodes(graph, traced.operations, traced.model)
        within = (each for each in graph.nodes if scope_of(each) == path or scope_of(each).startswith(f"{path}."))
        inside = dict.fromkeys(within)  # a dict keeps the order
        read = [n for each in inside for n in each.all_input_nodes if n not in inside and n in signals]
    labels = [labels_of(each, traced.operations) for each in dict.fromkeys(read)]
    return [each[0].text if each else _NAMELESS for each in labels]
