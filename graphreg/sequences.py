"""Sequences: which of the selected values are one each, and which are the steps of one; decided before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from graphreg.errors import NoMatchError, RegularizerError, near_sentence, shown
from graphreg.selector import Pattern, strings
from graphreg.sites import Label, Site
from graphreg.steps import Steps

Port = tuple[str, tuple[str, ...]]  # a module's path, and which of its values
Modules = Mapping[str, nn.Module]
Found = dict[Site, tuple[str, Steps]]  # with the string that chose it


def check_options(regularizer: Any) -> None:
    """Refuse a penalty on sequences without a selector, and options that name no axis or no input."""
    kind, texts = type(regularizer).__name__, strings(regularizer.pattern)
    if any(text.strip("! ") == "*" for text in texts) or (texts and all(Pattern.parse(text).exclude for text in texts)):
        key = regularizer.keys[0] if regularizer.keys else "key"
        raise RegularizerError(
            f"{kind} needs a selector, {regularizer.pattern!r} does not say which values are sequences. Give "
            f"{key}={{'weight': {regularizer.weight:g}, 'pattern': 'rnn'}} or {kind}('rnn', {regularizer.weight:g}), with a name of "
            "your model in place of 'rnn'; graphreg.names(model) lists them."
        )
    axis, lengths = time_axis(regularizer), lengths_name(regularizer)
    if type(axis) is not int:
        raise RegularizerError(
            f"{kind}: time_axis={shown(axis)} is not allowed; give the axis of time in the value, a whole number: 1 for "
            "[batch, time, ...], 0 for [time, batch, ...]."
        )
    if lengths is not None and not isinstance(lengths, str):
        raise RegularizerError(
            f"{kind}: lengths={type(lengths).__name__} is not allowed; give the name of the model's input that carries them."
        )


def check_arguments(kind: str, names: Sequence[str], options: Sequence[str]) -> None:
    """Refuse a formula that asks for a sequence and for something else at its site, or leaves its own lengths aside."""
    both = [name for name in ("z", "values") if name in names and "steps" in names]
    if both:
        raise RegularizerError(f"{kind}.__call__ asks for steps and for {both[0]}; it gets a sequence or a value. Leave one out.")
    if "lengths" in names and "steps" not in names:
        raise RegularizerError(f"{kind}.__call__ asks for lengths without steps, which they are the lengths of. Ask for steps, too.")
    if "steps" in names and "lengths" in options and "lengths" not in names:
        raise RegularizerError(f"{kind} has the option lengths, and its __call__ does not take them: they would change nothing.")


def time_axis(regularizer: Any) -> Any:
    return getattr(regularizer, "time_axis", 1)


def lengths_name(regularizer: Any) -> Any:
    return getattr(regularizer, "lengths", None)


def sequences(found: Mapping[Site, str], regularizer: Any, values: Sequence[Site], modules: Modules) -> Found:
    """The sequences that the selected sites are, each under its site; all calls of a cell under that of the first.

    Calls are one sequence where a string names their module, by a glob of its path. A function of a site names none.
    Raises RegularizerError for what is no sequence, as far as shapes are known.
    """
    texts = strings(regularizer.pattern)
    away = {id(site) for text in texts if (p := Pattern.parse(text)).exclude for site in p.find(values)}
    calls: dict[Port, list[Site]] = {}
    for site in (value for value in values if value.selectable):
        for port in {_port(label) for label in site.labels if label.module is not None}:
            calls.setdefault(port, []).append(site)
    chosen_by = {text: _labels(text, values) for text in set(found.values())} if texts else {}
    taken, kept = set[Site](), Found()
    for site, text in found.items():
        if site not in taken:
            named = _named(site, chosen_by[text][site.name], calls, modules) if texts else None
            steps = [call for call in calls[named] if id(call) not in away] if named else []
            taken.update(steps)
            kept[steps[0] if steps else site] = text, _steps(site, steps, named, calls, regularizer, modules)
    for site, (_, form) in kept.items():
        _require(site, form, regularizer)
    return kept


def _port(label: Label) -> Port:
    return label.module or "", label.ports


def _labels(text: str, values: Sequence[Site]) -> dict[str, list[Label]]:
    """By site, the labels that a string names it by, of those of modules whose path it names."""
    found: dict[str, list[Label]] = {}
    pattern = Pattern.parse(text)
    for label, site in pattern.labels(values):
        own = found.setdefault(site.name, [])
        if label.module is not None and pattern.path(label.module):
            own.append(label)
    return found


def _named(site: Site, labels: Sequence[Label], calls: Mapping[Port, Sequence[Site]], modules: Modules) -> Port | None:
    """The module that is named and whose calls are steps: one called several times, or a cell of torch's."""
    if site.sequence:  # a recurrent layer: each call is a sequence
        return None
    several = [port for port in map(_port, labels) if len(calls[port]) > 1 or isinstance(modules[port[0]], nn.RNNCellBase)]
    return max(several, key=lambda port: len(calls[port]), default=None)


