"""What graphreg adds to the graphs that Inductor compiles, for each site."""

from __future__ import annotations

import compile_time


def test_operations_a_site() -> None:
    """By hand, the forward has 12 operations a site, the backward 24. Counted, so that what a change adds to each site is seen."""
    grown = {}
    for form in compile_time.FORMS:
        few, many = compile_time.nodes(1, form), compile_time.nodes(2, form)
        grown[form] = [many[0] - few[0], many[1] - few[1]]
    forward, backward = (ours - hand for ours, hand in zip(grown["graphreg"], grown["by hand"], strict=True))
    assert forward <= compile_time.NODES
    assert backward <= 8  # six of them recompute the splice from the activation's output, instead of storing what it returned
