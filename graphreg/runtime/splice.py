"""``SpliceRule``, the runtime module that runs a splice at its site."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.compiler.recompute import recompute_in_backward
from graphreg.errors import RegularizerError
from graphreg.ir.layout import clone, laid_out, overlaps
from graphreg.ir.time_steps import Steps
from graphreg.ir.units import Units
from graphreg.regularizer.base import Splice
from graphreg.regularizer.purity import called, is_proven
from graphreg.regularizer.shared_axes import shared_axes
from graphreg.rng.ahead import CallPlace
from graphreg.rng.hash import in_plain_eager
from graphreg.rng.noise import Noise
from graphreg.rng.operators import compiling, recomputes
from graphreg.rng.window import Window
from graphreg.runtime.model_inputs import fitted, require_inputs
from graphreg.runtime.rank_layout import require_separable, shard_window, window, within
from graphreg.runtime.runtime_module import WIDE, DrawingRule, LayerMode, accumulation, element_of
from graphreg.torch_internals.distributed import is_distributed, without_partial_sums
from graphreg.torch_internals.other_threads import is_compiling

_PLAIN_FORMULA = ("z", "weight", "noise")  # what most formulas take


class SpliceRule(DrawingRule):
    """Runs a splice at a site. The splice acts while the module that owns the site is in train mode, or in a block of ``noise_on``.

    It does not act in a block of ``noise_off``.
    """

    overwritten = False  # whether the model may write into the value later
    # whether a call at which the splice does not act returns a copy of the value and not the value itself: see Insertions.apart
    apart = False

    def __init__(
        self, regularizer: Splice, site: str, strength: Tensor | None, slot: int, path: str, steps: Steps | None = None,
        units: Units | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{type(regularizer).__name__} at {site}", site, slot, path, strength)
        self.regularizer, self.steps, self.units = regularizer, steps, units
        self.share_axes = regularizer.engine_options.share_axes
        self.on_parameter = regularizer.on == "parameters"

    def adopt(self, owner: nn.Module) -> None:
        self.owner = (LayerMode(vars(owner)) if isinstance(owner, nn.RNNBase) else owner,)

    def acts(self) -> bool:
        """Whether the splice acts in the present mode and the open blocks of ``noise_on`` and ``noise_off``."""
        return not self.silenced and (self.forced or self.owner[0].training)

    def may_recompute(self) -> bool:
        """Whether a compiled backward may recompute the result."""
        return self.recomputed

    def differs_in_eval(self) -> bool:
        """Whether the splice has a form for eval mode (``in_eval``), which replaces the value while ``acts()`` is False."""
        return bool(self.regularizer.takes_in_eval)

    def forward(self, z: Tensor, key: Tensor, /, *, clock: Tensor | None = None, **others: Any) -> Tensor:
        """Replace a value ``z`` of any shape and floating dtype. Return a tensor of the same shape and dtype.

        ``key``: int32 [streams, 2], or one row of it. ``clock``: what the clock returned, [elements], for a strength that has a schedule.
        ``others``: ``module_input`` and ``previous``, each [shape of z], for a splice that takes it, and the inputs of the model that the
        formula takes, by the names of its arguments. If the splice does not act, the result is that of its form for eval mode; without
        such a form, it is ``z`` itself, or a copy of ``z`` if ``apart``.
        """
        if not (acts := self.acts()) and not self.differs_in_eval():
            return clone(z) if self.apart else z
        is_quick = (
            acts and clock is None and not others  # nothing is to be prepared for the formula: it takes a plain tensor, a weight and noise
            and type(z) is Tensor and z.dtype in WIDE and self.regularizer.takes == _PLAIN_FORMULA
            and self.cuts == () and not self.share_axes  # ``not`` of a tuple that is not empty breaks a graph of Dynamo
        )  # fmt: skip
        if is_quick:
            in_eager = in_plain_eager() and not compiling()
            return self._replaced_in_eager(z, key) if in_eager else self._replaced_while_traced(z, key)
        inputs = {name: others.pop(name) for name in self.regularizer.model_inputs if name in others}
        if is_distributed(z):
            return _on_shards(self, z, self.row(key), inputs, clock, others)
        return self.replaced(z, key, window(z, self.cuts, self.description), inputs, clock, others)

    def _replaced_in_eager(self, z: Tensor, key: Tensor) -> Tensor:
        """Do what ``_replaced_while_traced`` does where no compiler, tracer or transform is active. Small nets spend their time here."""
        regularizer, dtype = self.regularizer, z.dtype
        if type(regularizer).unfit is not Splice.unfit:
            regularizer.require_fit(z.shape, self.description)
        weight = self.kept(element_of, (self.elements[0], dtype))
        if weight is None:
            weight = self.weight(dtype)

        place, slot = None, self.slot
        if key.dim() > 1:
            source: Any = self.rules[0]._modules.get("key") if self.rules else None
            ahead = getattr(getattr(source, "shared", (source,))[0], "ahead", None)
            known = None if ahead is None else ahead.known
            if known is not None and (at := known.place(key)) is not None:
                place = CallPlace(self.ahead, known, at, slot)
            key = key[slot]
        noise = Noise(key, (), None, place)

        y = regularizer(z=z, weight=weight, noise=noise) if is_proven(regularizer) else self._plain_formula(z, weight, noise)
        is_alike = type(y) is Tensor and y.dtype == dtype and y.shape == z.shape
        return y if is_alike and y.layout is z.layout is torch.strided and y.stride() == z.stride() else self._fitting(y, z)

    def _replaced_while_traced(self, z: Tensor, key: Tensor) -> Tensor:
        """Replace a value as ``replaced`` does, where nothing is to be prepared for the formula."""
        self.regularizer.require_fit(z.shape, self.description)
        weight, noise = self.weight(z.dtype), self.noise(key)
        if self.may_recompute() and recomputes():
            y = recompute_in_backward(self._plain_formula, z, weight, noise, self.on_parameter)
        else:
            y = self._plain_formula(z, weight, noise)
        return self._fitting(y, z)

    def _plain_formula(self, z: Tensor, weight: Tensor, noise: Noise) -> Any:
        return called(self.regularizer, {"z": z, "weight": weight, "noise": noise})

    def replaced(
        self, z: Tensor, key: Tensor, window: Window | None, inputs: dict[str, Any], clock: Tensor | None, others: dict[str, Tensor]
    ) -> Tensor:
        """Replace a value that is no DTensor, as ``forward`` does. ``inputs``: the inputs of the model.

        ``window``: if ranks divide the value among them, where this rank's part lies in the whole value; None if the rank has the whole.
        """
        acts = self.acts()
        if not isinstance(z, Tensor) or not z.is_floating_point():
            what = z.dtype if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise RegularizerError(
                f"{self.description}: the value is {what}, and only floating-point values can be spliced. Leave the site out."
            )
        if z.is_nested:
            raise RegularizerError(
                f"{self.description}: the value is a nested tensor, and masks and noise need sizes that are numbers. Leave the site out, "
                "or give the model padded inputs (to_padded_tensor)."
            )
        self.regularizer.require_fit(z.shape, self.description)
        if self.units is not None:
            self.units.require(z.shape, self.description)
        require_inputs(self.regularizer, inputs, self.description)
        if self.steps is not None and "lengths" in inputs:
            inputs = {**inputs, "lengths": self.steps.counts(inputs["lengths"], z, self.description)}
        # recompute_in_backward takes no other value of the model than z: a splice that reads one with a gradient is not recomputed
        alone = not others and not any(value.is_floating_point() or value.is_complex() for value in inputs.values())
        given = self._others(z, others) | fitted(self.regularizer, inputs, z.dtype, z.device)
        shared = shared_axes(self.share_axes, self.steps, z.shape, self.description) if self.share_axes else ()
        weight, noise = self.weight(accumulation(z.dtype), clock), self.noise(key, shared, window)
        formula = partial(self._formula, others=given)
        recompute = self.may_recompute() and recomputes() and alone
        if not acts:
            y = self._in_eval(z, weight, given)
        elif recompute:
            y = recompute_in_backward(formula, z, weight, noise, self.on_parameter)
        else:
            y = formula(z, weight, noise)
        if not z.dim() and isinstance(y, Tensor) and y.dtype == weight.dtype:
            y = y.to(z.dtype)  # a strength without dims promotes only a value that has none, either: float16 times float32 is float32
        return self._fitting(y, z)

    def _fitting(self, y: Any, z: Tensor) -> Tensor:
        """Return what the formula gave for ``z``, with the strides of ``z``. Raise RegularizerError if it is no tensor like ``z``."""
        if not isinstance(y, Tensor):
            raise RegularizerError(f"{self.description} gave {type(y).__name__}; a splice gives a tensor like its site's.")
        if y.shape != z.shape or y.dtype != z.dtype:
            raise RegularizerError(
                f"{self.description} gave {tuple(y.shape)} {y.dtype} for {tuple(z.shape)} {z.dtype}; a splice gives a tensor like its "
                "site's."
            )
        return y if z.layout is not torch.strided or y.stride() == z.stride() else self._laid_out(y, z)

    def _laid_out(self, y: Tensor, z: Tensor) -> Tensor:
        """Return ``y`` with the strides of ``z``.

        Strides decide the layout and the rounding of the operations that follow. They also decide whether such an operation returns a
        view or a copy, which makes a difference if the model then writes in place.
        """
        if z.is_contiguous() and y.is_contiguous():  # their strides differ only in axes of length 1
            return y if is_compiling() else y.as_strided(z.shape, z.stride())
        if not overlaps(z):
            return laid_out(y, z)
        if self.overwritten:
            raise RegularizerError(
                f"{self.description}: elements of the value share their place in memory (it was expanded or unfolded), and the model "
                "writes into it. A write then changes several elements at once, which no replacement can imitate. Choose an "
                "earlier site, where the value is not yet expanded or unfolded, or clone the value in the model's code."
            )
        return y

    def _others(self, z: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``others`` in z's dtype. If the formula takes ``previous`` and the cell got no state, add zeros."""
        if "previous" in self.regularizer.takes:
            others = {"previous": torch.zeros_like(z), **others}
        for name, value in others.items():
            if value.shape != z.shape:
                what = "module" if name == "module_input" else "cell"
                raise RegularizerError(
                    f"{self.description}: the {what} gets {tuple(value.shape)} and returns {tuple(z.shape)}, so its input cannot take the "
                    "place of its output. Leave the site out."
                )
        return {name: value.to(z.dtype) for name, value in others.items()}

    def _in_eval(self, z: Tensor, weight: Tensor, others: dict[str, Any]) -> Any:
        arguments = {"z": z, "units": self._moved(z), "weight": weight, **others}
        y = self.regularizer.in_eval(**{name: arguments[name] for name in self.regularizer.takes_in_eval})  # type: ignore[attr-defined]
        return self.moved_back(y)

    def _moved(self, z: Tensor) -> Tensor:
        """Return the value with the axis of units at the end, for a formula that takes ``units``."""
        return z if self.units is None else z.movedim(self.units.axis, -1)

    def moved_back(self, y: Any) -> Any:
        """Move the axis of units in a formula's result back to where the value has it, if the formula takes ``units``."""
        return y if self.units is None or not isinstance(y, Tensor) or not y.dim() else y.movedim(-1, self.units.axis)

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise, others: dict[str, Any]) -> Any:
        arguments: dict[str, Any] = {"z": z, "w": z, "weight": weight, "noise": noise, **others}
        arguments["units"] = self._moved(z)
        if "values" in self.regularizer.takes:  # nothing else reads self.site: Dynamo compiles a graph for each value of it
            arguments["values"] = {self.site: z}
        return self.moved_back(called(self.regularizer, {name: arguments[name] for name in self.regularizer.takes}))


