"""Finds which arguments a call aliases or writes into, from torch's schemas (``declared``) or by a call on meta tensors (``probe``).

A schema declares whether an operator returns a view and whether it writes. A function composed of
several operators has no such declaration: an ``einsum`` that only permutes returns a view, and a
dropout in eval mode returns its input. Such a function is called on meta tensors, which have shapes
and storages but no data, while a dispatch mode records which arguments it writes into.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from graphreg.ir.layout import is_dense
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import storage_number
from graphreg.torch_internals.dynamo_marks import without_importing_dynamo
from graphreg.torch_internals.functorch import without_transforms
from graphreg.torch_internals.global_state import GlobalState
from graphreg.torch_internals.operators import OpOverload, has_kernel, overload_name, overloads_of, schema_of
from graphreg.torch_internals.torch_modes import TorchDispatchMode, without_functions, without_modes

TRIES = 400  # the most calls of a probe; many of them raise
_OPERATORS = 2000  # the most operators that one probed call may run
_RANKS = (2, 4, 3, 1, 5, 0)
# tried for an argument that is not a tensor
_NUMBERS = (4, 1, True, False, torch.float32, torch.device("meta"), torch.Size((4, 4)))
# the usual size of an axis, a size with room for sliding windows, the largest size
_SMALL, _LONG, _MANY = 4, 64, 1 << 16
PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)

Spec = tuple[tuple[int, ...], torch.dtype]  # a tensor's shape and dtype


@dataclass(frozen=True)
class Hole:
    """An argument that the graph computes, so that a probe has to choose a value for it.

    Attributes:
        index: Its position among the inputs of the node.
        kind: ``"tensor"``, ``"list"`` for a list of tensors, or ``"number"`` for anything else.
        specs: The shape and dtype of each of its tensors; empty if they are not known.
        dtype: The dtype of its tensors, if only that is known.
    """

    index: int
    kind: Literal["tensor", "list", "number"] = "tensor"
    specs: tuple[Spec, ...] = ()
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        # quick, because it is a part of the key of each probe
        return f"Hole({self.index}, {self.kind}, {self.specs}, {self.dtype})"


class ProbedCall(NamedTuple):
    """What probed calls did to their arguments. An argument is given by the ``index`` of its hole.

    Attributes:
        shares: The arguments whose storage the result may share.
        writes: The arguments that some call wrote into.
        definite_writes: The arguments that every call wrote into.
        dense: Whether each result that has its own storage fills this storage without gaps.
    """

    shares: frozenset[int]
    writes: frozenset[int]
    definite_writes: frozenset[int]
    dense: bool


def probe(
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    known_shapes: Sequence[tuple[int, ...]] = (),
    enough: int = TRIES,
) -> ProbedCall | None:
    """Call a function with meta tensors of many shapes in the holes of its arguments, and return what it did to storage.

    Args:
        call: The function.
        args: Its positional arguments, with holes.
        kwargs: Its keyword arguments, with holes.
        known_shapes: Shapes and sizes that belong to the call, such as those of weights; an
            argument often has to fit one of them.
        enough: The number of calls without an error after which to stop.

    Returns:
        What the calls did, taken together; None if every call raised.
    """
    holes = list({leaf.index: leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Hole)}.values())
    shapes = [*known_shapes, *(shape for hole in holes for shape, _ in hole.specs), *_literals((args, kwargs))]
    phases = _phases(holes, list(dict.fromkeys(shapes)), bool(known_shapes))

    draws = torch.get_rng_state()  # a composed function may draw random numbers
    with (
        warnings.catch_warnings(), torch.no_grad(), without_modes(), without_functions(), without_importing_dynamo(), without_transforms()
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        state = GlobalState()  # a function may be the beginning of a block, such as a level of torch.func or of autocast
        try:
            seen_calls = _calls(call, args, kwargs, phases, enough, bool(known_shapes))
        finally:
            state.restore()
            torch.set_rng_state(draws)
    return joined_calls(seen_calls) if seen_calls else None


def _calls(
    call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], phases: Iterator[Iterator[Filling]], enough: int, fits: bool
) -> list[ProbedCall]:
    """Call a function with the fillings of one phase after the other, and return what its calls did, those of the first phase that fits."""
    seen_calls, tries = list[ProbedCall](), 0
    for phase in phases:
        for filling in itertools.islice(phase, TRIES - tries):
            tries += 1
            seen = _run(call, args, kwargs, filling)
            # a cast to a tensor's own dtype makes no copy: try other dtypes
            if seen and not seen_calls and not fits:
                others = [_run(call, args, kwargs, _cast(filling, dtype)) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
                seen_calls += [each for other in others for each in other]
            seen_calls += seen
            if len(seen_calls) >= enough:
                break
        if seen_calls:
            break
    return seen_calls


def joined_calls(calls: Sequence[ProbedCall]) -> ProbedCall:
    """Combine what several calls did. An alias or a write counts if any call makes it, a definite write only if all calls make it."""
    shares, writes = (frozenset[int]().union(*(getattr(seen, name) for seen in calls)) for name in ("shares", "writes"))
    return ProbedCall(shares, writes, frozenset.intersection(*(seen.definite_writes for seen in calls)), all(seen.dense for seen in calls))


# index of a hole -> the specs of its tensors, or a value that is not a tensor
Filling = Mapping[int, tuple[Spec, ...] | Any]


def _literals(value: Any) -> list[tuple[int, ...]]:
    """Return the integers and tuples of integers in an argument, as shapes."""
    if isinstance(value, dict):
        return _literals(list(value.values()))
    if not isinstance(value, (tuple, list)):
        return [(value,)] if type(value) is int else []
    alone = [tuple(value)] if len(value) > 1 and all(type(n) is int for n in value) else []
    return [*alone, *(shape for item in value for shape in _literals(item))]


def _phases(holes: list[Hole], shapes: list[tuple[int, ...]], fits: bool) -> Iterator[Iterator[Filling]]:
    """Yield groups of fillings to try: tensors with the usual size in all axes, and tensors with sizes from ``shapes``.

    ``fits``: whether to try the sizes from ``shapes`` first, as for a layer, whose input has to fit
    the shapes of its weights.
    """
    tensors = [hole for hole in holes if hole.kind != "number"]
    numbers = [hole.index for hole in holes if hole.kind == "number"]
    free, known = [hole for hole in tensors if not hole.specs], {hole.index: hole.specs for hole in tensors if hole.specs}

    def fillings(shapes: Iterable[Filling]) -> Iterator[Filling]:
        for each in shapes:
            for number in _NUMBERS if numbers else (None,):
                yield {**each, **dict.fromkeys(numbers, number)}

    if not free:
        yield fillings([known])
        return
    sizes = [n for n in dict.fromkeys(n for shape in shapes for n in shape) if 1 < n <= _MANY and n != _SMALL][:8]
    # for an axis that is divided by n twice, such as by a pixel shuffle
    sizes += [n * n for n in sizes if n < _LONG]
    ends = [shape for shape in shapes if len(shape) > 1][:4]
    named = [*(_same(n) for n in sizes), *(_one(n) for n in sizes), *(_ending(shape) for shape in ends), _same(_LONG)]
    plain = [_same(_SMALL, 1)]
    for kinds in _dtypes(free):
        for patterns in (*named, *plain) if fits or known else (*plain, *named):
            for rests in ((None,), (1, 2, 3)) if len(free) > 1 else ((None,),):
                yield fillings(_shaped(free, known, patterns, rests, kinds))


def _shaped(
    free: list[Hole], known: Filling, patterns: tuple[_Pattern, ...], rests: tuple[int | None, ...], kinds: tuple[torch.dtype, torch.dtype]
) -> Iterator[Filling]:
    """Yield a filling for each pattern, each rank of the first hole, and each item of ``rests``.

    An item of ``rests`` is the rank of the other holes; None stands for the rank of the first hole.
    """
    for rest, rank, pattern in itertools.product(rests, _RANKS, patterns):
        specs = dict(known)
        for hole in free:
            shape = pattern(rank if hole is free[0] or rest is None else rest)
            dtype = hole.dtype or kinds[hole is not free[0]]
            specs[hole.index] = ((shape, dtype),) * (2 if hole.kind == "list" else 1)
        yield specs


_Pattern = Callable[[int], tuple[int, ...]]  # from a rank to a shape


def _same(*sizes: int) -> tuple[_Pattern, ...]:
    """Return, for each of ``sizes``, the pattern with that size in all axes."""
    return tuple((lambda rank, n=n: (n,) * rank) for n in sizes)


def _one(n: int) -> tuple[_Pattern, ...]:
    """Return two patterns: size n in axis 1 (channels) with room for sliding windows in the other axes, and size n in the last axis."""
    return (
        lambda rank: tuple(n if axis == 1 else _LONG for axis in range(rank)),
        lambda rank: tuple(n if axis == rank - 1 else _SMALL for axis in range(rank)),
    )


def _ending(shape: tuple[int, ...]) -> tuple[_Pattern, ...]:
    """Return the pattern whose last axes are those of ``shape``, like the input of a layer norm."""
    return (lambda rank: (_SMALL,) * (rank - len(shape)) + shape[-rank:],)


def _dtypes(free: list[Hole]) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Yield pairs of dtypes to try, for the first hole and for the others."""
    real, integer = torch.float32, torch.int64
    yield real, real
    yield integer, real
    if len(free) > 1:
        yield real, integer
    yield torch.complex64, torch.complex64
    yield torch.bool, torch.bool


