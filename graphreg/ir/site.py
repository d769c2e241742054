"""Sites: the named places of a traced model, values and parameters, and the listing that ``graphreg.names`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from graphreg.ir.text_table import columns

Role = Literal["input", "hidden", "output", ""]
ROLES = ("input", "hidden", "output")


@dataclass(frozen=True)
class Label:
    """One name of a site. A site has several: ``layer4``, ``layer4.1``, ``layer4.1.relu_1``.

    Attributes:
        name: The name without the port.
        op: The function, or the class of the module, which ``@`` in a selector matches.
        ports: The names of the port, if the value is one of several outputs.
        default: Whether a selector without a port means this one.
        module: The path of the module whose output this is; None for any other value.
    """

    name: str
    op: str
    ports: tuple[str, ...] = ("out",)
    default: bool = True
    module: str | None = None

    @property
    def text(self) -> str:
        return self.name if self.default else f"{self.name}:{self.ports[0]}"


@dataclass(frozen=True)
class Site:
    """A value or parameter of the traced model.

    Attributes:
        labels: Its labels; the first gives its ``name``.
        kind: ``"value"`` or ``"parameter"``.
        role: ``"input"``, ``"hidden"``, ``"output"``, or ``""``.
        selectable: Whether a regularizer can act on it; not on sizes, tuples, integers or reads of parameters.
        norm: Whether it is the output of a normalization.
        module: The path of the module that owns it.
        shape: None where no example inputs were given.
        dtype: None where no example inputs were given.
        sequence: Which output of a recurrent layer it is; ``""`` for any other value.
        used: Whether the model's output depends on it.
        why_not: The reason, where it is not selectable.
    """

    labels: tuple[Label, ...]
    kind: Literal["value", "parameter"] = "value"
    role: Role = ""
    selectable: bool = True
    norm: bool = False
    module: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    sequence: Literal["", "batch first", "time first", "state"] = ""
    used: bool = True
    why_not: str = ""

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def name(self) -> str:
        return self.labels[0].text

    @property
    def op(self) -> str:
        return self.labels[0].op

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(label.text for label in self.labels))

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain data; ``shape`` and ``dtype`` are None without example inputs."""
        return {
            "name": self.name, "also": list(self.names[1:]), "kind": self.kind, "op": self.op, "module": self.module, "role": self.role,
            "shape": None if self.shape is None else list(self.shape), "dtype": dtype_text(self) or None,
            "selectable": self.selectable, "why_not": self.why_not,
        }  # fmt: skip


class Names(Sequence[str]):
    """The listing that ``graphreg.names`` returns: a sequence of all names of all sites, which prints as a table of the sites."""

    def __init__(self, title: str, sites: Sequence[Site], notes: Sequence[str] = ()) -> None:
        self.title, self.sites, self.notes = title, tuple(sites), tuple(notes)
        self._names = [name for site in self.sites for name in site.names]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._names[index]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        rows = [
            (s.name, s.op, shape_text(s), dtype_text(s), s.role or ("" if s.selectable else s.why_not), ", ".join(s.names[1:]))
            for s in self.sites
        ]
        table = columns(("name", "op", "shape", "dtype", "role", "also called"), rows)
        return "\n".join([f"{self.title}: {len(self.sites)} site{'s' * (len(self.sites) != 1)}", table, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return the listing as plain data, fit for JSON: ``title``, ``sites`` (name, op, shape, dtype, role, …), ``notes``."""
        return {"title": self.title, "sites": [site.to_dict() for site in self.sites], "notes": list(self.notes)}


def shape_text(site: Site) -> str:
    return "x".join(map(str, site.shape)) if site.shape is not None else ""


def dtype_text(site: Site) -> str:
    return str(site.dtype).removeprefix("torch.") if site.dtype is not None else ""
