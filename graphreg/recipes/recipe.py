"""``graphreg.recipe``, ``save_recipe`` and ``load_recipe``; and ``Recipe``, which reads the data of a recipe."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from graphreg.errors import GraphRegError, NoMatchError, RegularizerError, check_flag, number_of, numeric_text, shown, suggestions_text
from graphreg.planning.kept import check_keep
from graphreg.planning.keywords import from_keywords
from graphreg.planning.native_dropout import read_option
from graphreg.planning.plan import Plan, check_missing, named_once
from graphreg.recipes.asked_groups import AskedGroups
from graphreg.recipes.files import RecipeFile, read, write
from graphreg.regularizer.base import Regularizer, Splice
from graphreg.regularizer.by_depth import ByDepth, read_strength
from graphreg.regularizer.options import strength_names
from graphreg.regularizer.registry import build, find, registered
from graphreg.rewriting.instantiate import check_rng
from graphreg.runtime.attach import check_penalties, check_scale
from graphreg.runtime.build_record import GIVEN_IN_THE_CALL, Asked
from graphreg.schedules import Schedule, of_plain
from graphreg.session.controls import Regulated, asked_of, changed_strengths, set_strength
from graphreg.session.strengths import OWN

VERSION = 1
_OF_ONE = {  # options that only some of the functions with ``recipe=`` have, each with the error that the other functions raise
    "eval_penalties": "only graphreg.regularize_ has this option; elsewhere, penalties act in eval mode, too. Leave it out.",
    "blocks": "graphreg.backend has no such option: Dynamo calls no modules. Leave it out, which changes no value and no mask.",
    "keep": "only graphreg.regularize has this option; elsewhere, a call returns what the model returns. Leave it out.",
}
ALL = "**"  # in a dict of strengths, the selector for all sites that no other selector of the dict matches
_OF_THE_CALL = ("model", "example_inputs", "compile", "verify", "prove", "recipe")  # arguments of regularize that no recipe has


def recipe(module: Regulated | Plan) -> dict[str, Any]:
    """Return the arguments that a module was made with, as plain data. ``regularize(model, recipe=...)`` makes the module again.

    The dict holds text, numbers, True and False, lists and dicts. It contains the regularizers with their selectors and options, the seed,
    the strengths that were changed since, and the options of ``regularize``. Options that are None are left out. The state of the noise is
    not in the dict; ``rng_state`` returns that state.

    Args:
        module: A rewritten module, a model that is regularized in place, a backend, or a plan.

    Raises:
        RegularizerError: An argument cannot be written down, for example a selector that is a function.
    """
    if isinstance(module, Plan):
        return recipe_dict(_of_plan(module), {})
    return recipe_dict(asked_of(module), changed_strengths(module))


def save_recipe(module: Regulated | Plan, path: str | os.PathLike[str]) -> None:
    """Write ``recipe(module)`` to a file. The file's suffix selects the format: .json, .toml, .yaml or .yml.

    Args:
        module: As for ``recipe``.
        path: The file; an existing one is replaced.

    Raises:
        RegularizerError: The suffix is unknown, or an argument that the module was made with cannot be written down.
        GraphRegError: The format is YAML, and PyYAML (the extra ``yaml``) is not installed.
    """
    write(path, recipe(module))


def load_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a recipe's file, and check its content.

    Args:
        path: A file with the suffix .json, .toml, .yaml or .yml.

    Returns:
        The recipe as a dict, for ``regularize(model, recipe=...)``; that function also takes the path itself.

    Raises:
        RegularizerError: The file is malformed, or has an option or a value that is not allowed; the error names file, line and key.
        NoMatchError: The file names a regularizer that is not known.
    """
    source = read(path)
    Recipe.of(source)
    data: dict[str, Any] = source.data
    return data


# writing


def _of_plan(plan: Plan) -> Asked:
    return Asked(plan.regularizers, missing=plan.missing, own_dropout=plan.own_dropout, blocks=plan.asked_blocks, keep=plan.keep)