def _run(call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], filling: Filling) -> list[ProbedCall]:
    """Make the call with contiguous and then with permuted tensors; return what each call did, up to the first that raised."""
    seen = list[ProbedCall]()
    axes = any(len(shape) > 1 for specs in filling.values() if _are_specs(specs) for shape, _ in specs)
    for permuted in (False, True)[: 1 + axes]:
        holes: dict[int, list[Tensor]] = {}

        def filled(leaf: Any, permuted: bool = permuted, holes: dict[int, list[Tensor]] = holes) -> Any:
            if not isinstance(leaf, Hole):
                return leaf
            if leaf.kind == "number":
                return filling[leaf.index]
            if leaf.index not in holes:
                made = [torch.empty(shape[:: -1 if permuted else 1], dtype=dtype, device="meta") for shape, dtype in filling[leaf.index]]
                holes[leaf.index] = [z.permute(*reversed(range(z.dim()))) for z in made] if permuted else made
            return holes[leaf.index][0] if leaf.kind == "tensor" else list(holes[leaf.index])

        try:
            seen.append(_watched(call, map_aggregate(args, filled), map_aggregate(kwargs, filled), holes))
        except Exception:  # a call may raise anything for arguments that do not fit
            break
    return seen


def _cast(filling: Filling, dtype: torch.dtype) -> Filling:
    """Return the filling with its floating-point tensors in another dtype."""

    def cast(spec: Spec) -> Spec:
        return spec[0], dtype if spec[1].is_floating_point else spec[1]

    return {index: tuple(map(cast, specs)) if _are_specs(specs) else specs for index, specs in filling.items()}


