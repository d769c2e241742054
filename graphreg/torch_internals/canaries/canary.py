"""What a canary is: a test of private parts of torch whose error says in a sentence what a new version of torch has changed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Look = Callable[[fx.GraphModule, list[Any]], None]


class CanaryError(AssertionError):
    """A canary failed. The text says what torch has changed, and which part of graphreg this concerns."""


@dataclass(frozen=True)
class Canary:
    """A test of names of ``torch_internals``.

    Attributes:
        what: What torch does, as a clause that can follow "torch changed how".
        needs: The part of graphreg that needs it, as a noun that can follow "this concerns".
        names: The tested names of ``torch_internals``: functions, classes and constants.
        test: The test.
    """

    what: str
    needs: str
    names: tuple[str, ...]
    test: Callable[[], None]

    def run(self) -> None:
        """Run the test, with torch's compiler reset before and after. Raises CanaryError."""
        torch.compiler.reset()
        try:
            self.test()
        except Exception as error:
            raise CanaryError(f"{self.sentence} ({_told(error)})") from error
        finally:
            torch.compiler.reset()

    @property
    def sentence(self) -> str:
        """The text of the error if the test fails."""
        return (
            f"torch {torch.__version__} changed how {self.what}; this concerns {self.needs}: "
            f"{', '.join(self.names)} in graphreg/torch_internals"
        )


CANARIES: list[Canary] = []  # in the order of definition


def canary(what: str, needs: str, *names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Return a decorator that makes its function a canary. The arguments are attributes of ``Canary``."""

    def made(test: Callable[[], None]) -> Callable[[], None]:
        CANARIES.append(Canary(what, needs, names, test))
        return test

    return made


def _told(error: BaseException) -> str:
    """Return an error as text: its message or, for an assertion without a message, the line of the assertion."""
    text = str(error).strip().partition("\n")[0] or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return f"{type(error).__name__}: {text}"


@contextmanager
def raising(*kinds: type[BaseException], match: str = "") -> Iterator[None]:
    """Open a block that must raise an error of one of these kinds, with a message in which the regular expression ``match`` is found."""
    try:
        yield
    except kinds as error:
        assert re.search(match, str(error)), f"the error is {error!r}"
    else:
        raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} is raised")


# Helpers for canaries that compile


def compiled(function: Any, look: Look, **options: Any) -> Any:
    """Return the function, compiled by a backend that calls ``look`` with each graph and then runs the graph unchanged."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        look(gm, inputs)
        return gm.forward

    return torch.compile(function, backend=backend, **options)


def nothing(gm: fx.GraphModule, inputs: list[Any]) -> None:
    """Do nothing: a ``look`` for a canary that needs no graph."""
