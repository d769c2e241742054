"""``State``: the tensors that a regularizer keeps from call to call, for each of its sites, such as where training began.

Those that are ``nn.Parameter`` are parameters of the rewritten module, and are in its ``state_dict``. All others are buffers that are in
no ``state_dict``; ``rng_state`` saves them. ``stateful.py`` has the runtime modules that read the state.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphreg.errors import GraphRegError, RegularizerError, listed, warn
from graphreg.ir.naming import identifier
from graphreg.ir.precision import with_values
from graphreg.regularizer.base import Regularizer
from graphreg.rng.operators import between_calls
from graphreg.runtime.distributed_values import whole
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.runtime.unfinished import counted
from graphreg.torch_internals.autograd import in_backward
from graphreg.torch_internals.functorch import transforms
from graphreg.torch_internals.modules import parameters_by_name
from graphreg.torch_internals.other_threads import is_compiling

log = logging.getLogger("graphreg")
Saved = Mapping[str, Mapping[str, Tensor]]  # by site, then by name of the tensor


class SiteState(nn.Module):
    """The state at one site. It follows the model's device and dtype, as the model's parameters do."""

    def __init__(self, tensors: Mapping[str, Tensor], like: Tensor) -> None:
        """``tensors``: what ``init_state`` returned; ``like``: its argument."""
        super().__init__()
        self.like = like.shape, like.dtype
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)
        self.register_load_state_dict_pre_hook(_keep_if_absent)  # type: ignore[no-untyped-call]

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, in the order of ``init_state``."""
        parameters, buffers = self._parameters, self._buffers
        return {
            name: parameters[name] if name in parameters else between_calls(buffers[name])  # type: ignore[misc,arg-type]
            for name in self.names
        }

    def replace(self, new: Mapping[str, Tensor]) -> None:
        """Replace the buffers by what the formula gave."""
        before = dict(self._buffers)
        for name, old in before.items():
            assert old is not None
            self._buffers[name] = between_calls(new[name].detach().to(old.dtype))
        if not is_compiling():
            counted(partial(self._take_back, before, dict(self._buffers)))

    def _take_back(self, before: Mapping[str, Tensor | None], made: Mapping[str, Tensor | None]) -> None:
        """Undo ``replace``: of a call that raised. A buffer that another call has replaced since stays as it is."""
        self._buffers.update({name: old for name, old in before.items() if self._buffers[name] is made[name]})

    def renew(self, tensors: Mapping[str, Tensor]) -> None:
        """Take other values. Parameters keep their identity."""
        for name, tensor in tensors.items():
            if (parameter := self._parameters.get(name)) is not None:
                with torch.no_grad():
                    parameter.copy_(tensor)
            else:
                self._buffers[name] = tensor

    def refuse_other(self, new: Mapping[str, Tensor], description: str) -> None:
        """Raise RegularizerError unless a formula's new state has the names and shapes of the buffers."""
        if {n: t.shape for n, t in new.items()} == {n: t.shape for n, t in self._buffers.items() if t is not None}:
            return
        more = ", its nn.Parameters left out, which the optimizer changes" if self._parameters else ""
        raise RegularizerError(f"{description}: the formula returned a state with other names or shapes than init_state{more}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteState:
        """Follow the model. Buffers keep their values where ``fn`` makes tensors without values (``to_empty``, the meta device)."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if buffer is not None:
                probe = fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device))
                self._buffers[name] = buffer if probe.device.type == "meta" else buffer.to(probe.device, probe.dtype)
        return self


class State(RuntimeModule):
    """The state of one regularizer at all its sites. It is shared by the graphs of a model that is regularized in place.

    Attributes:
        name: The regularizer's name.
        regularizer: The regularizer.
        sites: The sites that have a state, each with the name of its ``SiteState`` among the children.
    """

    def __init__(self, name: str, regularizer: Regularizer) -> None:
        super().__init__(f"the state of {name}")
        self.name, self.regularizer = name, regularizer
        self.sites: dict[str, str] = {}
        self.register_load_state_dict_pre_hook(_report_absent)  # type: ignore[no-untyped-call]

    def place(self, site: str, like: Tensor) -> SiteState:
        """Return the state of a site; make it if there is none. ``like``: as in ``Regularizer.init_state``."""
        if site in self.sites and self.regularizer.on == "values":
            held, anew = self.at(site).tensors(), self._made(site, like)
            if {name: tensor.shape for name, tensor in held.items()} != {name: tensor.shape for name, tensor in anew.items()}:
                log.warning("%s: the value at %s has another shape now; its state starts anew", self.name, site)
                self.drop(site)
        if site not in self.sites:
            self._put(site, self._made(site, like), like)
        return self.at(site)

    def at(self, site: str) -> SiteState:
        """Return the state of a site."""
        return self._modules[self.sites[site]]  # type: ignore[return-value]

    @property
    def owns_parameters(self) -> bool:
        """Whether there are parameters in it."""
        return next(self.parameters(), None) is not None

    @property
    def is_saved(self) -> bool:
        """Whether ``rng_state`` has it: it has buffers, or no site is known yet."""
        return not self.sites or next(self.buffers(), None) is not None

    def drop(self, site: str) -> None:
        """Forget the state of a site. Rewritten modules that hold it keep it."""
        self.sites = {name: own for name, own in self.sites.items() if name != site or self._modules.pop(own) is None}

    def reset(self, parameters: Mapping[str, Tensor]) -> None:
        """Make the state anew, from the parameters as they are now. Parameters in it keep their identity.

        The states of parameters that the model does not have any more are dropped.
        """
        for site in tuple(self.sites) if self.regularizer.on == "parameters" else ():
            if site not in parameters:
                self.drop(site)
        for site in self.sites:
            held = self.at(site)
            first = next(iter((*held.parameters(), *held.buffers(), *parameters.values())))
            # Of a value, only shape and dtype are known between calls, and init_state may use no
            # more.
            like = parameters[site] if self.regularizer.on == "parameters" else zeros(*held.like, first.device)
            held.renew(self._made(site, like))
            held.like = like.shape, like.dtype

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of the buffers, to save."""
        buffers = {site: self.at(site)._buffers for site in self.sites}
        return {site: {n: b.detach().clone() for n, b in each.items() if b is not None} for site, each in buffers.items()}

    def check(self, saved: Saved) -> None:
        """Raise RegularizerError unless ``load`` can take what was saved."""
        if not self.sites:
            return
        if other := sorted(saved.keys() ^ self.sites.keys()):
            raise RegularizerError(f"the state of {self.name} is that of other sites: only one of the two has {listed(other, 3)}.")
        for site, ours in self.saved().items():
            mine, theirs = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (ours, saved[site]))
            if mine != theirs:
                raise RegularizerError(f"the state of {self.name} at {site} has the shapes {theirs}, and the module needs {mine}.")

    def load(self, saved: Saved) -> None:
        """Load a saved state, in the dtype and on the device of the present state."""
        for site, tensors in saved.items():
            if site not in self.sites:
                # In place, there is no graph yet, so the shape of the site is not known.
                self._put(site, {name: tensor.detach().clone() for name, tensor in tensors.items()}, torch.empty(0, device="cpu"))
                continue
            old = self.at(site)._buffers
            self.at(site).renew({name: tensor.detach().to(old[name]).clone() for name, tensor in tensors.items()})

    def _made(self, site: str, like: Tensor) -> dict[str, Tensor]:
        if like.device.type == "meta":
            raise GraphRegError(
                f"{self.name} keeps a state for {site}, which has no values yet (device meta). Materialize the model, then regularize it."
            )
        kind = like.device.type
        casts = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
        with torch.no_grad(), torch.inference_mode(False), with_values(), casts:
            tensors = self.regularizer.init_state(whole(like.detach()))  # of a DTensor, too, a state is whole on all ranks
            return {name: _own(tensor, like.device) for name, tensor in tensors.items()}

    def _put(self, site: str, tensors: Mapping[str, Tensor], like: Tensor) -> None:
        # The tensors become attributes of a SiteState.
        taken = set(dir(nn.Module())) | {"like", "names", "tensors", "replace", "renew"}
        if wrong := [name for name in tensors if name in taken or not name.isidentifier()]:
            raise RegularizerError(f"{self.name}: init_state calls a tensor {wrong[0]!r}, and modules use that name themselves. Rename it.")
        own = identifier(site)
        while own in self._modules or hasattr(self, own):
            own += "_"
        self.sites = {**self.sites, site: own}
        self.add_module(own, SiteState(tensors, like))


