"""``State``: the tensors that a regularizer keeps from call to call, for each of its parameters, such as where training began.

They are buffers that are in no ``state_dict``; ``rng_state`` saves them. ``StatefulTotal`` computes a penalty from them, and replaces
them by what the formula gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphreg.errors import GraphRegError, RegularizerError, listed
from graphreg.regularizer import Penalty
from graphreg.runtime.penalty import Total, result, widened
from graphreg.runtime.runtime_module import RuntimeModule
from graphreg.torch_internals import in_backward, transforms

Saved = Mapping[str, Mapping[str, Tensor]]  # by site, then by name of the tensor


class State(RuntimeModule):
    """The state of one penalty. It is shared by the graphs of a model that is regularized in place.

    Attributes:
        name: The penalty's name.
        regularizer: The penalty.
        sites: The parameters that have a state, in the order of ``names``.
        names: For each of them, the names of its tensors.
    """

    def __init__(self, name: str, regularizer: Penalty) -> None:
        super().__init__(f"the state of {name}")
        self.name, self.regularizer = name, regularizer
        self.sites: tuple[str, ...] = ()
        self.names: tuple[tuple[str, ...], ...] = ()

    def place(self, site: str, parameter: Tensor) -> int:
        """Return the place of a parameter's state in ``sites``; make its state if there is none."""
        if site not in self.sites:
            self._put(site, self._made(site, parameter))
        return self.sites.index(site)

    def of(self, place: int) -> dict[str, Tensor]:
        """Return the state of the parameter at a place."""
        return {name: self._buffers[f"{name}_{place}"] for name in self.names[place]}  # type: ignore[misc]

    def replace(self, place: int, new: Mapping[str, Tensor]) -> None:
        """Replace the state of the parameter at a place by what the formula gave."""
        for name in self.names[place]:
            old = self._buffers[f"{name}_{place}"]
            assert old is not None
            self._buffers[f"{name}_{place}"] = new[name].detach().to(old.dtype)

    def reset(self, parameters: Mapping[str, Tensor]) -> None:
        """Make the state anew, from the parameters as they are now."""
        for site in self.sites:
            self._put(site, self._made(site, parameters[site]))

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of the state, to save."""
        return {site: {name: tensor.detach().clone() for name, tensor in self.of(i).items()} for i, site in enumerate(self.sites)}

    def check(self, saved: Saved) -> None:
        """Raise RegularizerError unless ``load`` can take what was saved."""
        if not self.sites:
            return
        if other := sorted(saved.keys() ^ set(self.sites)):
            raise RegularizerError(f"the state of {self.name} is that of other parameters: only one of the two has {listed(other, 3)}.")
        for i, site in enumerate(self.sites):
            mine, theirs = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (self.of(i), saved[site]))
            if mine != theirs:
                raise RegularizerError(f"the state of {self.name} at {site} has the shapes {theirs}, and the module needs {mine}.")

    def load(self, saved: Saved) -> None:
        """Take a saved state, on the devices where the state is now."""
        for site, tensors in saved.items():
            old = self.of(self.sites.index(site)) if site in self.sites else tensors
            self._put(site, {name: tensor.detach().to(old[name]).clone() for name, tensor in tensors.items()})

    def _made(self, site: str, parameter: Tensor) -> dict[str, Tensor]:
        if parameter.device.type == "meta":
            raise GraphRegError(
                f"{self.name} keeps a state for {site}, which has no values yet (device meta). Materialize the model, then regularize it."
            )
        with torch.no_grad(), torch.inference_mode(False):
            return {name: tensor.detach().clone() for name, tensor in self.regularizer.init_state(parameter.detach()).items()}

    def _put(self, site: str, tensors: Mapping[str, Tensor]) -> None:
        if site not in self.sites:
            self.sites, self.names = (*self.sites, site), (*self.names, tuple(tensors))
        place = self.sites.index(site)
        for name, tensor in tensors.items():
            self.register_buffer(f"{name}_{place}", tensor, persistent=False)


class StatefulTotal(Total):
    """Computes a penalty whose formula takes ``state``, and replaces the state if the formula returns a new one.

    The state is replaced in train mode alone, and neither in a block of ``noise_off`` nor in a transform of torch.func. A forward that a
    backward pass repeats is refused: it would go on from another state.
    """

    path = ""  # the root: a call of the whole model is one step
    moves_key = False

    def __init__(self, regularizer: Penalty, name: str, strength: Tensor | None, state: State, places: Sequence[int]) -> None:
        super().__init__(regularizer, name, strength)
        self.state, self.state_places = (state,), tuple(places)  # in a tuple, so that it does not become a submodule

    def forward(self, *values: Tensor, places: tuple[int, ...] = (), clock: Tensor | None = None) -> Tensor:
        """Return the penalty, [], from the parameters, each of any shape. ``places`` and ``clock``: as in ``Total``."""
        steps = self._steps()
        measurements = []
        for place, value in zip(self.state_places, values, strict=True):
            if type(value).__name__ == "DTensor":
                raise RegularizerError(f"{self.description}: the parameter is sharded (DTensor), and its state is not. Leave it out.")
            measurement, new = self._measured(value, self.state[0].of(place), clock)
            measurements.append(measurement)
            if new is not None and steps:
                self.state[0].replace(place, new)
        return self.combined(measurements, places, clock)

    def _steps(self) -> bool:
        """Whether this call replaces the state."""
        if self.silenced or not self.owner[0].training or transforms():
            return False
        if torch.compiler.is_compiling():
            return True
        if in_backward():
            raise GraphRegError(
                f"{self.description}: a backward pass runs the forward again, and its state has moved on since. Checkpoint blocks inside "
                "the model, not the whole module."
            )
        return not torch.is_inference_mode_enabled()

    def _measured(
        self, value: Tensor, state: Mapping[str, Tensor], clock: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor] | None]:  # fmt: skip
        wide = widened(value)
        arguments: dict[str, Any] = {
            "w": wide, "values": {"": wide}, "state": {name: tensor.to(wide.dtype) for name, tensor in state.items()},
            "weight": self.weight(wide.dtype, clock),
        }  # fmt: skip
        measurement, new = result(self.regularizer, arguments, wide.device.type, self.description)
        if new is not None and {n: t.shape for n, t in new.items()} != {n: t.shape for n, t in state.items()}:
            raise RegularizerError(f"{self.description}: the formula returned a state with other names or shapes than init_state.")
        return measurement, new
