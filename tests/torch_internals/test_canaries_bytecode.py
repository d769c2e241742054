"""Canaries of Python's bytecode, which differs between versions: what the line that is running does with a value."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from canary import answers_that_spare_errors, answers_that_spare_none, discards
from graphreg.torch_internals import bytecode, torch_modes
from graphreg.torch_internals.interpreter import CalledInstead

errors = OSError  # a local variable of this name is caught below


class _Watched:
    """Notes what ``look`` says of each frame that asks something of it."""

    __match_args__ = ("a",)

    def __init__(self, look: Callable[[FrameType], Any]) -> None:
        self.__dict__.update(look=look, found=[])

    def _note(self) -> None:
        self.found.append(self.look(sys._getframe(2)))

    def __getattr__(self, name: str) -> Any:
        self._note()
        return 1

    def __iter__(self) -> Iterator[int]:
        self._note()
        return iter((1, 2))

    def __str__(self) -> str:
        self._note()
        return ""

    def __format__(self, specification: str) -> str:
        self._note()
        return ""


class _Disguised:
    found: list[bool] = []

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        _Disguised.found.append(bytecode.matches_class(sys._getframe(1)))
        return int


def unpacking() -> list[Any]:
    """Without an assertion, whose code, as pytest writes it, asks for ``locals()``."""
    value = _Watched(bytecode.unpacked)
    _first, _second = value
    list(value)
    *_, _last = value
    *_read, _last = value
    *_others, _last, _one = *value, 1
    _first, _last, _one = *value, 1
    _called = max(*value, 1), _read
    return value.found


def test_unpacking() -> None:
    """Which items code takes of a value that it unpacks. It concerns shapes whose length a trace does not know."""
    found = unpacking()
    assert found[0] == bytecode.Unpacked(2)
    assert found == [(2, 0, False), None, (0, 1, True), None, (0, 1, True), (2, 0, False), None]


def test_steps() -> None:
    """How Python's code reads, unpacks and matches values. It concerns questions that a forward asks of a stand-in."""
    value = _Watched(bytecode.reads_attribute)
    value.shape  # noqa: B018
    getattr(value, "shape")  # noqa: B009
    assert value.found == [True, False]

    value = _Watched(bytecode.is_guarded)
    value.shape  # noqa: B018
    try:
        value.shape  # noqa: B018
    except AttributeError:
        raise
    assert value.found == [False, True]

    value = _Watched(bytecode.caught_by)
    errors = (ValueError, TypeError)
    try:
        value.shape  # noqa: B018
        with contextlib.suppress(OSError):
            value.shape  # noqa: B018
    except (KeyError, torch.linalg.LinAlgError):
        raise
    except errors:
        raise
    finally:
        value.shape  # noqa: B018
    try:
        value.shape  # noqa: B018
    except:
        raise
    both = {"KeyError", "_LinAlgError", "BaseException"}  # ``errors`` is a local variable
    assert value.found == [both, both | {"OSError"}, set(), {"BaseException"}]

    _Disguised.found.clear()
    match _Disguised():
        case int():
            pass
    assert isinstance(_Disguised(), int) and _Disguised.found == [True, False]


def test_texts() -> None:
    """How Python's code makes texts. It concerns texts of sizes in a forward."""
    value = _Watched(bytecode.only_tells)
    torch._assert(True, f"{value} and {value}")  # type: ignore[no-untyped-call]
    torch._assert(True, "%s" % (value,))  # type: ignore[no-untyped-call]  # noqa: UP031
    print(str(value), end="")
    text = f"{value}"
    assert str(value) == text == ""
    assert value.found == [True, True, True, True, False, False]


def test_questions() -> None:
    """How Python's code compares by identity and by patterns. It concerns stand-ins of dtypes, dicts and sequences."""

    def by_identity(x: Any) -> bool:
        return x.dtype is torch.float64

    def by_pattern(x: Any) -> bool:
        match x:
            case [_, _] | {"a": _}:
                return True
        return x is None or type(x) is float  # a class of Python, and torch.float is a dtype

    assert bytecode.asks(by_identity.__code__) == {"identity"} and bytecode.asks(by_pattern.__code__) == {"sequence", "mapping"}
    assert "_isinstance" in torch_modes.jit_namespace()
    assert torch.jit.isinstance(1, int)  # type: ignore[no-untyped-call]


def test_functions_that_call_another() -> None:
    """Whoever holds the function calls the other one: with defaults, keywords and a closure."""

    def made(kept: int) -> Any:
        def function(a: int, b: int = 2, *rest: int, c: int = 3) -> tuple[int, ...]:
            return a, b, *rest, c, kept

        return function

    function = made(7)
    held, calls = functools.partial(function, 1), list[Any]()
    calling = CalledInstead(function, lambda original: lambda *args, **kwargs: calls.append((args, kwargs)))
    calling.patch()
    try:
        function(1)
        held(4, c=5)
        assert calls == [((1,), {}), ((1, 4), {"c": 5})]
        assert calling.original(1) == (1, 2, 3, 7)
    finally:
        calling.revert()
    assert held(4, 8, c=5) == (1, 4, 8, 5, 7)


def test_errors_that_an_answer_spares() -> None:
    assert answers_that_spare_errors(bytecode.spares_an_error) == [True, True, True, False, False, True, False, False]
    assert answers_that_spare_none(bytecode.spares_an_error) == [None] * 4
    assert discards(bytecode.is_discarded) == [True, False]


def test_the_variables_of_a_frame_in_which_something_is_called_instead() -> None:
    """A tool that prints the variables of a traceback reads them. Up to Python 3.12 that ended the process."""
    outer, other = object(), [1]
    seen = list[dict[str, Any]]()

    def function(x: int) -> Any:
        return outer, other, x

    def instead(*args: Any) -> Any:
        seen.append(dict(sys._getframe(1).f_locals))
        return args

    CalledInstead(function, lambda original: instead).patch()
    assert function(3) == (3,) and seen[0]["outer"] is outer and seen[0]["other"] is other