def _are_specs(value: Any) -> bool:
    return type(value) is tuple


def _watched(call: Callable[..., Any], args: Any, kwargs: Any, holes: Mapping[int, list[Tensor]]) -> ProbedCall:
    owners = dict[int, set[int]]()
    for index, tensors in holes.items():
        for tensor in tensors:
            owners.setdefault(storage_number(tensor), set()).add(index)
    with _SchemaWatch(owners) as watch:
        result = call(*args, **kwargs)
    # the call may have given an argument another storage
    for index, tensors in holes.items():
        for tensor in tensors:
            owners.setdefault(storage_number(tensor), set()).add(index)
    shares, dense = set[int](), True
    for leaf in leaves(result):
        if isinstance(leaf, Tensor):
            shared = owners.get(storage_number(leaf), set()) if leaf.layout is torch.strided else set(holes)
            shares |= shared
            dense &= bool(shared) or is_dense(leaf)
        elif not isinstance(leaf, PLAIN):
            shares |= set(holes)  # an object that may hold any tensor
    return ProbedCall(frozenset(shares), frozenset(watch.written), frozenset(watch.written), dense)


class _SchemaWatch(TorchDispatchMode):
    """Records into which arguments the operators of a call write, according to the operators' schemas."""

    def __init__(self, owners: Mapping[int, set[int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners, self.written, self.left = owners, set[int](), _OPERATORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, self.left = kwargs or {}, self.left - 1
        if self.left < 0:
            raise RuntimeError("a call that goes through a long axis item by item")
        bound = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema_of(func).arguments)]
        silent = writes_silently(func) and all(value is not False for a, value in bound if a.name in ("training", "train"))
        for argument, value in bound:
            if is_written(argument) or (silent and argument.name in STATISTICS):
                for leaf in leaves(value):
                    if isinstance(leaf, Tensor):
                        self.written |= self.owners.get(storage_number(leaf), set())
        return func(*args, **kwargs)


STATISTICS = ("running_mean", "running_var")


def is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def writes_silently(func: Any) -> bool:
    """Return whether this is a batch norm whose schema does not declare that it updates its statistics (``native_batch_norm``)."""
    return any(argument.name in STATISTICS and argument.alias_info is None for argument in schema_of(func).arguments)


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists and dicts, or the bounds and the step of a slice."""
    return pytree.tree_leaves(value, is_leaf=lambda v: v is None) if not isinstance(value, slice) else [value.start, value.stop, value.step]


ArgumentPlace = tuple[int, str]  # an argument: its position and its name


class Declared(NamedTuple):
    """What the schemas of an operator declare about aliases and writes.

    Attributes:
        shares: The arguments that the result aliases according to at least one overload.
        writes: The arguments that the operator writes into according to at least one overload.
        complete: Whether the declarations are complete, so that what is not declared does not
            happen.
        silent: Whether an overload may write without declaring it.
    """

    shares: tuple[ArgumentPlace, ...]
    writes: tuple[ArgumentPlace, ...]
    complete: bool
    silent: bool


@cache
def declared(operator: str | OpOverload) -> Declared | None:
    """Return what is declared for an overload, or for all overloads of the aten operator with this name; None if there are no overloads."""
    overloads = [operator] if isinstance(operator, OpOverload) else overloads_with_tensors(operator)
    if not overloads:
        return None
    shares, writes = dict[ArgumentPlace, None](), dict[ArgumentPlace, None]()
    for overload in overloads:
        schema = schema_of(overload)
        noted = [(i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and not a.kwarg_only]
        writes.update(((i, a.name), None) for i, a in noted if is_written(a))
        if any(r.alias_info is not None for r in schema.returns):
            shares.update(((i, a.name), None) for i, a in noted)
    kinds = {_kind(overload) for overload in overloads if _takes_tensors(overload)}
    # an overload that is composed of another one has the same effects: ``add.Scalar`` calls
    # ``add.Tensor``
    complete = not kinds & {"implicit", "real"} and ("explicit" not in kinds or "own" in kinds)
    silent = any(writes_silently(overload) for overload in overloads)
    return Declared(tuple(shares), tuple(writes), complete and not silent, silent)


def overloads_with_tensors(name: str) -> list[OpOverload]:
    """Return the overloads of an aten operator that a model can call with tensors, but those with ``out=``."""
    overloads = [overload for overload in overloads_of(name) if _takes_tensors(overload)]

    # Without those with ``out=``, those of named tensors, and those that only TorchScript can call
    # (``sort.Tensor`` sorts a list).
    overloads = [overload for overload in overloads if not any(a.kwarg_only and is_written(a) for a in schema_of(overload).arguments)]
    return [overload for overload in overloads if "name" not in overload_name(overload).lower() and has_kernel(overload)]


def _takes_tensors(overload: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in schema_of(overload).arguments)


def _kind(overload: OpOverload) -> str:
    """Return how the operator is implemented.

    ``"implicit"`` and ``"explicit"``: it is composed of other operators, above or below autograd
    (``CompositeImplicitAutograd``, ``CompositeExplicitAutograd``). ``"own"``: it has kernels, one
    for meta tensors among them. ``"real"``: it has kernels, but none for meta tensors. Such an
    operator may do what its schema does not declare: given a float tensor, ``dequantize`` returns
    the tensor itself.
    """
    for kind in ("Implicit", "Explicit"):
        if has_kernel(overload, f"Composite{kind}Autograd"):
            return kind.lower()
    return "own" if has_kernel(overload, "Meta") else "real"