def _keep_if_absent(held: SiteState, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Let a checkpoint that has none of the parameters of a site leave them as they are: one of the model alone has none."""
    own = {f"{prefix}{name}": parameter for name, parameter in held.named_parameters()}
    if own.keys().isdisjoint(state_dict):
        state_dict.update(own)  # torch passes each module a dict of its own


def _report_absent(
    state: State, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
) -> None:  # fmt: skip
    """Report the keys that are missing where a checkpoint has the parameters of some sites, and not of all."""
    if not any(key.startswith(prefix) for key in state_dict):
        return
    for own in state.sites.values():
        keys = [f"{prefix}{own}.{name}" for name, _ in state.get_submodule(own).named_parameters()]
        if set(keys).isdisjoint(state_dict):
            missing += keys


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of a state's own: a Parameter for a Parameter."""
    values = tensor.detach().to(device).clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros of a shape, which take the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def cast(held: SiteState, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state of a site as a formula gets it: floating-point tensors in the dtype in which the formula computes."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in held.tensors().items()}


def moves_on(rule: RuntimeModule, training: bool) -> bool:
    """Whether this call replaces the state. ``training``: whether the module that the state follows is in train mode."""
    if rule.silenced or not training or transforms():
        return False
    if is_compiling():
        return True
    if in_backward():
        raise GraphRegError(
            f"{rule.description}: a backward pass runs the forward again, but the first run has replaced the state. Checkpoint parts of "
            "the model without it, not the whole module."
        )
    return not torch.is_inference_mode_enabled()


def states_in(module: nn.Module) -> Iterator[State]:
    """Yield the states of a module's runtime modules."""
    return (each for each in module.modules() if isinstance(each, State))


def watch_optimizers(module: nn.Module) -> None:
    """Call ``_warn_of_missed`` when a backward pass first reaches one of the parameters that regularizers own."""
    owned = [parameter for state in states_in(module) for parameter in state.parameters() if parameter.requires_grad]
    handles = list[Callable[[], None]]()
    root = weakref.ref(module)

    def reached(parameter: Tensor) -> None:
        while handles:
            handles.pop()()
        if (present := root()) is not None:
            _warn_of_missed(present)

    for parameter in owned if all(parameter.is_leaf for parameter in owned) else ():
        handles.append(parameter.register_post_accumulate_grad_hook(reached).remove)  # type: ignore[no-untyped-call]


def all_optimizers() -> list[Optimizer]:
    """Return the optimizers that there are in the process."""
    # by type(): isinstance reads an attribute of every object in the process, which may have side
    # effects
    return [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]


def _warn_of_missed(module: nn.Module) -> None:
    """Warn of the regularizers' parameters that no optimizer has, if some optimizer has a parameter of the model."""
    owned = {id(parameter) for state in states_in(module) for parameter in state.parameters()}
    named = parameters_by_name(module, once=True)
    theirs = {id(parameter) for parameter in named.values()} - owned
    trained = {id(p) for optimizer in all_optimizers() for group in optimizer.param_groups for p in group["params"]}
    missed = [name for name, parameter in named.items() if id(parameter) in owned and id(parameter) not in trained]
    if missed and not theirs.isdisjoint(trained):
        warn(
            f"the optimizer has the model's parameters, and not those that regularizers learn ({listed(missed, 3)}), which stay as they "
            "are. Make it from the parameters of the rewritten module: torch.optim.SGD(module.parameters(), ...)."
        )
