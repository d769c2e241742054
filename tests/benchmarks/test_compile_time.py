"""What graphreg adds to the graphs that Inductor compiles, for each site."""

from __future__ import annotations

import compile_time


def test_operations_a_site() -> None:
    """By hand, the forward has 12 operations a site, the backward 24. Counted, so that what a change adds to each site is seen."""
    grown = {form: [b - a for a, b in zip(*(compile_time.nodes(sites, form) for sites in (2, 4)), strict=True)] for form in compile_time.FORMS}
    forward, backward = (ours - hand for ours, hand in zip(grown["graphreg"], grown["by hand"], strict=True))
    assert forward <= 2 * compile_time.NODES
    assert backward <= 2 * 8  # six of them recompute the splice from the activation's output, instead of storing what it returned
