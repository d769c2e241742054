"""``RegularizerState`` for checkpoints of torch.distributed.checkpoint (DCP), the format of sharded training."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from graphreg.errors import GraphRegError, RegularizerError, listed, shown
from graphreg.integrations.parts import (
    Parts,
    Sessions,
    check_states,
    check_tensors,
    load_states,
    states_of,
    tensors_apart,
    tensors_replaced,
)
from graphreg.session.controls import Regulated
from graphreg.session.hosts import backend_host, native_draws

log = logging.getLogger("graphreg")
VERSION = 1  # the version of the format of the text in a checkpoint
TEXT = "state"  # the key of the text; no tensor has this key, because the key of a tensor has slashes


class RegularizerState(Stateful):
    """The noise, the strengths, the schedules and what regularizers remember, for ``dcp.save`` and ``dcp.load``.

    Put the object into the dict that DCP saves and loads, beside the states of the model and of the optimizer::

        states = {"model": ..., "optimizer": ..., "noise": RegularizerState(module)}
        dcp.save(states, checkpoint_id=folder)

    The state is the same on every rank, and DCP saves one copy of it, so any number of ranks can load it. If ranks hold different parts of
    a model (pipeline parallelism), give each part a key of its own, such as ``f"noise{stage}"``.

    The parameters that regularizers learn are in the module's ``state_dict``, and not here.
    """

    def __init__(self, model: Regulated) -> None:
        """Find the regularized modules.

        Args:
            model: A rewritten module, or a model that is regularized in place; also inside compiled and distributed wrappers, or inside
                another model. Or a backend of graphreg's.

        Raises:
            GraphRegError: Nothing in the model is regularized.
        """
        self._modules, self._sessions = _parts(model)
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state: a text, and the tensors that regularizers keep from call to call.

        The text is JSON, under ``"state"``. It is one entry because DCP loads no other entries of a checkpoint than those that the present
        state has. If each changed strength had an entry, a model in which that strength is still unchanged would not load it. The key of a
        tensor is ``REGULARIZER/SITE/NAME``, with ``PATH/`` before it if the regularized module is only a part of the model. DCP loads into
        these tensors.
        """
        self._warn_of_native_draws()
        modules, tensors = tensors_apart(states_of(self._sessions))
        return {TEXT: json.dumps({"version": VERSION, "modules": modules}), **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that DCP has loaded into what ``state_dict`` returned.

        Raises:
            RegularizerError: The state is damaged, or it belongs to another version of graphreg or to another model.
        """
        modules = _read(state_dict)
        given, named = {key: value for key, value in state_dict.items() if key != TEXT}, dict[str, str]()
        # This call replaces nothing: it collects the keys of the tensors that the text names.
        tensors_replaced(modules, named.setdefault)
        try:
            # All checks come before the first change.
            check_states(self._sessions, modules)
            check_tensors(given.keys(), named.keys())
            load_states(self._sessions, tensors_replaced(modules, lambda key, name: given[key]))
        except RegularizerError as error:
            if not (dist.is_initialized() and dist.get_world_size() > 1):
                raise
            raise RegularizerError(
                f"{error} If ranks hold different parts of a model (pipeline parallelism), each part needs a key of its own in what "
                "dcp.save gets, for example f'noise{stage}'."
            ) from error

    def _warn_of_native_draws(self) -> None:
        """Warn, once, of native dropout that draws from torch's generator, which is not saved."""
        if self._warned:
            return
        self._warned = True
        # A model that is regularized in place has no graph before its first call.
        traced = [module for path, module in self._modules.items() if self._sessions[path].complete]
        if names := [dropout.site.name for module in traced for dropout in native_draws(module)]:
            log.warning(
                "RegularizerState does not save the state of torch's generators, from which %s draws: a run that is resumed would draw "
                "other masks there. With own_dropout='seeded', graphreg draws what it can. Or save torch.get_rng_state() of each rank.",
                listed(names, 3),
            )


def _parts(model: Any) -> tuple[Mapping[str, nn.Module], Sessions]:
    """Return the regularized modules in a model and their sessions, by path; of a backend, the session alone."""
    if (backend := backend_host(model)) is not None:
        return {}, {"": backend.session}
    if not isinstance(model, nn.Module):
        raise GraphRegError(f"RegularizerState was given {shown(model)}. Give it a module that is regularized, or a backend of graphreg's.")
    try:
        parts = Parts(model)
        return parts.modules, parts.sessions
    except GraphRegError as error:
        raise GraphRegError(f"{error} If the model is compiled with graphreg.backend, give RegularizerState the backend.") from error


def _read(state: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the text of a state. Return the states of the modules by path, with keys in place of the tensors."""
    text = state.get(TEXT) if isinstance(state, Mapping) else None
    if not isinstance(text, str):
        raise RegularizerError(
            f"{shown(state)} is no state of RegularizerState. Give what its state_dict returned, or let dcp.load call load_state_dict."
        )
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("modules"), dict):
        raise RegularizerError(f"the state is damaged: its text is {shown(text)}. Load an older checkpoint, or start anew.")
    if found.get("version") != VERSION:
        raise RegularizerError(
            f"the state has version {found.get('version')!r}; this graphreg reads version {VERSION}. Read it with the graphreg that saved "
            "it."
        )
    modules: dict[str, Any] = found["modules"]
    return modules
