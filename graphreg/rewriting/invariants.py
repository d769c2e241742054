"""Checks, after every rewrite, that the module without its additions is the traced model. The checks change nothing.

Whether the additions are those of the plan follows from the lowering alone, and is checked after each rewrite of the tests
(``tests/lowering_check/``). A GraphRegError from ``check`` means that graphreg has a fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

from torch import fx, nn

from graphreg.blocks.block import original
from graphreg.errors import GraphRegError, RegularizerError
from graphreg.ir.aliasing import Aliases
from graphreg.ir.comparison import is_nan
from graphreg.ir.metadata import Kind, addition_of, is_kind, is_marked
from graphreg.ir.module_record import RULES
from graphreg.ir.roles import BOUNDARY
from graphreg.planning.plan import Plan
from graphreg.rewriting.substitute import restored
from graphreg.runtime.result import output_of
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.stateful import owned_by
from graphreg.session.hosts import graphs_of
from graphreg.torch_internals.torch_modes import gradients_switched
from graphreg.tracing.trace import Traced


def check(module: RewrittenModule, traced: Traced) -> None:
    """Raise GraphRegError unless the module without the additions is the traced model."""
    _same_owner(module, traced.model)
    for mode, graph in graphs_of(module).items():
        _lint(graph)
        _contracts(restored(graph), traced.graphs[mode])


def fail(sentence: str) -> NoReturn:
    """Raise the error for a check that failed; ``sentence`` says what is wrong."""
    raise GraphRegError(f"a rewritten graph failed its check: {sentence}")


def _same_owner(module: RewrittenModule, model: nn.Module) -> None:
    """Check that no submodule, parameter or buffer of the user's was replaced, added or lost."""
    waiting: list[tuple[str, nn.Module, nn.Module]] = [("", module, model)]
    while waiting:
        path, ours, theirs = waiting.pop()
        for what, tensors, of_model in (
            ("parameter", ours._parameters, theirs._parameters), ("buffer", ours._buffers, theirs._buffers)
        ):  # fmt: skip
            if tensors.keys() != of_model.keys() or any(tensors[name] is not tensor for name, tensor in of_model.items()):
                fail(f"a {what} is not the user's own.")
        children = {name: child for name, child in ours._modules.items() if child is not None and (path or name != RULES)}
        known = {name: child for name, child in theirs._modules.items() if child is not None}
        for name in known.keys() | children.keys():
            child, other = children.get(name), known.get(name)
            if child is None or other is None or original(child) is not original(other):
                fail(f"the submodule {f'{path}.{name}' if path else name!r} is not the user's own.")
            elif child is not other:  # an object that stands for a block; all that is in one and the same module is the same
                waiting.append((f"{path}.{name}" if path else name, child, other))


def _lint(graph: fx.Graph) -> None:
    """Check what torch.fx demands of a graph, such as that each node comes after the nodes that it reads, so that there is no cycle."""
    doubled = [name for name, count in Counter(node.name for node in graph.nodes).items() if count > 1]
    if doubled:
        fail(f"two nodes are called {doubled[0]!r}.")
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        fail(str(error).splitlines()[0])


def _contracts(graph: fx.Graph, original: fx.Graph) -> None:
    """Check that the graph without the additions is the original: each operation, on the same values, in the same order."""
    originals: dict[fx.Node, fx.Node] = {}  # by addition: the model's value that it replaces
    for node in graph.nodes:
        value = replaced_by(node)
        if value is not None:
            originals[node] = originals.get(value, value)
    remaining = [node for node in graph.nodes if not is_marked(node)]
    if len(remaining) != len(original.nodes):
        fail(f"{len(remaining)} of the model's own {len(original.nodes)} operations are left.")
    twin = dict(zip(remaining, original.nodes, strict=True))
    for ours, theirs in twin.items():
        if (ours.op, ours.target) != (theirs.op, theirs.target):
            fail(f"{theirs.name} ({theirs.op} {theirs.target}) became {ours.name} ({ours.op} {ours.target}).")
        args = (output_of(ours.args[0]),) if ours.op == "output" else ours.args
        # What our node reads, looked at as a value of the model: through the additions that
        # replaced it.
        if not _equal((args, ours.kwargs), (theirs.args, theirs.kwargs), lambda n: twin.get(originals.get(n, n))):
            fail(f"{ours.name} does not read what it read in the model: {args}, not {theirs.args}.")