def recipe_dict(asked: Asked, changed: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return a recipe, given the arguments that a module was made with, and the strengths that were set since, as ``recipe`` does."""
    data: dict[str, Any] = {"recipe": VERSION}
    options: dict[str, Any] = {
        "rng": asked.seeds.get(""), "front_end": asked.front_end, "missing": asked.missing, "penalties": asked.penalties,
        "scale": asked.scale, "eval_penalties": asked.eval_penalties or None,
        "own_dropout": None if asked.own_dropout == "keep" else _by_selector(asked.own_dropout, "own_dropout"),
        "blocks": list(asked.blocks) or None, "keep": None if asked.keep is None else _by_selector(asked.keep, "keep"),
    }  # fmt: skip
    # ``missing`` has no None: its default is left out by its name.
    data |= {key: value for key, value in options.items() if value is not None and (key, value) != ("missing", "error")}
    data["regularizers"] = [_entry(name, r, asked.seeds.get(name)) for name, r in asked.regularizers.items()]
    weights = {name: regularizer.weight for name, regularizer in asked.regularizers.items()}

    # A strength that was set back to the one in the regularizer's entry is no change.
    present = {name: _present(chosen) for name, chosen in changed.items() if dict(chosen) != {OWN: weights.get(name)}}
    return data | ({"strengths": present} if present else {})


def _present(chosen: Mapping[str, float]) -> Any:
    """Return, as plain data, the strengths that were set: a number, a schedule, or a dict whose keys are names of sites and ``**``."""
    plain = {site: _plain(value, "a strength") for site, value in chosen.items()}
    return plain[OWN] if plain.keys() == {OWN} else {site or ALL: value for site, value in plain.items()}


def _entry(name: str, regularizer: Regularizer, seed: int | None) -> dict[str, Any]:
    """Return a regularizer as plain data. ``seed``: for a splice with its own ``rng=``, the seed that was drawn from it; else None."""
    kind = type(regularizer)
    # In a notebook, a class that is defined again takes the key from the earlier one.
    if not kind.keys or registered().get(kind.keys[0].lower()) is not kind:
        raise RegularizerError(
            f"{name}: the class {kind.__name__} has no key of its own, by which a recipe could name it. Give the class a key: "
            f"class {kind.__name__}(..., keys=({kind.__name__.lower()!r},))."
        )
    entry: dict[str, Any] = {"key": kind.keys[0]}
    for each in fields(regularizer):
        # A generator cannot be written down, but the seed that was drawn from it can.
        drawn = each.name == "rng" and isinstance(regularizer, Splice) and seed is not None
        value = seed if drawn else getattr(regularizer, each.name)
        if value is not None:
            entry[each.name] = _plain(value, f"{name}: {each.name}")
    return entry


def _plain(value: Any, what: str) -> Any:
    """Return a value as plain data; raise RegularizerError if that is not possible. ``what``: the value's name, for the error."""
    # ByDepth and Schedule are floats, too, so they come before the numbers.
    if isinstance(value, ByDepth):
        return {"by_depth": [_plain(end, what) for end in (value.first, value.last)]}
    if isinstance(value, Schedule):
        return value.to_plain()
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, what) for key, item in value.items() if item is not None}
    if isinstance(value, (tuple, list)):
        return [_plain(item, what) for item in value]
    if (number := number_of(value)) is not None:
        return number
    cure = "Write the selector as text" if callable(value) else "Give text, a number, True or False, or a list or dict of these"
    raise RegularizerError(f"{what} is {shown(value)}, which a recipe cannot hold. {cure}, or make the module without a recipe.")


def _by_selector(option: Any, what: str) -> Any:
    """Return an option as plain data that may be a dict by selectors. A dict becomes a list of pairs if a selector is not a single string.

    ``what``: the option's name, for the error.
    """
    if not isinstance(option, Mapping):
        return _plain(option, what)
    pairs = [(_plain(selector, what), _plain(choice, what)) for selector, choice in option.items()]
    return dict(pairs) if all(isinstance(selector, str) for selector, _ in pairs) else [list(pair) for pair in pairs]


# reading


