"""Finds the values that ``keep=`` selects, which a call of the rewritten module returns beside output and penalties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphreg.errors import RegularizerError, shown
from graphreg.ir.selector import Missing, Pattern, Selector, select, strings, unmatched
from graphreg.ir.site import Site, dtype_text, shape_text
from graphreg.ir.terminal import Lines, Paragraph
from graphreg.ir.text_table import Table
from graphreg.regularizer.sequences import cell_calls
from graphreg.tracing.trace import Traced

# "spliced": as the model reads the value; "clean": before the splices at its site
KeptForm = Literal["spliced", "clean"]
KEPT_FORMS = ("spliced", "clean")
# A mapping may also have tuples of strings and functions as keys.
Keep = Selector | Mapping[Any, KeptForm]
KEEP = "keep"  # the key of this option in mappings such as Plan.missed, whose other keys are names of regularizers


@dataclass(frozen=True)
class KeptValue:
    """A value that a call returns.

    Attributes:
        name: Its key in ``Kept.values``: the name by which the selector found it.
        site: Its site; for the calls of a recurrent cell, the site of the first call.
        form: ``"spliced"`` for the value as the model reads it, ``"clean"`` for the value before the splices at its site.
        matched: The string of the selector that matched it; for a function, the function's name.
        calls: The sites of all calls of a recurrent cell, which are one sequence; () for a single value.
    """

    name: str
    site: Site
    form: KeptForm
    matched: str
    calls: tuple[Site, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The labels of the values in a graph: that of the value, or those of the calls.

        Not the name of the site: where a module returns another value in eval mode than in train mode, its path labels both.
        """
        return tuple(call.name for call in self.calls) or (self.name,)

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of the value's row in a table."""
        place = f"{self.site.name} ({len(self.calls)} calls)" if self.calls else self.site.name
        return self.name, place, self.site.op, shape_text(self.site), dtype_text(self.site), self.form, self.matched


HEADINGS = ("kept", "site", "op", "shape", "dtype", "form", "matched by")


def kept_values(traced: Traced, keep: Keep | None, missing: Missing) -> tuple[KeptValue, ...]:
    """Return the values that ``keep=`` selects, in the order of the graph. If several selectors find one name, the last one counts.

    Raises:
        NoMatchError: A string matches no value, and ``missing`` is ``"error"``.
        RegularizerError: The calls of a cell have different shapes.
    """
    found: dict[tuple[str, str], KeptValue] = {}
    for selector, form in _forms(keep).items():
        matched = select(
            selector, traced.values, _usual(traced), model=traced.title, missing=missing, who="keep=", usual="the hidden values",
            elsewhere=traced.parameters,
        )  # fmt: skip
        labels = {text: _labels(text, traced) for text in set(matched.values())} if strings(selector) else {}
        for site, (text, calls) in cell_calls(selector, matched, traced.values, traced.operations, traced.graphs).items():
            name = labels.get(text, {}).get(site.name, site.name)
            _require_one_shape(name, calls)
            found[site.name, name] = KeptValue(name, site, form, text, calls)
    order, by_name = {site.name: i for i, site in enumerate(traced.values)}, dict[str, KeptValue]()
    for key in sorted(found, key=lambda key: order[key[0]]):
        # A module may return another value in eval mode, which has the same name.
        by_name.setdefault(found[key].name, found[key])
    return tuple(by_name.values())


def missed_values(traced: Traced, keep: Keep | None) -> tuple[str, ...]:
    """Return the strings of the selectors of ``keep=`` that match nothing."""
    usual = _usual(traced)
    return tuple(text for selector in _forms(keep) for text in unmatched(selector, traced.values, usual, traced.parameters))


def check_keep(keep: object, penalties: str = "return") -> None:
    """Raise RegularizerError for a value of ``keep=`` that is not allowed, or together with attached penalties."""
    given = [] if keep is None else list(keep.items()) if isinstance(keep, Mapping) else [(keep, "spliced")]
    selectors = [each for each, form in given if form in KEPT_FORMS and (isinstance(each, (str, Sequence)) or callable(each))]
    if len(selectors) < len(given) or (isinstance(keep, Mapping) and not keep):
        raise RegularizerError(
            f"keep={shown(keep)} is not allowed; give a selector ('layer4.*', several strings, or a function of a site), or a dict of "
            "selectors to 'spliced' or 'clean', which is the value before the splices at its site."
        )
    for selector in selectors:
        strings(selector)
    if keep is not None and penalties == "attach":
        raise RegularizerError(
            "keep= and penalties='attach' do not go together: then a call returns the model's output alone. Leave penalties= out, and add "
            "sum(penalties.values()) to the loss."
        )


def refuse_keep(keywords: Mapping[str, Any], who: str, why: str) -> None:
    """Raise RegularizerError if a function that cannot keep values is given ``keep=``. ``why``: a clause."""
    if KEEP in keywords:
        raise RegularizerError(f"keep= is no option of {who}: {why}. graphreg.regularize has it.")


def kept_table(kept: Sequence[KeptValue]) -> Iterator[Paragraph]:
    """Yield what a plan shows about kept values."""
    if kept:
        yield Lines((f"{len(kept)} value{'s' * (len(kept) != 1)} kept",))
        yield Table(HEADINGS, tuple(value.row for value in kept))


def _forms(keep: Keep | None) -> Mapping[Selector, KeptForm]:
    if isinstance(keep, Mapping):
        return keep
    if keep is None or callable(keep):
        return {} if keep is None else {keep: "spliced"}
    # Each string has names of its own, but one with ``!`` takes away from the others.
    together = any(Pattern.parse(text).exclude for text in strings(keep))
    return {tuple(strings(keep)): "spliced"} if together else dict.fromkeys(strings(keep), "spliced")


def _usual(traced: Traced) -> list[Site]:
    return [site for site in traced.values if site.selectable and site.role == "hidden"]


def _labels(text: str, traced: Traced) -> dict[str, str]:
    """Return the first label of each site that a string matches, by the site's name; the sites of a lone ``*`` are left out."""
    pattern, labels = Pattern.parse(text), dict[str, str]()
    for label, site in pattern.labels(traced.values) if not pattern.lone else ():
        labels.setdefault(site.name, label.text)
    return labels


def _require_one_shape(name: str, calls: Sequence[Site]) -> None:
    shapes = dict.fromkeys(str(call.shape) for call in calls if call.shape is not None)
    if len(shapes) > 1:
        raise RegularizerError(
            f"keep={name!r}: the calls of this cell are one sequence, and they give different shapes: {', '.join(shapes)}. "
            "Select the calls one by one, by a function of a site."
        )