def _on_shards(
    splice: SpliceRule, z: Any, key: Tensor, inputs: dict[str, Any], clock: Tensor | None, others: dict[str, Tensor]
) -> Tensor:
    """Replace a DTensor. Return a DTensor with the same placements, except that partial sums are added up first.

    The mask is the one that a single process would draw for the whole value, so that the result does not depend on the placements.

    Args:
        splice: The splice.
        z: The DTensor.
        key: The splice's row of the keys, int32 [2].
        inputs: The inputs of the model that the formula takes; none are allowed.
        clock: As in ``SpliceRule.forward``.
        others: As in ``SpliceRule.forward``; they must be DTensors.

    Raises:
        RegularizerError: The value is a parameter, the formula cannot be applied to a part of a value, or an argument is not allowed.
        GraphRegError: The value is divided in another way than ``Shard`` says.
    """
    if splice.on_parameter:
        raise RegularizerError(
            f"{splice.description}: the parameter is sharded here (DTensor), so that each rank would draw for a part of it. With "
            "fully_shard, apply it to the whole module alone, not to its submodules, so that its forward has whole parameters. With "
            "parallelize_module, leave the parameter out."
        )
    if inputs:
        option = next(iter(inputs))
        raise RegularizerError(
            f"{splice.description}: the value is a DTensor, and the input that {option}= names is not divided as it is. Leave {option}= "
            "out, or the site."
        )
    if plain := [name for name, value in others.items() if not is_distributed(value)]:
        what = "module" if plain[0] == "module_input" else "cell"
        raise RegularizerError(f"{splice.description}: the value is a DTensor, and the {what} gets a plain tensor. Leave the site out.")
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  # most processes never need it

    z = without_partial_sums(z)
    distributed: dict[str, Any] = dict(others)  # Dynamo does not know dict[str, Any](others)
    place = shard_window(z)
    require_separable(splice.regularizer, place, splice.description)
    # this rank's parts of the other values, which may be divided in another way
    local: dict[str, Tensor] = {name: value.redistribute(z.device_mesh, z.placements).to_local() for name, value in distributed.items()}
    place = within(place, z, splice.cuts, splice.description)
    part = splice.replaced(z.to_local(), splice.key_among(key, z.device_mesh), place, {}, clock, local)
    # the shape and strides are said, because by the part alone torch would take all parts to be of
    # one size
    whole: Tensor = DTensor.from_local(part, z.device_mesh, z.placements, run_check=False, shape=z.shape, stride=z.stride())
    return whole
