"""Python's bytecode: what the line that is running does with a value, and what a function may ask of one."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch

_NAMES = {"LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_CONST", "LOAD_METHOD"}
_SINGLETONS = (torch.dtype, torch.layout)


@functools.lru_cache(8192)
def _operations(code: types.CodeType) -> Mapping[int, dis.Instruction]:
    """Return the instructions of code that read an attribute or unpack a value, and class patterns, by their offset."""
    kinds = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "UNPACK_SEQUENCE", "MATCH_CLASS"}
    return {each.offset: each for each in dis.get_instructions(code) if each.opname in kinds}


@functools.lru_cache(8192)
def _handlers(code: types.CodeType) -> tuple[tuple[int, int, bool], ...]:
    """Return the places that an ``except``, ``finally`` or ``with`` covers: where each begins and ends, and whether it is a ``with``."""
    names = {each.offset: each.opname for each in dis.get_instructions(code)}
    after = dict(zip(names, [*names][1:], strict=False))

    entries: Any = getattr(dis.Bytecode(code), "exception_entries", ())
    # Python adds further handlers, for generators and comprehensions, that begin with another operation.
    return tuple(
        (each.start, each.end, names.get(after.get(each.target, -1)) == "WITH_EXCEPT_START")
        for each in entries if names.get(each.target) == "PUSH_EXC_INFO"
    )  # fmt: skip


def reads_attribute(frame: types.FrameType) -> bool:
    """Return whether a frame reads an attribute as ``x.shape`` does, and not by a function such as ``hasattr`` or ``getattr``."""
    step = _operations(frame.f_code).get(frame.f_lasti)
    return step is not None and step.opname.startswith("LOAD_")


def unpacked(frame: types.FrameType) -> int | None:
    """Return into how many variables a frame unpacks a value; None if it does something else."""
    step = _operations(frame.f_code).get(frame.f_lasti)
    return int(step.argval) if step is not None and step.opname == "UNPACK_SEQUENCE" else None


def matches_class(frame: types.FrameType) -> bool:
    """Return whether a frame compares a value with a class pattern (``case Tensor():``)."""
    step = _operations(frame.f_code).get(frame.f_lasti)
    return step is not None and step.opname == "MATCH_CLASS"


def is_guarded(frame: types.FrameType, by_with: bool = False) -> bool:
    """Return whether a frame runs code in a ``try`` that may catch what this code raises. ``by_with``: whether a ``with`` counts, too."""
    return any(start <= frame.f_lasti < end and (by_with or not is_with) for start, end, is_with in _handlers(frame.f_code))


_TELLS = {"_assert", "print", "warn", "debug", "info", "warning", "error", "critical", "log", "exception"}
_BOUNDS = ("POP_TOP", "STORE_", "POP_JUMP", "JUMP", "RETURN", "RESUME", "RAISE", "YIELD")  # the operations between two statements


@functools.lru_cache(8192)
def _statements(code: types.CodeType) -> Mapping[int, bool]:
    """Return for the offset of each instruction whether its statement only calls a function that tells something: ``print(...)``."""
    tells, offsets, names = dict[int, bool](), list[int](), list[Any]()
    for step in dis.get_instructions(code):
        offsets.append(step.offset)
        if step.opname.startswith("LOAD_"):
            names.append(step.argval)
        elif step.opname.startswith(_BOUNDS):
            told = step.opname == "POP_TOP" and not _TELLS.isdisjoint(name for name in names if isinstance(name, str))
            tells |= dict.fromkeys(offsets, told)
            offsets, names = [], []
    return tells


def only_tells(frame: types.FrameType) -> bool:
    """Return whether a frame runs a statement that only tells something: a call of ``torch._assert``, ``print``, a logger or the like.

    The text of a value in such a statement decides nothing.
    """
    return _statements(frame.f_code).get(frame.f_lasti, False)


@functools.lru_cache(8192)
def asks(code: types.CodeType) -> frozenset[str]:
    """Return what code and its inner functions ask in a way that calls no method of a value.

    They are ``"sequence"`` and ``"mapping"`` for patterns of ``match``, and ``"identity"`` if ``is`` may compare a dtype, layout or flag.
    """
    found, loaded = set[str](), list[Any]()
    for step in dis.get_instructions(code):
        if step.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
            found.add(step.opname.partition("_")[2].lower())
        elif step.opname == "IS_OP" and loaded[-1:] != [None] and any(map(_names_singleton, loaded)):
            found.add("identity")
        if step.opname in _NAMES:
            loaded.append(step.argval)
        elif step.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
            loaded.clear()
    inner = (asks(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(found).union(*inner)


def _names_singleton(name: Any) -> bool:
    """Return whether a name that code loads is that of a dtype or layout of torch, or of a variable or attribute with one, or a flag."""
    if not isinstance(name, str):
        return False
    return isinstance(getattr(torch, name, None), _SINGLETONS) or name.endswith(("dtype", "layout", "is_cuda"))
