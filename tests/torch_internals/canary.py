"""Canaries: tests of one private part of torch each, which say in a sentence what a new version of torch has changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

TESTED = set[str]()  # the names of the door that have a canary


def canary(what: str, needs: str, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of ``names``, functions of the door. ``what``: how something is in torch; ``needs``: what of graphreg needs that."""
    TESTED.update(names)

    def marked(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                raise pytest.fail.Exception(sentence(what, needs, names) + f" ({type(error).__name__}: {error})") from error

        return run

    return marked


def sentence(what: str, needs: str, names: tuple[str, ...]) -> str:
    """What a canary says when it falls."""
    return f"torch {torch.__version__} changed how {what}; {needs} needs it: {', '.join(names)} in graphreg/torch_internals"
