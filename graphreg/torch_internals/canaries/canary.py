"""What a canary is: a test of one private part of torch, which says in a sentence what a new version of torch has changed."""

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
    """A canary fell; the text says what torch has changed, and what of graphreg needs it."""


@dataclass(frozen=True)
class Canary:
    """A test of functions of the room.

    Attributes:
        what: How something is in torch, to stand behind "torch changed how".
        needs: What of graphreg needs that.
        names: The functions of the room that are tested.
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
        """What it says when it falls."""
        return (
            f"torch {torch.__version__} changed how {self.what}; {self.needs} needs it: {', '.join(self.names)} in graphreg/torch_internals"
        )


CANARIES: list[Canary] = []  # in the order of definition


def canary(what: str, needs: str, *names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make a function a canary; the arguments are those of ``Canary``."""

    def made(test: Callable[[], None]) -> Callable[[], None]:
        CANARIES.append(Canary(what, needs, names, test))
        return test

    return made


def _told(error: BaseException) -> str:
    """An error as text; of an assertion without a message the line that asserts."""
    text = str(error).strip().partition("\n")[0] or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return f"{type(error).__name__}: {text}"


@contextmanager
def raising(*kinds: type[BaseException], match: str = "") -> Iterator[None]:
    """A block that must raise an error of one of these kinds, with a message in which ``match`` is found."""
    try:
        yield
    except kinds as error:
        assert re.search(match, str(error)), f"the error is {error!r}"
    else:
        raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)} is raised")


# For what compiles


def compiled(function: Any, look: Look, **options: Any) -> Any:
    """The function compiled by a backend that looks at each graph, and runs it as it is."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        look(gm, inputs)
        return gm.forward

    return torch.compile(function, backend=backend, **options)


def nothing(gm: fx.GraphModule, inputs: list[Any]) -> None:
    """A look that sees nothing."""
