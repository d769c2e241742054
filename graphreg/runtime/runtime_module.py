"""Runtime modules: their container ``Rules``, their base class ``RuntimeModule``, and ``SpliceRule``, which runs a splice.

A rewritten module holds them under ``graphreg_rules``, one for each addition, and the emitted code calls them by name. They own the
strengths as buffers that are not persistent, and run the regularizers' formulas in the right precision and mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.compiler import recompute_in_backward
from graphreg.errors import RegularizerError
from graphreg.ir import Steps, brought, clone, has_float64, laid_out, overlaps
from graphreg.regularizer import Splice, called, shared_axes
from graphreg.rng import Noise, recomputes
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.site_strengths import OWN, Places


class Rules(nn.Module):
    """Container of a module's runtime modules: adds nothing to ``state_dict`` or its ``_metadata``, and keeps the dtype of buffers.

    Attributes:
        strengths: By regularizer name: the buffer with the regularizer's strength, which all runtime modules of the regularizer share.
        exact: By regularizer name: the strength exactly as it was set, if the device can hold it only in float32.
        places: By regularizer name: the sites that have elements of their own in the strength's buffer.
        chosen: By regularizer name: the strengths that were set since the plan, by site, and under ``OWN`` for all other sites.
        elements: By the name of a regularizer that has a schedule: the places of its elements in what the clock returns, first that of its
            own strength, then those of its sites. Such a regularizer has no entry in ``strengths``.
        build_record: How the module was made; None until the rewrite has finished.
        seeds: The seeds that the module's streams were made with, as in ``Asked``.
        watching: The monitor; None if no monitor watches the module.
        made_by: The mark of the torch.fx pass (``as_pass``) that rewrote the module; None if no pass did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strengths: dict[str, Tensor] = {}
        self.exact: dict[str, float] = {}
        self.places: dict[str, Places] = {}
        self.chosen: dict[str, dict[str, float]] = {}
        self.elements: dict[str, tuple[int, ...]] = {}
        self.build_record: BuildRecord | None = None
        self.seeds: dict[str, int] = {}
        self.watching: Any = None
        self.made_by: str | None = None

    def train(self, mode: bool = True) -> Rules:
        """Set only the flags ``training``: runtime modules follow the mode of the modules that own their sites."""
        self.training = mode
        for child in self.children():
            child.training = mode
        return self

    def find_owners(self, root: nn.Module) -> None:
        """Find, by path, the modules that own the sites, because a later pass may have replaced or removed some of them."""
        placed = [child for child in self.children() if isinstance(child, RuntimeModule) and child.path is not None]
        for child in placed:
            owner = root
            for name in str(child.path).split("."):  # as far as the path exists: torch.fx drops modules that contain no layer
                if (inner := owner._modules.get(name)) is None:
                    break
                owner = inner
            child.adopt(owner)
        placed = [child for child in placed if child.moves_key]
        if placed and isinstance(key := self._modules.get("key"), RuntimeModule):
            key.owner = tuple(dict.fromkeys(child.owner[0] for child in placed))
            # a Drawing that always acts is not counted: for it, the graph passes ``always`` to KeyRule.forward
            key.always = any(child.always for child in placed if not isinstance(child, Drawing))

    def state_dict(self, *args: Any, destination: Any = None, **more: Any) -> Any:
        """Add nothing: the user's state_dict and its metadata stay as they are."""
        return destination if destination is not None else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rules:
        """Follow the model to its device, and keep dtype and value through ``.half()`` and ``.to_empty()``."""
        self.move(fn, {})
        return self

    def move(self, fn: Callable[[Tensor], Tensor], moved: dict[int, Tensor]) -> None:
        """Move all tensors as ``fn`` moves them.

        Args:
            fn: Moves a tensor.
            moved: By the id of a tensor, the moved tensor. Each tensor is moved once, because several runtime modules share a strength.
                Containers that share strengths must get the same ``moved``.
        """
        for name, tensor in self.strengths.items():
            if id(tensor) not in moved:
                moved[id(tensor)] = self._strength(name, tensor, fn)
        for child in self.children():
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    if id(buffer) not in moved:
                        moved[id(buffer)] = brought(buffer, followed(buffer, fn))
                    child._buffers[name] = moved[id(buffer)]
            if isinstance(child, RuntimeModule):
                child.has_moved()
        self.strengths = {name: moved[id(tensor)] for name, tensor in self.strengths.items()}

    def _strength(self, name: str, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the strength on the device that ``fn`` moves to. If the device has float64, the strength is exactly as it was set."""
        device = followed(tensor, fn)
        new = brought(tensor, device)
        if new.dtype == tensor.dtype and (new.dtype == torch.float64 or not has_float64(device)):
            return new
        value = self.value(name)
        self.exact.pop(name, None)
        if has_float64(device):
            exactly = new.to(torch.float64)
            return torch.where(new == new[0], exactly.new_full((), value), exactly)
        self.exact[name] = value
        return new

    def has(self, name: str) -> bool:
        """Return whether there is a strength of this name."""
        return name in self.strengths or name in self.elements

    def value(self, name: str) -> float:
        """Return the strength exactly as it was set; of a schedule, that of the next call in train mode."""
        if name in self.elements:
            own: float = self._clock().value(self.elements[name][0])
            return own
        tensor = self.strengths[name]
        exact = self.exact.get(name)
        stored = float(tensor[0])
        return exact if exact is not None and float(torch.tensor(exact, dtype=tensor.dtype)) == stored else stored

    def set_value(self, name: str, value: float) -> None:
        """Change a strength in place, at all sites: all runtime modules of the regularizer share it."""
        self.set_by_site(name, {OWN: value})

    def set_by_site(self, name: str, chosen: Mapping[str, float]) -> None:
        """Change the strengths at sites in place.

        ``chosen``: those that differ from the plan, by site, and under ``OWN`` the one for all other sites.
        """
        self.chosen[name] = dict(chosen)
        places = self.places.get(name, Places())
        if name in self.elements:
            self._clock().set(self.elements[name], [chosen.get(OWN, places.own), *places.values(chosen)])
        else:
            self._set_elements(name, places, chosen)
        for child in self.children() if chosen.keys() - {OWN} else ():
            if isinstance(child, RuntimeModule) and child.own_element:
                child.element = child.own_element

    def _set_elements(self, name: str, places: Places, chosen: Mapping[str, float]) -> None:
        tensor = self.strengths[name]
        elements = places.elements(chosen.get(OWN, self.value(name)), places.values(chosen))
        tensor.copy_(tensor.new_tensor(elements))
        if name in self.exact:
            self.exact[name] = elements[0]

    def by_site(self, name: str) -> dict[str, float]:
        """Return the strength at each site; nothing for a formula that takes all of them at once."""
        if name in self.elements:
            clock, sites = self._clock(), self.places.get(name, Places()).sites
            return {site: clock.value(place) for site, place in zip(sites, self.elements[name][1:], strict=True)}
        return self.places.get(name, Places()).read([self.value(name), *self.strengths[name][1:].tolist()])


    def _clock(self) -> Any:
        """Return the clock, which other graphs may share."""
        clock: Any = self._modules["clock"]
        return getattr(clock, "shared", (clock,))[0]


def followed(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> torch.device:
    """Return the device that ``fn`` moves a buffer to; the buffer's own device if ``fn`` moves to meta, where it would lose its value."""
    device = fn(torch.empty(0, dtype=torch.float32, device=buffer.device)).device
    return buffer.device if device.type == "meta" else device


def _moves(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    device = followed(buffer, fn)
    return brought(buffer, device) is not buffer or (buffer.dtype == torch.float32 and has_float64(device))


class RuntimeModule(nn.Module):
    """Base of all runtime modules: it has a description for errors, and the strength, if its regularizer has one.

    The strength is float64 [1 or more], as ``site_strengths.py`` says, or float32 on a device without float64.

    The strength is not 0-d: Dynamo makes a symbol of the ``item()`` of a 0-d float64 input, fails to turn it back into a tensor, and starts
    its analysis over (TensorifyScalarRestartAnalysis), which doubles the time to compile.
    """

    path: str | None = None  # the path of the module whose mode it follows; None if it follows none
    always = False  # whether it acts in every mode
    element = 0  # the element of the strength that it reads, see site_strengths.py
    own_element = 0  # the element that its site has, if any; it reads it from when strengths are set by site, or by depth
    elements: tuple[int, ...] = ()  # where the elements of a strength with a schedule are in what the clock returns, as in Rules
    moves_key = True  # whether the mode that it follows decides if a call draws
    silenced = False  # whether a block of noise_off is open: no splice acts then, and no state is replaced

    def __init__(self, description: str, strength: Tensor | None = None) -> None:
        super().__init__()
        self.description, self.silenced = description, False
        self.rules: tuple[Rules, ...] = ()  # in tuples, so that they do not become submodules
        self.owner: tuple[nn.Module | LayerMode, ...] = (self,)  # until Rules.find_owners finds the owner
        self.strength: Tensor
        if strength is not None:
            self.register_buffer("strength", strength, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out that a block of ``noise_on`` or ``noise_off`` is open: for a copy, it would never end."""
        return {**vars(self), **({"forced": False} if "forced" in vars(self) else {}), "silenced": False}

    def adopt(self, owner: nn.Module) -> None:
        """Follow the mode of ``owner``."""
        self.owner = (owner,)

    def weight(self, dtype: torch.dtype, clock: Tensor | None = None) -> Tensor:
        """Return the strength as a 0-d tensor of the dtype that it is used in. ``clock``: what the clock returned, for a schedule."""
        strength = self.strength[self.element] if clock is None else clock[self.elements[self.element]]
        return strength.to(dtype)

    def has_moved(self) -> None:
        """Do what is to be done after the buffers were moved to another device."""

    def extra_repr(self) -> str:
        return self.description

    def train(self, mode: bool = True) -> RuntimeModule:
        """Set the mode, and follow this mode from now on.

        ``Rules`` does not call this method. So it is called only in a GraphModule that a later pass made, which holds runtime modules
        without their container. The mode of that GraphModule does not reach the modules that own the sites.
        """
        self.training, self.owner = mode, (self,)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RuntimeModule:
        """Have ``Rules`` move all buffers, because it keeps their dtypes and values, and keeps strengths shared.

        This method is called in a GraphModule that a later pass made, which has no ``Rules`` among its submodules.
        """
        if not self.rules:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        if any(_moves(buffer, fn) for buffer in self._buffers.values() if buffer is not None):
            self.rules[0]._apply(fn)
        return self


class Drawing(RuntimeModule):
    """A runtime module that draws at a site. ``slot``: its row of the keys; ``path``: the path of the module whose mode it follows."""

    def __init__(self, description: str, site: str, slot: int, path: str, strength: Tensor | None = None) -> None:
        super().__init__(description, strength)
        self.site, self.slot, self.path = site, slot, path
        self.forced = False  # whether it acts in any mode: a block of noise_on is open
        self.recomputed = False  # whether a compiled backward recomputes its result, see compiler/recompute.py

    def row(self, key: Tensor) -> Tensor:
        """Return the row of the keys to draw from, int32 [2]. Within a block the key is this row already."""
        return key[self.slot] if key.dim() > 1 else key


class LayerMode:
    """The mode of a recurrent layer, read from its attributes: Dynamo refuses to read the layer.

    A copy keeps the mode that the layer had, until ``Rules.find_owners`` gives the runtime module the layer of its own module.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes

    @property
    def training(self) -> bool:
        return bool(self.attributes["training"])

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerMode, ({"training": self.training},)


class SpliceRule(Drawing):
    """Runs a splice at a site: it acts while the module that owns the site is in train mode, or in a block of ``noise_on``.

    It does not act in a block of ``noise_off``.
    """

    overwritten = False  # whether the model may write into the value later
    apart = False  # whether it must return a copy where it does not act, because the model writes into the value: see Insertions.apart

    def __init__(self, regularizer: Splice, site: str, strength: Tensor | None, slot: int, path: str, steps: Steps | None = None) -> None:
        super().__init__(f"{type(regularizer).__name__} at {site}", site, slot, path, strength)
        self.regularizer, self.steps = regularizer, steps
        self.share_axes = regularizer.engine_options.share_axes
        self.on_parameter = regularizer.on == "parameters"

    def adopt(self, owner: nn.Module) -> None:
        self.owner = (LayerMode(vars(owner)) if isinstance(owner, nn.RNNBase) else owner,)

    def acts(self) -> bool:
        """Whether the value is replaced now."""
        return not self.silenced and (self.forced or self.owner[0].training)

    def differs_in_eval(self) -> bool:
        """Whether the splice replaces the value where it does not act, as its ``in_eval`` says."""
        return bool(self.regularizer.takes_in_eval)

    def forward(
        self, z: Tensor, key: Tensor, lengths: Tensor | None = None, *, clock: Tensor | None = None, **others: Tensor
    ) -> Tensor:
        """Replace a value: z [any shape], floating; key int32 [streams, 2]; lengths, or a mask of steps -> [same shape and dtype].

        ``clock``: what the clock returned, [elements], for a strength that has a schedule. ``others``: ``module_input`` and ``previous``,
        each [shape of z], for a splice that takes it. If the splice does not act, return ``z`` itself, or a copy if ``apart``, unless the
        splice has a form for eval mode.
        """
        acts = self.acts()
        if not acts and not self.differs_in_eval():
            return clone(z) if self.apart else z
        if self.on_parameter and type(z).__name__ == "DTensor":
            raise RegularizerError(
                f"{self.description}: the parameter is sharded here (DTensor), so that each rank would draw for a part of it. Apply "
                "fully_shard to the whole module alone, whose forward then has whole parameters, or leave the parameter out."
            )
        if not isinstance(z, Tensor) or not z.is_floating_point():
            what = z.dtype if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise RegularizerError(
                f"{self.description}: the value is {what}, and only floating-point values can be spliced. Leave the site out."
            )
        self.regularizer.require_fit(z.shape, self.description)
        if self.steps is not None and self.steps.lengths is not None:
            lengths = self.steps.counts(lengths, z, self.description)
        others = self._others(z, others)
        shared = shared_axes(self.share_axes, self.steps, z.shape, self.description) if self.share_axes else ()
        weight, noise = self.weight(accumulation(z.dtype), clock), Noise(self.row(key), shared)
        formula = partial(self._formula, lengths=lengths, others=others)
        recompute = self.recomputed and recomputes() and not others  # a recomputed formula has z as its only input
        if not acts:
            y = self._in_eval(z, weight, others)
        elif recompute:
            y = recompute_in_backward(formula, z, weight, noise, self.on_parameter)
        else:
            y = formula(z, weight, noise)
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
            return y if torch.compiler.is_compiling() else y.as_strided(z.shape, z.stride())
        if not overlaps(z):
            return laid_out(y, z)
        if self.overwritten:
            raise RegularizerError(
                f"{self.description}: elements of the value share their place in memory (it was expanded or unfolded), and the model "
                "writes into it. A write then changes several elements at once, which no replacement can imitate. Choose the site before, "
                "or clone the value there."
            )
        return y

    def _others(self, z: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the module or the cell got, in z's dtype; zeros for a cell that got no state."""
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

    def _in_eval(self, z: Tensor, weight: Tensor, others: dict[str, Tensor]) -> Any:
        arguments = {"z": z, "weight": weight, **others}
        return self.regularizer.in_eval(**{name: arguments[name] for name in self.regularizer.takes_in_eval})  # type: ignore[attr-defined]

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise, lengths: Tensor | None, others: dict[str, Tensor]) -> Any:
        arguments: dict[str, Any] = {"z": z, "w": z, "weight": weight, "noise": noise, "lengths": lengths, **others}
        if "values" in self.regularizer.takes:  # not read otherwise: Dynamo would compile blocks apart that differ in this name alone
            arguments["values"] = {self.site: z}
        return called(self.regularizer, {name: arguments[name] for name in self.regularizer.takes})


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which formulas compute with a value: float64 for float64, float32 for any other floating dtype."""
    if not dtype.is_floating_point:
        raise RegularizerError(f"a value of {dtype} cannot be regularized: only floating-point values can.")
    return torch.float64 if dtype == torch.float64 else torch.float32
