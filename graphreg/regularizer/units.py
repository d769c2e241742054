"""Decides which axis of each selected value has the units, for formulas that take ``units``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from graphreg.errors import RegularizerError, shown
from graphreg.ir.site import Site
from graphreg.ir.unit_axes import UNKNOWN, UnitFinder
from graphreg.ir.units import Units


def check_axis(regularizer: Any) -> None:
    """Raise RegularizerError for an option ``axis`` that is neither a whole number nor None."""
    axis = regularizer.engine_options.axis
    if axis is not None and type(axis) is not int:
        raise RegularizerError(
            f"{type(regularizer).__name__}: axis={shown(axis)} is not allowed; give the axis of the units, a whole number, or None, which "
            "means axis 1 for the value of a convolution, and the last axis for any other value."
        )


def units_at(sites: Iterable[Site], regularizer: Any, finder: UnitFinder) -> dict[Site, Units]:
    """Decide how to read the value of each site as samples of units.

    The units lie along the axis that the option ``axis`` gives. If it is None, the units of a value
    in which an axis is known to have the channels of a convolution are these channels, and those
    of the value of a linear layer are where operations have moved its last axis. The units of any
    other value lie along the last axis.

    Args:
        sites: The selected sites.
        regularizer: The regularizer. Its ``min_samples`` and ``min_units`` say how many samples and
            units its formula needs.
        finder: Finds where the units of the layer that made a value are.

    Returns:
        A dict. Each key is a site; the value says how to read the site's value.

    Raises:
        RegularizerError: The shape of a value is known, and has fewer than 2 dims, no such axis, or
            too few units. Or it is not known on which axis its units are.
    """
    read_as, given = {}, regularizer.engine_options.axis
    for site in sites:
        who = f"{type(regularizer).__name__} at {site.name}"
        channels = given is None and site.spatial > 0
        # the axis of the channels is counted from the end, so that it is right for a value without
        # the batch axis, too
        axis = given if given is not None else -1 - site.spatial
        made = finder.at(site.name) if axis == -1 and given is None else None
        if made == UNKNOWN and (site.shape is None or site.role == "output"):
            cure = "axis=" if site.shape is not None else "example_inputs, or axis="
            raise RegularizerError(
                f"{who}: it is not known which axis of this value has the units of the layer that made it. Give {cure}."
            )
        axis = made.axes[-1] if made is not None and made.axes else axis
        read_as[site] = Units(axis, channels, regularizer.min_samples, regularizer.min_units)
        if site.shape is not None:
            read_as[site].require(site.shape, who)
    return read_as


def units_note(read_as: Sequence[tuple[str, Units]]) -> str:
    """Describe, for plan and report, which axis has the units. ``read_as``: the names of sites, each with how its value is read."""
    by_axis: dict[str, list[str]] = {}
    for name, units in read_as:
        by_axis.setdefault(units.text, []).append(name)
    if len(by_axis) == 1:
        return f"the units are {next(iter(by_axis))}, all other axes are samples"
    parts = (f"{text} of {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}" for text, names in by_axis.items())
    return f"the units are {', and '.join(parts)}; all other axes are samples"
