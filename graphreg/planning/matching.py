"""Finds the sites that a regularizer's selector matches, and counts the sites of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from graphreg.errors import NoMatchError, RegularizerError, TraceError
from graphreg.ir.operations import function_name
from graphreg.ir.selector import Missing, Pattern, select, unmatched
from graphreg.ir.site import Site
from graphreg.ir.time_steps import Steps
from graphreg.planning.keywords import like_an_option
from graphreg.planning.parameter_splices import with_reads
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.shared_axes import shared_axes
from graphreg.regularizer.units import units_at
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.tracing.trace import Traced

# words by which a selector may mean the weights of attention
_OF_ATTENTION = ("softmax", "attn", "attention", "prob")


@dataclass(frozen=True)
class Count:
    """How many sites of one kind there are, and how many elements they have together (None if a shape is unknown)."""

    sites: int = 0
    elements: int | None = 0


@dataclass(frozen=True)
class SiteCounts:
    """The counts of those values and parameters of a model that a selector can select."""

    values: Count = Count()
    parameters: Count = Count()

    def of(self, on: str) -> Count:
        """Return the count of one kind of site. ``on``: the kind, ``"values"`` or ``"parameters"``, as in ``Regularizer.on``."""
        return self.parameters if on == "parameters" else self.values


def count_sites(traced: Traced) -> SiteCounts:
    """Count the sites that can be selected."""
    return SiteCounts(*(count_of(site for site in sites if site.selectable) for sites in (traced.values, traced.parameters)))


def count_of(sites: Iterable[Site]) -> Count:
    """Count sites and their elements; a site that is given twice counts once."""
    shapes = [site.shape for site in {site.name: site for site in sites}.values()]
    known = [math.prod(shape) for shape in shapes if shape is not None]
    return Count(len(shapes), sum(known) if len(known) == len(shapes) else None)


def matching_sites(traced: Traced, regularizer: Regularizer, missing: Missing) -> dict[Site, str]:
    """Return the sites that a regularizer's selector matches, each with the string that matched it first."""
    sites, usual = _candidates(traced, regularizer)
    on_parameters = regularizer.on == "parameters"
    hints = (_parametrized,) if on_parameters else (_inside_opaque, _inside_attention)
    return select(
        regularizer.pattern, sites, usual, model=traced.title, missing=missing, who=type(regularizer).__name__, usual=regularizer.usual,
        what=f"parameter of {regularizer.min_dims} dims or more" if on_parameters else "value",
        elsewhere=_elsewhere(traced, regularizer),
        hint=lambda text: like_an_option(type(regularizer), text) + "".join(hint(traced, text) for hint in hints),
    )  # fmt: skip


def _inside_opaque(traced: Traced, text: str) -> str:
    """Return a hint if a selector that matches no value names modules inside opaque ones that ``example_inputs`` may open; else ``""``."""
    if any(site.shape is not None for site in traced.values):  # the trace had example inputs
        return ""
    pattern = Pattern.parse(text)
    # These could not be traced without inputs. Others are opaque for what they are.
    for outer in (path for path, reason in traced.opaque_modules.items() if reason.startswith(TraceError.__name__)):
        inside = next((path for path in traced.operations.modules if path.startswith(f"{outer}.") and pattern.path(path)), None)
        if inside is not None:
            return f" {inside!r} is inside the opaque module {outer!r}. Give example_inputs: with them, graphreg can trace more modules."
    return ""


def _inside_attention(traced: Traced, text: str) -> str:
    """Return a hint if a selector that matches no value seems to mean the weights of attention that one operation computes; else ``""``."""
    if not any(word in text.lower() for word in _OF_ATTENTION):
        return ""
    nodes = (node for graph in traced.graphs.values() for node in graph.nodes)
    if not any(function_name(node) == "scaled_dot_product_attention" for node in nodes):
        return ""
    return (
        f" The attention of {traced.title} is one operation, scaled_dot_product_attention, so its weights are not a value that a selector "
        "can match. In transformers, call model.set_attn_implementation('eager'), or create the model with attn_implementation='eager'. In "
        "timm, call timm.layers.set_fused_attn(False) before you create the model. '**.softmax' then selects the weights."
    )


def _parametrized(traced: Traced, text: str) -> str:
    """Return a hint if a selector that matches no parameter matches the name that a parametrized one had before; else ``""``."""
    pattern = Pattern.parse(text)
    for site in traced.parameters:
        owner, inside, rest = site.name.rpartition("parametrizations.")
        before = f"{owner}{rest.partition('.')[0]}"
        # As if the parameter had the name that it had before.
        if inside and pattern.find([Site((replace(site.labels[0], name=before),), kind="parameter")]):
            return f" {before} is parametrized, and its parameter is {site.name}: '**.original' selects such parameters."
    return ""


