"""Decides which axis of each selected value has the units, for penalties that take ``units``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from graphreg.errors import RegularizerError, shown
from graphreg.ir import Graphs, Operations, Site, Units, convolution, site_nodes


def check_axis(regularizer: Any) -> None:
    """Raise RegularizerError for an option ``axis`` that is neither a whole number nor None."""
    axis = regularizer.engine_options.axis
    if axis is not None and type(axis) is not int:
        raise RegularizerError(
            f"{type(regularizer).__name__}: axis={shown(axis)} is not allowed; give the axis of the units, a whole number, or None: axis 1 "
            "for the value of a convolution, else the last."
        )


def units_at(sites: Iterable[Site], regularizer: Any, operations: Operations, graphs: Graphs) -> dict[Site, Units]:
    """Decide how to read the value of each site as samples of units.

    The units are on the axis that the option ``axis`` gives. Without it, they are the channels of a value that has the axes of a
    convolution's output, and else the last axis.

    Args:
        sites: The selected sites.
        regularizer: The regularizer, which says how many samples and units its formula takes.
        operations: The operations of the model's graphs.
        graphs: The graphs by mode.

    Returns:
        By site, how to read its value.

    Raises:
        RegularizerError: A value has no such axis, or too few units, as far as shapes are known.
    """
    nodes = {name: node for graph in reversed(tuple(graphs.values())) for name, node in site_nodes(graph, operations).items()}
    read_as = {}
    for site in sites:
        given = regularizer.engine_options.axis
        made_by = convolution(nodes[site.name], operations) if given is None and site.name in nodes else None
        # the channels are counted from the end, so that a value without the batch axis is read rightly
        axis = given if given is not None else -1 if made_by is None else -1 - made_by[1]
        read_as[site] = Units(axis, made_by is not None, regularizer.min_samples, regularizer.min_units)
        if site.shape is not None:
            read_as[site].require(site.shape, f"{type(regularizer).__name__} at {site.name}")
    return read_as


def units_note(read_as: Sequence[tuple[str, Units]]) -> str:
    """Describe, for plan and report, which axis of which site has the units: the sites by name, each with how its value is read."""
    by_axis: dict[str, list[str]] = {}
    for name, units in read_as:
        by_axis.setdefault(units.text, []).append(name)
    if len(by_axis) == 1:
        return f"the units are {next(iter(by_axis))}, all other axes are samples"
    parts = (f"{text} of {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}" for text, names in by_axis.items())
    return f"the units are {', and '.join(parts)}; all other axes are samples"
