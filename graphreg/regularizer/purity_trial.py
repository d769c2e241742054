"""Tries each formula on small tensors before a graph is touched, to see whether it is pure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from graphreg.ir.site import Site
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.regularizer.formula_arguments import VJP_NAMES
from graphreg.regularizer.purity import ImpureError, generators_put_back, twice, unproven
from graphreg.regularizer.vjp import Vjp
from graphreg.rng.noise import Noise

# common shapes: the output of a dense layer, a sequence, small images, and images that a window of
# size 7 fits into
_SHAPES: tuple[tuple[int, ...], ...] = ((2, 3), (2, 3, 4), (2, 3, 4, 4), (2, 3, 8, 8))
# the full shapes of sites are tried if they have at most this many elements in total
_SMALL = 1 << 12
_SETTINGS = {"pattern", "weight", "name", "expect", "rng", "clean"}  # options that no formula reads
_InputLike = tuple[int | None, torch.dtype]
# samples of an input of the model, for a value [batch, ...]: one like the value, a mask, labels,
# tokens, weights of examples or steps
_INPUTS: tuple[_InputLike, ...] = (
    (None, torch.float32), (None, torch.bool), (1, torch.int64), (2, torch.int64), (1, torch.bool), (2, torch.bool), (1, torch.float32),
    (2, torch.float32),
)  # fmt: skip
# by class, the combinations of options that were tried
_known: WeakKeyDictionary[type, set[tuple[str, ...]]] = WeakKeyDictionary()


def require_pure(regularizer: Regularizer, sites: Sequence[Site]) -> None:
    """Raise if a formula draws random numbers without its noise, writes into its arguments, or keeps state between calls.

    Each class is tried once for each combination of options. A formula that runs on none of the
    sample tensors, because it needs other shapes, is watched at its first eager call instead.

    Args:
        regularizer: The regularizer whose formula to try.
        sites: The sites that the regularizer will act on; their shapes are tried, too.

    Raises:
        RegularizerError: The formula is impure.
    """
    options = (*(repr(getattr(regularizer, f.name)) for f in fields(regularizer) if f.name not in _SETTINGS),)
    known = _known.setdefault(type(regularizer), set())
    if options not in known:
        if not _probed(regularizer, sites):
            unproven.add(type(regularizer))
        known.add(options)


def _probed(regularizer: Regularizer, sites: Sequence[Site]) -> bool:
    """Try the formula; return whether it ran on any of the sample tensors."""
    ran = False
    for shapes, like in product(_guesses(regularizer, sites), _INPUTS if regularizer.input_options else (None,)):
        try:
            # The outcome must not depend on the modes of the caller: in inference mode, for
            # example, no formula could be differentiated.
            with generators_put_back(), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                warnings.simplefilter("ignore")
                with torch.autocast("cpu", enabled=False):
                    arguments = _sample_arguments(regularizer, shapes, like)
                    for method, takes in _methods(regularizer):
                        given = {name: arguments[name] for name in takes}
                        twice(regularizer, lambda method=method, given=given: method(**_anew(given)))  # type: ignore[misc]
            ran = True
        except ImpureError:
            raise
        except Exception:  # a formula may raise anything for a value that does not fit it
            continue
    return ran


def _guesses(regularizer: Regularizer, sites: Sequence[Site]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield dicts of shapes to try. Each dict has a shape for every value that the formula gets, by name.

    If the shapes of the sites are known, they come first: with each axis cut to 4, then uncut if
    they are small. Common shapes follow.
    """
    if "units" in regularizer.takes:
        # Whatever the shape of the value, the formula gets a matrix.
        yield {"units": (5, 3)}
        return
    together = "values" in regularizer.takes or regularizer.takes_vjp
    groups = [list(sites)] if together else [[site] for site in {len(s.shape): s for s in sites if s.shape is not None}.values()]
    for group in groups:
        shapes = {site.name: site.shape for site in group if site.shape is not None}
        if shapes and len(shapes) == len(group):
            yield {name: tuple(min(size, 4) for size in shape) for name, shape in shapes.items()}
            if sum(torch.Size(shape).numel() for shape in shapes.values()) <= _SMALL:
                yield shapes
    if regularizer.on == "values":
        names = [site.name for site in sites] if together else ["z"]
        yield from (dict.fromkeys(names, shape) for shape in (((5, 2, 3),) if "steps" in regularizer.takes else _SHAPES))


def _sample_arguments(regularizer: Regularizer, shapes: Mapping[str, tuple[int, ...]], like: _InputLike | None) -> dict[str, Any]:
    """Return sample arguments for a formula. As in a call, the values are tensors that autograd records and that are not leaves.

    ``like``: how many axes of the value an input of the model has, None for all, and its dtype.
    """
    values = {name: _in_range(_value(shape, i), regularizer).requires_grad_().clone() for i, (name, shape) in enumerate(shapes.items())}
    first = next(iter(values.values()))
    noise = {name: Noise(torch.tensor([12345 + i, 678], dtype=torch.int32)) for i, name in enumerate(values)}
    made: dict[str, Any] = {"z": first, "w": first, "values": values, "steps": first, "units": first, "noise": next(iter(noise.values()))}
    made["module_input"] = made["previous"] = first.clone()
    made["weight"] = torch.full((), 0.25)
    made |= dict.fromkeys(("lengths", "counted", *regularizer.input_options))
    if like is not None:
        axes, dtype = like
        inputs = regularizer.model_inputs.keys() - {"lengths"}
        made |= {option: torch.ones(first.shape[:axes], dtype=dtype) for option in inputs}
    if "state" in regularizer.takes:
        made["state"] = regularizer.init_state(first.detach())
    if regularizer.takes_vjp:
        vjp = Vjp({name: torch.tanh(z * 0.5) for name, z in values.items()}, {"x": first}, noise, proven=True)
        made |= dict.fromkeys(VJP_NAMES, vjp)
    return made


def _methods(regularizer: Any) -> list[tuple[Callable[..., Any], tuple[str, ...]]]:
    """Return the formula, and a splice's ``in_eval`` and ``penalty``, each with the names of its arguments."""
    methods = [(regularizer, regularizer.takes)]
    if isinstance(regularizer, Splice):
        methods += [(getattr(regularizer, "in_eval", None), regularizer.takes_in_eval)]
        methods += [(getattr(regularizer, "penalty", None), regularizer.penalty_takes)]
    return [(method, takes) for method, takes in methods if takes]


def _anew(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same arguments for another call, with new noise objects that draw the same numbers again."""
    again = dict(arguments)
    if "noise" in arguments:
        again["noise"] = Noise(arguments["noise"].key)
    for vjp in VJP_NAMES:
        if vjp in arguments:
            again[vjp] = replace(arguments[vjp], noise={name: Noise(noise.key) for name, noise in arguments[vjp].noise.items()})
    return again


def _in_range(value: Tensor, regularizer: Regularizer) -> Tensor:
    """Map numbers between -1 and 1 to the regularizer's ``value_range``, if it has one."""
    if not isinstance(regularizer, Penalty) or regularizer.value_range is None:
        return value
    low, high = regularizer.value_range
    return low + (high - low) * (value + 1) / 2


def _value(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a tensor of distinct numbers of both signs, made without random draws."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1 + seed, count + 1 + seed, dtype=torch.float32) * 1.7).reshape(shape)
