"""Python's bytecode: what the line that is running does with a value, and what a function may ask of one."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
_NAMES = {"LOAD_ATTR", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_CONST", "LOAD_METHOD"}
_SINGLETONS = (torch.dtype, torch.layout)


def _once_a_code(read: Callable[[types.CodeType], T]) -> Callable[[types.CodeType], T]:
    """Have a function read the same code once. A ``functools.cache`` would compute the hash of the code, from all of it, at each call."""
    known = dict[int, tuple[types.CodeType, T]]()  # it holds the code, so that no other code gets its id

    def once(code: types.CodeType) -> T:
        if (found := known.get(id(code))) is None:
            found = known[id(code)] = code, read(code)
        return found[1]

    return once


@_once_a_code
def _operations(code: types.CodeType) -> Mapping[int, dis.Instruction]:
    """Return the instructions of code that read an attribute, and class patterns, by their offset."""
    kinds = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "MATCH_CLASS"}
    return {each.offset: each for each in dis.get_instructions(code) if each.opname in kinds}


class _Handler(NamedTuple):
    """What runs when an error is raised in a part of some code.

    Attributes:
        start: Where the part begins.
        end: Where it ends.
        target: Where the handler begins.
        is_with: Whether it is the end of a ``with``.
        is_written: Whether it is an ``except``, a ``finally`` or the end of a ``with``, and not one that Python adds.
        named: The dotted names of the classes that ``except`` names; ``BaseException`` for a bare one.
    """

    start: int
    end: int
    target: int
    is_with: bool
    is_written: bool
    named: tuple[tuple[str, ...], ...]


@_once_a_code
def _handlers(code: types.CodeType) -> tuple[_Handler, ...]:
    """Return the handlers of some code, each with the part that it is for."""
    steps = _steps(code)
    position = {step.offset: i for i, step in enumerate(steps)}
    found = []
    for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
        at = position[entry.target]
        is_written = steps[at].opname == "PUSH_EXC_INFO"
        is_with = is_written and steps[at + 1].opname == "WITH_EXCEPT_START"
        named: tuple[tuple[str, ...], ...] = ()
        if is_with:
            named = _suppressed(steps, next(i for i, step in enumerate(steps) if step.offset >= entry.start))
        elif is_written:
            named = _clauses(steps, at + 1, position)
        found.append(_Handler(entry.start, entry.end, entry.target, is_with, is_written, named))
    return tuple(found)


_ALL = ("BaseException",)


def _clauses(steps: Sequence[dis.Instruction], at: int, position: Mapping[int, int]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the classes in the clauses of an ``except``; none for a ``finally``, which lets the error go on.

    A clause that does not match jumps to the next one. A bare ``except`` throws the error away at once.
    """
    named = list[tuple[str, ...]]()
    while steps[at].opname not in ("RERAISE", "POP_TOP"):
        matched = next((i for i in range(at, len(steps)) if steps[i].opname in ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "RERAISE")), None)
        if matched is None or steps[matched].opname == "RERAISE":  # a ``finally``, with code of its own
            return tuple(named)
        if steps[matched].opname == "CHECK_EG_MATCH":
            return (_ALL,)
        named += _loaded(steps[at:matched])
        jump = next((step for step in steps[matched:] if step.opname.startswith("POP_JUMP")), None)
        if jump is None or jump.argval not in position:
            return (*named, _ALL)
        at = position[jump.argval]
    return (*named, _ALL) if steps[at].opname == "POP_TOP" else tuple(named)


def _loaded(steps: Sequence[dis.Instruction]) -> list[tuple[str, ...]]:
    """Return the dotted names of global variables that code loads; BaseException for other variables, and if it does anything else."""
    names = list[tuple[str, ...]]()
    for step in steps:
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and names:
            names[-1] = (*names[-1], str(step.argval))
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.append((str(step.argval),))
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names.append(_ALL)
        elif step.opname not in ("BUILD_TUPLE", "PUSH_NULL", "NOP"):
            return [_ALL]
    return names or [_ALL]


def _suppressed(steps: Sequence[dis.Instruction], start: int) -> tuple[tuple[str, ...], ...]:
    """Return the classes that ``contextlib.suppress`` names in a ``with`` whose block begins at a step; none for another ``with``."""
    entered = next((i for i in reversed(range(start)) if steps[i].opname == "BEFORE_WITH"), 0)
    first = entered
    while first and steps[first - 1].opname.startswith(("LOAD_", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "BUILD_TUPLE")):
        first -= 1
    names = _loaded([step for step in steps[first:entered] if not step.opname.startswith(("CALL", "PRECALL", "KW_NAMES"))])
    of = next((i for i, name in enumerate(names) if name[-1] == "suppress"), None)
    return () if of is None else tuple(names[of + 1 :]) or (_ALL,)


