"""Decides what to do with native dropout: checks ``own_dropout=`` and turns it into edits, without changing the model.

Native dropout is every random operation that the model itself contains: dropout, stochastic depth,
attention dropout, and others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphreg.errors import ROUNDS_TO_1, NoMatchError, RegularizerError, number_of, numeric_text, shown, suggestions_text
from graphreg.ir.random_ops import NativeDropout
from graphreg.ir.selector import Missing, Pattern, complain, select, strings_of
from graphreg.ir.site import Site
from graphreg.ir.terminal import Lines, Paragraph
from graphreg.ir.text_table import Table
from graphreg.regularizer.by_depth import read_strength
from graphreg.schedules import Schedule, VaryingStrength

log = logging.getLogger("graphreg")

Choice = Literal["keep", "seeded", "off"]
# from selectors to choices and rates, or a schedule as plain data
OwnDropout = Choice | float | Mapping[Any, Any]
CHOICES = ("keep", "seeded", "off")
# the key of this option in mappings such as Plan.missed, whose other keys are names of regularizers
OWN_DROPOUT = "own_dropout"


@dataclass(frozen=True)
class NativeDropoutEdit:
    """What to do with one native dropout.

    Attributes:
        dropout: The native dropout.
        rate: Its new rate, a number or a schedule. None keeps the model's rate; 0 turns the dropout
            off.
        matched: The selector that matched the dropout.
    """

    dropout: NativeDropout
    rate: float | None
    matched: str

    @property
    def draws(self) -> bool:
        """Whether the dropout draws from graphreg's streams: False if it is turned off."""
        return self.rate != 0

    @property
    def is_scheduled(self) -> bool:
        """Whether the rate changes while the model trains."""
        return isinstance(self.rate, Schedule)

    @property
    def action(self) -> str:
        """The action as text: ``off``, ``seeded``, or ``seeded at 0.1``."""
        return "off" if self.rate == 0 else "seeded" if self.rate is None else f"seeded at {self.rate:g}"


def decide(
    option: OwnDropout, dropouts: Sequence[NativeDropout], title: str, missing: Missing = "error", elsewhere: Sequence[Site] = ()
) -> tuple[tuple[NativeDropoutEdit, ...], tuple[NativeDropout, ...]]:
    """Decide what to do with each native dropout. If several selectors of ``own_dropout=`` match one dropout, the last of them counts.

    Args:
        option: The value of ``own_dropout=``, as ``read_option`` returns it.
        dropouts: The model's native dropouts.
        title: The model's name, for errors.
        missing: What to do when a selector matches nothing.
        elsewhere: All values of the model. A string that excludes, such as ``!layer4.*``, may match
            values that are no dropouts.

    Returns:
        The edits, and the dropouts that were chosen but cannot be moved to graphreg's streams.

    Raises:
        RegularizerError: None of the chosen dropouts can be moved.
        NoMatchError: A selector matches no dropout.
    """
    if option == "keep":
        return (), ()

    choices: dict[str, tuple[Any, str]] = {}
    by_selector = isinstance(option, Mapping)
    for selector, value in option.items() if isinstance(option, Mapping) else [("*", option)]:
        if not dropouts:
            what = f"own_dropout: {selector!r} names no dropout of {title}" if by_selector else "own_dropout has nothing to act on"
            cure = "Leave own_dropout at 'keep', or add dropout: hidden_dropout=0.1."
            complain(f"{what}, because {title} contains no dropout. {cure}", missing)
        for site, text in _matching(selector, dropouts, title, missing, elsewhere) if dropouts else ():
            choices[site.name] = (value, text)

    chosen = [(dropout, *choices[dropout.site.name]) for dropout in dropouts if dropout.site.name in choices]
    # A later selector may keep a dropout that an earlier one, such as '*', has chosen.
    chosen = [choice for choice in chosen if choice[1] != "keep"]
    unmovable = tuple(dropout for dropout, _, _ in chosen if dropout.why_not)
    movable = [choice for choice in chosen if not choice[0].why_not and choice[0].when != "never"]

    fixed = {"seeded": None, "off": 0.0}
    rates = [fixed[each] if isinstance(each, str) else each if isinstance(each, Schedule) else float(each) for _, each, _ in movable]
    edits = tuple(NativeDropoutEdit(dropout, rate, text) for (dropout, _, text), rate in zip(movable, rates, strict=True))

    if unmovable and not edits:
        raise RegularizerError(
            f"own_dropout={option!r} cannot be applied to {title}: " + "; ".join(dropout.text for dropout in unmovable) + ". "
            "Use own_dropout='keep', or change these calls in the model. graphreg can replace only torch's dropouts, stochastic depth "
            "and attention dropout, and only where it can trace them."
        )
    return edits, unmovable


