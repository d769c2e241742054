"""Runtime modules: their base class and container, the one that runs a splice, and the one that gives each call its noise keys.

A rewritten module holds them under ``graphreg_rules``, one for each addition, and the emitted code calls them by name. They own the
strengths and the keys as buffers that are not persistent, and run the regularizers' formulas in the right precision and mode.
``KeyRule``, with the lock and the threads above it, counts the calls and holds the noise for ``frozen_noise``.
"""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.compiler import kept
from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir import brought, clone, has_float64, laid_out, overlaps
from graphreg.regularizer import Splice, called
from graphreg.rng import Noise, call_keys, next_keys, of_process, recomputes
from graphreg.torch_internals import CHUNKED, Chunk, chunks, in_chunks, is_wrapped, lent, outside, transforms, unwrapped


class Rules(nn.Module):
    """Container of a module's runtime modules: adds nothing to ``state_dict`` or its ``_metadata``, and keeps the dtype of buffers.

    Attributes:
        strengths: By regularizer name, the one buffer that all its runtime modules share.
        about: What the rewrite remembers for the report: plan, opaque modules, specialized arguments, front end, notes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.strengths: dict[str, Tensor] = {}
        self.exact: dict[str, float] = {}  # as they were set, the strengths that are float32 on the present device
        self.about: Any = None
        self.watching: Any = None  # the monitor that watches the module, if one does
        self.made_by: str | None = None  # the mark of the torch.fx pass that made the additions

    def train(self, mode: bool = True) -> Rules:
        """Set the flag alone: runtime modules act by the mode of the modules that own their sites; see ``Leaf.train``."""
        self.training = mode
        for leaf in self.children():
            leaf.training = mode
        return self

    def own(self, root: nn.Module) -> None:
        """Find the modules that own the sites, by path: a later pass may have replaced or removed some."""
        placed = [leaf for leaf in self.children() if isinstance(leaf, Leaf) and leaf.path is not None]
        for leaf in placed:
            owner = root
            for name in str(leaf.path).split("."):  # as far as the path exists: torch.fx drops modules without a layer in them
                if (inner := owner._modules.get(name)) is None:
                    break
                owner = inner
            leaf.adopt(owner)
        if placed and isinstance(key := self._modules.get("key"), Leaf):
            key.owner = tuple(dict.fromkeys(leaf.owner[0] for leaf in placed))
            key.always = any(leaf.always for leaf in placed if not isinstance(leaf, Drawing))  # a Drawing's comes by the graph

    def state_dict(self, *args: Any, destination: Any = None, **more: Any) -> Any:
        """Add nothing: the user's state_dict and its metadata stay as they are."""
        return destination if destination is not None else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rules:
        """Follow the model to its device, and keep dtype and value through ``.half()`` and ``.to_empty()``.

        Several runtime modules share one strength: each tensor is moved once.
        """
        moved = {id(tensor): self._strength(name, tensor, fn) for name, tensor in self.strengths.items()}
        for leaf in self.children():
            for name, buffer in leaf._buffers.items():
                if buffer is not None:
                    if id(buffer) not in moved:
                        moved[id(buffer)] = brought(buffer, followed(buffer, fn))
                    leaf._buffers[name] = moved[id(buffer)]
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
        held = float(tensor)
        return exact if exact is not None and float(torch.tensor(exact, dtype=tensor.dtype)) == held else held

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


class Leaf(nn.Module):
    """Base of all runtime modules: a name for errors, and the strength, float64 [1], or float32 on a device without float64.

    Not 0-d: Dynamo makes a symbol of the ``item()`` of a 0-d float64 input, fails to turn it back into a tensor, and starts its
    analysis over (TensorifyScalarRestartAnalysis), which doubles the time to compile.
    """

    path: str | None = None  # of the module whose mode it follows, if it follows one
    always = False  # whether it acts in every mode

    def __init__(self, about: str, strength: Tensor | None = None) -> None:
        super().__init__()
        self.about = about
        self.rules: tuple[Rules, ...] = ()  # in tuples, so that they do not become submodules
        self.owner: tuple[nn.Module, ...] = (self,)  # until Rules.own
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
        return self.about

    def train(self, mode: bool = True) -> Leaf:
        """Follow the mode of the parent: called only if that is not ``Rules``, because a later pass made a GraphModule of the graph.

        The blocks of that GraphModule are not the modules that own the sites, and its mode does not reach those.
        """
        self.training, self.owner = mode, (self,)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Leaf:
        """Keep dtype and value in such a GraphModule too, and one strength for all runtime modules of the regularizer."""
        if not self.rules:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        if any(_moves(buffer, fn) for buffer in self._buffers.values() if buffer is not None):
            self.rules[0]._apply(fn)
        return self


