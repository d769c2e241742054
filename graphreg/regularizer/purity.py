"""Checks that a formula is pure: it draws from ``noise`` alone, writes into no tensor it was given, and keeps no state between calls.

With an impure formula, frozen noise would not be frozen, a mask recomputed in backward would differ
from the first, and compiled code would give other results than eager code. A dispatch mode examines
each operation while the formula runs: the operation's tags say whether it may draw random numbers,
and its schema says which arguments it writes into.
"""

from __future__ import annotations

import linecache
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from graphreg.errors import RegularizerError
from graphreg.regularizer.base import Penalty, Regularizer, Splice
from graphreg.rng.operators import compiling
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import storage_number
from graphreg.torch_internals.operators import schema_of
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.random_state import randomness, restore_randomness
from graphreg.torch_internals.torch_modes import TorchDispatchMode

_CONTAINERS = (list, set, tuple, dict)
# the classes whose formula ran on no sample tensor (see purity_trial.py), and has not run under
# ``watched`` since
unproven: WeakSet[type] = WeakSet()


class ImpureError(RegularizerError):
    """A formula draws random numbers itself, writes into its arguments, or keeps state between calls."""


def draw_error(regularizer: Regularizer, what: str) -> ImpureError:
    """Return the error for a formula that draws random numbers without its ``noise``. ``what``: by which operation, for the message."""
    cure = (
        "Give __call__ an argument noise, and draw with noise.keep, noise.uniform or noise.normal"
        if isinstance(regularizer, Splice)
        else "Draw from vjp.noise"
        if regularizer.takes_vjp
        else "Use fixed numbers instead"
    )
    return ImpureError(
        f"{type(regularizer).__name__}.__call__ draws random numbers itself, {what}. A formula is a function of its arguments: "
        f"frozen_noise and rng_state do not control these draws, and a recomputation in backward would draw different numbers. {cure}."
    )


def write_error(regularizer: Regularizer, what: str) -> ImpureError:
    """Return the error for a formula that writes into a tensor that it did not make. ``what``: by which operation, for the message."""
    return ImpureError(
        f"{type(regularizer).__name__}.__call__ writes into a tensor that it did not make, {what}. A formula is a function of its "
        "arguments. Use the operation that makes a new tensor (z * 2 instead of z.mul_(2)), or clone first."
    )


def state_error(regularizer: Regularizer, what: str) -> ImpureError:
    """Return the error for a formula that keeps state from call to call. ``what``: how this was noticed, for the message."""
    return ImpureError(
        f"{type(regularizer).__name__}.__call__ is no function of its arguments: {what}. A compiled module would contain the stored or "
        "drawn values as constants, and frozen_noise does not control them. Take everything that varies as an argument: z, weight, noise."
    )


class PurityWatch(TorchDispatchMode):
    """A dispatch mode that raises ImpureError when a formula draws random numbers, or writes into a tensor that it did not make."""

    def __init__(self, regularizer: Regularizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.regularizer = regularizer
        # the error that was raised, stored because the formula may catch it
        self.error: ImpureError | None = None
        # the storages that the formula made, each as its ``storage_number``
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = schema_of(func)
        # a higher-order operator has no schema; the operators that it runs have one
        if schema is None:
            return func(*args, **kwargs)
        name = schema.name.rpartition("::")[2]
        if any(storage not in self.made for tensor in _written(schema, args, kwargs) for storage in _storages(tensor)):
            self._refuse(write_error(self.regularizer, self._described(name)))
        before = _generator_states(args, kwargs) if torch.Tag.nondeterministic_seeded in func.tags else None
        out = func(*args, **kwargs)
        if before is not None and before != _generator_states(args, kwargs):
            self._refuse(draw_error(self.regularizer, self._described(name)))
        inputs = {storage for each in pytree.tree_tensors((args, kwargs)) for storage in _storages(each)}
        new = {storage for each in pytree.tree_tensors(out) for storage in _storages(each)}
        # torch.tensor(1.) calls lift_fresh on the tensor that it has just made, so the storage of
        # this input is new, too
        self.made |= new if name == "lift_fresh" else new - inputs
        return out

    def _refuse(self, error: ImpureError) -> None:
        self.error = error
        raise error

    def _described(self, operation: str) -> str:
        """Describe the operation, and the user's line that ran it.

        The name of the operation alone may not help the user: ``F.dropout``, for example, is
        dispatched as ``bernoulli_``.
        """
        frame = sys._getframe(2)
        while frame is not None and (frame.f_globals.get("__name__") or "").partition(".")[0] in ("torch", "graphreg"):
            frame = frame.f_back  # type: ignore[assignment]
        line = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals).strip()
        return f"by {operation}" + (f" in line {frame.f_lineno}: {line}" if line else "")