def _equal(ours: Any, theirs: Any, resolve: Callable[[fx.Node], fx.Node | None]) -> bool:
    """Whether two structures of arguments are equal: containers of the same kind, the same keys, the same values."""
    if isinstance(theirs, fx.Node):
        return isinstance(ours, fx.Node) and resolve(ours) is theirs
    if isinstance(theirs, (tuple, list)):
        if not isinstance(ours, tuple if isinstance(theirs, tuple) else list) or len(ours) != len(theirs):
            return False
        for a, b in zip(ours, theirs, strict=True):  # noqa: SIM110  # a loop is twice as quick as ``all``, at each argument of the graph
            if not _equal(a, b, resolve):
                return False
        return True
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and list(ours) == list(theirs) and all(_equal(ours[k], theirs[k], resolve) for k in theirs)
    if isinstance(theirs, slice):
        return isinstance(ours, slice) and _equal((ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), resolve)
    return type(ours) is type(theirs) and bool(ours == theirs or (is_nan(ours) and is_nan(theirs)))


def replaced_by(node: fx.Node) -> fx.Node | None:
    """Return the value that an addition replaces, which another addition may have made; None if it replaces no value."""
    if is_kind(node, Kind.SPLICE, Kind.CLONE, Kind.TRACK, Kind.REPLACED, Kind.WHOLE):
        value = node.args[0]
    elif is_kind(node, Kind.ATTACHED) and isinstance(node.args[0], fx.Node):
        value = node.args[0].args[0][node.args[1]]  # type: ignore[index]
    else:
        return None
    return value if isinstance(value, fx.Node) else None


def require_trained(module: RewrittenModule, traced: Traced, plan: Plan) -> None:
    """Raise RegularizerError unless a trainable parameter reaches each penalty, in one of the graphs."""
    if not traced.whole or plan.in_whole or plan.resting:
        return
    trains = dict[str, bool]()
    for emitted in graphs_of(module).values() if plan.penalties else ():
        graph = restored(emitted)
        trained = _trained(graph, module, Aliases(graph, traced.operations))
        for node in graph.nodes:
            addition = addition_of(node)
            if addition is not None and addition.kind == Kind.TOTAL and node.args and node.args[0] != {}:
                trains[str(addition.regularizer)] = node in trained or trains.get(str(addition.regularizer), False)
    for name in (name for name, some in trains.items() if not some):
        raise RegularizerError(
            f"{name}: no parameter that can train reaches its sites, so the penalty would change nothing. Unfreeze a "
            "parameter, or leave the penalty out."
        )


def _trained(graph: fx.Graph, module: RewrittenModule, aliases: Aliases) -> set[fx.Node]:
    """Return the nodes that a trainable parameter reaches, also through definite in-place writes."""
    trains = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in trains}
    prefixes = {".".join(owner.split(".")[:i]) for owner in owners for i in range(1, owner.count(".") + 2)}
    reached, written = set[fx.Node](), set[fx.Node]()  # ``written``: the bases of the values that such a node writes into
    is_off = False  # in a block of ``torch.no_grad``
    for n in graph.nodes:
        if n.target is gradients_switched:
            is_off = n.args[0] is False
        elif is_off and not aliases.effects.writes(n, is_definite=True):  # what is written into stays what it was
            continue
        elif (
            not reached.isdisjoint(n.all_input_nodes)
            or (n.op == "get_attr" and n.target in trains) or (n.op == "call_module" and n.target in prefixes) or n.meta.get(BOUNDARY)
            or (n.op == "call_module" and any(p.requires_grad for p in owned_by(module.get_submodule(str(n.target)))))
            or (written and any(not written.isdisjoint(aliases.bases(value)) for value in n.all_input_nodes))
        ):  # fmt: skip
            reached.add(n)
            written.update(base for value in aliases.effects.writes(n, is_definite=True) for base in aliases.bases(value))
    return reached