class Drawing(Leaf):
    """A runtime module that draws at a site: ``slot`` is its row of the keys, ``path`` the path of the module whose mode it follows."""

    def __init__(self, about: str, site: str, slot: int, path: str, strength: Tensor | None = None) -> None:
        super().__init__(about, strength)
        self.site, self.slot, self.path = site, slot, path
        self.forced = False  # on, whatever the mode
        self.recomputed = False  # whether backward recomputes its value when compiled; see compiler/recompute.py


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
            raise RegularizerError(f"{self.about}: the value is {what}, and only floating-point values can be spliced. Leave the site out.")
        weight, noise = self.weight(accumulation(z.dtype)), Noise(key[self.slot])
        again = self.recomputed and recomputes()
        y = kept(self._formula, z, weight, noise) if again else self._formula(z, weight, noise)
        if not isinstance(y, Tensor):
            raise RegularizerError(f"{self.about} gave {type(y).__name__}; a splice gives a tensor like its site's.")
        if y.shape != z.shape or y.dtype != z.dtype:
            raise RegularizerError(
                f"{self.about} gave {tuple(y.shape)} {y.dtype} for {tuple(z.shape)} {z.dtype}; a splice gives a tensor like its site's."
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
                f"{self.about}: elements of the value share their place in memory (it was expanded or unfolded), so that a write of the "
                "model into one reaches others, and no replacement of it can do that. Choose the site before, or clone the value there."
            )
        return y

    def _formula(self, z: Tensor, weight: Tensor, noise: Noise) -> Any:
        given = {"z": z, "weight": weight, "noise": noise, "values": {self.site: z}}
        return called(self.regularizer, {name: given[name] for name in self.regularizer.takes})


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a value is computed in: float64 for float64, float32 for any other floating dtype."""
    if not dtype.is_floating_point:
        raise RegularizerError(f"a value of {dtype} cannot be regularized: only floating-point values can.")
    return torch.float64 if dtype == torch.float64 else torch.float32




class _Lock:
    """One lock for all modules, held for microseconds: a lock for each would have to be left out of every copy and pickle."""

    now = threading.Lock()


def _anew() -> None:
    _Lock.now = threading.Lock()  # a thread of the parent may have held the old one, and no thread of the child would release it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)


class _Thread(threading.local):
    """Identifies each thread by an object of its own: thread idents are reused."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


def taking() -> AbstractContextManager[Any]:
    """Lock out other threads while a call takes its number."""
    return _Lock.now


