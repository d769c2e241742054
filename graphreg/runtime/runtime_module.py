"""Runtime modules: their container ``Rules``, their base class ``RuntimeModule``, and ``DrawingRule``, the base of those that draw.

A rewritten module holds them under ``graphreg_rules``, one for each addition, and the emitted code calls them by name. They own the
strengths as buffers that are not persistent, and run the regularizers' formulas in the right precision and mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.errors import RegularizerError
from graphreg.ir.precision import brought, has_float64
from graphreg.rng.ahead import CallPlace, CallsAhead, DrawnAhead
from graphreg.rng.hash import in_plain_eager
from graphreg.rng.noise import Noise
from graphreg.rng.operators import compiling
from graphreg.rng.window import Window
from graphreg.runtime.averaging import follow_averages
from graphreg.runtime.build_record import BuildRecord
from graphreg.runtime.rank_layout import Cut
from graphreg.runtime.sharding import numbered
from graphreg.runtime.unseen_changes import UnseenChanges
from graphreg.torch_internals.autograd import is_forward_mode, version_of
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.tracing.proof.proof import PROVABLE, proof_key


class Rules(nn.Module):
    """Container of a module's runtime modules: keeps the dtype of buffers, and adds nothing to ``state_dict`` but regularizers' parameters.

    Attributes:
        session: The session from which the strengths come; several graphs of a model in place share it.
        strengths: The buffer with each regularizer's strengths, by regularizer name, [sites] or [1]. All runtime modules of a regularizer
            share its buffer. A regularizer with a schedule has none: its strengths are in what the clock returns.
        planned_strengths: By regularizer name, the sites of the graph that have a strength of their own, in the order of the elements,
            each with the strength in the plan. Empty for a formula that takes all sites at once: then one element is for all.
        shared_elements: By regularizer name, then by the names of runtime modules: the elements that these read once a strength was set by
            site. Until then they all read the first one, so that equal blocks (``blocks=``) are compiled once.
        build_record: How the module was made; None until the rewrite has finished.
        watching: The monitor; None if no monitor watches the module.
        stage_calls: Checks and ends the calls of a stage of a pipeline; None for any other module.
        number: The number of the rewritten module, by which ``sharding.py`` finds it.
        is_uncalled: Whether the module was not called since its code was made; see ``warn_of_uncalled_checkpoints``.
        unseen: Notices changes of the model that the module does not follow; None for a model in place, which follows.
        unproved: For each mode in which the graph was not compared with the model's own forward, the reason; ``Traced`` has this, too.
        asks_autocast: Whether the forward may ask whether autocast is on, or has blocks of it of its own.
        prover: Compares them at a call, if the reason is that no inputs were at hand.
        awaits_device: Whether all parameters of the model were on the meta device when the module was made, so that its device is not
            known yet.
        is_edited: Whether the graph was edited after the rewrite.
        made_by: The mark of the torch.fx pass (``as_pass``) that rewrote the module; None if no pass did.
        regularized: The names of each parameter that a regularizer acts on; a tied parameter has several. Empty if nothing checks that
            they still are the names of one parameter each.
        replaced: Those of these names whose parameters splices replace.
        proxed: The names of the parameters that ``prox_`` changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.session: Any = None  # graphreg.session is below this room
        self.strengths: dict[str, Tensor] = {}
        self.planned_strengths: dict[str, dict[str, float]] = {}
        self.shared_elements: dict[str, dict[str, int]] = {}
        self.build_record: BuildRecord | None = None
        self.watching: Any = None
        self.stage_calls: Any = None
        self.number, self.is_uncalled = 0, True
        self.made_by: str | None = None
        self.unseen: UnseenChanges | None = None
        self.unproved: dict[str, str] = {}
        self.awaits_device, self.is_edited = False, False
        self.prover: Callable[[Any, Any, Any], None] | None = None
        self.regularized: tuple[tuple[str, ...], ...] = ()
        self.proxed: tuple[str, ...] = ()

    asks_autocast, replaced = False, frozenset[str]()  # of modules that an earlier version pickled
    named_modules = follow_averages(nn.Module.named_modules, hides_buffers=True)

    @property
    def awaits_proof(self) -> bool:
        """Whether an eager call can still prove a graph."""
        return bool(self.unproved) and not PROVABLE.isdisjoint(self.unproved.values())

    def is_unproved(self, training: bool) -> bool:
        """Return whether a call of the graph in a mode can prove it, and none has, under the autocast of the present."""
        return self.unproved.get(proof_key("train" if training else "eval", self.asks_autocast)) in PROVABLE

    def train(self, mode: bool = True) -> Rules:
        """Set only the ``training`` flags: runtime modules follow the mode of the modules that own their sites."""
        self.training = mode
        for child in self.children():
            child.training = mode
        return self

    def follow_original(self, original: Rules) -> None:
        """Copy the buffers of another container, and which strengths were set there. Each freezes its noise by itself."""
        theirs = dict(original.named_buffers())
        for name, buffer in self.named_buffers():
            if name in theirs and not name.endswith(".free"):
                buffer.copy_(theirs[name])
        self.session.restore_strengths(original.session.changed_strengths())

    def find_owners(self, root: nn.Module) -> None:
        """Find, by path, the modules that own the sites, because a later pass may have replaced or removed some of them.

        ``root``: the rewritten module.
        """
        self.number, self.is_uncalled = numbered(root), True
        self.unseen = None if self.unseen is None else UnseenChanges(root)
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
            key.always = any(child.always for child in placed if not isinstance(child, DrawingRule))

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Add the parameters of regularizers alone: the rest of the user's state_dict and its metadata stay as they are."""
        destination = destination if destination is not None else {}
        for name, parameter in self.named_parameters():
            destination[f"{prefix}{name}"] = parameter if keep_vars else parameter.detach()
        return destination

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rules:
        """Follow the model to its device, and keep dtype and value through ``.half()`` and ``.to_empty()``."""
        self.move(fn, {})
        return self

    def move(self, fn: Callable[[Tensor], Tensor], moved: dict[int, Any]) -> None:
        """Move all tensors to the device to which ``fn`` moves them. The tensors of a state also get the dtype that ``fn`` gives.

        Args:
            fn: A function that moves a tensor.
            moved: A dict. Each key is the id of a tensor or a state; the value is the moved tensor or state. Each tensor is moved once,
                because several runtime modules share a strength. Containers that share strengths must get the same dict.
        """
        for name, tensor in self.strengths.items():
            if id(tensor) not in moved:
                device = followed(tensor, fn)
                if tensor.dtype == torch.float64 or not has_float64(device):
                    moved[id(tensor)] = brought(tensor, device)
                else:  # from a device without float64 to one with it: as exact as they were set
                    moved[id(tensor)] = strengths_on(device, self.session.strengths[name].elements(self.planned_strengths[name]))
        for child in self.children():
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    if id(buffer) not in moved:
                        moved[id(buffer)] = brought(buffer, followed(buffer, fn))
                    child._buffers[name] = moved[id(buffer)]
            if isinstance(child, RuntimeModule):
                child.has_moved()
            for state in child.modules():  # the state of a site
                if state is not child and not state._modules and id(state) not in moved:
                    moved[id(state)] = state._apply(fn)  # type: ignore[no-untyped-call]
        self.strengths = {name: moved[id(tensor)] for name, tensor in self.strengths.items()}

    def on_strength_changed(self, row: Any) -> None:
        """Write the strengths of a regularizer in place. ``row``: its row in the session's table."""
        if (tensor := self.strengths.get(row.name)) is not None:
            tensor.copy_(tensor.new_tensor(row.elements(self.planned_strengths[row.name])))
        if row.chosen:
            self.read_own_elements(row.name)

    def read_own_elements(self, regularizer: str) -> None:
        """From now on, let each runtime module of a regularizer read the strength of its own site, also in equal blocks."""
        for name, element in self.shared_elements.pop(regularizer, {}).items():
            self._modules[name].elements = (element,)  # type: ignore[union-attr]

    def elements_of(self, regularizer: str) -> Callable[[], None]:
        """Return a function that undoes ``read_own_elements``, if that is called from now on."""
        shared = self.shared_elements.get(regularizer)
        before = {name: self._modules[name].elements for name in shared or ()}  # type: ignore[union-attr]

        def back() -> None:
            if shared is not None and regularizer not in self.shared_elements:
                self.shared_elements[regularizer] = shared
                for name, elements in before.items():
                    self._modules[name].elements = elements  # type: ignore[union-attr]

        return back

    def on_switched(self, session: Any) -> None:
        """Let the runtime modules act as the open blocks of ``noise_on``, ``noise_off`` and ``penalties_off`` say."""
        noise, penalties = session.noise.state, session.penalties.state
        for child in self.children():
            if "forced" in vars(child):
                child.forced = noise is True  # type: ignore[assignment]
            if isinstance(child, RuntimeModule):
                child.silenced, child.is_off = noise is False, penalties is False