def _handlers_of(frame: types.FrameType) -> Iterator[_Handler]:
    """Yield the handlers of an error that is raised in a frame now, the innermost first: each may let it go on to the next."""
    at, known = frame.f_lasti, _handlers(frame.f_code)
    for _ in known:
        # each part has one handler; that of a handler's own code is the next one outwards
        if (handler := next((each for each in known if each.start <= at < each.end), None)) is None:
            return
        yield handler
        at = handler.target


def reads_attribute(frame: types.FrameType) -> bool:
    """Return whether a frame reads an attribute as ``x.shape`` does, and not by a function such as ``hasattr`` or ``getattr``."""
    step = _operations(frame.f_code).get(frame.f_lasti)
    return step is not None and step.opname.startswith("LOAD_")


class Unpacked(NamedTuple):
    """The items of a value that code unpacks, as in ``a, *_, z = x``.

    Attributes:
        first: How many it takes from the start.
        last: How many it takes from the end.
        rest: Whether a variable that nothing reads gets those in between; else there are none.
    """

    first: int
    last: int = 0
    rest: bool = False


def unpacked(frame: types.FrameType) -> Unpacked | None:
    """Return which items of a value a frame unpacks into variables; None if it does something else."""
    return _unpackings(frame.f_code).get(frame.f_lasti)


@_once_a_code
def _unpackings(code: types.CodeType) -> Mapping[int, Unpacked]:
    """Return what code unpacks, by the offset of the instruction that asks for the items: also ``*_, h, w, t = *x.shape, x.dtype``."""
    steps, found = _steps(code), dict[int, Unpacked]()
    for i, step in enumerate(steps):
        if step.opname in _UNPACKING and (taken := _taken(code, steps, i)) is not None:
            found[step.offset] = taken
        if step.opname == "LIST_EXTEND":
            end = next((j for j in range(i + 1, len(steps)) if not _is_of_display(steps[j])), len(steps) - 1)
            start = next((j for j in range(i - 1, -1, -1) if not steps[j].opname.startswith("LOAD_")), 0)
            taken = _taken(code, steps, end) if steps[end].opname in _UNPACKING and steps[start].opname == "BUILD_LIST" else None
            if taken is not None:
                before, behind = int(steps[start].argval), sum(each.opname == "LIST_APPEND" for each in steps[i:end])
                first, last = (taken.first - before, taken.last - behind) if taken.rest else (taken.first - before - behind, 0)
                if min(first, last) >= 0:
                    found[step.offset] = Unpacked(first, last, taken.rest)
    return found


_UNPACKING = ("UNPACK_SEQUENCE", "UNPACK_EX")


def _taken(code: types.CodeType, steps: Sequence[dis.Instruction], i: int) -> Unpacked | None:
    """Return what an instruction unpacks; None if code reads the variable with the star, or may read it by its name."""
    count = int(steps[i].argval)
    if steps[i].opname == "UNPACK_SEQUENCE":
        return Unpacked(count)
    first, last = count & 0xFF, count >> 8
    names = list[str]()
    for step in steps[i + 1 :]:
        if not step.opname.startswith("STORE_FAST") or len(names) > first:
            break
        names += _variables(step)
    if len(names) <= first:
        return None
    is_read = any("LOAD_" in step.opname and names[first] in _variables(step) for step in steps)
    return None if is_read or {"eval", "exec", "locals", "vars"} & {*code.co_names} else Unpacked(first, last, True)