def missed(traced: Traced, regularizer: Regularizer) -> tuple[str, ...]:
    """Return the strings of a regularizer's selector that match nothing."""
    return unmatched(regularizer.pattern, *_candidates(traced, regularizer), _elsewhere(traced, regularizer))


def check_count(regularizer: Regularizer, sites: Sequence[Site]) -> None:
    """Raise NoMatchError if the regularizer has an ``expect`` that differs from the number of sites."""
    if regularizer.expect is not None and len(sites) != regularizer.expect:
        listed = ", ".join(site.name for site in sites[:6]) or "none"
        raise NoMatchError(
            f"{type(regularizer).__name__}({regularizer.pattern!r}): expect={regularizer.expect}, found {len(sites)} "
            f"site{'s' * (len(sites) != 1)} ({listed}). "
            "Change the selector, or the number."
        )


def check_sites(regularizer: Regularizer, sites: Iterable[Site]) -> None:
    """Raise RegularizerError for the first site where the regularizer's class says that it cannot act."""
    for site in sites:
        if why_not := regularizer.why_not(site):
            raise RegularizerError(f"{type(regularizer).__name__} at {site.name}: {why_not}")


def refusals(traced: Traced, regularizer: Regularizer) -> dict[str, str]:
    """Return the error of ``plan`` for each site that a selector may match and where the regularizer cannot act, by the site's name.

    Only what the site itself shows is known here: a site that is no sequence, or not the state of a
    cell, is not among them.
    """
    refused: dict[str, str] = {}
    cls, by_shape = type(regularizer), isinstance(regularizer, Splice) and type(regularizer).unfit is not Splice.unfit
    if cls.why_not is Regularizer.why_not and "units" not in regularizer.takes and not by_shape:
        return refused  # it refuses none, and a large model has very many sites
    for site in traced.parameters if regularizer.on == "parameters" else traced.values:
        try:
            check_sites(regularizer, [site])
            if "units" in regularizer.takes:
                units_at([site], regularizer, traced.unit_finder)
            if isinstance(regularizer, Splice):
                check_shapes(regularizer, {site: None}, axes=False)
        except RegularizerError as error:
            refused[site.name] = str(error)
    return refused


def _elsewhere(traced: Traced, regularizer: Regularizer) -> Sequence[Site]:
    """Return the sites of the other kind: values for a regularizer of parameters, and parameters for one of values."""
    return traced.values if regularizer.on == "parameters" else traced.parameters


def _candidates(traced: Traced, regularizer: Regularizer) -> tuple[list[Site], list[Site]]:
    """Return all sites of the kind that a regularizer acts on, and those of them that a lone ``*`` matches.

    Sites where the regularizer cannot act have ``selectable=False``.
    """
    on_parameters = regularizer.on == "parameters"
    sites = [_enough_dims(s, regularizer.min_dims) for s in traced.parameters] if on_parameters else list(traced.values)
    if isinstance(regularizer, Splice) and on_parameters:
        sites = with_reads(traced, regularizer, sites)
    elif isinstance(regularizer, Splice):
        # a splice at a value that nothing reads would silently do nothing
        sites = [s if s.used else replace(s, selectable=False, why_not=s.why_not or "its value is not used") for s in sites]
    return sites, regularizer.defaults([site for site in sites if site.selectable])


def _enough_dims(site: Site, dims: int) -> Site:
    if not site.selectable or (site.shape is not None and len(site.shape) >= dims):
        return site
    few = len(site.shape or ())
    return replace(site, selectable=False, why_not=f"{few} dim{'s' * (few != 1)}, {dims} needed")


def check_shapes(splice: Splice, sites: Mapping[Site, Steps | None], axes: bool = True) -> None:
    """Raise RegularizerError if the splice cannot take the shape of a site. A site of unknown shape passes.

    ``axes``: also check that the site has the axes of ``share_axes=``.
    """
    for site, steps in sites.items():
        if site.shape is None:
            continue
        who = f"{type(splice).__name__} at {site.name}"
        splice.require_fit(site.shape, who)
        if axes:
            shared_axes(splice.engine_options.share_axes, steps, site.shape, who)


def check_trainable(traced: Traced, regularizer: Penalty, sites: Sequence[Site]) -> None:
    """Raise RegularizerError if all the parameters that a penalty selects are frozen."""
    parameters = parameters_by_name(traced.model, once=True)
    if sites and not any(parameters[site.name].requires_grad for site in sites):
        raise RegularizerError(
            f"{type(regularizer).__name__}({regularizer.pattern!r}) selects only parameters that are frozen "
            f"({', '.join(site.name for site in sites[:3])}), so it would train nothing. Unfreeze one, or leave the penalty out. "
            "A copy that is not trained, such as a teacher, needs no penalty: graphreg.strip_(copy), or copy.eval(). If they train later, "
            "as in a GAN, give example_inputs, and call regularize or regularize_ while they train."
        )
