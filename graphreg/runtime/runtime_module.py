"""Runtime modules: their base class and container, the one that runs a splice, and the one that gives each call its noise keys.

A rewritten module holds them under ``graphreg_rules``, one for each addition, and the emitted code calls them by name. They own the
strengths and the keys as buffers that are not persistent, and run the regularizers' formulas in the right precision and mode.
``KeyRule``, with the lock and the threads above it, counts the calls and holds the noise for ``frozen_noise``.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.compiler import recompute_in_backward
from graphreg.errors import RegularizerError
from graphreg.ir import brought, clone, has_float64, laid_out, overlaps
from graphreg.regularizer import Splice, called
from graphreg.rng import Noise, recomputes
from graphreg.runtime.build_record import BuildRecord


class Rules(nn.Module):
    """Container of a module's runtime modules: adds nothing to ``state_dict`` or its ``_metadata``, and keeps the dtype of buffers.

    ``strengths`` maps regularizers to the one buffer that all their leaves share; ``build_record``: how the module was made,
    once it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strengths: dict[str, Tensor] = {}
        self.exact: dict[str, float] = {}  # the strengths that are float32 for now, as they were set
        self.build_record: BuildRecord | None = None
        self.watching: Any = None  # the monitor, while there is one
        self.made_by: str | None = None  # the mark of the torch.fx pass that added all this

    def train(self, mode: bool = True) -> Rules:
        """Set the flag alone: runtime modules act by the mode of the modules that own their sites; see ``RuntimeModule.train``."""
        self.training = mode
        for child in self.children():
            child.training = mode
        return self

    def find_owners(self, root: nn.Module) -> None:
        """Find the modules that own the sites, by path: a later pass may have replaced or removed some."""
        placed = [child for child in self.children() if isinstance(child, RuntimeModule) and child.path is not None]
        for child in placed:
            owner = root
            for name in str(child.path).split("."):  # as far as the path exists: torch.fx drops modules without a layer in them
                if (inner := owner._modules.get(name)) is None:
                    break
                owner = inner
            child.adopt(owner)
        if placed and isinstance(key := self._modules.get("key"), RuntimeModule):
            key.owner = tuple(dict.fromkeys(child.owner[0] for child in placed))
            key.always = any(child.always for child in placed if not isinstance(child, Drawing))  # a Drawing's comes by the graph

    def state_dict(self, *args: Any, destination: Any = None, **more: Any) -> Any:
        """Add nothing: the user's state_dict and its metadata stay as they are."""
        return destination if destination is not None else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rules:
        """Follow the model to its device, and keep dtype and value through ``.half()`` and ``.to_empty()``.

        Several runtime modules share one strength: each tensor is moved once.
        """
        moved = {id(tensor): self._strength(name, tensor, fn) for name, tensor in self.strengths.items()}
        for child in self.children():
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    if id(buffer) not in moved:
                        moved[id(buffer)] = brought(buffer, followed(buffer, fn))
                    child._buffers[name] = moved[id(buffer)]
        self.strengths = {name: moved[id(tensor)] for name, tensor in self.strengths.items()}
        return self

    def _strength(self, name: str, tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the strength on the model's device; on one that has float64 again, restore what was set to the last bit."""
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
    """Return the device that ``fn`` moves a buffer to; for meta, where it would lose its value, the one it is on."""
    device = fn(torch.empty(0, dtype=torch.float32, device=buffer.device)).device
    return buffer.device if device.type == "meta" else device


def _moves(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    device = followed(buffer, fn)
    return brought(buffer, device) is not buffer or (buffer.dtype == torch.float32 and has_float64(device))


class RuntimeModule(nn.Module):
    """Base of all runtime modules: a name for errors, and the strength, float64 [1], or float32 on a device without float64.

    Not 0-d: Dynamo makes a symbol of the ``item()`` of a 0-d float64 input, fails to turn it back into a tensor, and starts its
    analysis over (TensorifyScalarRestartAnalysis), which doubles the time to compile.
    """

    path: str | None = None  # of the module whose mode it follows, if it follows one
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
        """Follow the mode of the parent: called only if that is not ``Rules``, because a later pass made a GraphModule of the graph.

        The blocks of that GraphModule are not the modules that own the sites, and its mode does not reach those.
        """
        self.training, self.owner = mode, (self,)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RuntimeModule:
        """Keep dtype and value in such a GraphModule too, and one strength for all runtime modules of the regularizer."""
        if not self.rules:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        if any(_moves(buffer, fn) for buffer in self._buffers.values() if buffer is not None):
            self.rules[0]._apply(fn)
        return self


class Drawing(RuntimeModule):
    """A runtime module that draws at a site: ``slot`` is its row of the keys, ``path`` the path of the module whose mode it follows."""

    def __init__(self, description: str, site: str, slot: int, path: str, strength: Tensor | None = None) -> None:
        super().__init__(description, strength)
        self.site, self.slot, self.path = site, slot, path
        self.forced = False  # on, whatever the mode
        self.recomputed = False  # in backward, when compiled; see compiler/recompute.py


class SpliceRule(Drawing):
    """Runs a splice at a site: it acts while the module that owns the site is in train mode, or in a block of ``noise_on``."""

    overwritten = False  # whether the model may write into the value later
    apart = False  # whether it does so and something measures the splice's output, which must then never be the value itself

    def __init__(self, regularizer: Splice, site: str, strength: Tensor, slot: int, path: str) -> None:
        super().__init__(f"{type(regularizer).__name__} at {site}", site, slot, path, strength)
        self.regularizer = regularizer

    def acts(self) -> bool:
        """Whether the value is replaced in the present mode."""
        return self.forced or self.owner[0].training

    def forward(self, z: Tensor, key: Tensor) -> Tensor:
        """Replace a value: z [any shape], floating; key int32 [streams, 2] -> [same shape and dtype].

        Where the splice does not act it returns ``z`` itself, or a copy if ``apart``.
        """
        if not self.acts():
            return clone(z) if self.apart else z
        if not isinstance(z, Tensor) or not z.is_floating_point():
            what = z.dtype if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise RegularizerError(
                f"{self.description}: the value is {what}, and only floating-point values can be spliced. Leave the site out."
            )
        weight, noise = self.weight(accumulation(z.dtype)), Noise(key[self.slot])
        again = self.recomputed and recomputes()
        y = recompute_in_backward(self._formula, z, weight, noise) if again else self._formula(z, weight, noise)
        if not isinstance(y, Tensor):
            raise RegularizerError(f"{self.description} gave {type(y).__name__}; a splice gives a tensor like its site's.")
        if y.shape != z.shape or y.dtype != z.dtype:
            raise RegularizerError(
                f"{self.description} gave {tuple(y.shape)} {y.dtype} for {tuple(z.shape)} {z.dtype}; a splice gives a tensor like its "
                "site's."
            )
        return y if z.layout is not torch.strided or y.stride() == z.stride() else self._laid_out(y, z)

    def _laid_out(self, y: Tensor, z: Tensor) -> Tensor:
        """``y`` with the strides of ``z``. Strides decide on an operation's layout and rounding, and on whether it returns a view or a
        copy, which in-place writes reveal."""
        if z.is_contiguous() and y.is_contiguous():  # they differ in axes of length 1
            return y if torch.compiler.is_compiling() else y.as_strided(z.shape, z.stride())
        if not overlaps(z):
            return laid_out(y, z)
        if self.overwritten:
            raise RegularizerError(
                f"{self.description}: elements of the value share their place in memory (it was expanded or unfolded), so that a write of "
                "the model into one reaches others, and no replacement of it can do that. Choose the site before, or clone the value there."
            )
        return y

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise) -> Any:
        arguments = {"z": z, "weight": weight, "noise": noise, "values": {self.site: z}}
        return called(self.regularizer, {name: arguments[name] for name in self.regularizer.takes})


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a value is computed in: float64 for float64, float32 for any other floating dtype."""
    if not dtype.is_floating_point:
        raise RegularizerError(f"a value of {dtype} cannot be regularized: only floating-point values can.")
    return torch.float64 if dtype == torch.float64 else torch.float32