class KeyRule(Leaf):
    """Returns the keys of this call and makes those of the next: one runtime module at the top of the graph.

    It *assigns* new buffers. An increment in place gives silently wrong gradients when the partitioner recomputes the masks in
    backward; so does a key derived where it is used, which is inlined into the arithmetic of every element.
    """

    streams: Tensor
    step: Tensor
    keys: Tensor
    free: Tensor

    def __init__(self, streams: Mapping[str, int]) -> None:
        super().__init__("the keys of the call")
        self.names = tuple(streams)
        self.forced = False
        self.forcing: dict[object, None] = {}  # the open blocks of noise_on
        self.held: int | None = None  # in a block of frozen_noise: the call whose masks every call draws
        self.blocks: dict[object, tuple[object, int]] = {}  # the open blocks of frozen_noise: the thread of each, and its call
        self.left: set[object] = set()  # the threads that ended their blocks while another thread still holds the noise
        self.beyond = 0  # how many calls after the held one were taken meanwhile
        self.alike = False  # whether all ranks draw the same masks
        self.part: tuple[object, int, int] = (None, 0, 0)  # of a chunked vmap: its run, the chunk's number, the call of the first chunk
        self.register_buffer("streams", torch.tensor(list(streams.values()), dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("keys", call_keys(self.streams, self.step), persistent=False)
        # A compiled graph reads this tensor instead of ``held``, so that holding the noise recompiles nothing. It is an integer because
        # torch.optim.swa_utils.AveragedModel(use_buffers=True) subtracts buffers, and bools cannot be subtracted.
        self.register_buffer("free", torch.ones(1, dtype=torch.int64), persistent=False)

    def draws(self, always: bool = False) -> bool:
        """Whether a call in the present mode draws noise, and so counts."""
        return always or self.forced or self.always or any(owner.training for owner in self.owner)

    def refuse_backward(self) -> None:
        """Raise GraphRegError where a backward pass runs the forward again: it would draw the masks of the next call."""
        if torch._C._current_graph_task_id() == -1:
            return
        if not self._is_held():
            raise GraphRegError(
                "this module runs inside a backward pass: activation checkpointing around the whole of it would draw "
                "other masks than the forward did. Put forward and backward under graphreg.frozen_noise(module), or "
                "checkpoint blocks inside the model, and compile outside."
            )
        threads = dict(self.blocks.values())
        if len(threads) > 1 and _thread.token not in threads:
            raise GraphRegError(
                "this module runs inside a backward pass, in a thread of autograd's, while several threads hold its noise "
                "(graphreg.frozen_noise), and whose masks are meant is not known. Give each thread a copy of the module: copy.deepcopy."
            )

    def _is_held(self) -> bool:
        """Whether the noise is held for this thread: also by another thread's block, unless this thread has ended a block of its own."""
        return self.held is not None and _thread.token not in self.left

    def forward(self, always: bool = False) -> Tensor:
        """Return the keys, int32 [streams, 2]; ``always``: the graph has a native dropout that acts in eval mode too."""
        if not self.draws(always):
            keys = self.keys
        elif not torch.compiler.is_compiling():
            keys = self._taken()
        elif transforms() and in_chunks():
            keys = self._taken_of_chunk()
        else:
            # Written into the dict directly: Dynamo would trace every check of Module.__setattr__.
            keys, step = self.keys, self.step + 1
            following = next_keys(self.streams, step, self.free, keys)
            self._buffers["step"], self._buffers["keys"] = (unwrapped(step), unwrapped(following)) if transforms() else (step, following)
        return of_process(keys, self.alike)

    def _taken(self) -> Tensor:
        """Return the keys of this call and store those of the next: for one thread at a time, and outside of torch.func's transforms."""
        self.refuse_backward()
        if is_wrapped(self.step) or (self.held is None and lent(self.step)):
            raise GraphRegError(
                "the noise's own counter is among what torch.func.functional_call was given: it would not count on, and each call would "
                "draw the same. Leave what begins with 'graphreg_rules.' out: {n: b for n, b in module.named_buffers() if "
                "'graphreg_rules.' not in n}. For the same masks in each call there is graphreg.frozen_noise(module)."
            )
        if not transforms():
            with taking():
                return self._advanced()
        parts = chunks()
        with taking(), outside():
            if parts and self.held is None:
                self._rejoin(parts)
            return self._advanced()

    _taken_of_chunk = torch.compiler.disable(_taken, reason=CHUNKED)  # type: ignore[no-untyped-call]

    def _advanced(self) -> Tensor:
        keys, step = self.keys, self.step + 1
        if type(step) is not type(self.step):  # shape propagation calls with fake tensors
            return keys
        self._buffers["step"] = step
        if self.held is None:
            self._buffers["keys"] = call_keys(self.streams, step)
            return keys
        number = self._number()
        return keys if number == self.held else call_keys(self.streams, torch.full_like(step, number))

    def _number(self) -> int:
        """Return the number of this thread's call while any thread holds the noise."""
        threads = dict(self.blocks.values())
        if _thread.token in threads:
            return threads[_thread.token]
        if self._is_held():  # of a thread without a block of its own
            return next(iter(threads.values())) if len(threads) == 1 else self._held()
        return self._behind()

    def _held(self) -> int:
        assert self.held is not None
        return self.held

    def _behind(self) -> int:
        """Take the next call after the held one, and return its number."""
        self.beyond += 1
        return self._held() + self.beyond

    def _rejoin(self, parts: Sequence[Chunk]) -> None:
        """Give each chunk of a vmap with ``chunk_size`` the calls of the first: the rows of one batch belong to one call."""
        if len(parts) > 1:
            raise GraphRegError(
                "the module draws noise within two vmaps that both have a chunk_size, and which rows belong together is not known. "
                "Leave the inner chunk_size out."
            )
        run, number, call = self.part
        if run is not parts[0].run:
            call = int(self.step)
        elif number != parts[0].number:
            self.seek(call)
        self.part = (parts[0].run, parts[0].number, call)

    def call(self) -> int:
        """Return the number of the next call. All calls that draw in one block of ``hold`` count as one."""
        step = int(self.step)
        if self.held is None:
            return step
        return self.held + self.beyond + 1 if self.beyond else min(step, self.held + 1)

    def seek(self, call: int) -> None:
        """Jump to a call: the next forward draws its masks."""
        self.step = torch.full_like(self.step, call)
        self.keys = call_keys(self.streams, self.step)
        if self.held is not None:
            self.held, self.beyond = call, 0
            self.blocks = {block: (thread, call) for block, (thread, _) in self.blocks.items()}

    def settle(self) -> None:
        """Replace tensors made under ``torch.inference_mode``, which a compiled graph could not save for backward later."""
        if self.step.is_inference():
            with torch.inference_mode(False):
                self.step, self.keys = self.step.clone(), self.keys.clone()

    def hold(self, block: object) -> None:
        """Begin a block: every call of this thread draws the masks of the next one, until its blocks have ended."""
        with taking():
            mine = [number for thread, number in self.blocks.values() if thread is _thread.token]
            if self.held is None:
                self.held, self.free = int(self.step), torch.zeros_like(self.free)
                number = self.held
            else:
                number = mine[0] if mine else self._behind()
            self.left.discard(_thread.token)
            self.blocks[block] = (_thread.token, number)

    def release(self, block: object) -> None:
        """End a block; after the last one, continue after the calls that were held and taken, if anything drew them."""
        with taking():
            thread, _ = self.blocks.pop(block, (None, 0))
            if thread is not None and all(thread is not other for other, _ in self.blocks.values()):
                self.left.add(thread)
            if self.blocks or self.held is None:
                return
            call, self.held, self.free = self.call(), None, torch.ones_like(self.free)
            self.beyond, self.left = 0, set()
            self.seek(call)
