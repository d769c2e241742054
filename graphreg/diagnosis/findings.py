"""What ``doctor`` gives: findings as records, and the words for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from graphreg.compiler import Setting
from graphreg.errors import listed
from graphreg.ir import Own

ISSUE = "https://github.com/pytorch/pytorch/issues/"
NONE = "no upstream issue found"
ISSUES = {"activation_memory_budget": f"{ISSUE}190758", "fallback_random": f"{ISSUE}118735", "order": f"{ISSUE}192635"}


@dataclass(frozen=True)
class Finding:
    """One thing found. ``kind``: ``"wrong"``, backward has other masks than the forward; ``"refused"``, it does not compile;
    ``"differs"``, compiled draws other masks than eager, which is no error of either.

    ``cause``: the settings with their values, or what of the step. ``observed``: what was seen, in numbers. ``sites``: what it
    concerns. ``upstream``: the address of torch's issue, or that none was found.
    """

    kind: Literal["wrong", "refused", "differs"]
    cause: str
    observed: str
    sites: tuple[str, ...]
    cure: str
    upstream: str = NONE

    def __str__(self) -> str:
        rows = (("observed", self.observed), ("concerns", listed(self.sites)), ("cure", self.cure), ("upstream", self.upstream))
        return "\n".join([f"{self.kind}: {self.cause}", *(f"  {name:<9} {text}" for name, text in rows if text)])


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found; it prints as text. ``about``: module, torch, backend, device. ``right``: what was tried and is right."""

    about: str
    findings: tuple[Finding, ...]
    right: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong or refused. That masks differ between eager and compiled is a note."""
        return all(finding.kind == "differs" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return "\n".join([self.about, *map(str, self.findings), *(f"right: {text}" for text in self.right)])




def shares(seen: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{share:.0%} of elements ({kind})" for kind, share in seen)


def cause(blamed: Sequence[Setting]) -> str:
    return " and ".join(map(str, blamed)) or "none of the settings known to graphreg: at torch's defaults it is the same"


def set_back(blamed: Sequence[Setting]) -> str:
    return " and ".join(each.at_default for each in blamed)


def upstream(blamed: Sequence[Setting]) -> str:
    return ", ".join(ISSUES[each.name] for each in blamed if each.name in ISSUES) or NONE


def seed(owns: Iterable[Own], other: str = "") -> str:
    """Graphreg's streams, for what can be moved to them, and what else helps."""
    seeded = "regularize(..., own_dropout='seeded')" if any(not own.why_not for own in owns) else ""
    return ", or ".join(filter(None, (seeded, other)))