def log_unmovable(unmovable: Iterable[NativeDropout]) -> None:
    """Warn in the log of dropouts that were chosen but cannot be moved."""
    for dropout in unmovable:
        log.warning("native dropout keeps drawing from torch's generator: %s", dropout.text)


def _matching(
    selector: Any, dropouts: Sequence[NativeDropout], title: str, missing: Missing, elsewhere: Sequence[Site]
) -> list[tuple[Site, str]]:
    """Match a selector, with the dropouts as the only candidates. So ``*`` means all dropouts, including those inside submodules."""
    sites = [dropout.site for dropout in dropouts]
    try:
        matched = select(selector, sites, sites, what="dropout", model=title, missing=missing, who="own_dropout", elsewhere=elsewhere)
        return list(matched.items())
    except NoMatchError:
        names = ", ".join(site.name for site in sites[:6]) + (f" and {len(sites) - 6} more" if len(sites) > 6 else "")
        asked = Pattern.parse(selector) if isinstance(selector, str) else None
        ops = [label.op for site in sites for label in site.labels]
        suggestion = suggestions_text(asked.op, ops, "Near ops") if asked and asked.op else ""
        suggestion = suggestion or suggestions_text(asked.name if asked else str(selector), strings_of(sites))
        raise NoMatchError(f"own_dropout: {selector!r} names no dropout of {title}.{suggestion} Its dropouts: {names}.") from None


def read_option(option: Any) -> Any:
    """Return the value of ``own_dropout=``, with schedules in place of plain data that stands for them.

    Raises:
        RegularizerError: The value is not one of ``CHOICES``, a rate in [0, 1), a schedule of
            rates, or a dict of selectors to these.
    """
    option = read_strength(option)
    if isinstance(option, Mapping):
        option = {selector: read_strength(choice) for selector, choice in option.items()}
    for where, value in option.items() if isinstance(option, Mapping) else [(None, option)]:
        if not (value in CHOICES if isinstance(value, str) else is_rate(value)):
            # A number in quotes gets a hint of its own.
            hint = numeric_text(value)
            rate = None if isinstance(value, (bool, str)) else number_of(value)
            if rate is not None and ROUNDS_TO_1 <= rate < 1:
                hint = " In float32, this rate is 1."
            suggestion = f" {hint.strip()}" if hint else suggestions_text(value, CHOICES, "Near words") if isinstance(value, str) else ""
            at = "" if where is None else f" (for {shown(where)})"
            raise RegularizerError(
                f"own_dropout={shown(value)}{at} is not allowed; it is 'keep', 'seeded', 'off', or a rate in [0, 1), for all or by "
                f"selector: own_dropout={{'layer4.*': 'off'}}.{suggestion}"
            )
    return option


def is_rate(value: object) -> bool:
    """Return whether a value is a rate of dropout, in [0, 1) also as a number of float32, or a schedule of such rates."""
    if isinstance(value, Schedule):
        return all(map(is_rate, value.values))
    number = None if isinstance(value, (bool, VaryingStrength)) else number_of(value)
    return number is not None and 0 <= number < ROUNDS_TO_1


def rates_are_scheduled(option: OwnDropout) -> bool:
    """Return whether ``own_dropout=`` has a schedule for any native dropout."""
    return any(isinstance(value, Schedule) for value in (option.values() if isinstance(option, Mapping) else (option,)))


def native_dropout_table(edits: Sequence[NativeDropoutEdit], unmovable: Sequence[NativeDropout]) -> Iterator[Paragraph]:
    """Yield what a plan shows about native dropout."""
    if not edits and not unmovable:
        return
    rows = [(e.dropout.site.name, e.dropout.site.op, f"{e.dropout.rate:g}", e.dropout.when, e.action, e.matched) for e in edits]
    yield Lines((f"native dropout: {len(edits) + len(unmovable)} chosen, {len(edits)} replaced",))
    yield Table(("site", "op", "rate", "acts", "becomes", "matched by"), tuple(rows))
    yield Lines(tuple(dropout.text for dropout in unmovable))
