"""``AskedGroups``: what a call of ``param_groups``, or a recipe, asks for; checked, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphreg.errors import RegularizerError, numeric_text, shown, suggestions_text
from graphreg.ir.selector import Selector, strings
from graphreg.regularizer.by_depth import ByDepth, DepthDecay, has_schedule, read_strength
from graphreg.schedules import Schedule

OptimizerOptions = Mapping[str, Any]  # of an optimizer, by name
FROZEN: Literal["frozen"] = "frozen"
_KEYS = ("selectors", "default", "decay")
_OURS = ("params", "param_names")  # the entries of a group that are no options


@dataclass(frozen=True)
class AskedGroups:
    """What to do with the parameters of a model.

    Attributes:
        selectors: For each selector, the options of the parameters that it selects, or ``"frozen"``. Later ones take precedence.
        default: The options of all parameters, which those of selectors replace.
        decay: ``"standard"``: what the usual rule leaves without decay has none.
    """

    selectors: Mapping[Selector, OptimizerOptions | Literal["frozen"]] = field(default_factory=dict)
    default: OptimizerOptions = field(default_factory=dict)
    decay: Literal["standard"] | None = None

    def __post_init__(self) -> None:
        """Raise RegularizerError for what is not allowed."""
        if not isinstance(self.selectors, Mapping):
            raise RegularizerError(
                f"param_groups: {shown(self.selectors)} is not allowed; give a dict of selectors to options, such as "
                "{'head.*': {'lr': 1e-3}, 'embed.*': 'frozen'}."
            )
        for selector, options in self.selectors.items():
            strings(selector)
            if options != FROZEN:
                _check_options(shown(selector), options)
                if not options:
                    raise RegularizerError(f"param_groups: {shown(selector)} has no options. Give some, 'frozen', or leave it out.")
        _check_options("default", self.default)
        for name, value in self.default.items():
            if isinstance(value, (ByDepth, DepthDecay)):
                raise RegularizerError(
                    f"param_groups: default has {name}={value!r}; give a value by depth to a selector: {{'*': {{{name!r}: ...}}}}."
                )
        if self.decay not in (None, "standard"):
            raise RegularizerError(f"param_groups: decay={shown(self.decay)} is not allowed; give 'standard' or None.")

    @classmethod
    def of_plain(cls, data: Any) -> AskedGroups:
        """Return what plain data stands for, as recipes have it under ``param_groups``. Raises RegularizerError if it is not allowed."""
        if not isinstance(data, Mapping) or not data:
            raise RegularizerError(f"this must be a dict with some of {', '.join(_KEYS)}, not {shown(data)}.")
        if unknown := [key for key in data if key not in _KEYS]:
            near = suggestions_text(str(unknown[0]), _KEYS, "Near keys")
            raise RegularizerError(f"{shown(unknown[0])} is no key of param_groups; it has {', '.join(_KEYS)}.{near}")
        given = data.get("selectors", {})
        pairs = given.items() if isinstance(given, Mapping) else given
        if not isinstance(given, (Mapping, list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
            raise RegularizerError("selectors is a dict of selectors to options, or a list of pairs [selector, options].")
        selectors = {tuple(selector) if isinstance(selector, list) else selector: _read(options) for selector, options in pairs}
        return cls(selectors, _read(data.get("default", {})), data.get("decay"))

    def to_plain(self) -> dict[str, Any]:
        """Return the plain data that ``of_plain`` reads. Raises RegularizerError for what data cannot hold, such as a function."""
        pairs: list[list[Any]] = []
        for selector, options in self.selectors.items():
            if not (texts := strings(selector)):
                raise RegularizerError(f"param_groups: {shown(selector)} is a function, which a recipe cannot hold. Write it as text.")
            text = texts[0] if isinstance(selector, str) else list(texts)
            pairs.append([text, options if isinstance(options, str) else _plain(options)])
        texts_alone = all(isinstance(selector, str) for selector, _ in pairs)
        data: dict[str, Any] = {"decay": self.decay, "default": _plain(self.default), "selectors": dict(pairs) if texts_alone else pairs}
        return {key: value for key, value in data.items() if value}


def _check_options(where: str, options: Any) -> None:
    usage = "give a dict of the optimizer's options, such as {'lr': 1e-3, 'weight_decay': 0.05}"
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        frozen = " or 'frozen'" if where != "default" else ""
        raise RegularizerError(f"param_groups: {where} has {shown(options)}; {usage}{frozen}.")
    for name, value in options.items():
        if name in _OURS:
            raise RegularizerError(f"param_groups: {where} gives {name!r}, which the selectors decide; {usage}.")
        if number := numeric_text(value):
            raise RegularizerError(f"param_groups: {where} gives {name}={value!r}. {number}".rstrip())
        if isinstance(value, Schedule) or (isinstance(value, ByDepth) and has_schedule(value)):
            raise RegularizerError(
                f"param_groups: {where} gives {name}={value!r}, and an optimizer's options follow no schedule. Give a number, and use "
                "one of torch.optim.lr_scheduler."
            )


def _read(options: Any) -> Any:
    if not isinstance(options, Mapping):
        return options
    return {name: tuple(value) if isinstance(value, list) else read_strength(value) for name, value in options.items()}


def _plain(options: OptimizerOptions) -> dict[str, Any]:
    """Return options as plain data."""
    plain: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, DepthDecay):
            plain[name] = {"by_depth": {"decay": value.decay}}
        elif isinstance(value, ByDepth):
            plain[name] = {"by_depth": [value.first, value.last]}
        elif isinstance(value, (str, bool, int, float)):
            plain[name] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float)) for item in value):
            plain[name] = list(value)
        else:
            raise RegularizerError(
                f"param_groups: {name} is {shown(value)}, which a recipe cannot hold. Give text, a number, or a list of numbers."
            )
    return plain
