"""The records that ``doctor`` returns, ``Diagnosis`` and ``Finding``, and the helpers that write their text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from graphreg.compiler.settings import Setting
from graphreg.errors import RenamedAttributes, listed
from graphreg.ir.random_ops import NativeDropout

ISSUE = "https://github.com/pytorch/pytorch/issues/"
NONE = "no upstream issue found"
ISSUES = {"activation_memory_budget": f"{ISSUE}190758", "fallback_random": f"{ISSUE}118735", "order": f"{ISSUE}192635"}


@dataclass(frozen=True)
class Finding:
    """One thing that ``doctor`` found.

    Attributes:
        kind: ``"wrong"``: backward has other masks than the forward, or graphreg's masks differ between eager and compiled code.
            ``"refused"``: an operation does not compile or run. ``"differs"``: compiled code draws other masks from torch's generator
            than eager, which is not an error. ``"broken"``, without a module: a part of graphreg does not work with the installed torch.
        cause: The settings to blame, with their values, or the fault of the step; without a module, the part that is broken.
        observed: The measurements, in numbers; without a module, the error.
        sites: The names of the sites that the finding concerns.
        cure: What to do.
        upstream: The address of torch's issue, or a text that says that no issue was found; ``""`` if torch is not at fault.
    """

    kind: Literal["wrong", "refused", "differs", "broken"]
    cause: str
    observed: str
    sites: tuple[str, ...]
    cure: str
    upstream: str = NONE

    def __str__(self) -> str:
        head, sites = f"{self.kind}: {self.cause}", listed(self.sites)
        return told(head, observed=self.observed, concerns=sites, cure=self.cure, upstream=self.upstream)


@dataclass(frozen=True)
class Diagnosis(RenamedAttributes):
    """The result of ``doctor``. It prints as text, and ``bool(diagnosis)`` is ``diagnosis.ok``.

    Attributes:
        subject: The module, torch's version, the backend and the device, as text; without a module, the versions of torch and Python.
        findings: The findings, by kind: wrong, then refused, then differs; without a module, broken.
        right: Sentences about everything that was tested and is right.
    """

    renamed: ClassVar[Mapping[str, str]] = {"about": "subject"}
    subject: str
    findings: tuple[Finding, ...]
    right: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, refused or broken; findings of the kind ``"differs"`` do not count."""
        return all(finding.kind == "differs" for finding in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data."""
        findings = [asdict(finding) for finding in self.findings]
        return {"subject": self.subject, "ok": self.ok, "findings": findings, "right": list(self.right)}

    def __repr__(self) -> str:
        return "\n".join([self.subject, *map(str, self.findings), *(f"right: {text}" for text in self.right)])


def told(head: str, **rows: str) -> str:
    """Return the text of a record: the line ``head``, and below it the name and the text of each row that is not empty."""
    return "\n".join([head, *(f"  {name:<9} {text}" for name, text in rows.items() if text)])


def site_names(operations: Iterable[NativeDropout]) -> tuple[str, ...]:
    """Return the names of the sites of random operations."""
    return tuple(operation.site.name for operation in operations)


def shares(seen: Iterable[tuple[str, float]]) -> str:
    """Return a text with the share of elements whose masks differ, for each kind of random operation."""
    return ", ".join(f"{share:.0%} of elements ({kind})" for kind, share in seen)


def cause(blamed: Sequence[Setting]) -> str:
    """Return a text that names the settings to blame, or says that no setting is to blame."""
    return " and ".join(map(str, blamed)) or "none of the settings known to graphreg: at torch's defaults it is the same"


def set_back(blamed: Sequence[Setting]) -> str:
    """Return a cure: the lines of Python that set the settings to their defaults, joined by ``and``."""
    return " and ".join(each.at_default for each in blamed)


def issue_addresses(blamed: Sequence[Setting]) -> str:
    """Return the addresses of torch's issues about these settings, or ``NONE``."""
    return ", ".join(ISSUES[each.name] for each in blamed if each.name in ISSUES) or NONE


def seed_cures(operations: Iterable[NativeDropout], other: str = "") -> str:
    """Return up to two cures as a text, joined by ``or``.

    The cures are ``own_dropout='seeded'``, if one of the operations can be moved to graphreg's streams, and ``other``, if it is not empty.
    """
    seeded = "regularize(..., own_dropout='seeded')" if any(not operation.why_not for operation in operations) else ""
    return ", or ".join(filter(None, (seeded, other)))