@dataclass
class Recipe:
    """A recipe that was read.

    Attributes:
        source: The data, and the file that it was read from.
        regularizers: The regularizers in the recipe's list ``regularizers``.
        keywords: Regularizers by keyword, as ``regularize`` takes them.
        options: Options of ``regularize`` by name; under ``param_groups`` an ``AskedGroups``, which only ``param_groups`` reads.
        strengths: The strengths to set, by the regularizer's name: a number, a schedule, or a dict of selectors to these.
    """

    source: RecipeFile
    regularizers: list[Regularizer] = field(default_factory=list)
    keywords: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    strengths: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: RecipeFile) -> Recipe:
        """Read the data of a recipe. Raises GraphRegError for what is not allowed."""
        made = cls(source)
        if not isinstance(source.data, Mapping):
            raise source.error((), f"a recipe is a dict, not {shown(source.data)}.")
        for key, value in source.data.items():
            made._add(key, value)
        return made

    def without(self, keywords: Iterable[str]) -> Recipe:
        """Return the recipe without the regularizers, keywords and strengths of these names. ``dropout`` also stands for ``dropout_2``."""
        matchers = [re.compile(rf"{re.escape(keyword.lower())}(_\d+)?").fullmatch for keyword in keywords if keyword != "regularizers"]

        def stays(name: str) -> bool:
            return not any(matches(name.lower()) for matches in matchers)

        regularizers = [each for name, each in named_once(self.regularizers).items() if stays(name)]
        others = {name: value for name, value in self.keywords.items() if stays(name)}
        strengths = {name: value for name, value in self.strengths.items() if stays(name)}
        return Recipe(self.source, regularizers, others, self.options, strengths)

    def of_plan(self, plan: Plan, **options: Any) -> dict[str, Any]:
        """Return the recipe of a plan that was made by this one, as plain data.

        A plan has the regularizers, ``missing``, ``own_dropout``, ``blocks`` and ``keep``. All else is from ``options``, by the names
        that recipes have, or else from this recipe.
        """
        given = self.options | {name: value for name, value in options.items() if value is not None}
        rng, front_end = given.get("rng"), given.get("front_end", "auto")
        asked = replace(
            _of_plan(plan), seeds={} if rng is None else {"": rng}, front_end=None if front_end == "auto" else front_end,
            penalties=given.get("penalties"), scale=given.get("scale"), eval_penalties=given.get("eval_penalties", False),
        )  # fmt: skip

        # ``recipe_dict`` takes strengths as sessions have them, with OWN where a recipe has ``**``.
        set_since = {name: value if isinstance(value, Mapping) else {ALL: value} for name, value in self.strengths.items()}
        by_site = {name: {OWN if at == ALL else at: each for at, each in sites.items()} for name, sites in set_since.items()}
        groups = given.get("param_groups")
        return recipe_dict(asked, by_site) | ({} if groups is None else {"param_groups": groups.to_plain()})

    def options_for(self, function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options to call a function with: those of ``given``, but the recipe's where ``given`` has the default."""
        parameters, chosen = inspect.signature(function).parameters, dict(given)
        for name, value in self.options.items():
            if name in given and given[name] == parameters[name].default:
                chosen[name] = value
            # ``plan`` has no ``penalties``, and takes from a recipe only what a plan needs.
            elif name in _OF_ONE and value and name not in given and ("penalties" in given or name == "keep"):
                raise self.source.error((name,), _OF_ONE[name])
        if chosen.get("scale") == GIVEN_IN_THE_CALL:
            raise self.source.error(("scale",), "the recipe was made with a scale that cannot be written down. Give scale= in the call.")
        return chosen

    def set_strengths(self, module: Any) -> None:
        """Set the recipe's strengths in a module or backend that was made by the recipe."""
        for name, value in self.strengths.items():
            by_site = dict(value) if isinstance(value, Mapping) else {ALL: value}
            # The strength of all sites first: it would replace those of single sites.
            parts = [by_site.pop(ALL)] if ALL in by_site else []
            for part in [*parts, by_site] if by_site else parts:
                self._checked(("strengths", name), partial(set_strength, module, name), part)

    def _add(self, key: Any, value: Any) -> None:
        if key == "recipe":
            if value != VERSION or isinstance(value, bool):
                raise self.source.error((key,), f"the version is {shown(value)}; this graphreg reads version {VERSION}.")
        elif key == "regularizers":
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise self.source.error((key,), f"this must be a list of dicts, each with a 'key', not {shown(value)}.")
            self.regularizers = [self._made((key, i), entry) for i, entry in enumerate(value)]
        elif key == "strengths":
            if not isinstance(value, Mapping):
                raise self.source.error((key,), f"this must be a dict of names of regularizers to numbers, not {shown(value)}.")
            self.strengths = {name: self._strength((key, name), strength) for name, strength in value.items()}
        elif key in _CHECKS:
            self.options[key] = self._checked((key,), _CHECKS[key], value)
        else:
            self._add_keyword(key, value)

    def _add_keyword(self, key: Any, value: Any) -> None:
        if key in _OF_THE_CALL:
            raise self.source.error((key,), f"{key}= is given in the call, and is no part of a recipe.")
        if not isinstance(key, str) or key not in registered():
            known = {*registered().spellings, *_CHECKS, "regularizers", "strengths"}
            near = suggestions_text(str(key).lower(), sorted(known), "Near keys")
            raise self.source.error((key,), f"{key!r} is no option of a recipe and no key of a regularizer.{near}", NoMatchError)
        self.keywords[key] = self._checked((key,), _read, value)
        # Made to check it, while the place is known; ``regularize`` makes it again.
        self._checked((key,), lambda given: from_keywords({key: given}), self.keywords[key])

    def _made(self, place: tuple[str | int, ...], entry: Any) -> Regularizer:
        if not isinstance(entry, Mapping) or "key" not in entry:
            raise self.source.error(place, f"{shown(entry)} is not a dict with a 'key', which says which regularizer it is.")
        kind: type[Regularizer] = self._checked((*place, "key"), find, entry["key"])
        options = {name: self._checked((*place, name), _read, value) for name, value in entry.items() if name != "key"}
        try:
            return build(entry["key"], **options)
        except GraphRegError as error:
            at = _faulty(entry["key"], kind, options)
            raise self.source.at(place if at is None else (*place, at), error) from None

    def _strength(self, place: tuple[str, ...], value: Any) -> Any:
        """Return a strength to set: a number, a schedule, or a dict of selectors to these."""
        if (schedule := self._checked(place, of_plain, value)) is not None:
            return schedule
        # At the place ("strengths", NAME). One level down, a dict would have no meaning.
        if isinstance(value, Mapping) and len(place) == 2:
            return {site: self._strength((*place, site), strength) for site, strength in value.items()}
        if isinstance(value, bool) or number_of(value) is None:
            raise self.source.error(place, f"{shown(value)} is not a finite number. {numeric_text(value)}".rstrip())
        return value

    def _checked(self, place: tuple[str | int, ...], check: Callable[[Any], Any], value: Any) -> Any:
        """Return ``check(value)``. If it raises an error, add the place in the recipe to the error."""
        try:
            return check(value)
        except GraphRegError as error:
            raise self.source.at(place, error) from None


def _faulty(key: str, kind: type[Regularizer], options: Mapping[str, Any]) -> str | None:
    """Return the option that is wrong: without it, the regularizer can be made. None if no single option is wrong.

    Without its strength, the regularizer is made with 0.5, because a strength has no default.
    """
    for name in options:
        others = {key: value for key, value in options.items() if key != name}
        with contextlib.suppress(GraphRegError):
            build(key, **({} if others.keys() & strength_names(kind) else {"weight": 0.5}) | others)
            return name
    return None


def _read(value: Any) -> Any:
    """Return a value as regularizers take it: tuples in place of lists, and strengths in place of plain data that stands for them."""
    value = read_strength(value)
    if isinstance(value, list):
        return tuple(map(_read, value))
    return {key: _read(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _kept(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Return a function that checks a value and returns the value unchanged."""

    def checked(value: Any) -> Any:
        check(value)
        return value

    return checked


def _check_front_end(value: Any) -> None:
    if value not in ("auto", "symbolic", "export"):
        raise RegularizerError(f"front_end={shown(value)} is unknown; it is 'auto', 'symbolic' or 'export'.")


def _check_scale(value: Any) -> None:
    if value != GIVEN_IN_THE_CALL:
        check_scale(value)


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _read_own_dropout(value: Any) -> Any:
    option = value
    if isinstance(value, list):
        if not _is_pairs(value):
            raise RegularizerError("own_dropout is a choice, a rate, a dict of selectors to these, or a list of pairs [selector, choice].")
        option = {_read(selector): choice for selector, choice in value}
    return read_option(option)


def _read_keep(value: Any) -> Any:
    option = {_read(selector): form for selector, form in value} if _is_pairs(value) else value
    check_keep(option)
    return option


def _read_blocks(value: Any) -> Any:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise RegularizerError(f"blocks={shown(value)} is not allowed; give a selector as text, or a list of them.")
    return value


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "rng": _kept(check_rng), "front_end": _kept(_check_front_end), "missing": _kept(check_missing), "penalties": _kept(check_penalties),
    "scale": _kept(_check_scale), "eval_penalties": _kept(partial(check_flag, "eval_penalties")),
    "own_dropout": _read_own_dropout, "blocks": _read_blocks, "keep": _read_keep, "param_groups": AskedGroups.of_plain,
}  # fmt: skip
