"""Measures the cost of graphreg's additions to a graph: runs one forward pass with the additions and one without them.

Both passes run on meta tensors, which have shapes but no data. The cost is the difference between the two passes, node by node. The cost
can be negative. For example, autograd saves the mask of an added dropout for backward, but may no longer save the value that the dropout
replaces. The numbers are those of eager mode. Compiled code saves other values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import flop_registry

from graphreg.errors import GraphRegError, first_line
from graphreg.ir.layer_calls import LAYER
from graphreg.ir.metadata import Kind, addition_of
from graphreg.ir.module_record import specialized_arguments
from graphreg.ir.views_and_writes import without_data
from graphreg.planning.native_dropout import OWN_DROPOUT
from graphreg.planning.plan import Plan
from graphreg.reporting.records import Cost
from graphreg.rewriting.strip import without_additions
from graphreg.session.hosts import graphs_of
from graphreg.torch_internals import pytree
from graphreg.torch_internals.autograd import storage_number
from graphreg.torch_internals.interpreter import deep_enough
from graphreg.torch_internals.operators import packet_of
from graphreg.torch_internals.patching import Changes
from graphreg.torch_internals.random_state import with_draws_restored
from graphreg.torch_internals.torch_modes import TorchDispatchMode, uncompiled
from graphreg.tracing.side_effects.retrace import model_restored

# Names of operators that count as 0 operations. Views also count as 0, see ``_operations``.
_FREE = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_reshape_alias"}
META = torch.device("meta")


def cost(module: fx.GraphModule, plan: Plan) -> Cost:
    """Measure the cost of the additions to a rewritten module, in one forward pass in train mode.

    Raises:
        GraphRegError: The model was traced without example inputs, or the model cannot run on meta tensors. The message is a clause
            with the reason, which the report quotes.
    """
    try:
        with Changes() as changes, changes:
            deep_enough(module, changes)
            twin = without_data(module)
        twin.train()
        plain = without_additions(twin)

        def passes() -> list[_ForwardPass]:
            return [_pass(each, _of_train(graphs_of(each)), specialized_arguments(module)) for each in (twin, plain)]

        with model_restored(twin):  # opaque code runs, and may change what is not in the copies
            with_them, without = with_draws_restored(passes)
    except GraphRegError:
        raise
    except Exception as error:  # raised by the model's code, which may read a tensor's value, or by an operator without a meta kernel
        raise GraphRegError(f"the model does not run on shapes alone ({first_line(error)})") from error

    labels = _labels(_of_train(graphs_of(twin)), plan)
    names = [*plan.regularizers, OWN_DROPOUT, "keys", "schedules", "copies", "attach", "monitor", "kept values", "other"]
    operations, kept = Counter[str](), Counter[str]()
    for node in {**with_them.operations, **without.operations, **with_them.kept, **without.kept}:
        more = with_them.operations[node] - without.operations[node]
        operations[labels.get(node, "other")] += more
        bytes_more = with_them.kept[node] - without.kept[node]
        # Autograd may save a value of the model's own because of an addition, or save it no longer.
        kept[labels.get(node) or _cause(node, bytes_more, with_them, _of_train(graphs_of(twin)), labels)] += bytes_more

    shown = [name for name in names if name in plan.regularizers or operations[name] or kept[name]]
    return Cost(
        {name: operations[name] for name in shown}, {name: kept[name] for name in shown}, without.operations.total(), without.kept.total()
    )


def _of_train(graphs: Mapping[str, fx.Graph]) -> fx.Graph:
    return graphs.get("train") or graphs["both"]


def _labels(graph: fx.Graph, plan: Plan) -> dict[str, str]:
    """Map the name of each added node to its row of the cost table: a regularizer, or a kind of addition such as ``"keys"``.

    A node of the model has an entry only if graphreg replaced its call, such as the call of a native dropout.
    """
    kinds = {
        Kind.NATIVE: OWN_DROPOUT, Kind.KEY: "keys", Kind.CLOCK: "schedules", Kind.CLONE: "copies", Kind.COPY: "copies",
        Kind.ATTACH: "attach", Kind.ATTACHED: "attach", Kind.WATCH: "monitor", Kind.KEEP: "kept values",
    }  # fmt: skip
    labels = {}
    for node in graph.nodes:
        if (added := addition_of(node)) is not None:
            tracked = plan.tracked.get(added.site or "", ["other"]) if added.kind == Kind.TRACK else ["other"]
            labels[node.name] = added.regularizer or kinds.get(added.kind, tracked[0])
    return labels


def _cause(node: str, more: int, run: _ForwardPass, graph: fx.Graph, labels: Mapping[str, str]) -> str:
    """Return the row of the cost table for a change in the bytes that autograd saves of one value of the model.

    If autograd saves more bytes than without additions, the row is that of an added node that saved the value. If autograd saves fewer
    bytes, the row is that of an added node that reads the value. The row is ``"other"`` if there is no change or no such node.

    Args:
        node: The name of the node of the model that made the value's storage.
        more: The change in bytes.
        run: The pass with the additions.
        graph: The graph with the additions.
        labels: The row of each added node, as ``_labels`` returns them.
    """
    if not more:
        return "other"
    if more > 0:
        return next((labels[name] for name in run.savers.get(node, ()) if name in labels), "other")
    values = (n for n in graph.nodes if n.name in run.holders.get(node, ()))
    return next((labels[user.name] for value in values for user in value.users if user.name in labels), "other")


def _pass(module: fx.GraphModule, graph: fx.Graph, specialized: Mapping[str, Any]) -> _ForwardPass:
    inputs = [_input(node, specialized) for node in graph.nodes if node.op == "placeholder"]
    run = _ForwardPass(module, graph)
    # Autograd calls the hook with each tensor that it saves for backward.
    with uncompiled(), torch.enable_grad(), saved_tensors_hooks(run.save, lambda tensor: tensor), _Counting(run):
        # One input for each placeholder: there is no structure to flatten.
        run.run(*inputs, enable_io_processing=False)
    run.settle()
    return run


def _input(node: fx.Node, specialized: Mapping[str, Any]) -> Any:
    name = str(node.target)
    if name in specialized:
        return specialized[name]
    if "value" not in node.meta:
        raise GraphRegError("the model was traced without example inputs")
    known = node.meta["value"]
    if known is None and name.startswith("*"):
        return {} if name.startswith("**") else ()
    if known is None and node.args:
        return node.args[0]
    if known is None:
        raise GraphRegError(f"the shapes in the input {name!r} are not known")
    return _empty(known, name)


def _empty(known: Any, name: str) -> Any:
    if isinstance(known, list):
        return tuple(_empty(item, name) for item in known)
    if known is None:
        raise GraphRegError(f"the shapes in the input {name!r} are not known")
    return torch.empty(known[0], dtype=known[1], device=META)


class _ForwardPass(fx.Interpreter):
    """Runs one forward pass. Counts the operations of each node, and the bytes of the node's value that autograd saves for backward."""

    def __init__(self, module: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.operations, self.kept = Counter[str](), Counter[str]()
        self.savers: dict[str, list[str]] = {}  # key: the node that made a storage; value: the nodes that saved the storage
        # Key: the number of a storage; value: the node that made the storage, and the storage itself. The reference keeps the storage
        # alive, because torch may give the number of a freed storage to a new one.
        self.made: dict[int, tuple[str, Any]] = {}
        self.holders: dict[str, dict[str, None]] = {}  # key: the node that made a storage; value: the nodes whose values are in the storage
        self.saved: dict[int, list[str]] = {}  # key: the number of a storage; value: the nodes that saved the storage for backward
        self.now = ""
        storages = [_storage(tensor) for tensor in (*module.parameters(), *module.buffers())]
        self.free = {storage_number(storage): storage for storage in storages}  # saving a parameter or a buffer needs no more memory

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # for ``*args``, fx.Interpreter would return a list of all remaining inputs

    def run_node(self, n: fx.Node) -> Any:
        self.now = n.name
        value = super().run_node(n)
        self.made_by_now(value)
        if isinstance(self.module_of(n), nn.RNNBase):  # cuDNN and oneDNN run the layer as one operator, which saves its outputs
            for tensor in pytree.tree_tensors(value):
                self.save(tensor)
        return value

    def module_of(self, node: fx.Node) -> nn.Module | None:
        if (layer := node.kwargs.get(LAYER)) is not None:
            return self.fetch_attr(str(layer.target))  # type: ignore[union-attr,no-any-return]
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def made_by_now(self, value: Any) -> None:
        for tensor in pytree.tree_tensors(value):
            storage = _storage(tensor)
            maker, _ = self.made.setdefault(storage_number(storage), (self.now, storage))
            self.holders.setdefault(maker, {})[self.now] = None

    def save(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if (number := storage_number(storage)) not in self.free:
            self.made.setdefault(number, (self.now, storage))
            self.saved.setdefault(number, []).append(self.now)
        return tensor

    def settle(self) -> None:
        """Add up the bytes of the saved storages by the node that made each storage. Count each storage once."""
        for key, savers in self.saved.items():
            node, storage = self.made[key]
            self.kept[node] += storage.nbytes()
            self.savers.setdefault(node, []).extend(savers)


class _Counting(TorchDispatchMode):
    """Counts the operations of each node, and moves the arguments of each operator to the meta device."""

    def __init__(self, run: _ForwardPass) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pass_ = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, keywords = pytree.tree_map_only(Tensor, _emptied, (args, dict(kwargs or {})))
        if keywords.get("device") is not None:
            keywords["device"] = META
        value = func(*args, **keywords)
        self.pass_.made_by_now(value)
        self.pass_.operations[self.pass_.now] += _operations(func, args, keywords, value)
        return value


def _emptied(tensor: Tensor) -> Tensor:
    """Move a tensor to the meta device. A 0-d tensor stays on its device, because torch combines 0-d tensors with meta tensors."""
    return tensor if tensor.device == META or tensor.dim() == 0 else tensor.to(META)


def _operations(func: Any, args: Any, kwargs: Any, value: Any) -> int:
    packet = packet_of(func)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=value))
    if getattr(func, "is_view", False) or packet.__name__ in _FREE:
        return 0
    return max((tensor.numel() for tensor in (*pytree.tree_tensors(value), *pytree.tree_tensors((args, kwargs)))), default=0)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