def _steps(
    site: Site, steps: Sequence[Site], named: Port | None, calls: Mapping[Port, Sequence[Site]], regularizer: Any, modules: Modules
) -> Steps:
    lengths = lengths_name(regularizer)
    if named and time_axis(regularizer) not in (0, 1):
        raise RegularizerError(
            f"{type(regularizer).__name__} at {site.name}: time_axis={time_axis(regularizer)} has no meaning where the calls of {named[0]} "
            "are the steps. Leave time_axis out; to take each call for a sequence, select the calls by a function of a site."
        )
    if named:
        return Steps(0, tuple(steps), isinstance(modules[named[0]], nn.RNNCellBase), lengths)
    if site.sequence:
        return Steps(_layer_axis(site, regularizer), (), True, lengths)
    return Steps(time_axis(regularizer), lengths=lengths, hint=_hint(site, calls))


def _hint(site: Site, calls: Mapping[Port, Sequence[Site]]) -> str:
    """What to select instead of one call of a cell."""
    several = [label for label in site.labels if label.module is not None and len(calls[_port(label)]) > 1]
    whole = [f"{label.module}" if label.default else f"{label.module}:{label.ports[0]}" for label in several]
    return (
        f" This is one call of {whole[0]!r}: the selector {whole[0]!r} takes all its calls as the steps of one sequence." if whole else ""
    )


def _layer_axis(site: Site, regularizer: Any) -> int:
    """The axis of time in the output of a recurrent layer; another that was asked for is refused, not passed over."""
    given, axis = time_axis(regularizer), 1 if site.sequence == "batch first" else 0
    if site.sequence != "state" and given not in (1, axis, axis - 3):  # 1: not given
        raise RegularizerError(
            f"{type(regularizer).__name__} at {site.name}: time_axis={given} is not the axis of time in the output of this layer, which is "
            f"{axis} (batch_first={axis == 1}). Leave time_axis out: a recurrent layer tells its own."
        )
    return axis


def _require(site: Site, steps: Steps, regularizer: Any) -> None:
    who = f"{type(regularizer).__name__} at {site.name}"
    if site.sequence == "state":
        layer = site.labels[0].name
        raise RegularizerError(
            f"{who}: this is the state of {layer} after the last step, no sequence. Select '{layer}:out'; "
            f"where a glob finds both, add '!{site.name}'."
        )
    shapes = [call.shape for call in steps.calls or (site,) if call.shape is not None]
    if shapes:
        steps.require_calls(shapes, who)
        steps.require((len(steps.calls), *shapes[0]) if steps.calls else shapes[0], who)


def check_lengths(found: Found, name: str, inputs: Mapping[str, Any], held: Mapping[str, Any], who: str) -> None:
    """Refuse lengths that no input of the model carries; ``inputs`` maps their names to (shape, dtype), or None if unknown."""
    if name not in inputs:
        why = (
            f"{name!r} is an argument that is held at {held[name]!r}: give example_inputs that carry a tensor for it."
            if name in held
            else f"no input of the model has that name.{near_sentence(name, inputs)} Inputs: {', '.join(inputs)}."
        )
        raise NoMatchError(f"{who}: lengths={name!r}: {why}")
    known = inputs[name]
    for site, (_, steps) in found.items():
        if isinstance(known, tuple) and site.shape is not None:
            shape, dtype = known
            steps.require_lengths(shape, dtype, (len(steps.calls), *site.shape) if steps.calls else site.shape, f"{who} at {site.name}")
