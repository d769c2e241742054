"""``param_groups``: the groups of an optimizer, by the same selectors as regularizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from graphreg.errors import RegularizerError, listed, number_of, shown
from graphreg.ir.selector import Pattern, Selector, exactly, select_among, strings
from graphreg.ir.site import Label, Site
from graphreg.ir.terminal import Lines, Paragraph, Printed
from graphreg.ir.text_table import Table
from graphreg.optimizers.levels import levels
from graphreg.optimizers.parameters import ModelParameters
from graphreg.optimizers.standard_decay import undecayed
from graphreg.recipes.arguments import RecipeLike, read_recipe
from graphreg.recipes.asked_groups import FROZEN, AskedGroups, OptimizerOptions
from graphreg.recipes.recipe import VERSION
from graphreg.regularizer.by_depth import ByDepth, DepthDecay

DECAY = "weight_decay"
Matches = Mapping[Selector, Mapping[Site, str]]  # for each selector, the parameters that it selects


class ParamGroups(Printed, list[dict[str, Any]]):
    """The result of ``param_groups``: a list of groups, for any optimizer that takes torch's groups. It prints as a table.

    Each group is a dict with ``params``, ``param_names`` and the options of the group. An optimizer
    that is made from the list adds its own defaults to the dicts; the table stays as it was.

    Attributes:
        title: The model's class name.
        frozen: The names of the parameters that are in no group: frozen by a selector, or without
            gradients.
        asked: What the call asked for.
    """

    title: str
    frozen: tuple[str, ...]
    asked: AskedGroups
    _rows: list[_GroupRow]
    _left: _GroupRow

    @classmethod
    def made(cls, parameters: ModelParameters, options: Mapping[Site, OptimizerOptions], asked: AskedGroups) -> ParamGroups:
        """Make the groups, one for each set of options. A parameter without options is in no group."""
        merged = list[tuple[OptimizerOptions, list[Site]]]()
        for site, own in options.items():
            group = next((sites for known, sites in merged if _same(known, own)), None)
            if group is None:
                merged.append((own, group := []))
            group.append(site)

        made = cls(
            {"params": [parameters.of_site[site] for site in sites], "param_names": [site.name for site in sites], **own}
            for own, sites in merged
        )
        left = [site for site in parameters.of_site if site not in options]
        made.title, made.frozen, made.asked = parameters.title, tuple(site.name for site in left), asked
        made._rows = [_GroupRow(dict(own), [site.name for site in sites], _elements(parameters, sites)) for own, sites in merged]
        made._left = _GroupRow({}, list(made.frozen), _elements(parameters, left))
        return made

    def recipe(self) -> dict[str, Any]:
        """Return what the call asked for as a recipe, plain data that ``param_groups(model, recipe=...)`` takes.

        Beside a module's recipe it makes one for both:
        ``{**graphreg.recipe(module), **groups.recipe()}``.

        Raises:
            RegularizerError: A selector is a function, or an option is an object.
        """
        return {"recipe": VERSION, "param_groups": self.asked.to_plain()}

    def to_dict(self) -> dict[str, Any]:
        """Return the groups as plain data: ``title``, ``groups`` with their options and names, ``frozen``."""
        groups = [{"options": row.options, "param_names": row.names, "elements": row.elements} for row in self._rows]
        return {"title": self.title, "groups": groups, "frozen": list(self.frozen)}

    def _blocks(self) -> Iterable[Paragraph]:
        count = sum(len(row.names) for row in self._rows)
        left = f", {len(self.frozen)} frozen" if self.frozen else ""
        head = f"{self.title}: {count} parameter{'s' * (count != 1)} in {len(self._rows)} group{'s' * (len(self._rows) != 1)}{left}"
        yield Lines((head,), "bold")
        options = list(dict.fromkeys(name for row in self._rows for name in row.options))
        shown_rows = [(str(i), row) for i, row in enumerate(self._rows)] + ([("frozen", self._left)] if self.frozen else [])
        rows = [
            (
                place, *(_text(row.options[name]) if name in row.options else "" for name in options),
                str(len(row.names)), "" if row.elements is None else f"{row.elements:,}", listed(row.names, 2),
            )
            for place, row in shown_rows
        ]  # fmt: skip
        yield Table(("group", *options, "parameters", "elements", "names"), tuple(rows))


@dataclass(frozen=True)
class _GroupRow:
    """A line of the table. ``elements``: None if a parameter has no shape yet."""

    options: OptimizerOptions
    names: list[str]
    elements: int | None


def param_groups(
    model: nn.Module,
    selectors: Mapping[Selector, OptimizerOptions | Literal["frozen"]] | None = None,
    *,
    default: OptimizerOptions | None = None,
    decay: Literal["standard"] | None = None,
    freeze: bool = False,
    recipe: RecipeLike | None = None,
) -> ParamGroups:
    """Make the parameter groups of an optimizer by selectors.

    Each trainable parameter is in exactly one group. If several selectors match a parameter, their
    options are merged, and of each option the last one counts. Parameters that regularizers learn
    have a weight decay of 0. The model is not traced, and only ``freeze=True`` changes it.

    Args:
        model: Any model, also one that is regularized, compiled, wrapped, sharded, or has adapters.
        selectors: A dict of selectors. The value is a dict of the optimizer's options, such as
            ``{"lr": 1e-3, "weight_decay": 0.05}``, or ``"frozen"``, which takes precedence over
            options and leaves the parameters out of all groups. The value of an option may be
            ``by_depth(first, last)``, or ``by_depth(decay=0.65)``, which multiplies what the
            default or an earlier selector gives.
        default: The options of all parameters.
        decay: ``"standard"`` gives a ``weight_decay`` of 0 to parameters with fewer than two dims,
            biases, parameters of norms, and embeddings; unless a selector that matches no others
            gives them another.
        freeze: Whether to call ``requires_grad_(False)`` on the parameters that are ``"frozen"``.
        recipe: A recipe with ``param_groups``, or the path of its file. The call's selectors come
            after those of the recipe; its ``default`` and ``decay`` take precedence.

    Returns:
        A list of groups with ``params``, ``param_names`` and options, which prints as a table.

    Raises:
        NoMatchError: A selector, or one of its strings, matches nothing.
        RegularizerError: An option or a value is not allowed; a selector gives options to frozen
            parameters only; ``"frozen"`` has not all names of a tied parameter; or no parameter is
            left to train.
    """
    asked = AskedGroups({} if selectors is None else selectors, {} if default is None else default, decay)
    if recipe is not None:
        asked = _after(recipe, asked)
    parameters = ModelParameters.of(model)
    matches = {selector: parameters.matching(selector, "param_groups") for selector in asked.selectors}

    frozen = _frozen(parameters, asked, matches)
    trained = [site for site, parameter in parameters.of_site.items() if parameter.requires_grad]
    merged = _merged(parameters, asked, matches)
    options = {site: merged[site] for site in trained if site not in frozen}
    if not options:
        raise RegularizerError(f"no parameter of {parameters.title} is left to train: all {len(parameters.of_site)} are frozen.")

    groups = ParamGroups.made(parameters, options, asked)
    if freeze:
        for site in frozen:
            parameters.of_site[site].requires_grad_(False)
    return groups


def _after(recipe: RecipeLike, asked: AskedGroups) -> AskedGroups:
    """Return what a recipe asks for, and then the call."""
    known = read_recipe(recipe).options.get("param_groups")
    if known is None:
        raise RegularizerError("the recipe has no param_groups. Write param_groups(model, {...}), or give a recipe of such groups.")
    # A selector that both have is one of the call's, and comes where these do.
    kept = {selector: options for selector, options in known.selectors.items() if selector not in asked.selectors}
    return AskedGroups({**kept, **asked.selectors}, {**known.default, **asked.default}, asked.decay or known.decay)


def _frozen(parameters: ModelParameters, asked: AskedGroups, matches: Matches) -> list[Site]:
    """Return the parameters that selectors freeze. Raises RegularizerError if not all names of a tied one are selected."""
    names: dict[Site, set[Label]] = {}
    for selector, options in asked.selectors.items():
        for site in matches[selector] if options == FROZEN else ():
            names.setdefault(site, set()).update(parameters.labels(selector, site))
    for site, selected in names.items():
        named, others = ([label for label in site.labels if (label in selected) == chosen] for chosen in (True, False))
        if others:
            raise RegularizerError(
                f"'frozen' selects {named[0].name}, which is tied to {others[0].name}: both names are one parameter. Freeze "
                f"{exactly(others[0])!r}, too, or leave the parameter out: ('...', {'!' + exactly(site.labels[0])!r})."
            )
    return list(names)


def _merged(parameters: ModelParameters, asked: AskedGroups, matches: Matches) -> dict[Site, dict[str, Any]]:
    """Return the options of each parameter, whether it is trained or not."""
    exempt = set(parameters.owned) | (set(undecayed(parameters)) if asked.decay else set())
    merged = {site: dict(asked.default) | ({DECAY: 0.0} if site in exempt else {}) for site in parameters.of_site}
    for selector, options in asked.selectors.items():
        if isinstance(options, str):
            continue
        sites = matches[selector]
        if not any(parameters.of_site[site].requires_grad for site in sites):
            raise RegularizerError(
                f"{shown(selector)} selects only parameters that are frozen ({listed([site.name for site in sites], 3)}), so its options "
                "would do nothing. Call requires_grad_() on one, write 'frozen' in their place, or leave the selector out."
            )
        for name, value in options.items():
            at = _values(parameters, selector, name, value, sites, merged)
            passed_over = exempt - _named(selector, list(sites), exempt) if name == DECAY else set[Site]()
            for site in sites:
                if site not in passed_over:
                    merged[site][name] = at[site]
    return merged


def _named(selector: Selector, sites: list[Site], exempt: set[Site]) -> set[Site]:
    """Return those parameters without decay for which a selector asks: one of its strings matches these and no others.

    So ``"layer4.*"`` means the weights in layer 4, and ``"layer4.*.bias"`` the biases.
    """
    chosen = [text for text in strings(selector) if not Pattern.parse(text).exclude]
    found = [set(select_among(text, sites)) for text in chosen] if chosen else [set(sites)]
    return set[Site]().union(*(named for named in found if named <= exempt))


def _values(
    parameters: ModelParameters, selector: Selector, name: str, value: Any, sites: Iterable[Site], merged: Mapping[Site, OptimizerOptions]
) -> dict[Site, Any]:
    """Return the value of an option at each of the sites that a selector selects."""
    sites = list(sites)
    if not isinstance(value, (ByDepth, DepthDecay)):
        return dict.fromkeys(sites, value)

    # Levels are those in the whole model. What regularizers learn has none; it is like the last.
    of_model = levels(parameters.modules, (site for site in parameters.of_site if site not in parameters.owned))
    last = max((of_model[site] for site in sites if site in of_model), default=0)
    level = {site: of_model.get(site, last) for site in sites}
    found = sorted(set(level.values()))
    if len(found) < 2:
        raise RegularizerError(
            f"{shown(selector)}: {name}={value!r} needs parameters in two blocks or more, and all that it selects are in one. Give a "
            "number."
        )
    if isinstance(value, ByDepth):
        return {site: float(value.at(found.index(level[site]), len(found))) for site in sites}

    for site in sites:
        base = merged[site].get(name)
        if isinstance(base, bool) or number_of(base) is None:
            has = "has none" if base is None else f"has {shown(base)}"
            raise RegularizerError(
                f"{shown(selector)}: {name}={value!r} multiplies a number that the default or an earlier selector gives, and {site.name} "
                f"{has}. Give default={{{name!r}: ...}}."
            )
    return {site: merged[site][name] * value.decay ** (last - level[site]) for site in sites}


def _same(one: OptimizerOptions, other: OptimizerOptions) -> bool:
    """Return whether options are the same. Tensors, as of a learning rate for CUDA graphs, are the same if they are one object."""
    return one.keys() == other.keys() and all(
        value is other[name] or (not isinstance(value, torch.Tensor) and not isinstance(other[name], torch.Tensor) and value == other[name])
        for name, value in one.items()
    )


def _elements(parameters: ModelParameters, sites: Iterable[Site]) -> int | None:
    found = [parameters.of_site[site] for site in sites]
    return None if any(map(nn.parameter.is_lazy, found)) else sum(parameter.numel() for parameter in found)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else shown(value)
