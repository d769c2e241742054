"""The strengths in one call of a model whose forward is several graphs: numbers, read from the session's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from graphreg.ir.site import Site
from graphreg.runtime.runtime_module import strengths_on
from graphreg.session.strengths import Row, number


class CallStrengths:
    """The strengths in one call of the model, as numbers. A strength that is set later does not change them: backward reads them, too.

    A graph gets the strengths of a regularizer as one tensor, which has an element for each of its sites in this graph.

    Attributes:
        table: The session's table of strengths.
        rows: The table as it was at the beginning of the call.
        call: The number of the call, which schedules follow.
    """

    def __init__(self, table: Mapping[str, Row], call: int) -> None:
        self.table, self.call = table, call
        self.rows = {name: row.as_it_is() for name, row in table.items()}
        self._made: dict[tuple[str, tuple[str, ...], torch.device], Tensor] = {}

    def learn(self, acting: Iterable[tuple[str, Site]]) -> None:
        """Take sites of a graph that is captured in this call, each with the name of a regularizer that acts there."""
        for name, site in acting:
            for row in (self.table[name], self.rows[name]):
                row.learn({site.name: site}, {site.name: row.own})
        # A selector of set_strength that waited may give the new sites a strength of their own.
        self._made.clear()

    def at(self, name: str, site: str) -> float:
        """Return the strength of a regularizer at a site."""
        row = self.rows[name]
        return number(row.at(site, row.own), self.call)

    def differ(self, name: str) -> bool:
        """Whether a site of the regularizer has a strength of its own."""
        return bool(self.rows[name].chosen)

    def tensor(self, name: str, sites: tuple[str, ...], device: torch.device) -> Tensor:
        """Return the strengths at some sites of a regularizer, [sites]; without sites, the strength at all, [1].

        It is float64, or float32 where the device has no float64.
        """
        if (name, sites, device) not in self._made:
            values = [self.at(name, site) for site in sites] or [number(self.rows[name].others, self.call)]
            self._made[name, sites, device] = strengths_on(device, values)
        return self._made[name, sites, device]
