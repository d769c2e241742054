"""``Parts``: the regularized modules in a model, their state for a checkpoint, and the scale of their penalties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, listed
from graphreg.ir import PLACED, Selector
from graphreg.reporting import Monitor, monitor
from graphreg.runtime import ModuleHandle, RewrittenModule, current, handle_of
from graphreg.torch_internals import COMPILED_MODULE

_WRAPPERS = (COMPILED_MODULE, "module", "_fsdp_wrapped_module")  # the attributes that hold a model inside of wrappers


class TrainerScale:
    """The scale of penalties under a trainer that divides the loss by the number of batches in a step.

    Attributes:
        batches: The number of batches in the present step.
        ranks: What a trainer multiplies a loss by that is divided by ``num_items_in_batch``: the number of processes, or 1.
        scaler: The GradScaler that scales the loss, or None.
    """

    def __init__(self, batches: int = 1, ranks: int = 1, scaler: Any = None) -> None:
        self.batches, self.ranks, self.scaler = batches, ranks, scaler

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the factor for gradients that join the backward pass, and that for penalties that are added to the loss.

        A model that gets ``num_items_in_batch`` divides the loss by it, and the trainer does not divide it by the number of batches.
        """
        counted = kwargs.get("num_items_in_batch") is not None
        scale = 1.0 if self.scaler is None else current(self.scaler)
        return scale / self.batches, 1 / (self.batches * self.ranks) if counted else 1.0


class Parts:
    """The regularized modules in a model, by path."""

    def __init__(self, model: nn.Module) -> None:
        """Find them.

        Raises:
            GraphRegError: There is none.
        """
        self.handles: dict[str, ModuleHandle] = {}
        for path, module in model.named_modules():
            if isinstance(module, RewrittenModule) or PLACED in vars(module):
                name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
                handle = handle_of(module)
                assert isinstance(handle, ModuleHandle)
                self.handles[name] = handle
        if not self.handles:
            raise GraphRegError(
                f"no module in this {type(model).__name__} is regularized, so there is nothing to save or to log. Regularize before you "
                "train: graphreg.regularize_(model, ...)."
            )
        self._watched: dict[str, Monitor] = {}
        self._stack = ExitStack()

    def state(self) -> dict[str, Any]:
        """Return the state of the noise and the strengths that were changed, of each part: plain data, and the tensors of ``rng_state``."""
        return {
            path: {"noise": handle.rng_state(), "regularizers": list(handle.strengths()), "strengths": handle.changed_strengths()}
            for path, handle in self.handles.items()
        }

    def keeping_tensors(self) -> list[str]:
        """Return the names of the regularizers whose state is tensors, which JSON cannot hold."""
        return [name for handle in self.handles.values() for name in handle.saved_states()]

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a state.

        Raises:
            RegularizerError: The state belongs to another model. Nothing is changed then.
        """
        if state.keys() != self.handles.keys():
            other = [path or "the model itself" for path in sorted(state.keys() ^ self.handles.keys())]
            raise RegularizerError(
                f"the checkpoint belongs to another model: only one of the two has a regularized module at {listed(other)}. Regularize "
                "the model as for the run that saved it."
            )
        for path, handle in self.handles.items():
            if other := sorted(handle.strengths().keys() ^ set(state[path]["regularizers"])):
                raise RegularizerError(
                    f"the checkpoint belongs to another model: only one of the two has a regularizer named {listed(other)}. Regularize "
                    "the model as for the run that saved it."
                )
        for path, handle in self.handles.items():
            handle.set_rng_state(state[path]["noise"])
            handle.restore_strengths(state[path]["strengths"])

    def scale_by(self, scale: TrainerScale) -> None:
        """Scale attached penalties so until ``close``, except those to which the user has given a scale."""
        for handle in self.handles.values():
            if handle.attaches and handle.scale() is None:
                handle.set_scale(scale)
                self._stack.callback(handle.set_scale, None)

    def watch(self, selector: Selector | None) -> None:
        """Watch the shares of values that splices keep, at the sites that a selector matches, until ``close``; with None do nothing.

        A model that is regularized in place has a graph only once it was called, so this may be repeated.
        """
        if selector is None:
            return
        for path, handle in self.handles.items():
            if path not in self._watched and handle.is_traced:
                self._watched[path] = self._stack.enter_context(monitor(handle.current(), selector))

    def numbers(self) -> dict[str, float]:
        """Return the penalties of the last call, the strengths, and the shares that splices have kept, by name."""
        return {name: value for path in self.handles for name, value in self._numbers(path)}

    def _numbers(self, path: str) -> Iterator[tuple[str, float]]:
        handle, prefix = self.handles[path], f"{path}/" if path else ""
        penalties: Mapping[str, Tensor] = handle.last_penalties()
        yield from ((f"{prefix}penalty/{name}", float(value)) for name, value in penalties.items())
        yield from ((f"{prefix}strength/{name}", value) for name, value in handle.strengths().items())
        if path in self._watched:
            values = self._watched[path].values().items()
            yield from ((f"{prefix}kept/{name.replace('/kept/', '/')}", value) for name, value in values if "/kept/" in name)

    def close(self) -> None:
        """Take the scale and the watches back."""
        self._watched.clear()
        self._stack.close()
