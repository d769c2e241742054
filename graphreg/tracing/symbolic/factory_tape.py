"""The tape: records what a forward does during a trace with the tensors that it makes itself.

torch.fx runs ``torch.zeros(4)`` while it traces, and puts the resulting tensor into the graph,
where all calls share it. So a call would find what earlier calls wrote into the tensor. With the
tape, such operations still run during the trace, because the forward may read their results. But
the tape records each operation with its place in the graph, and ``factories.py`` decides which of
them the graph must repeat at each call.

As soon as a traced value may have been written into a tensor, the tensor's content is unknown. From
then on, each operation on the tensor, or on a view of it, becomes a node of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from graphreg.ir.contents import called_by_foreign_code
from graphreg.ir.operation_probes import declared
from graphreg.ir.operations import SPLITS, is_in_place
from graphreg.ir.source_location import origin_now, short
from graphreg.ir.views_and_writes import ViewsAndWrites
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import PRIVATE_FACTS, PRIVATE_STORAGE, version_of
from graphreg.torch_internals.functorch import is_wrapped
from graphreg.torch_internals.fx import value_name
from graphreg.torch_internals.modules import buffers_by_name, modules_by_path, parameters_by_name
from graphreg.torch_internals.random_state import regions
from graphreg.tracing.symbolic.proxies import Value
from graphreg.tracing.symbolic.tape_records import StorageFacts, TapeEntry
from graphreg.tracing.tensors import (
    LEFT_IN_TENSORS,
    SavedTensor,
    StorageKey,
    TensorState,
    reads_what_is_left,
    storage_key,
    tensors_by_path,
    tensors_in,
)

# Attributes, methods and functions whose result does not depend on a tensor's content, so that no
# write changes it.
FACTS = {
    "shape", "ndim", "dtype", "device", "layout", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__",
    "is_floating_point", "is_complex", "is_contiguous", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_meta", "is_signed",
    "is_nested", "is_mkldnn", "itemsize", "nbytes", "element_size", "get_device", "is_pinned", "is_shared", "names", "__hash__",
    "__repr__", "__dir__", "is_inference", "is_leaf", "result_type", "can_cast", *PRIVATE_FACTS,
}  # fmt: skip
# functions that give a tensor's memory to code whose writes the tape does not see
EXPOSING = {"numpy", "__array__", "untyped_storage", "storage", PRIVATE_STORAGE, "__dlpack__", "data_ptr"}
# functions whose result may share the memory of another object, such as an array
SHARING = {"as_tensor", "asarray", "from_numpy", "frombuffer", "from_dlpack", "from_file"}
# methods whose result must be a Python value, so that no node can stand for it
PYTHON_READS = {"__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__"}
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, type(...))
CURE = "Compute a new value instead, or move that step into a submodule of its own, which then becomes an opaque module."


class Tape(TorchFunctionMode):
    """The function mode that records operations; active while the model's code runs.

    Attributes:
        tracer: The ``SiteTracer`` that traces the model.
        entries: The recorded operations in order.
        known: Facts about storages.
        effects: Tells which arguments a node may share storage with, and which it writes into.
        moved: A dict. Each key is the id of a tensor of the model that has got another storage; the
            value is the line where the tape noticed this.
        owned: A dict. Each key is the storage of a tensor of the model; the value is the tensor's
            name.
        registered: The storages of the model's parameters and buffers.
        states: By id, each tensor that the tape has seen, with its last known state.
    """

    def __init__(self, tracer: Any, root: nn.Module) -> None:
        """Prepare to record the forward of ``root``."""
        super().__init__()
        self.tracer, self.entries, self.known = tracer, list[TapeEntry](), StorageFacts()
        self.effects = ViewsAndWrites(tracer.operations)
        # (dict of facts, key) of each fact, in the order in which they were added
        self._undo: list[tuple[dict[Any, Any], Any]] = []
        # keeps tensors alive, so that their ids and storages are not used again
        self._alive: list[Tensor] = []
        self.states: dict[int, tuple[Tensor, TensorState]] = {}
        self.moved: dict[int, str] = {}
        self.owned: dict[StorageKey, str] = {}

        mine: list[tuple[str, Any]] = [
            (f"{path}.{name}" if path else name, value)
            for path, module in modules_by_path(root, once=True).items()
            for held in (vars(module), module._parameters, module._buffers)
            for name, value in held.items()
            if issubclass(type(value), Tensor)  # isinstance would read ``__class__``, and a ``StaleValue`` then raises
        ]
        for (name, tensor), state in zip(mine, TensorState.all_of(tensor for _, tensor in mine), strict=True):
            self.owned.setdefault(state.key, name)
            self.states[id(tensor)] = tensor, state
        self.registered = set(map(storage_key, (*parameters_by_name(root).values(), *buffers_by_name(root).values())))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.evaluating:
            return func(*args, **kwargs)
        name, tensors = operation_name(func), list(tensors_in((args, kwargs)))
        if name in LEFT_IN_TENSORS and not called_by_foreign_code():
            raise TypeError(reads_what_is_left(name))
        if tensors:
            self.check_states(tensors)
        if any(map(is_wrapped, tensors)):
            return func(*args, **kwargs)
        if has_proxy((args, kwargs)):
            self._refuse_assignment(func, name)
            return Value.set_item(self.tracer, *args) if name == "__setitem__" else func(*args, **kwargs)
        # a function mode sees ``set_`` in some cases only; ``check_states`` always notices it
        if name.partition(".")[0] == "set_":
            return func(*args, **kwargs)
        if any(storage_key(tensor) in self.known.traced for tensor in tensors):
            return self._as_node(func, name, args, kwargs)
        return self._run_eagerly(func, name, args, kwargs, tensors)

    # Called by the tracer

    def constant_read(self, node: fx.Node, tensor: Tensor) -> None:
        """Note that the graph reads a tensor by a ``get_attr`` node."""
        key = storage_key(tensor)
        self._alive.append(tensor)
        self.check_states([tensor])
        self._add(self.known.read, node, tensor)
        self._add(self.known.touched, key)
        self._add(self.known.holding, node, frozenset([key]))

    def check_states(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Notice changes that no function mode sees: those by ``Tensor.set_``, ``torch.utils.swap_tensors`` or ``t.real = ...``.

        Args:
            tensors: The tensors to compare with their last known states. None means all tensors
                that the tape has seen.
        """
        asked = [tensor for tensor, _ in self.states.values()] if tensors is None else list(tensors)
        for tensor, now in zip(asked, TensorState.all_of(asked), strict=True):
            _, before = self.states.setdefault(id(tensor), (tensor, now))
            if before == now:
                continue
            self.states[id(tensor)] = tensor, now
            keys, place = (before.key, now.key), _location()
            if before.key in self.owned and before.key != now.key:
                self.moved.setdefault(id(tensor), place)
            for key in keys:
                self._add(self.known.untracked, key, place)
                if not self.known.touched.keys().isdisjoint(keys):
                    self._add(self.known.rewritten, key)

    def _update_states(self, tensors: Iterable[Tensor], written: Iterable[StorageKey]) -> None:
        """Note the present states of an operation's tensors, and of all other tensors in the storages that the operation wrote into."""
        others = [tensor for tensor, state in self.states.values() if state.key in written]
        for tensor, state in zip(asked := [*tensors, *others], TensorState.all_of(asked), strict=True):
            self.states[id(tensor)] = tensor, state

    def node_created(self, node: fx.Node) -> None:
        """Note that a node was made. The tensors that the node may write into may hold a traced value from now on."""
        holding = self.known.holding
        sources = [source for source in node.all_input_nodes if source in holding]
        if not sources:
            return
        definite, possible, shares = self._effects_of(node)
        # if it is unknown which arguments an in-place operation writes into, assume that it writes
        # into all, such as the tensors of a list
        definite = definite or tuple(sources if is_in_place(node) else ())
        for written in {**dict.fromkeys(possible), **dict.fromkeys(definite)}:
            for key in holding.get(written, ()):
                if written in definite:
                    self._refuse_others(key)
                self._add(self.known.traced, key)
        if shares:
            self._add(holding, node, frozenset().union(*(holding[source] for source in sources)))

    def _effects_of(self, node: fx.Node) -> tuple[tuple[fx.Node, ...], ...]:
        """Return the nodes that a node writes into, may write into, and shares storage with.

        To find that out, ``ViewsAndWrites`` runs operations on tensors of its own. The tape must not
        record these operations.
        """
        before, self.tracer.evaluating = self.tracer.evaluating, True
        try:
            return self.effects.writes(node, is_definite=True), self.effects.writes(node), self.effects.shares(node)
        finally:
            self.tracer.evaluating = before

    def module_output(self, value: Any) -> Any:
        """Return a module's result, with a new node in place of each tensor that may hold traced values.

        The node is an alias, so that it has the content that the tensor has at this place of the
        graph.
        """
        kind = type(value)
        if issubclass(kind, Tensor) and storage_key(value) in self.known.traced:
            return self.tracer.alias(value)
        if kind in (tuple, list):
            return kind(map(self.module_output, value))
        return {key: self.module_output(item) for key, item in value.items()} if kind is dict else value

    def mark(self) -> tuple[int, int]:
        """Return a mark of the present state, to which ``roll_back`` can return."""
        return len(self.entries), len(self._undo)

    def roll_back(self, mark: tuple[int, int]) -> None:
        """Forget what was recorded since a mark."""
        entries, undo = mark
        del self.entries[entries:]
        for content, key in reversed(self._undo[undo:]):
            content.pop(key, None)
        del self._undo[undo:]

    # Operations

    def _run_eagerly(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run an operation on tensors whose content is known, and record it."""
        if name in FACTS:
            return func(*args, **kwargs)
        if any(storage_key(tensor) not in self.known.fresh for tensor in tensors):
            self._refuse_assignment(func, name)
            if name == "__get__" and accessed_attribute(func) == "requires_grad" and isinstance(tensors[0], nn.Parameter):
                return self.tracer.requires_grad_of(tensors[0])
        saved_tensors = [SavedTensor(tensor) for tensor in tensors if storage_key(tensor) not in self.known.fresh]
        before = [(tensor, version_of(tensor)) for tensor in tensors]
        arguments = _copied((args, kwargs))
        result = func(*args, **kwargs)
        if not any(True for _ in tensors_in(result)) and self._reads_parameters(func, args, kwargs):
            return self._as_node(func, name, args, kwargs)
        written = {storage_key(tensor) for tensor, version in before if version_of(tensor) != version}

        # Version counters do not show all writes: under a dispatch mode, such as the one that
        # counts random draws, ``torch._foreach_add_`` does not increase them. Its schema tells what
        # it writes into.
        schema = declared(name)
        for position, argument in schema.writes if schema is not None else ():
            given = args[position] if position < len(args) else kwargs.get(argument)
            written.update(map(storage_key, tensors_in(given)))
        if name == "__set__" or (name.endswith("_") and not name.endswith("__") and any(result is tensor for tensor in tensors)):
            written.add(storage_key(tensors[0]))
        overwritten = [saved for saved in saved_tensors if storage_key(saved.tensor) in written]
        # only the graph may write into tensors that the forward did not make: undo the writes, and
        # make a node
        if overwritten:
            for saved in overwritten:
                saved.restore()
            self._update_states(tensors, written)
            for saved in overwritten:
                self._refuse_others(storage_key(saved.tensor))
                self._add(self.known.traced, storage_key(saved.tensor))
            return self._as_node(func, name, args, kwargs)
        self._update_states([*tensors, *tensors_in(result)], written)
        self._append(func, name, arguments, result, frozenset(written))
        return result

    def computed_from(self, changing: Iterable[StorageKey]) -> set[StorageKey]:
        """Return the storages in ``changing``, and those of all results that the forward computed from them."""
        storages = set(changing)
        for entry in self.entries:
            if not storages.isdisjoint(map(storage_key, entry.tensors)):
                storages.update(map(storage_key, tensors_in(entry.result)))
        return storages

    def _reads_parameters(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Return whether a function reads the content of parameters, of buffers or of values computed from them, which changes later.

        A function that reads the content of a tensor fails for tensors that have none.
        """
        if self.computed_from(self.registered).isdisjoint(map(storage_key, tensors_in((args, kwargs)))):
            return False
        args, kwargs = pytree.tree_map_only(Tensor, _without_content, (args, kwargs))
        try:
            func(*args, **kwargs)
        except (RuntimeError, TypeError):  # torch raises NotImplementedError, a RuntimeError, or numpy a TypeError
            return True
        return False

    def _append(self, func: Any, name: str, arguments: Any, result: Any, written: frozenset[StorageKey]) -> None:
        """Append an entry for an operation that ran, and note what the operation did to storages."""
        args, kwargs = arguments
        keys = frozenset(storage_key(tensor) for tensor in tensors_in(arguments))
        self._alive += tensors_in(arguments)
        results = list(tensors_by_path(result))

        if name in EXPOSING:
            for key in keys:
                self._add(self.known.exposed, key, name)

        if not results and not written:
            if keys:
                self._add(self.known.python_reads, len(self.known.python_reads), (keys, _location()))
            return

        representable = _is_representable((args, kwargs))
        if not representable and (keys or name in SHARING):
            # record nothing: a graph cannot hold the arguments, and a copy of the result would not
            # share their memory
            return

        if any(tensor.requires_grad for tensor in tensors_in(arguments)):
            self.tracer.follow_gradients()
        last = next(iter(reversed(self.tracer.graph.nodes)), None)
        stack = dict(self.tracer.module_stack)
        self.tracer.note_autocast()
        entry = TapeEntry(func, args, kwargs, last, self.tracer.scope_path, stack, origin_now(), result, written, regions())
        if not representable:
            entry.copy = result.detach().clone() if isinstance(result, Tensor) else None
        self.entries.append(entry)

        for key in written:
            if key in self.known.touched:
                self._add(self.known.rewritten, key)
        for path, tensor in results:
            self._alive.append(tensor)
            if not any(tensor is each for each in tensors_in(arguments)):
                self._add(self.known.made, id(tensor), (entry, path))
                if storage_key(tensor) not in keys:
                    self._add(self.known.fresh, storage_key(tensor))

    def _as_node(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Make a node for an operation on a tensor that may hold traced values."""
        tracer = self.tracer
        if name in FACTS or name in EXPOSING - {"numpy", "__array__"}:
            return func(*args, **kwargs)
        if name == "__get__":
            return tracer.create_proxy("call_function", getattr, (args[0], accessed_attribute(func)), {})
        self._refuse_assignment(func, name)
        if name in PYTHON_READS:
            raise TypeError("the forward reads the content of a parameter, a buffer or a tensor into which traced values were written")
        if name == "__setitem__":
            return Value.set_item(self.tracer, *args)
        if not is_tensor_method_or_property(func):
            value = tracer.create_proxy("call_function", func, args, kwargs, name=value_name(tracer.graph, func.__name__))
        else:
            value = tracer.create_proxy("call_method", name, args, kwargs)
        if name in SPLITS:
            return tuple(value[i] for i in range(len(func(*args, **kwargs))))
        return value

    def _refuse_assignment(self, func: Any, name: str) -> None:
        """Raise AttributeError if the operation assigns or deletes an attribute of a tensor."""
        if name in ("__set__", "__delete__"):
            attribute = accessed_attribute(func)
            raise AttributeError(f"it assigns or deletes .{attribute} of a tensor, and a graph cannot do that; make a new tensor")

    def _refuse_others(self, key: StorageKey) -> None:
        """Raise RuntimeError if a storage that an operation writes into was not made by the forward and does not belong to the model."""
        if key not in self.known.fresh and key not in self.owned:
            raise RuntimeError(
                "it writes into a tensor that it neither makes by an operation of torch (torch.zeros, torch.tensor) nor finds on the "
                "model: a global, a default argument, a tensor in a list, memory of numpy. Register it as a buffer, or write into a clone"
            )

    def _add(self, content: dict[Any, Any], key: Any, value: Any = None) -> None:
        """Add a key to a dict of facts, unless it is there already. ``roll_back`` can remove the key."""
        if key not in content:
            content[key] = value
            self._undo.append((content, key))


def has_proxy(value: Any) -> bool:
    """Return whether nested arguments contain a traced value."""
    kind = type(value)
    if issubclass(kind, (tuple, list)):
        return any(map(has_proxy, value))
    if kind is dict:
        return any(map(has_proxy, value.values()))
    if kind is slice:
        return has_proxy((value.start, value.stop, value.step))
    return issubclass(kind, fx.Proxy)


def _is_representable(value: Any) -> bool:
    """Return whether a node can have a value as an argument."""
    if isinstance(value, (tuple, list)):
        return all(map(_is_representable, value))
    if isinstance(value, dict):
        return all(map(_is_representable, value.values()))
    if isinstance(value, slice):
        return _is_representable((value.start, value.stop, value.step))
    return isinstance(value, (Tensor, range, *_PLAIN)) and type(value).__module__ != "numpy"


def _copied(value: Any) -> Any:
    """Copy nested lists and dicts, because the forward may change them after the call."""
    kind = type(value)
    if kind in (tuple, list, torch.Size):
        items: Iterable[Any] = map(_copied, value)
        return list(items) if kind is list else tuple(items)
    return {key: _copied(item) for key, item in value.items()} if kind is dict else value


def operation_name(func: Any) -> str:
    """Return the name of a function; for the getter of a property in ``FACTS``, the property's name instead of ``__get__``."""
    name = str(getattr(func, "__name__", ""))
    attribute = accessed_attribute(func) if name == "__get__" else ""
    return attribute if attribute in FACTS else name


def accessed_attribute(func: Any) -> str:
    """Return the name of the tensor attribute that a getter or setter reads or writes."""
    return str(getattr(getattr(func, "__self__", None), "__name__", "an attribute"))


def _without_content(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _location() -> str:
    """Return the line of the user's code that runs, as ``" at file:line"``; ``""`` if it is not known."""
    origin = origin_now()
    return f" at {short(origin)}" if origin else ""
