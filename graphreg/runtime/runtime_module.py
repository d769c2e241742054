"""Runtime modules: their container ``Rules``, their base class ``RuntimeModule``, and ``SpliceRule``, which runs a splice.

A rewritten module holds them under ``graphreg_rules``, one for each addition, and the emitted code calls them by name. They own the
strengths as buffers that are not persistent, and run the regularizers' formulas in the right precision and mode.
"""
from __future__ import annotations

from collections.abc import Callable
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


class Rules(nn.Module):
    """Container of a module's runtime modules: adds nothing to ``state_dict`` or its ``_metadata``, and keeps the dtype of buffers.

    Attributes:
        strengths: By regularizer name, the buffer with its strength, which all its runtime modules share.
        exact: The strengths as they were set, for those that the device holds in float32 only.
        build_record: How the module was made; None until the rewrite has finished.
        watching: The monitor; None if no monitor watches the module.
        made_by: The mark of the torch.fx pass (``as_pass``) that rewrote the module; None if no pass did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strengths: dict[str, Tensor] = {}
        self.exact: dict[str, float] = {}
        self.build_record: BuildRecord | None = None
        self.watching: Any = None
        self.made_by: str | None = None

    def train(self, mode: bool = True) -> Rules:
        """Set only the flags ``training``: runtime modules follow the mode of the modules that own their sites."""
        self.training = mode
        for child in self.children():
            child.training = mode
        return self

    def find_owners(self, root: nn.Module) -> None:
        """Find the modules that own the sites by path, because a later pass may have replaced or removed some."""
        placed = [child for child in self.children() if isinstance(child, RuntimeModule) and child.path is not None]
        for child in placed:
            owner = root
            for name in str(child.path).split("."):  # as far as the path exists: torch.fx drops modules that contain no layer
                if (inner := owner._modules.get(name)) is None:
                    break
                owner = inner
            child.adopt(owner)
        if placed and isinstance(key := self._modules.get("key"), RuntimeModule):
            key.owner = tuple(dict.fromkeys(child.owner[0] for child in placed))
            key.always = any(child.always for child in placed if not isinstance(child, Drawing))  # a Drawing's: see KeyRule.forward

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
            moved: By id of a tensor, what it has become. Each is moved once, because several runtime modules share a strength, and
                so do several containers that get the same ``moved``.
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
        self.strengths = {name: moved[id(tensor)] for name, tensor in self.strengths.items()}

    def _strength(self, name: str, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the strength on the device that ``fn`` moves to. On a device that has float64 again it is exactly as it was set."""
        device = followed(tensor, fn)
        new = brought(tensor, device)
        if new.dtype == tensor.dtype and (new.dtype == torch.float64 or not has_float64(device)):
            return new
        value = self.value(name)
        self.exact.pop(name, None)
        if has_float64(device):
            return torch.full_like(new, value, dtype=torch.float64)
        self.exact[name] = value
        return new

    def value(self, name: str) -> float:
        """Return the strength exactly as it was set."""
        tensor = self.strengths[name]
        exact = self.exact.get(name)
        stored = float(tensor)
        return exact if exact is not None and float(torch.tensor(exact, dtype=tensor.dtype)) == stored else stored

    def set_value(self, name: str, value: float) -> None:
        """Change a strength in place: all runtime modules of the regularizer share it."""
        self.strengths[name].fill_(value)
        if name in self.exact:
            self.exact[name] = value


