"""``Parts``: the regularized modules in a model, with their states for a checkpoint and the scale of their penalties."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from graphreg.errors import GraphRegError, RegularizerError, listed
from graphreg.ir.module_record import PLACED
from graphreg.ir.selector import Selector
from graphreg.recipes.recipe import recipe_dict
from graphreg.reporting.monitor import Monitor, monitor
from graphreg.runtime.attach import AttachRule, current
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.schedules import Schedule, of_plain
from graphreg.session.hosts import rewritten, rules_of, session_of
from graphreg.session.session import Session
from graphreg.torch_internals.modules import COMPILED_MODULE

log = logging.getLogger("graphreg")
ITEMS = "num_items_in_batch"  # the argument by which the Trainer of transformers gives a model the number of items in a step
_WRAPPERS = (COMPILED_MODULE, "module", "_fsdp_wrapped_module")  # the attributes in which wrappers hold the model


class TrainerScale:
    """The scale of penalties under a trainer that accumulates gradients: in a step of k batches, each batch has 1 / k of the penalties.

    A trainer divides the loss of each batch by k. The Trainer of transformers does not, if it gives the model ``num_items_in_batch``, the
    number of items in all batches of the step. The model may divide its loss by this number; the graph tells whether it does. If it does
    not, the step has k times the loss that one batch would have. It then has k times the penalties, too, so that their share is the same.

    Attributes:
        batches: The number of batches in the present step.
        ranks: The number of processes whose items ``num_items_in_batch`` counts. A loss that comes with this number is multiplied by it.
        scaler: The GradScaler that scales the loss, or None.
        divides: Whether the trainer divides the loss of each batch, even if the model gets ``num_items_in_batch``.
        waiting: Whether penalties were added to losses in this step, and no backward pass has reached them; None if none were added.
    """

    divides = True
    waiting: bool | None = None

    def __init__(self, batches: int = 1, ranks: int = 1, scaler: Any = None) -> None:
        self.batches, self.ranks, self.scaler = batches, ranks, scaler

    def of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], reads: Set[str]) -> tuple[Any, Any]:
        """Return two factors: for penalties whose gradients join the backward pass, and for penalties that are added to the model's loss.

        What is added to the model's loss gets the factors that the trainer applies to the loss. What joins the backward pass does not.
        """
        scale = 1.0 if self.scaler is None else current(self.scaler)
        counted = kwargs.get(ITEMS) is not None
        if counted and ITEMS in reads:
            return scale / self.batches, 1 / (self.batches * self.ranks)
        # Without labels, the loss is computed outside of the model: by label smoothing, or by a function of the user's. It is divided then.
        divided = self.divides or not counted or kwargs.get("labels") is None
        return scale / self.batches if divided else scale * self.ranks, 1.0

    def added(self, total: Tensor) -> None:
        """Find out whether a backward pass reaches the penalties that were added to a loss."""
        self.waiting = self.waiting is not False
        total.register_hook(self._reached)  # type: ignore[no-untyped-call]

    def _reached(self, gradient: Tensor) -> None:
        self.waiting = False


_PATIENCE = 10  # a first step may skip a bad batch, or train another part of the model


class Parts:
    """The regularized modules in a model, by path."""

    def __init__(self, model: nn.Module) -> None:
        """Find the regularized modules.

        Raises:
            GraphRegError: No module in the model is regularized.
        """
        self.modules: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            # Not ``hasattr``: a wrapper passes the attributes of the model on as its own.
            if isinstance(module, RewrittenModule) or PLACED in vars(module):
                name = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
                self.modules[name] = module
        self.sessions = {name: session_of(module) for name, module in self.modules.items()}
        if not self.modules:
            raise GraphRegError(
                f"no module in this {type(model).__name__} is regularized, so there is nothing to save or to log. Regularize before you "
                "train: graphreg.regularize_(model, ...)."
            )
        self._watched: dict[str, Monitor] = {}
        self._stack = ExitStack()
        self._idle = 0  # steps before the first call of a regularized module
        self._has_warned = False  # of an unused loss

    def state(self) -> dict[str, Any]:
        """Return, by the path of each module, the state of its noise, those of its strengths that were changed, and its recipe.

        The result is plain data, except for the tensors in ``noise`` that regularizers keep from call to call.
        """
        return states_of(self.sessions)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state that the method ``state`` returned.

        Raises:
            RegularizerError: The state belongs to another model. If the paths of the regularized modules or the names of the regularizers
                differ, nothing is changed.
        """
        load_states(self.sessions, state)

    def scale_by(self, scale: TrainerScale) -> None:
        """Scale attached penalties by ``scale`` until ``close``, except those for which the user has given a scale.

        The scale of an earlier run is replaced, because a run that was interrupted has not removed it.
        """
        for session in self.sessions.values():
            # A scale of another class is the user's own.
            if session.attaches and (session.scale is None or isinstance(session.scale, TrainerScale)):
                session.set_scale(scale)
                self._stack.callback(session.set_scale, None)

    def watch(self, selector: Selector | None) -> None:
        """Watch the values that a selector matches, until ``close``: measure which share of each value the splices keep.

        With None, do nothing. A model that is regularized in place has a graph only after its first call. Before that call, nothing is
        watched: call this method again after it.
        """
        if selector is None:
            return
        for path, module in self.modules.items():
            if path not in self._watched and self.sessions[path].complete:
                self._watched[path] = self._stack.enter_context(monitor(rewritten(module), selector))

    def end_step(self, scale: TrainerScale) -> None:
        """Warn, once, if regularizers do nothing in training: no regularized module was called, or their penalties are in an unused loss.

        Call this at the end of each step. ``scale``: the scale of the step.
        """
        self._idle = 0 if any(session.complete for session in self.sessions.values()) else self._idle + 1
        if self._idle == _PATIENCE:
            warn_of_no_call(next(iter(self.modules)))
        if scale.waiting and not self._has_warned:
            self._has_warned = True
            warn_of_unused_loss()
        scale.waiting = None

    def numbers(self) -> dict[str, float]:
        """Return the penalties of the last call, the strengths, and the shares of values that splices have kept, by name."""
        return {name: value for path in self.modules for name, value in self._numbers(path)}

    def _numbers(self, path: str) -> Iterator[tuple[str, float]]:
        session, prefix = self.sessions[path], f"{path}/" if path else ""
        attach = rules_of(self.modules[path])._modules.get("attach") if session.complete else None

        # Returned penalties are the caller's; attached ones are kept until the next call.
        penalties: Mapping[str, Tensor] = attach.last if isinstance(attach, AttachRule) else {}
        yield from ((f"{prefix}penalty/{name}", float(value)) for name, value in penalties.items())
        yield from ((f"{prefix}strength/{name}", value) for name, value in session.values().items())
        if path in self._watched:
            values = self._watched[path].values().items()
            yield from ((f"{prefix}kept/{name.replace('/kept/', '/')}", value) for name, value in values if "/kept/" in name)

    def close(self) -> None:
        """Remove the watches, and the scales that ``scale_by`` has set. Warn as ``end_step`` does if the run was short."""
        if 0 < self._idle < _PATIENCE:
            warn_of_no_call(next(iter(self.modules)))
        self._watched.clear()
        self._stack.close()


