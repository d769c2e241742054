"""Turns a recipe into arguments of ``regularize``, ``regularize_`` and ``backend``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from graphreg.errors import RegularizerError, shown
from graphreg.planning.keywords import merged
from graphreg.recipes.files import RecipeFile, read
from graphreg.recipes.recipe import Recipe

R = TypeVar("R")
RecipeLike = Mapping[str, Any] | str | os.PathLike[str] | Recipe


def by_recipe(function: Callable[..., R], arguments: Mapping[str, Any]) -> R:
    """Call a function again, with the arguments that its ``recipe=`` stands for, and set the recipe's strengths.

    The caller's other arguments take precedence over the recipe. An option that is not at its
    default replaces the recipe's option, and a keyword replaces the recipe's regularizers of that
    name, also if it is in a dict ``regularizers={...}``.

    Args:
        function: One of the functions that take ``recipe=``.
        arguments: The arguments of the call that has ``recipe=``, by the names of the function's
            parameters.
    """
    # By the signature, so that one function serves all those that take a recipe.
    by_kind: dict[Any, dict[str, Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        by_kind.setdefault(parameter.kind, {})[name] = arguments[name]
    (regularizers,) = by_kind[inspect.Parameter.VAR_POSITIONAL].values()
    keywords = merged(*by_kind[inspect.Parameter.VAR_KEYWORD].values())
    first = by_kind.get(inspect.Parameter.POSITIONAL_OR_KEYWORD, {}).values()  # the model
    given = by_kind[inspect.Parameter.KEYWORD_ONLY]
    asked = read_recipe(given.pop("recipe")).without(keywords)
    made = function(*first, *asked.regularizers, *regularizers, **asked.options_for(function, given), **asked.keywords, **keywords)
    asked.set_strengths(made)
    return made


def read_recipe(recipe: RecipeLike) -> Recipe:
    """Read a recipe that a user gave as a dict or as the path of a file. A ``Recipe`` is returned unchanged."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.of(RecipeFile(recipe))
    if isinstance(recipe, (str, os.PathLike)):
        return Recipe.of(read(recipe))
    raise RegularizerError(f"recipe={shown(recipe)} is not allowed; give what graphreg.recipe returned, or the path of a recipe's file.")
