"""The tape: what a forward does with the tensors that it makes itself, beside what it does with the values that are traced.

torch.fx runs ``torch.zeros(4)`` while it traces and puts the tensor into the graph, one for all calls: what is written into it
stays from call to call. Here such operations run too, so that the forward may look at what comes of them, and are written
down with their place in the graph. ``factories.py`` then says which of them the graph must do again at each call.

As soon as a traced value may be in a tensor, nobody knows what it holds: from there on what the forward does with it, or with a
view of it, is a node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from graphreg.ir import SPLITS, Effects, Origin, declared, is_in_place, origin_now, short
from graphreg.torch_internals import (
    PRIVATE_FACTS,
    PRIVATE_STORAGE,
    is_wrapped,
    regions,
    value_name,
    version_of,
)
from graphreg.tracing.symbolic.proxies import Value
from graphreg.tracing.tensors import Key, Lie, Saved, key_of, parts_of, tensors_in

# What is asked of a tensor and does not depend on what it holds: a write leaves it as it is.
FACTS = {
    "shape", "ndim", "dtype", "device", "layout", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__",
    "is_floating_point", "is_complex", "is_contiguous", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_meta", "is_signed",
    "is_nested", "is_mkldnn", "itemsize", "nbytes", "element_size", "get_device", "is_pinned", "is_shared", "names", "__hash__",
    "__repr__", "__dir__", "is_inference", "is_leaf", "result_type", "can_cast", *PRIVATE_FACTS,
}  # fmt: skip
SHOWN = {"numpy", "__array__", "untyped_storage", "storage", PRIVATE_STORAGE, "__dlpack__", "data_ptr"}  # by these others may write
SHARING = {"as_tensor", "asarray", "from_numpy", "frombuffer", "from_dlpack", "from_file"}  # of what is no tensor: in its memory
ANSWERS = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"}  # Python wants these at once
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, type(...))
CURE = "Compute a new value in its place, or move that step into a submodule of its own, which graphreg then keeps whole."


@dataclass(eq=False)
class Entry:
    """An operation on tensors that are no traced values. ``after``: the last node of the graph when it ran."""

    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    after: fx.Node | None
    scope: str
    stack: Any
    origin: Origin | None
    result: Any
    wrote: frozenset[Key]
    region: tuple[bool, ...]  # no_grad, autocast or the like, in which it ran
    copy: Tensor | None = None  # of what it made out of something that no graph holds

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors_in((self.args, self.kwargs)))

    @property
    def place(self) -> str:
        return f" at {short(self.origin)}" if self.origin else ""


@dataclass
class Known:
    """What is known of storages; every set only grows, and ``undo`` says in which order, for a trace may go back."""

    made: dict[int, tuple[Entry, tuple[int, ...]]] = field(default_factory=dict)  # by id of the tensor: what made it, and its part
    fresh: dict[Key, None] = field(default_factory=dict)  # the forward's own
    read: dict[fx.Node, Tensor] = field(default_factory=dict)  # what the graph reads
    touched: dict[Key, None] = field(default_factory=dict)  # the graph reads it, or a view of it
    traced: dict[Key, None] = field(default_factory=dict)  # a traced value may be in it
    rewritten: dict[Key, None] = field(default_factory=dict)  # the forward wrote into it after the graph had read it
    shown: dict[Key, str] = field(default_factory=dict)  # another library may write into it
    asked: dict[int, tuple[frozenset[Key], str]] = field(default_factory=dict)  # what Python was told: of which storages, where
    holding: dict[fx.Node, frozenset[Key]] = field(default_factory=dict)  # nodes that may share a storage of these
    unseen: dict[Key, str] = field(default_factory=dict)  # changed, or given up, by what torch shows to no mode; and where that was noticed


class Tape(TorchFunctionMode):
    """Active while the model's own code runs. ``tracer``: the ``SiteTracer`` that it runs for."""

    def __init__(self, tracer: Any, root: nn.Module) -> None:
        super().__init__()
        self.tracer, self.entries, self.known = tracer, list[Entry](), Known()
        self.effects = Effects(tracer.operations)
        self._undo: list[tuple[dict[Any, Any], Any]] = []
        self._alive: list[Tensor] = []  # so that no id and no storage is another's later
        self._lies: dict[int, tuple[Tensor, Lie]] = {}  # by id: each tensor that was seen, as it was then
        self.moved: dict[int, str] = {}  # by id, those of the model's that lie elsewhere now, and where that was noticed
        self.owned: dict[Key, str] = {}
        for path, module in root.named_modules():
            mine = {**vars(module), **module._parameters, **module._buffers}
            for name, value in mine.items():
                if issubclass(type(value), Tensor):  # by its type: some values may not be looked at (``Gone`` of ``side_effects``)
                    self.owned.setdefault(key_of(value), f"{path}.{name}" if path else name)
                    self._lies[id(value)] = value, Lie.of(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.asking:
            return func(*args, **kwargs)
        name, tensors = _name(func), list(tensors_in((args, kwargs)))
        self.look(tensors)
        if any(map(is_wrapped, tensors)):
            return func(*args, **kwargs)
        if _traces((args, kwargs)):
            self._refuse_assignment(func, name)
            return self._setitem(args) if name == "__setitem__" else func(*args, **kwargs)
        if name.partition(".")[0] == "set_":  # shown since torch.export or Dynamo was imported, by the operator's name, and else not
            return func(*args, **kwargs)
        if any(key_of(tensor) in self.known.traced for tensor in tensors):
            return self._as_node(func, name, args, kwargs)
        return self._run(func, name, args, kwargs, tensors)

    # What the tracer tells

    def reads(self, node: fx.Node, tensor: Tensor) -> None:
        """The graph reads a tensor by a ``get_attr`` of its own."""
        key = key_of(tensor)
        self._alive.append(tensor)
        self.look([tensor])
        self._add(self.known.read, node, tensor)
        self._add(self.known.touched, key)
        self._add(self.known.holding, node, frozenset([key]))

    def look(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Notice what became of tensors since they were last seen, by what torch shows to no mode of functions: ``Tensor.set_``,
        ``torch.utils.swap_tensors``, ``t.real = ...``. All that were seen, if none are given."""
        for tensor in [tensor for tensor, _ in self._lies.values()] if tensors is None else tensors:
            now = Lie.of(tensor)
            _, before = self._lies.setdefault(id(tensor), (tensor, now))
            if before == now:
                continue
            self._lies[id(tensor)] = tensor, now
            keys, place = (before.key, now.key), _here()
            if before.key in self.owned and before.key != now.key:
                self.moved.setdefault(id(tensor), place)
            for key in keys:
                self._add(self.known.unseen, key, place)
                if not self.known.touched.keys().isdisjoint(keys):
                    self._add(self.known.rewritten, key)

    def _looked(self, tensors: Iterable[Tensor], written: Iterable[Key]) -> None:
        """An operation was seen, and what it did to tensors is known."""
        others = [tensor for tensor, lie in self._lies.values() if lie.key in written]
        for tensor in (*tensors, *others):
            self._lies[id(tensor)] = tensor, Lie.of(tensor)

    def is_state(self, tensor: Tensor) -> bool:
        """Whether the tensor is the model's own, and the forward writes into it: as a buffer, no site of the graph."""
        return key_of(tensor) in self.known.traced and key_of(tensor) in self.owned

    def made(self, node: fx.Node) -> None:
        """A node was made: what it may write into may hold a traced value from now on."""
        holding = self.known.holding
        sources = [source for source in node.all_input_nodes if source in holding]
        if not sources:
            return
        surely, may, shares = self._told(node)
        surely = surely or tuple(sources if is_in_place(node) else ())  # also into what is in a list
        for written in {**dict.fromkeys(may), **dict.fromkeys(surely)}:
            for key in holding.get(written, ()):
                if written in surely:
                    self._refuse_others(key)
                self._add(self.known.traced, key)
        if shares:
            self._add(holding, node, frozenset().union(*(holding[source] for source in sources)))

    def _told(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], ...]:
        """What the node writes into, may write into and shares. That is found out by calls, and these are not the model's."""
        before, self.tracer.asking = self.tracer.asking, True
        try:
            return self.effects.writes(node, is_definite=True), self.effects.writes(node), self.effects.shares(node)
        finally:
            self.tracer.asking = before

    def returned(self, value: Any) -> Any:
        """What a module returned: a tensor that traced values were written into, as what it holds now."""
        kind = type(value)
        if issubclass(kind, Tensor) and key_of(value) in self.known.traced:
            return self.tracer.alias(value)
        if kind in (tuple, list):
            return kind(map(self.returned, value))
        return {key: self.returned(item) for key, item in value.items()} if kind is dict else value

    def mark(self) -> tuple[int, int]:
        return len(self.entries), len(self._undo)

    def roll_back(self, mark: tuple[int, int]) -> None:
        entries, undo = mark
        del self.entries[entries:]
        for content, key in reversed(self._undo[undo:]):
            content.pop(key, None)
        del self._undo[undo:]

    # Operations

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """An operation on tensors whose content is known: it runs, and is written down."""
        if name in FACTS:
            return func(*args, **kwargs)
        if any(key_of(tensor) not in self.known.fresh for tensor in tensors):
            self._refuse_assignment(func, name)
            if name == "__get__" and attribute_of(func) == "requires_grad" and isinstance(tensors[0], nn.Parameter):
                return self.tracer.flag(tensors[0])
        others = [Saved(tensor) for tensor in tensors if key_of(tensor) not in self.known.fresh]
        before = [(tensor, version_of(tensor)) for tensor in tensors]
        given = _frozen((args, kwargs))
        result = func(*args, **kwargs)
        written = {key_of(tensor) for tensor, version in before if version_of(tensor) != version}
        written.update(map(key_of, _written_by_schema(name, args, kwargs)))
        if name == "__set__" or (name.endswith("_") and not name.endswith("__") and any(result is tensor for tensor in tensors)):
            written.add(key_of(tensors[0]))
        spoilt = [saved for saved in others if key_of(saved.tensor) in written]
        if spoilt:  # it is the graph that writes into what is not the forward's own
            for saved in spoilt:
                saved.put_back()
            self._looked(tensors, written)
            for saved in spoilt:
                self._refuse_others(key_of(saved.tensor))
                self._add(self.known.traced, key_of(saved.tensor))
            return self._as_node(func, name, args, kwargs)
        self._looked([*tensors, *tensors_in(result)], written)
        self._write_down(func, name, given, result, frozenset(written))
        return result

    def _write_down(self, func: Any, name: str, given: Any, result: Any, written: frozenset[Key]) -> None:
        args, kwargs = given
        keys = frozenset(key_of(tensor) for tensor in tensors_in(given))
        self._alive += tensors_in(given)
        results = list(parts_of(result))
        if name in SHOWN:
            for key in keys:
                self._add(self.known.shown, key, name)
        if not results and not written:
            if keys:
                self._add(self.known.asked, len(self.known.asked), (keys, _here()))
            return
        plain = _plain((args, kwargs))
        if not plain and (keys or name in SHARING):
            return  # in memory that is not the graph's to make, or by what it cannot hold
        last = next(iter(reversed(self.tracer.graph.nodes)), None)
        stack = dict(self.tracer.module_stack)
        entry = Entry(func, args, kwargs, last, self.tracer.scope_path, stack, origin_now(), result, written, regions())
        if not plain:
            entry.copy = result.detach().clone() if isinstance(result, Tensor) else None
        self.entries.append(entry)
        for key in written:
            if key in self.known.touched:
                self._add(self.known.rewritten, key)
        for path, tensor in results:
            self._alive.append(tensor)
            if not any(tensor is each for each in tensors_in(given)):
                self._add(self.known.made, id(tensor), (entry, path))
                if key_of(tensor) not in keys:
                    self._add(self.known.fresh, key_of(tensor))

    def _as_node(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An operation on a tensor that may hold traced values is one of the graph."""
        tracer = self.tracer
        if name in FACTS or name in SHOWN - {"numpy", "__array__"}:
            return func(*args, **kwargs)
        if name == "__get__":
            return tracer.create_proxy("call_function", getattr, (args[0], attribute_of(func)), {})
        self._refuse_assignment(func, name)
        if name in ANSWERS:
            raise TypeError("the forward asks what a tensor holds, and traced values were written into it")
        if name == "__setitem__":
            return self._setitem(args)
        if not is_tensor_method_or_property(func):
            made = tracer.create_proxy("call_function", func, args, kwargs, name=value_name(tracer.graph, func.__name__))
        else:
            made = tracer.create_proxy("call_method", name, args, kwargs)
        if name in SPLITS:
            return tuple(made[i] for i in range(len(func(*args, **kwargs))))
        return made

    def _setitem(self, args: Any) -> None:
        Value.put(self.tracer, *args)

    def _refuse_assignment(self, func: Any, name: str) -> None:
        if name in ("__set__", "__delete__"):
            raise AttributeError(f"it assigns .{attribute_of(func)} of a tensor, which a graph cannot carry; make a new one instead")

    def _refuse_others(self, key: Key) -> None:
        if key not in self.known.fresh and key not in self.owned:
            raise RuntimeError(
                "it writes into a tensor that it neither makes by an operation of torch (torch.zeros, torch.tensor) nor finds on the "
                "model: a global, a default argument, a tensor in a list, memory of numpy. Register it as a buffer, or write into a clone"
            )

    def _add(self, content: dict[Any, Any], key: Any, value: Any = None) -> None:
        if key not in content:
            content[key] = value
            self._undo.append((content, key))


def _traces(value: Any) -> bool:
    kind = type(value)
    if issubclass(kind, (tuple, list)):
        return any(map(_traces, value))
    if kind is dict:
        return any(map(_traces, value.values()))
    if kind is slice:
        return _traces((value.start, value.stop, value.step))
    return issubclass(kind, fx.Proxy)


def _plain(value: Any) -> bool:
    """Whether a graph can hold it as it is."""
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, slice):
        return _plain((value.start, value.stop, value.step))
    return isinstance(value, (Tensor, range, *_PLAIN)) and type(value).__module__ != "numpy"


def _frozen(value: Any) -> Any:
    """The same with lists and dicts of its own: the forward may go on to fill the one that it gave."""
    kind = type(value)
    if kind in (tuple, list, torch.Size):
        made: Iterable[Any] = map(_frozen, value)
        return list(made) if kind is list else tuple(made)
    return {key: _frozen(item) for key, item in value.items()} if kind is dict else value


def _written_by_schema(name: str, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """What an operation writes into by its schema: under a dispatch mode, as one that watches for draws, ``torch._foreach_add_`` counts
    no version up."""
    known = declared(name)
    for position, argument in known.writes if known is not None else ():
        yield from tensors_in(args[position] if position < len(args) else kwargs.get(argument))


def _name(func: Any) -> str:
    """What is called; of a property that is read, the property, where it is a fact."""
    name = str(getattr(func, "__name__", ""))
    attribute = attribute_of(func) if name == "__get__" else ""
    return attribute if attribute in FACTS else name


def attribute_of(func: Any) -> str:
    return str(getattr(getattr(func, "__self__", None), "__name__", "an attribute"))


def _here() -> str:
    origin = origin_now()
    return f" at {short(origin)}" if origin else ""