Sessions = Mapping[str, Session]  # by the path of the module


def states_of(sessions: Sessions) -> dict[str, Any]:
    """Return the state of the noise, the changed strengths and the recipe of each module: see ``Parts.state``."""
    return {
        path: {
            "noise": session.saved(),
            "regularizers": list(session.strengths),
            "strengths": _plain(session.changed_strengths()),
            "recipe": recipe_of(session),
        }
        for path, session in sessions.items()
    }


def recipe_of(session: Session) -> dict[str, Any] | None:
    """Return the recipe of a module, or of a backend; None if it has an argument that no recipe can hold, such as a function."""
    asked = session.asked_now()
    if isinstance(session.scale, TrainerScale):  # which the trainer has set, and sets again
        asked = replace(asked, scale=None)
    try:
        return recipe_dict(asked, session.changed_strengths())
    except RegularizerError as error:
        _warn_once(str(error))
        return None


def warn_of_no_call(path: str) -> None:
    """Warn that training has called no regularized module. ``path``: that of the first one."""
    log.warning(
        "no regularized module has been called in train mode so far, so no regularizer acts. %s is regularized: regularize the module "
        "that the step calls. For a LightningModule whose training_step calls self.net(x), this is graphreg.regularize_(module.net, ...).",
        repr(path) if path else "The model itself",
    )