def _variables(step: dis.Instruction) -> tuple[Any, ...]:
    """Return what an instruction names, such as its variable, or from Python 3.12 on its two variables."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _is_of_display(step: dis.Instruction) -> bool:
    """Return whether an instruction adds another item to a list or tuple that is being written, such as ``*x.shape, x.dtype``."""
    is_tuple = step.opname == "LIST_TO_TUPLE" or (step.opname == "CALL_INTRINSIC_1" and step.arg == 6)
    return is_tuple or step.opname == "LIST_APPEND" or step.opname.startswith(("LOAD_", "EXTENDED_ARG"))


def matches_class(frame: types.FrameType) -> bool:
    """Return whether a frame compares a value with a class pattern (``case Tensor():``)."""
    step = _operations(frame.f_code).get(frame.f_lasti)
    return step is not None and step.opname == "MATCH_CLASS"


def is_discarded(frame: types.FrameType) -> bool:
    """Return whether a frame throws the result of the call away that it makes now."""
    steps = _steps(frame.f_code)
    # up to Python 3.12, the place behind a call's caches
    following = next((step for step in steps if step.offset > frame.f_lasti), None)
    return following is not None and following.opname == "POP_TOP"


def spares_an_error(frame: types.FrameType) -> bool | None:
    """Return which truth value of the value that a frame tests keeps it from raising an error at once; None if neither or both do.

    True for ``assert ok``, False for ``if wrong: raise ValueError(...)``.
    """
    steps = _steps(frame.f_code)
    at = next((i for i, step in enumerate(steps) if step.offset == frame.f_lasti), len(steps))
    while at < len(steps) and steps[at].opname in ("COMPARE_OP", "CONTAINS_OP", "TO_BOOL"):  # these test their own result, from 3.13 on
        at += 1
    step = steps[at] if at < len(steps) else None
    if step is None or not (step.opname.startswith("POP_JUMP") and step.opname.endswith(("IF_TRUE", "IF_FALSE"))):
        return None

    goes_on, jumps = _only_raises(frame.f_code, at + 1), _only_raises(frame.f_code, _place(steps, step.argval))
    return None if goes_on == jumps else step.opname.endswith("IF_TRUE") == goes_on


@functools.lru_cache(8192)
def _only_raises(code: types.CodeType, start: int) -> bool:
    """Return whether every way on from a step of some code ends in a ``raise``."""
    steps, waiting, seen = _steps(code), [start], set[int]()
    while waiting:
        at = waiting.pop()
        if at in seen:
            continue
        seen.add(at)
        if steps[at].opname.startswith(("RETURN", "YIELD", "SEND")):
            return False
        step = steps[at]
        if step.opname == "RAISE_VARARGS":
            continue
        if step.opcode in (*dis.hasjrel, *dis.hasjabs):
            waiting.append(_place(steps, step.argval))
        if step.opname not in ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"):
            waiting.append(at + 1)
    return True


def _place(steps: Sequence[dis.Instruction], offset: int) -> int:
    return next(i for i, step in enumerate(steps) if step.offset >= offset)


@_once_a_code
def _steps(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOT_TAKEN"))


def is_guarded(frame: types.FrameType, by_with: bool = False) -> bool:
    """Return whether a frame runs code in a ``try`` that may catch what this code raises. ``by_with``: whether a ``with`` counts, too."""
    return any(handler.is_written and (by_with or not handler.is_with) for handler in _handlers_of(frame))


def caught_by(frame: types.FrameType) -> set[str]:
    """Return the names of the classes of errors that a frame catches where it is now; BaseException for what cannot be looked up."""
    kinds = set[str]()
    for first, *rest in (names for handler in _handlers_of(frame) for names in handler.named):
        # without the frame's locals: to read them changes them, up to Python 3.12
        kind: Any = next((space[first] for space in (frame.f_globals, vars(builtins)) if first in space), BaseException)
        for name in rest:
            kind = inspect.getattr_static(kind, name, BaseException)
        several = kind if isinstance(kind, tuple) else (kind,)
        kinds.update(each.__name__ if isinstance(each, type) else "BaseException" for each in several)
    return kinds


_TELLS = {"_assert", "print", "warn", "debug", "info", "warning", "error", "critical", "log", "exception"}
_BOUNDS = ("POP_TOP", "STORE_", "POP_JUMP", "JUMP", "RETURN", "RESUME", "RAISE", "YIELD")  # the operations between two statements


@_once_a_code
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
            # ``float`` of Python is no dtype
            is_builtin = step.opname == "LOAD_GLOBAL" and hasattr(builtins, str(step.argval))
            loaded.append("" if is_builtin else step.argval)
        elif step.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
            loaded.clear()
    inner = (asks(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(found).union(*inner)


def _names_singleton(name: Any) -> bool:
    """Return whether a name that code loads is that of a dtype or layout of torch, or of a variable or attribute with one, or a flag."""
    if not isinstance(name, str):
        return False
    return isinstance(getattr(torch, name, None), _SINGLETONS) or name.endswith(("dtype", "layout", "is_cuda"))