def strengths_on(device: torch.device, elements: Sequence[float]) -> Tensor:
    """Return strengths as a tensor on a device: float64, or float32 if the device has no float64."""
    return brought(torch.tensor(elements, dtype=torch.float64, device="cpu"), device)


def device_with_values(model: nn.Module) -> torch.device | None:
    """Return the device of the model's first parameter that is not a meta tensor; None if there is none."""
    return next((p.device for p in parameters_by_name(model).values() if p.device.type != "meta"), None)


def followed(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> torch.device:
    """Return the device that ``fn`` moves a buffer to; the buffer's own device if ``fn`` moves to meta, where it would lose its value."""
    device = fn(torch.empty(0, dtype=torch.float32, device=buffer.device)).device
    return buffer.device if device.type == "meta" else device


def _moves(buffer: Tensor, fn: Callable[[Tensor], Tensor]) -> bool:
    device = followed(buffer, fn)
    return brought(buffer, device) is not buffer or (buffer.dtype == torch.float32 and has_float64(device))


class RuntimeModule(nn.Module):
    """Base of all runtime modules: it has a description for errors, and the strength, if its regularizer has one.

    The strength is float64 [sites] or [1], as in ``Rules``, or float32 on a device without float64.

    The strength is not 0-d: Dynamo makes a symbol of the ``item()`` of a 0-d float64 input, fails to turn it back into a tensor, and starts
    its analysis over (TensorifyScalarRestartAnalysis), which doubles the time to compile.
    """

    path: str | None = None  # the path of the module whose mode it follows; None if it follows no module
    always = False  # whether it acts in every mode
    elements: tuple[int, ...] = (0,)  # where the strengths that it reads are in ``strength``, or in what the clock returns
    moves_key = True  # whether the mode that it follows decides if a call draws
    description: str
    rules: tuple[Rules, ...]
    owner: tuple[nn.Module | LayerMode, ...]  # the module whose mode it follows
    strength: Tensor
    silenced = False  # whether a block of noise_off is open: no splice acts then, and no state is replaced
    is_off = False  # whether a block of penalties_off is open: no penalty is computed then, and each is 0
    _known: tuple[Tensor, int, dict[Any, Any]] | None = None  # the strength that ``kept`` has read, its version, and what was asked of it

    def __init__(self, description: str, strength: Tensor | None = None) -> None:
        super().__init__()
        # Not by ``__setattr__``, which looks for parameters and modules. ``rules`` and ``owner`` are tuples, because a module that is
        # assigned becomes a submodule. The module is its own owner until ``Rules.find_owners`` finds the owner.
        vars(self).update(description=description, silenced=False, is_off=False, rules=(), owner=(self,))
        if strength is not None:
            self.register_buffer("strength", strength, persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy. No block of ``noise_on`` and the like is open in the copy, because it would never end."""
        state = {**vars(self), **({"forced": False} if "forced" in vars(self) else {}), "silenced": False, "is_off": False}
        state.pop("_known", None)
        return state

    def adopt(self, owner: nn.Module) -> None:
        """Follow the mode of ``owner``."""
        self.owner = (owner,)

    def weight(self, dtype: torch.dtype, clock: Tensor | None = None) -> Tensor:
        """Return the strength as a 0-d tensor of the given dtype. ``clock``: what the clock returned, if the strength has a schedule."""
        if clock is not None:
            return clock[self.elements[0]].to(dtype)
        if is_compiling():  # Dynamo would trace ``kept``, too; the compiler merges the conversions of one strength
            return self.strength.to(dtype)[self.elements[0]]
        kept: Tensor | None = self.kept(element_of, (self.elements[0], dtype))
        return element_of(self.strength, (self.elements[0], dtype)) if kept is None else kept

    def kept(self, function: Callable[[Tensor, Any], Any], argument: Any) -> Any:
        """Return ``function(strength, argument)``, computed anew only after the strength has changed; None where it must not be kept.

        It is not kept in compiled code, under a tracer, a transform or a dispatch mode, or in inference mode: it would belong to that.
        It is not kept either if it is differentiated: ``torch.func.functional_call`` may lend a strength that requires a gradient.
        """
        strength = self._buffers["strength"]
        if (self._known is None or self._known[0] is not strength) and strength is not None and self.rules:
            self._require_all(strength)
        if not in_plain_eager() or is_forward_mode():
            return None
        if strength is None or strength.requires_grad or torch.is_inference_mode_enabled() or strength.is_inference():
            return None
        known: tuple[Tensor, int, dict[Any, Any]] | None = self._known
        if known is None or known[0] is not strength or known[1] != version_of(strength):
            known = self._known = (strength, version_of(strength), {})
        asked = (function, argument)
        if asked not in known[2]:
            known[2][asked] = function(strength, argument)
        return known[2][asked]

    def _require_all(self, strength: Tensor) -> None:
        """Raise RegularizerError for a strength with too few elements, or with one that nothing reads: ``functional_call`` may lend any."""
        rules, regularizer = self.rules[0], vars(self).get("regularizer")
        if any(strength is own for own in rules.strengths.values()):
            return
        name = next((name for name, row in rules.session.strengths.items() if row.regularizer is regularizer), None)
        if name in rules.strengths and strength.shape != (shape := rules.strengths[name].shape):
            raise RegularizerError(
                f"{name} was given a strength of shape {list(strength.shape)}, but needs {list(shape)}: one element for each site in "
                f"graphreg.strength_buffers(module)[{name!r}].sites."
            )

    def has_moved(self) -> None:
        """Called after the buffers were moved to another device. Does nothing here; subclasses override it."""

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
        else:  # a state follows a dtype, too
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        return self


class DrawingRule(RuntimeModule):
    """A runtime module that draws at a site. ``slot``: its row of the keys; ``path``: the path of the module whose mode it follows."""

    site: str
    slot: int
    forced: bool  # whether it acts in any mode: a block of noise_on is open
    recomputed: bool  # whether a compiled backward recomputes its result, see compiler/recompute.py
    ahead: DrawnAhead
    cuts: tuple[Cut, ...] | None  # the axes that ranks divide among them; None if set_ranks has to be called again

    def __init__(self, description: str, site: str, slot: int, path: str, strength: Tensor | None = None) -> None:
        super().__init__(description, strength)
        vars(self).update(site=site, slot=slot, path=path, forced=False, recomputed=False, ahead=DrawnAhead(), cuts=())

    def noise(self, key: Tensor, shared: tuple[int, ...] = (), window: Window | None = None) -> Noise:
        """Return the noise of this call. ``key``: int32 [streams, 2], or one row of it. ``shared`` and ``window``: as in ``Noise``."""
        at_call = shared or window is not None or is_compiling()  # asked here because Dynamo traces each function it meets
        return Noise(self.row(key), shared, window, None if at_call else self._place(key))

    def _place(self, key: Tensor) -> CallPlace | None:
        """Return where the draws for this call are among those that are drawn ahead; None if they are drawn at the call."""
        if compiling() or not self.rules or key.dim() == 1:
            return None
        source: Any = self.rules[0]._modules.get("key")
        ahead: CallsAhead | None = getattr(getattr(source, "shared", (source,))[0], "ahead", None)
        calls = None if ahead is None else ahead.known
        place = None if calls is None else calls.place(key)
        return None if calls is None or place is None else CallPlace(self.ahead, calls, place, self.slot)

    def row(self, key: Tensor) -> Tensor:
        """Return the row of the keys to draw from, int32 [2]. In the graph of a block (``blocks=``), ``key`` is this row already."""
        return key[self.slot] if key.dim() > 1 else key

    def key_among(self, key: Tensor, mesh: Any) -> Tensor:
        """Return the key that all ranks of a mesh share, because each has only a part of the value. ``key``: this rank's, int32 [2]."""
        source: Any = self.rules[0]._modules["key"]
        shared: Tensor = getattr(source, "shared", (source,))[0].among(key, mesh)
        return shared


class LayerMode:
    """The mode of a recurrent layer, read from the layer's ``__dict__``, because Dynamo refuses to read the layer itself.

    A copy of this object keeps the mode that the layer had when it was copied. Then ``Rules.find_owners`` makes the copied runtime module
    read the layer of the copied model.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes

    @property
    def training(self) -> bool:
        return bool(self.attributes["training"])

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerMode, ({"training": self.training},)


def element_of(strength: Tensor, asked: tuple[int, torch.dtype]) -> Tensor:
    """Return an element of a strength as a 0-d tensor. ``asked``: the element and the dtype.

    It is a copy, which backward may read after ``set_strength`` has written into the strength.
    """
    element, dtype = asked
    return strength[element].to(dtype, copy=True)


WIDE = (torch.float32, torch.float64)  # the dtypes in which formulas compute


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which formulas compute with a value: float64 for float64, float32 for any other floating dtype."""
    if not dtype.is_floating_point:
        raise RegularizerError(f"a value of {dtype} cannot be regularized: only floating-point values can.")
    return torch.float64 if dtype == torch.float64 else torch.float32
