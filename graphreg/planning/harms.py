"""Finds dropout and noise where they do known harm: before a batch norm, and again and again on one residual trunk.

``plan`` and ``report`` tell of splices, ``graphreg.audit`` of the model's own dropout, both by the
rules here. The marks of sites (``#normed``, ``#trunk``) say where a value goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphreg.errors import listed
from graphreg.ir.site import Site
from graphreg.planning.repeats import Strengths, strength_at
from graphreg.regularizer.base import Regularizer, Splice

_SHOWN = 3  # how many sites a line names


@dataclass(frozen=True)
class Harm:
    """Known harm that dropout and noise do at sites with a mark.

    Attributes:
        kind: Where they do it, in words.
        mark: The mark. Its value at a site is the name of the batch norm or of the trunk.
        least: How many sites of one batch norm or trunk it takes.
        matters: What follows.
        source: The publication that shows it.
        cited: The same, in short.
    """

    kind: Literal["before batch norm", "on the trunk"]
    mark: Literal["normed", "trunk"]
    least: int
    matters: str
    source: str
    cited: str

    def among(self, sites: Sequence[Site]) -> list[Site]:
        """Return those of the sites where the harm is done, if dropout or noise acts at all of them."""
        counts = Counter(getattr(site, self.mark) for site in sites)
        return [site for site in sites if (at := getattr(site, self.mark)) and counts[at] >= self.least]

    @property
    def why(self) -> str:
        """What follows, with the source in short, and the selector that leaves the sites out."""
        return f"{self.matters} ({self.cited}). '!#{self.mark}' in the selector leaves these sites out"


HARMS = (
    Harm(
        "before batch norm", "normed", 1,
        "the input of the batch norm has a larger variance in train mode only, so the running variance does not fit eval mode",
        "Li et al., Understanding the disharmony between dropout and batch normalization by variance shift, CVPR 2019",
        "Li et al., CVPR 2019",
    ),
    Harm(
        "on the trunk", "trunk", 2, "every later block gets what one site drops or adds, so the drops compound with depth",
        "He et al., Identity mappings in deep residual networks, ECCV 2016, section 3.1", "He et al., ECCV 2016",
    ),
)  # fmt: skip


def harm_lines(splices: Sequence[tuple[Site, str, Regularizer]], strengths: Strengths) -> list[str]:
    """Return a line for each kind of harm that splices do: at how many sites, what follows, and how to leave these sites out.

    Args:
        splices: The site, the name and the regularizer of each splice.
        strengths: The strengths. What is off with strength 0, and has no schedule, does no harm.
    """
    acting = [
        (site, name) for site, name, regularizer in splices
        if isinstance(regularizer, Splice) and regularizer.raises_variance and site.kind == "value"
        and (strength_at((site.name, name), strengths) or regularizer.is_scheduled or not regularizer.off_at_zero)
    ]  # fmt: skip
    sites, counts = list({site.name: site for site, _ in acting}.values()), Counter(name for _, name in acting)
    lines = list[str]()
    for harm in HARMS:
        found = {site.name: site for site in harm.among(sites)}
        there = Counter(name for site, name in acting if site.name in found)
        if there:
            who = listed([f"{name} at {count} of {counts[name]} sites" for name, count in there.items()])
            lines.append(f"{harm.kind}: {who} ({listed(list(found), _SHOWN)}): {harm.why}")
    return lines
