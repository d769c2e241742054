"""Public functions for a model that trains: they read and set strengths, noise, ranks and states, and switch noise and penalties.

Most of them take a rewritten module, a model that is regularized in place, a backend of graphreg's, or a model that torch.compile compiled
with such a backend; the docstrings name the exceptions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from graphreg.errors import GraphRegError, RegularizerError, listed, shown
from graphreg.ir.module_record import RULES
from graphreg.ir.random_ops import NativeDropout
from graphreg.planning.repeats import Strengths
from graphreg.regularizer.by_depth import read_strength
from graphreg.runtime.build_record import Asked
from graphreg.runtime.rank_mesh import RankMesh
from graphreg.session.hosts import (
    BackendHost,
    InPlaceHost,
    backend_host,
    in_place_host,
    native_draws,
    record_of,
    regularized,
    rewritten,
    roots_of,
    rules_of,
    session_of,
)
from graphreg.session.session import Session, StrengthBuffers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger("graphreg")
# by session: the native dropouts that frozen_noise has not warned of yet
_unfrozen: WeakKeyDictionary[Session, tuple[NativeDropout, ...]] = WeakKeyDictionary()
Ranks = Literal["differ", "same"]
Regulated = nn.Module | BackendHost | InPlaceHost | Callable[..., Any]  # what the functions of this file take


def strengths(module: Regulated) -> dict[str, float]:
    """Return the current strengths (weights and rates) by regularizer name.

    If a regularizer's strength differs by site, its entry is the strength furthest from 0. If a strength has a schedule, its entry is the
    strength of the next call in train mode. Rates of native dropout that have a schedule have one entry, ``own_dropout``.
    """
    return session_of(module).values()


def site_strengths(module: Regulated) -> dict[str, dict[str, float]]:
    """Return the current strength of each regularizer at each of its sites: ``{regularizer: {site: strength}}``.

    A regularizer whose formula takes all its sites at once has one strength, which ``strengths`` returns, and no entry here.
    """
    return session_of(module).values_by_site()


def set_strength(module: Regulated, name: str, value: float | Mapping[str, float]) -> None:
    """Change a regularizer's strength (its weight or rate), or replace its schedule. Nothing is recompiled.

    Args:
        module: A rewritten module, also compiled or wrapped, a model that is regularized in place, or a backend.
        name: The regularizer's name, one of ``strengths(module)``.
        value: The new strength for all sites, or a dict of selectors to strengths, such as ``{"layer1.*": 0.3}``, for the sites that the
            selectors match. If several selectors match a site, the last of them counts. A penalty multiplies each measurement by the
            strength at its site before it averages or sums the measurements. If the regularizer was made with a schedule, the new
            strength replaces the schedule, and may itself be a schedule, also as plain data: ``{"linear": [0, 0.5, 1000]}``. Before a
            model in place or a backend has a graph, selectors wait for its sites.

    Raises:
        NoMatchError: No regularizer has this name, or a selector matches none of its sites; if it had to wait, the first call raises this.
        RegularizerError: ``value`` is out of the regularizer's range, or a dict for a formula that takes all sites at once, or a
            schedule for a regularizer that was made with a number.
    """
    value = read_strength(value)
    if isinstance(value, Mapping) and (wrong := [key for key in value if not isinstance(key, str) or not key]):
        raise RegularizerError(f"{name}: {shown(wrong[0])} is no selector; give a dict from texts to strengths: {{'layer1.*': 0.3}}.")
    by_site = {site: read_strength(each) for site, each in value.items()} if isinstance(value, Mapping) else value
    session_of(module).set_strength(name, by_site)


def strength_buffers(module: Regulated) -> dict[str, StrengthBuffers]:
    """Return where the strengths of a module are, for ``torch.func.functional_call``, by regularizer name.

    Give ``functional_call`` the same tensor under all ``names`` of a regularizer. It has one element for each of ``sites``: the strength at
    that site. This call then computes with other strengths, and ``torch.vmap`` with many at once; the module's strengths do not change.
    A tensor with fewer or more elements raises RegularizerError, except in compiled code.

    Args:
        module: A rewritten module, also compiled or wrapped. The names are those of the rewritten module's own ``named_buffers``.

    Returns:
        A record for each regularizer that was made with a number. Regularizers with a schedule are left out, because their strengths follow
        the count of calls. Penalties with ``by="prox"`` are left out, because no call computes them.

    Raises:
        GraphRegError: graphreg did not rewrite the module, or it is regularized in place or a backend, whose graphs have no such buffers.
    """
    if backend_host(module) is not None or in_place_host(module) is not None:
        raise GraphRegError(
            "strength_buffers is for what graphreg.regularize returned. A model in place and a backend have no buffers of strengths that "
            "torch.func could replace."
        )
    rules, buffers = rules_of(module), dict(rewritten(module).named_buffers(remove_duplicate=False))
    for name in tuple(rules.shared_elements):  # otherwise equal blocks (``blocks=``) would read the first element alone
        rules.read_own_elements(name)
    return {
        name: StrengthBuffers(tuple(n for n, buffer in buffers.items() if buffer is tensor), tuple(rules.planned_strengths[name]) or ("",))
        for name, tensor in rules.strengths.items()
        if not record_of(module).plan.regularizers[name].by_prox
    }


def strengths_now(module: Regulated) -> Strengths:
    """Return the present strengths by regularizer name. If they differ by site, also return them by (regularizer name, site name)."""
    differing = {name: sites for name, sites in site_strengths(module).items() if len(set(sites.values())) > 1}
    return {**strengths(module), **{(name, site): value for name, sites in differing.items() for site, value in sites.items()}}


def asked_of(module: Regulated) -> Asked:
    """Return the arguments that a rewritten module, a model regularized in place or a backend was made with."""
    return session_of(module).asked_now()


def changed_strengths(module: Regulated) -> dict[str, dict[str, float]]:
    """Return the strengths set since the module was made: ``{regularizer: {site: strength}}``; the site ``""`` means all others."""
    return session_of(module).changed_strengths()


def rng_state(module: Regulated) -> dict[str, Any]:
    """Return the state of the noise: a plain dict to save beside a checkpoint, the same on every rank.

    The state has graphreg's noise streams and the number of the next call; all calls in a block of ``frozen_noise`` count as one. If
    regularizers keep tensors from call to call (``L2SP``, ``SpectralPenalty``), the dict has copies of these: then save it with
    ``torch.save``. The parameters that regularizers learn are not in the dict, but in ``state_dict``. If a strength has a schedule, the
    dict has the count of calls in train mode. Strengths are not in it: if a run changes them, save ``recipe(module)`` too. A native dropout
    that was left alone (``own_dropout="keep"``) draws from torch's generator, whose state is ``torch.get_rng_state()``. For a module that
    draws nothing, the dict has no streams.
    """
    return session_of(module).saved()


def reset_state(module: Regulated, *names: str) -> None:
    """Reset the state that regularizers keep, from the current parameters: for ``L2SP``, the point to which it pulls them.

    Call this function after you have loaded a checkpoint into a model that was already regularized.

    Args:
        module: A rewritten module, also compiled or wrapped, or a model that is regularized in place.
        names: The regularizers' names. Without names, all regularizers that keep a state.

    Raises:
        NoMatchError: No regularizer that keeps a state has this name.
        GraphRegError: ``module`` is a backend, whose regularizers keep no state.
    """
    if backend_host(module) is not None:
        raise GraphRegError("no regularizer of a backend keeps a state. reset_state is for what regularize or regularize_ returned.")
    # A function, because most models keep no state, and a large one has very many parameters.
    session_of(module).reset_state(names, lambda: dict(rewritten(module).named_parameters(remove_duplicate=False)))


def model_state_dict(module: nn.Module) -> dict[str, Any]:
    """Return the ``state_dict`` of the user's model: that of the module, without the parameters that regularizers own.

    Such a checkpoint loads into the model, and into the model regularized in another way. To resume training, save
    ``module.state_dict()``.

    Args:
        module: A rewritten module, also compiled or wrapped, or a model that is regularized in place.

    Raises:
        GraphRegError: graphreg did not rewrite the module.
    """
    state: dict[str, Any] = regularized(module).state_dict()
    for name in [name for name in state if name.startswith(f"{RULES}.")]:
        del state[name]
    return state


def set_rng_state(module: Regulated, state: dict[str, Any]) -> None:
    """Resume the noise at a saved state: the next call draws the masks that would have come next when ``rng_state`` was called.

    Streams are matched by name. They replace the module's own streams, and with them the seed that the module was built with. Schedules
    go on at the saved count of calls; a state that was saved without schedules leaves the count where it is.

    Args:
        module: A rewritten module, also compiled or wrapped, a model that is regularized in place, or a backend.
        state: What ``rng_state`` returned.

    Raises:
        RegularizerError: The state is damaged, or belongs to another version or another module. The noise then stays unchanged.
    """
    session_of(module).load(state)


def set_ranks(
    module: Regulated,
    ranks: Ranks | None = None,
    *,
    mesh: DeviceMesh | None = None,
    data: str | Sequence[str] = (),
    tensor: str | Sequence[str] = (),
    placements: Mapping[str, Mapping[str, Any]] | None = None,
    one_batch: bool = False,
) -> None:
    """Choose which ranks of torch.distributed draw the same masks: all, none (the default), or as a device mesh says.

    Give either ``ranks`` or ``mesh``. With ``mesh``, ranks along the dimensions ``data`` draw different masks. Ranks along the dimensions
    ``tensor``, which work on the same examples together, draw the same mask for a value that each of them has whole, and their parts of one
    mask for a value that they divide: the masks that one process would draw. Call this function after ``parallelize_module``, because the
    placements of values follow from the layers that it made parallel. Ranks along any other dimension draw the same masks.

    Args:
        module: A rewritten module, also compiled or wrapped, a model that is regularized in place, or, without ``mesh``, a backend.
        ranks: ``"differ"`` or ``"same"``.
        mesh: A device mesh whose dimensions have names.
        data: The dimensions of the mesh along which ranks have different examples, such as ``("dp",)``.
        tensor: The dimensions along which ranks work on the same examples together, such as ``("tp",)``.
        placements: How ranks share values where this cannot be inferred. A dict: each key is a selector of sites at which a splice or a
            native dropout draws, or a penalty measures; each value is a dict from each dimension of ``tensor`` to ``Shard(axis)`` or
            ``Replicate()``. ``Shard`` means equal parts, in the order of the ranks.
        one_batch: Whether the examples of the ranks along ``data`` are one batch: each rank then draws its own rows of the masks that one
            process would draw for the whole batch. This requires that the examples lie along axis 0 of each value, and that all ranks
            have equally many, in the order of the ranks.

    Raises:
        RegularizerError: An argument is not allowed, or ranks divide a value that a splice has to see as a whole.
        GraphRegError: The module draws no noise; or how ranks share a value is not known; or a penalty would measure a part of a value.
    """
    session = session_of(module)
    session.require_draws()
    if mesh is not None:
        if ranks is not None:
            raise RegularizerError("set_ranks takes either 'differ' or 'same', or mesh= with the dimensions data= and tensor=, not both.")
        given = {} if placements is None else placements
        session.set_ranks(RankMesh(mesh, _names("data", data), _names("tensor", tensor), given, one_batch), roots_of(module))
        return
    if data or tensor or placements or one_batch:
        raise RegularizerError("data=, tensor=, placements= and one_batch= belong to mesh=, the device mesh whose dimensions they name.")
    if ranks not in ("differ", "same"):
        raise RegularizerError(f"ranks={shown(ranks)} is not allowed; give 'differ' (each rank draws its own masks), 'same', or mesh=.")
    session.set_ranks(ranks, roots_of(module))


def _names(option: str, given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, (tuple, list)) or not all(isinstance(name, str) for name in given):
        raise RegularizerError(f"{option}={shown(given)} is not allowed; give names of dimensions of the mesh: {option}=('dp', 'pp').")
    return tuple(given)


@contextmanager
def frozen_noise(module: Regulated) -> Iterator[None]:
    """Draw the same masks in every call inside the block, for line searches, gradient checks or sharpness-aware steps.

    The block counts as one call, or as none if nothing was drawn in it. A nested block is part of the outer one. Nothing is
    recompiled. A native dropout that was left to torch (``own_dropout="keep"``) is not frozen; the logger ``graphreg`` warns of this once
    for each module. A strength that has a schedule stays the same in the block, too. The block has no effect on a module that draws nothing
    and has no schedule.

    A block belongs to the thread that entered it. Without torch.compile, the blocks of two threads have different masks. While some thread
    is in a block, a thread that has entered no block draws the masks of that block; if several threads are in blocks, it draws the masks
    of the block that was entered first.
    """
    session = session_of(module)
    # An outer block has warned already.
    if not session.noise_is_frozen:
        _warn_unfrozen(module)
    with session.frozen():
        yield


@contextmanager
def noise_on(module: Regulated) -> Iterator[None]:
    """Let every splice act in any mode inside the block: ``with graphreg.noise_on(module): module.eval()(x)``.

    Blocks of several threads may overlap: the noise is on until the last of them ends. A native dropout that was left to torch
    (``own_dropout="keep"``) still follows its module's mode. Raises GraphRegError for a module that draws no noise.
    """
    session = session_of(module)
    session.require_draws()
    with session.noise_switched(on=True):
        yield


@contextmanager
def noise_off(module: Regulated) -> Iterator[None]:
    """Let no splice act inside the block, for example for one batch: ``with graphreg.noise_off(module): module(x)``.

    Penalties are computed as outside the block, but the state of a penalty is not replaced. A splice with its own formula for eval mode
    (``Zoneout``) uses this formula. Native dropout that graphreg draws (``own_dropout="seeded"``) does not act, either. Native dropout that
    was left to torch (``own_dropout="keep"``) follows its module's mode.

    For the noise, a call in train mode counts like any other, so later calls have the same masks as if splices had acted in the block. For
    schedules, the call does not count. Of nested blocks of ``noise_on`` and ``noise_off`` the inner one decides; of
    blocks of several threads, the one that was entered last. The block has no effect on a module that draws nothing, has no schedule, and
    has no penalty with a state.
    """
    with session_of(module).noise_switched(on=False):
        yield


@contextmanager
def penalties_off(module: Regulated) -> Iterator[None]:
    """Let no penalty act inside the block, for example for one batch: ``with graphreg.penalties_off(module): module(x)``.

    Penalties keep their names, and each is 0, without a gradient and without being computed, also where they are added to a loss or to
    gradients (``penalties="attach"``). Their strengths, schedules and ramps are not touched: a call in the block counts as any other, and
    after the block they are what they would be without it. The state of a penalty is not replaced. Noise is not changed.

    The block has no effect on a module that has no penalty. Of blocks of several threads, the penalties are off until the last ends.
    """
    with session_of(module).penalties_off():
        yield


def _warn_unfrozen(module: Regulated) -> None:
    """Warn, once for each module, of the native dropouts that draw from torch's generator."""
    if not (roots := roots_of(module)):
        return
    session = session_of(module)
    if session not in _unfrozen:  # native_draws searches all graphs, so it is called once
        _unfrozen[session] = native_draws(roots[0])
    names = [each.site.name for each in _unfrozen[session] if each.when == "always" or roots[0].get_submodule(each.path).training]
    if names:
        _unfrozen[session] = ()
        log.warning(
            "frozen_noise does not freeze %s: torch draws it, not graphreg. With own_dropout='seeded', graphreg draws what it can.",
            listed(names, 3),
        )
