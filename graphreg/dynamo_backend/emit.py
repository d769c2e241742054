"""Turns a rewritten graph back into Dynamo's form for the inner compiler. The resulting graph has no state that a call changes.

Parameters are inputs again, as Dynamo passes them. Keys and strengths are inputs too, and the backend passes them at each call: if a
runtime module assigned a buffer, that would happen only once, while the compiler traces. After its own outputs, the graph returns the
measurements of penalties on values (``model_call.py`` says what these are) and the totals of penalties on parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from graphreg.ir.metadata import Kind, addition_of, is_kind
from graphreg.ir.module_record import RULES
from graphreg.planning.plan import Plan
from graphreg.rewriting.instantiate import measures
from graphreg.runtime.noise_keys import KeyRule
from graphreg.runtime.penalty import AllSitesTotal, Total
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.runtime_module import DrawingRule, Rules, RuntimeModule
from graphreg.session.hosts import graphs_of
from graphreg.torch_internals.dynamo import copy_notes, copy_source
from graphreg.torch_internals.fake_tensors import fake_mode


class Bound(nn.Module):
    """Calls a runtime module. If ``takes_strength``, the first argument is the strength that the runtime module has during the call.

    The runtime module is kept in a tuple. There the compiler does not see it, and so does not treat its buffers as buffers of the graph.
    """

    def __init__(self, runtime_module: RuntimeModule, takes_strength: bool) -> None:
        super().__init__()
        self.runtime_module, self.takes_strength = (runtime_module,), takes_strength

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (runtime_module,) = self.runtime_module
        if not self.takes_strength:
            return runtime_module(*args, **kwargs)
        # The formula reads the buffer. For the compiler, which traces this call, it must be the
        # input.
        before = runtime_module._buffers["strength"]
        runtime_module._buffers["strength"] = args[0]
        try:
            return runtime_module(*args[1:], **kwargs)
        finally:
            runtime_module._buffers["strength"] = before

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the key of a compiler's cache would stay the same if the formula changed, and the old compiled code would run
        raise TypeError("an addition of graphreg cannot be part of a cache key")


@dataclass(frozen=True)
class Emitted:
    """A graph for the inner compiler, with its additional inputs and outputs.

    Attributes:
        module: The graph, with the runtime modules that it calls.
        draws: Whether the graph draws random numbers. If so, the first additional input is the tensor of keys.
        strengths: The regularizers whose strengths are the next inputs, in order.
        more: The names of the parameters that are the last inputs. Penalties read these, and the captured graph does not.
        measured: For each measurement, the name of the penalty that made it, and the site; ``""`` for all sites at once. The measurements
            are the outputs after the graph's own.
        weighed: The names of the penalties on parameters that the graph computes. Their totals are the last outputs.
    """

    module: fx.GraphModule
    draws: bool
    strengths: tuple[str, ...]
    more: tuple[str, ...]
    measured: tuple[tuple[str, str], ...]
    weighed: tuple[str, ...]


Weighed = Mapping[str, tuple[Total, Sequence[str]]]  # from a penalty's name to its runtime module and its parameters' names


def emit(rewritten: RewrittenModule, gm: fx.GraphModule, plan: Plan, weighed: Weighed) -> Emitted:
    """Return the rewritten graph in Dynamo's form.

    Args:
        rewritten: The rewritten graph.
        gm: The graph that Dynamo captured.
        plan: The plan of the rewrite.
        weighed: The penalties on parameters that this graph has to compute.
    """
    return _Emitter(rewritten, gm, plan, weighed).emitted()


class _Emitter:
    def __init__(self, rewritten: RewrittenModule, gm: fx.GraphModule, plan: Plan, weighed: Weighed) -> None:
        self.rewritten, self.gm, self.plan, self.weighed = rewritten, gm, plan, weighed
        (self.source,) = graphs_of(rewritten).values()
        self.graph = fx.Graph()
        self.twins: dict[fx.Node, Any] = {}
        self.strengths: dict[str, fx.Node] = {}
        self.key: fx.Node | None = None
        self.attributes: dict[str, Any] = {}

    def emitted(self) -> Emitted:
        """Build the graph node by node: the captured graph's inputs, then the additional inputs, then the other nodes in their order."""
        # The source was made from a copy of the captured graph: nodes of one name belong together.
        nodes = {node.name: node for node in self.source.nodes}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.twins[nodes[node.name]] = twin = self.graph.node_copy(node)
                copy_source(node, twin)
        modules = {node: self._runtime_module(node) for node in self.source.nodes if node.op == "call_module"}

        # Dynamo passes its own inputs by position, so those that are added come after them.
        if any(isinstance(module, KeyRule) for module in modules.values()):
            self.key = self._added("graphreg_keys")
        for module in modules.values():
            if (name := self._strength(module)) and name not in self.strengths:
                self.strengths[name] = self._added(f"graphreg_strength_{name}")
        for name in self.weighed:
            self.strengths[name] = self._added(f"graphreg_strength_{name}")

        # A penalty reads a parameter that the captured graph has as its own input, or else as one
        # more.
        parameters = {str(node.target): twin for node, twin in self.twins.items() if node.op == "get_attr"}
        wanted = dict.fromkeys(name for _, names in self.weighed.values() for name in names)
        more = {name: self._added(f"graphreg_parameter_{i}") for i, name in enumerate([name for name in wanted if name not in parameters])}

        # The mean over sites is left to the end of the call: other graphs may have some of them.
        measured = list[tuple[str, str, fx.Node]]()
        for node in self.source.nodes:
            if node in self.twins or node.op == "output":
                continue
            added = addition_of(node)
            total = added.regularizer if added is not None and added.kind == Kind.TOTAL else None
            if is_kind(node, Kind.KEY):
                self.twins[node] = self.key
            elif total is not None and measures(self.plan.regularizers[total]):
                measured += [(total, _site_of(n), self.twins[n]) for n in node.args if isinstance(n, fx.Node)]
            else:
                self.twins[node] = self._copied(node)
                if total is not None and node.args[0]:
                    measured.append((total, "", self.twins[node]))
        return self._finished(measured, tuple(more), self._weigh({**parameters, **more}))

    def _weigh(self, parameters: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
        """Add the penalties on parameters to the graph."""
        totals = {}
        for name, (total, names) in self.weighed.items():
            read = {each: parameters[each] for each in names}
            target = f"graphreg_total_{name}"
            self.attributes[target] = Bound(total, True)
            arguments = (read,) if isinstance(total, AllSitesTotal) else tuple(read.values())
            totals[name] = self.graph.create_node("call_module", target, (self.strengths[name], *arguments))
        return totals

    def _finished(self, measured: Sequence[tuple[str, str, fx.Node]], more: tuple[str, ...], totals: Mapping[str, fx.Node]) -> Emitted:
        value = self.source.output_node().args[0]
        # Dynamo's code expects the outputs that it captured. The measurements go out behind them.
        value = value.output if isinstance(value, Regularized) else value
        outputs: Any = fx.node.map_arg(value, self.twins.__getitem__)
        self.graph.output((*outputs, *(node for _, _, node in measured), *totals.values())).meta.update(self.gm.graph.output_node().meta)
        module = fx.GraphModule(self.attributes, self.graph)
        module.meta.update(self.gm.meta)
        copy_notes(self.gm, module)
        known = tuple((name, site) for name, site, _ in measured)
        return Emitted(module, self.key is not None, tuple(self.strengths), more, known, tuple(totals))

    def _added(self, name: str) -> fx.Node:
        twin = self.graph.create_node("placeholder", name, name=name)
        copy_source(None, twin)
        return twin

    def _runtime_module(self, node: fx.Node) -> RuntimeModule | None:
        module = self.rewritten.get_submodule(str(node.target))
        return module if isinstance(module, RuntimeModule) else None

    def _strength(self, module: RuntimeModule | None) -> str | None:
        """Return the name of the regularizer whose strength a runtime module reads; None if it reads none."""
        strength = module._buffers.get("strength") if module is not None else None
        by_name: dict[str, Tensor] = getattr(self.rewritten, RULES).strengths
        return next((name for name, buffer in by_name.items() if buffer is strength), None)

    def _copied(self, node: fx.Node) -> fx.Node:
        module = self._runtime_module(node) if node.op == "call_module" else None
        twin = self.graph.node_copy(node, self.twins.__getitem__)
        if module is not None:
            name = self._strength(module)
            self.attributes[str(node.target)] = Bound(module, name is not None)
            if name is not None:
                twin.args = (self.strengths[name], *twin.args)
        elif node.op == "get_attr":
            self.attributes[str(node.target)] = getattr(self.gm, str(node.target))
        return twin


def _site_of(node: fx.Node) -> str:
    addition = addition_of(node)
    return str(addition.site) if addition is not None else ""


def acting(rewritten: RewrittenModule) -> list[tuple[str, bool]]:
    """Return, for each row of the keys, the name of the runtime module that draws with it, and whether that module acts now."""
    rules: Rules = getattr(rewritten, RULES)
    key = rules._modules.get("key")
    streams = []
    for name in key.names if isinstance(key, KeyRule) else ():
        module = rules.get_submodule(name)
        streams.append((name, not isinstance(module, DrawingRule) or module.always or module.forced or module.owner[0].training))
    return streams


def constant_example(value: Tensor) -> Tensor:
    """Return an example of an additional input: a fake tensor like ``value``, with static sizes, if Dynamo is tracing; else ``value``."""
    fake = fake_mode()
    return fake.from_tensor(value, static_shapes=True) if fake is not None else value