def warn_of_unused_loss() -> None:
    """Warn that the penalties of a step were added to a loss that the trainer has not used."""
    log.warning(
        "the penalties were added to the loss that the model returns, but no backward pass of this step went through this loss, so they "
        "train nothing. If your code computes a loss of its own from the model's other outputs, call the model without labels: it then "
        "returns no loss, and graphreg joins the penalties to its other outputs."
    )


@cache
def _warn_once(why: str) -> None:
    log.warning("checkpoints have no recipe: %s", why)


def check_states(sessions: Sessions, states: Mapping[str, Any]) -> None:
    """Raise RegularizerError unless the states are those of the same modules, with regularizers of the same names."""
    if states.keys() != sessions.keys():
        other = [path or "the model itself" for path in sorted(states.keys() ^ sessions.keys())]
        raise RegularizerError(
            "the checkpoint belongs to another model: only the checkpoint or only the model has a regularized module at "
            f"{listed(other)}. Regularize the model as for the run that saved the checkpoint."
        )
    for path, session in sessions.items():
        if other := sorted(session.strengths.keys() ^ set(states[path]["regularizers"])):
            raise RegularizerError(
                "the checkpoint belongs to another model: only the checkpoint or only the model has a regularizer named "
                f"{listed(other)}. Regularize the model as for the run that saved the checkpoint."
            )


def load_states(sessions: Sessions, states: Mapping[str, Any]) -> None:
    """Restore what ``states_of`` returned: see ``Parts.load``."""
    check_states(sessions, states)
    for path, session in sessions.items():
        session.load(states[path]["noise"])
        session.restore_strengths(_read(states[path]["strengths"]))


def tensors_apart(states: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the states of modules with a key in place of each tensor, which is plain data, and the tensors by these keys.

    The key of a tensor is ``REGULARIZER/SITE/NAME``, with ``PATH/`` before it if the module is only a part of the model.
    """
    tensors: dict[str, Tensor] = {}

    def taken(key: str, tensor: Tensor) -> str:
        tensors[key] = tensor
        return key

    return tensors_replaced(states, taken), tensors


def check_tensors(given: Set[str], named: Set[str]) -> None:
    """Raise RegularizerError unless the tensors of a checkpoint are those that the states of its modules name."""
    if other := sorted(named ^ given):
        raise RegularizerError(
            f"the checkpoint belongs to another model: only the checkpoint or only the model has the tensors {listed(other, 3)}. "
            "Regularize the model as for the run that saved the checkpoint."
        )


def tensors_replaced(modules: Mapping[str, Any], of: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return the states of modules with other values in place of the tensors that regularizers keep.

    Args:
        modules: The states by path, as ``states_of`` returns them.
        of: A function that returns the new value. Its arguments are the key of the tensor in the checkpoint, and the present value: the
            tensor, or that key.
    """
    done = {}
    for path, module in modules.items():
        prefix, noise = f"{path}/" if path else "", dict(module["noise"])
        if "state" in noise:
            noise["state"] = {
                name: {
                    site: {tensor: of(f"{prefix}{name}/{site}/{tensor}", value) for tensor, value in tensors.items()}
                    for site, tensors in sites.items()
                }
                for name, sites in noise["state"].items()
            }
        done[path] = {**module, "noise": noise}
    return done


SavedStrengths = Mapping[str, Mapping[str, Any]]  # from the name of a regularizer, then of a site, to the strength


def _plain(strengths: SavedStrengths) -> dict[str, dict[str, Any]]:
    """Return strengths as plain data: each schedule is replaced by its plain form."""
    return {n: {s: v.to_plain() if isinstance(v, Schedule) else v for s, v in sites.items()} for n, sites in strengths.items()}


def _read(strengths: SavedStrengths) -> dict[str, dict[str, Any]]:
    """Return the strengths, with their schedules, from the result of ``_plain``."""
    return {n: {s: v if (made := of_plain(v)) is None else made for s, v in sites.items()} for n, sites in strengths.items()}