def followed(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> torch.device:
    """Return the device that ``fn`` moves a buffer to; the buffer's own device if ``fn`` moves to meta, where it would lose its value."""
    device = fn(torch.empty(0, dtype=torch.float32, device=buffer.device)).device
    return buffer.device if device.type == "meta" else device


def _moves(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    device = followed(buffer, fn)
    return brought(buffer, device) is not buffer or (buffer.dtype == torch.float32 and has_float64(device))


class RuntimeModule(nn.Module):
    """Base of all runtime modules: it has a description for errors, and the strength: float64 [1], float32 on a device without float64.

    The strength is not 0-d: Dynamo makes a symbol of the ``item()`` of a 0-d float64 input, fails to turn it back into a tensor, and starts
    its analysis over (TensorifyScalarRestartAnalysis), which doubles the time to compile.
    """

    path: str | None = None  # the path of the module whose mode it follows; None if it follows none
    always = False  # whether it acts in every mode

    def __init__(self, description: str, strength: Tensor | None = None) -> None:
        super().__init__()
        self.description = description
        self.rules: tuple[Rules, ...] = ()  # in tuples, so that they do not become submodules
        self.owner: tuple[nn.Module, ...] = (self,)  # until Rules.find_owners
        self.strength: Tensor
        if strength is not None:
            self.register_buffer("strength", strength, persistent=False)

    def adopt(self, owner: nn.Module) -> None:
        """Follow the mode of ``owner``."""
        self.owner = (owner,)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the strength as a 0-d tensor of the dtype that it is used in."""
        return self.strength[0].to(dtype)

    def extra_repr(self) -> str:
        return self.description

    def train(self, mode: bool = True) -> RuntimeModule:
        """Set the mode and follow it from here on.

        ``Rules`` does not call it. So it is called only in a GraphModule that a later pass made, which holds runtime modules without their
        container. The mode of that GraphModule does not reach the modules that own the sites.
        """
        self.training, self.owner = mode, (self,)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RuntimeModule:
        """Have ``Rules`` move all buffers, in a later pass's GraphModule too: it keeps dtypes and values, and strengths shared."""
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
        self.forced = False  # whether it acts in any mode, in a block of noise_on
        self.recomputed = False  # whether a compiled backward recomputes its result, see compiler/recompute.py

    def row(self, key: Tensor) -> Tensor:
        """Return the row of the keys to draw from, int32 [2]. Within a block the key is this row already."""
        return key[self.slot] if key.dim() > 1 else key


class SpliceRule(Drawing):
    """Runs a splice at a site: it acts while the module that owns the site is in train mode, or in a block of ``noise_on``."""

    overwritten = False  # whether the model may write into the value later
    apart = False  # whether it does, and a penalty measures the splice's output: then the output is never the value itself

    def __init__(self, regularizer: Splice, site: str, strength: Tensor, slot: int, path: str, steps: Steps | None = None) -> None:
        super().__init__(f"{type(regularizer).__name__} at {site}", site, slot, path, strength)
        self.regularizer, self.steps = regularizer, steps
        self.share_axes = regularizer.engine_options.share_axes

    def acts(self) -> bool:
        """Whether the value is replaced in the present mode."""
        return self.forced or self.owner[0].training

    def forward(self, z: Tensor, key: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Replace a value: z [any shape], floating; key int32 [streams, 2]; lengths, or a mask of steps -> [same shape and dtype].

        Where the splice does not act it returns ``z`` itself, or a copy if ``apart``.
        """
        if not self.acts():
            return clone(z) if self.apart else z
        if not isinstance(z, Tensor) or not z.is_floating_point():
            what = z.dtype if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise RegularizerError(
                f"{self.description}: the value is {what}, and only floating-point values can be spliced. Leave the site out."
            )
        self.regularizer.require_fit(z.shape, self.description)
        if self.steps is not None and self.steps.lengths is not None:
            lengths = self.steps.counts(lengths, z, self.description)
        shared = shared_axes(self.share_axes, self.steps, z.shape, self.description) if self.share_axes else ()
        weight, noise = self.weight(accumulation(z.dtype)), Noise(self.row(key), shared)
        formula = partial(self._formula, lengths=lengths)
        y = recompute_in_backward(formula, z, weight, noise) if self.recomputed and recomputes() else formula(z, weight, noise)
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

        Strides decide the layout and the rounding of the operations that follow, and whether they return a view or a copy, which in-place
        writes reveal.
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

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise, lengths: Tensor | None) -> Any:
        arguments = {"z": z, "weight": weight, "noise": noise, "lengths": lengths}
        if "values" in self.regularizer.takes:  # not read otherwise: Dynamo would compile blocks apart that differ in this name alone
            arguments["values"] = {self.site: z}
        return called(self.regularizer, {name: arguments[name] for name in self.regularizer.takes})


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which formulas compute with a value: float64 for float64, float32 for any other floating dtype."""
    if not dtype.is_floating_point:
        raise RegularizerError(f"a value of {dtype} cannot be regularized: only floating-point values can.")
    return torch.float64 if dtype == torch.float64 else torch.float32