@contextmanager
def watched(regularizer: Regularizer) -> Iterator[PurityWatch]:
    """Watch the formula that runs in the block.

    Raises:
        ImpureError: The formula draws random numbers, or writes into a tensor that it did not make.
            The error is raised even if the formula catches it.
    """
    watch = PurityWatch(regularizer)
    with watch:
        yield watch
    if watch.error is not None:
        raise watch.error


def is_proven(regularizer: Regularizer) -> bool:
    """Return whether the formula was already tried, so that no call of it has to be watched."""
    return not unproven or type(regularizer) not in unproven


def called(regularizer: Regularizer, arguments: dict[str, Any]) -> Any:
    """Call a formula. If it could not be tried on sample tensors before, watch its first call.

    Args:
        regularizer: The regularizer whose formula to call.
        arguments: The arguments of the formula by name.

    Returns:
        The result of the formula.

    Raises:
        ImpureError: The call is watched, and the formula draws random numbers or writes into a
            tensor that it did not make.
    """
    # in this order: Dynamo traces what it meets
    if is_compiling() or is_proven(regularizer) or compiling():
        return regularizer(**arguments)
    with watched(regularizer):
        result = regularizer(**arguments)
    value = result[0] if isinstance(result, tuple) and "state" in regularizer.takes else result
    if isinstance(value, Tensor) and value.device.type != "meta":
        unproven.discard(type(regularizer))
    return result


def twice(regularizer: Regularizer, run: Callable[[], Tensor]) -> None:
    """Run a formula twice on the same arguments, and raise ImpureError if the two runs show that it is impure.

    The two results must be equal. A run must change neither the states of Python's and numpy's
    generators, nor the attributes of the regularizer and its classes.

    Args:
        regularizer: The regularizer whose formula to run.
        run: Runs the formula; it gives the formula the same arguments each time.

    Raises:
        ImpureError: The formula is impure. An exception that the formula raises itself is raised,
            too.
    """
    states, results = [_python_states()], []
    for _ in range(2):
        attributes = _attributes(regularizer)
        with watched(regularizer):
            given: Any = run()
            # without the new state
            results.append(given[0] if isinstance(given, tuple) and "state" in regularizer.takes else given)
        states.append(_python_states())
    # changed by both runs: a change during one run alone may come from another thread
    if states[0] != states[1] != states[2]:
        raise draw_error(regularizer, "by Python's random or numpy.random")
    if changed := [name for name, what in _attributes(regularizer).items() if attributes.get(name) != what]:
        raise state_error(regularizer, f"it changes {type(regularizer).__name__}.{changed[0]}")
    if not all(isinstance(each, Tensor) for each in results) or results[0].shape != results[1].shape:
        return
    if not torch.equal(results[0].detach().nan_to_num(), results[1].detach().nan_to_num()):
        raise state_error(regularizer, "called twice with the same arguments, it gives two results")


def _storages(tensor: Tensor) -> list[int]:
    try:
        return [storage_number(tensor)]
    except (RuntimeError, NotImplementedError):
        # sparse tensors and some subclasses have no storage
        return []


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    written: list[Tensor] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += pytree.tree_tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


def _generator_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes]:
    """Return the states of the default generators, to compare before and after a call.

    The tag of random operations does not show that a call drew: attention and recurrent layers have
    the tag even if they draw nothing. A generator that the formula passes as an argument is not
    included, because the formula may seed it in each call, for example for a fixed projection. If
    the formula does not seed it, two calls give different results, which ``twice`` detects.
    """
    devices = {each.device for each in pytree.tree_tensors((args, kwargs))} | {torch.device(kwargs.get("device") or "cpu")}
    states = [torch.get_rng_state()]
    states += [torch.get_device_module(device).get_rng_state(device) for device in devices if device.type not in ("cpu", "meta")]
    return [state.numpy().tobytes() for state in states]


def _python_states() -> list[Any]:
    if (numpy := sys.modules.get("numpy")) is None:
        return [random.getstate()]
    kind, words, *rest = numpy.random.get_state()
    return [random.getstate(), (kind, words.tobytes(), *rest)]


@contextmanager
def generators_put_back() -> Iterator[None]:
    """Restore the states of torch's, Python's and numpy's generators if the block raises ImpureError."""
    before, numpy = randomness(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    except ImpureError:
        restore_randomness(before)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        raise


def _attributes(regularizer: Regularizer) -> dict[str, Any]:
    """Return the identity of each attribute of the regularizer and its classes, by name; for a container, also those of its items.

    A comparison of the results from before and after a call shows which attributes the call
    changed.
    """
    attributes: dict[str, Any] = {}
    for kind in reversed(type(regularizer).__mro__):
        if issubclass(kind, Regularizer) and kind not in (Regularizer, Splice, Penalty):
            attributes |= {name: _identity(value) for name, value in vars(kind).items() if not name.startswith("__")}
    return attributes | {name: _identity(value) for name, value in vars(regularizer).items()}


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), [(id(key), id(item)) for key, item in value.items()]
    return (id(value), list(map(id, value))) if isinstance(value, _CONTAINERS) else id(value)
