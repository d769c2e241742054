"""``join``: an identity on the output's tensors, through which a penalty's gradient enters a backward pass."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphreg.errors import GraphRegError
from graphreg.regularizer.vjp import recorded
from graphreg.torch_internals.autograd import (
    NO_BACKWARD,
    backward_task,
    base_of,
    has_hook,
    is_forward_mode,
    is_plain_view,
    number_of_node,
    same_view,
    storage_of,
    will_run,
)
from graphreg.torch_internals.dynamo_marks import allow_in_graph, assume_constant_result
from graphreg.torch_internals.functorch import level_of, one_level_below, transform_level
from graphreg.torch_internals.torch_modes import is_functionalized

TWICE = (
    "penalties='attach': this backward pass is itself to be differentiated (create_graph=True), as for a gradient penalty. Its gradients "
    "contain those of the attached penalties, and the second backward pass would add these once more. Regularize with penalties='return' "
    "and add the penalties to the loss."
)
_FORWARD_MODE = (
    "penalties='attach': forward-mode differentiation (torch.func.jvp, jacfwd) would leave out the penalties, because they join only in a "
    "backward pass. Regularize with penalties='return', or use reverse mode (torch.func.vjp, jacrev)."
)


Way = Literal["alias", "copy", "view"]  # how a tensor passes through the join: see ``identity``
Apply = Callable[[Sequence[Way], Sequence[Tensor]], tuple[Tensor, ...]]
# Outputs that are views of what passes through the join: each with the position of the latter, and the function that makes the view again
# of the joined tensor. The functions return the same object at each call.
Views = Sequence[tuple[Tensor, int, Callable[[Tensor], Tensor]]]
Link = Callable[[Sequence[Way], Sequence[Tensor], Views], tuple[Tensor, ...]]


class _Call(threading.local):
    """The call that runs in this thread. ``storages``: the storages of its arguments, or None if they are not known."""

    storages: frozenset[int] | None = None


_call = _Call()


def begin_call(tensors: Iterable[Tensor] | None) -> frozenset[int] | None:
    """Record the storages of a call's tensors, before it runs; return the argument for ``end_call``.

    ``tensors``: the tensors among the call's arguments; None if they are not known.
    """
    before, _call.storages = _call.storages, None if tensors is None else frozenset(map(storage_of, tensors))
    return before


def end_call(before: frozenset[int] | None) -> None:
    """End a call: restore what ``begin_call`` returned."""
    _call.storages = before


def join(total: Tensor, scale: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors with the same values, through which a backward pass gives ``total`` the gradient ``scale``.

    The tensors are returned unchanged if autograd records none of them, or does not record ``total``. ``total`` and ``scale`` are 0-d.
    """
    if torch.compiler.is_dynamo_compiling():
        _known_to_dynamo()
    return _join(total, scale, tensors)


def _join(total: Tensor, scale: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    live = list({id(tensor): tensor for tensor in tensors if recorded(tensor)}.values())
    if is_forward_mode() and forward_ad.unpack_dual(total).tangent is not None:  # type: ignore[no-untyped-call]
        raise GraphRegError(_FORWARD_MODE)
    if not live or not recorded(total):
        return tuple(tensors)

    def apply(ways: Sequence[Way], entering: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Attached.apply(total, scale, tuple(ways), *entering)  # type: ignore[no-any-return,no-untyped-call]

    def linked(ways: Sequence[Way], entering: Sequence[Tensor], views: Views) -> tuple[Tensor, ...]:
        if is_forward_mode() or len(entering) == 1:  # a jvp is refused by ``_Attached``
            return apply(ways, entering)
        return link(_Once.apply(total, scale), ways, entering, views)  # type: ignore[no-untyped-call]

    if transform_level() is not None:  # torch.func's tensors have no storage
        joined = dict(zip(map(id, live), apply(["view"] * len(live), live), strict=True))
        return tuple(joined.get(id(tensor), tensor) for tensor in tensors)
    if is_functionalized():
        return _apart(apply, tensors, live)
    return in_place(linked, tensors, live, _call.storages)


@assume_constant_result
def _known_to_dynamo() -> None:
    """Let Dynamo call ``_join`` as one operation: Dynamo cannot trace comparisons of storages, nor a result that has one tensor twice."""
    allow_in_graph(_join)


def refuse_twice(below: Tensor | None = None) -> None:
    """Raise GraphRegError if autograd records the running backward pass, so that it can itself be differentiated.

    ``below``: under a transform of torch.func, the penalty's tensor at the next outer level of transforms; else None. A transform always
    records its own backward pass. That pass is differentiated only if autograd also records the tensor at the outer level.
    """
    if torch.is_grad_enabled() and (below is None or recorded(below)):
        hint = "" if below is None else " If the gradient is not differentiated again, give torch.func the parameters detached."
        raise GraphRegError(TWICE + hint)


def in_place(apply: Link, tensors: Sequence[Tensor], live: Sequence[Tensor], known: frozenset[int] | None) -> tuple[Tensor, ...]:
    """Join without AOTAutograd: outputs keep their storage, and users may write into them in place, as into the model's own outputs.

    torch forbids writes into a view that a custom autograd function returned. So for outputs that share storage the function returns their
    common base, as an alias that is not a view, and the outputs become views of this alias. An output that shares storage with an argument
    of the call or with a parameter is returned as a view all the same: otherwise autograd would not notice that a write into the output
    also changes the caller's tensor.

    ``known``: the storages of the call's arguments; None if they are not known, so that any output may share storage with an argument.
    """
    outside = {id(t) for t in live if known is None or storage_of(t) in known or base_of(t).is_leaf}
    groups = _groups([t for t in live if id(t) not in outside])
    entering, ways, sources = list[Tensor](), list[Way](), dict[int, Tensor]()
    for tensor in live:
        group = groups.get(storage_of(tensor), []) if id(tensor) not in outside else []
        base = tensor if len(group) == 1 else _base(group)
        source = sources[id(tensor)] = tensor if base is None else base
        if all(source is not other for other in entering):
            entering.append(source)
            ways.append("alias" if base is not None and group else "view")
    made: dict[int, Tensor] = {}

    def again(tensor: Tensor, joined: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _like(tensor, sources[id(tensor)], joined)
        return made[id(tensor)]

    at = {id(source): i for i, source in enumerate(entering)}
    places = [(tensor, at[id(sources[id(tensor)])]) for tensor in live]
    views = [(tensor, place, partial(again, tensor)) for tensor, place in places if entering[place] is not tensor]
    joined = apply(ways, entering, views)
    for tensor, place in places:
        again(tensor, joined[place])
    return tuple(made.get(id(tensor), tensor) for tensor in tensors)


def _apart(apply: Apply, tensors: Sequence[Tensor], live: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Join while AOTAutograd traces: outputs get storage of their own.

    If outputs share storage, AOTAutograd makes them again at run time, as views of their common base. These views would bypass the join,
    and the penalty's gradient would be lost. So the join copies the base, and the outputs become views of the copy. An output that shares
    storage with no other is copied too. As an alias, it would have a version counter of its own at run time, and autograd would not notice
    that a user's write into the output changes what is saved for backward. An output that shares storage with an input or a parameter
    stays a view of it: AOTAutograd does not make a view again if a custom function returned it.
    """
    groups = _groups(tensors)
    entering, sources = list[Tensor](), dict[int, Tensor]()  # sources: for each tensor's id, what enters in its place
    for tensor in live:
        group = groups[storage_of(tensor)]
        base = tensor if len(group) == 1 else _base(group)
        if base is not None and (base.is_leaf or torch.empty_like(base).stride() != base.stride()):
            base = None  # no copy can replace a leaf, nor a base whose strides a copy would not have
        source = sources[id(tensor)] = tensor if base is None else base
        if all(source is not other for other in entering):
            entering.append(source)
    ways: list[Way] = ["view" if base_of(source).is_leaf else "copy" for source in entering]
    joined = dict(zip(map(id, entering), apply(ways, entering), strict=True))
    made = {id(tensor): _like(tensor, sources[id(tensor)], joined[id(sources[id(tensor)])]) for tensor in live}
    for tensor in tensors:
        others = [other for other in live if storage_of(other) == storage_of(tensor)]
        if id(tensor) not in made:  # not recorded by autograd; if a joined tensor had the same geometry, share its new storage
            same = next((made[id(other)] for other in others if _geometry(other) == _geometry(tensor)), None)
            made[id(tensor)] = same.detach() if same is not None else tensor.clone() if others else tensor
    return tuple(made[id(tensor)] for tensor in tensors)


def _groups(tensors: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """Group the tensors by storage, each tensor once."""
    by_storage: dict[int, dict[int, Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault(storage_of(tensor), {})[id(tensor)] = tensor
    return {key: list(group.values()) for key, group in by_storage.items()}


def _base(group: Sequence[Tensor]) -> Tensor | None:
    """Return the common base of those tensors of a group that require grad.

    Return None if they have no common base that requires grad, or if one of them cannot be made again as a view of a copy of the base.
    """
    bases = list({id(base): base for base in map(base_of, (t for t in group if t.requires_grad))}.values())
    if len(bases) == 1 and bases[0].requires_grad and all(is_plain_view(t) for t in group if t.requires_grad and t is not bases[0]):
        return bases[0]
    return None


def _like(tensor: Tensor, source: Tensor, joined: Tensor) -> Tensor:
    """Return the view of ``joined`` that corresponds to ``tensor`` as a view of ``source``."""
    if tensor is source or _geometry(tensor) == _geometry(source):
        return joined
    return same_view(tensor, joined)


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()


def identity(ways: Sequence[Way], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return each output in the way that ``ways`` gives for it, as a custom autograd function may return it.

    ``"alias"``: a tensor with the same storage that is no view; ``"copy"``: a clone; ``"view"``: a view.
    """
    by_way: dict[Way, Callable[[Tensor], Tensor]] = {"alias": Tensor.detach, "copy": Tensor.clone, "view": lambda out: out.view_as(out)}
    return tuple(by_way[way](out) for way, out in zip(ways, outputs, strict=True))


def link(token: Tensor, ways: Sequence[Way], entering: Sequence[Tensor], views: Views) -> tuple[Tensor, ...]:
    """Return each output through a node of its own, from which a backward pass reaches ``token``; outputs keep their relations.

    With one node for all outputs, a hook on one would run, with None, in a backward pass from another.

    If y was computed from h, the joined y must have the gradient by the joined h that y has by h (Grad-CAM). But y was computed before the
    penalties were known, so no path leads from it to the joined h. Each node therefore has an edge to the outputs from which its own was
    computed, and sends a gradient there if somebody asks for it: see ``_Linked``.
    """
    joined: dict[int, Tensor] = {}
    probe = torch.zeros((), requires_grad=True, device="cpu")
    outputs = [*((tensor, i, lambda joined: joined) for i, tensor in enumerate(entering)), *views]
    for i, earlier in _relations(entering, views).items():
        edges = [get_gradient_edge(outputs[j][0]) for j in earlier]
        sources = [joined[outputs[j][1]] for j in earlier]
        targets = [outputs[j][2](source) for j, source in zip(earlier, sources, strict=True)]  # type: ignore[no-untyped-call]
        joined[i] = _Linked.apply(token, probe, ways[i], edges, sources, entering[i], *targets)  # type: ignore[no-untyped-call]
    return tuple(joined[i] for i in range(len(entering)))


def _relations(entering: Sequence[Tensor], views: Views) -> dict[int, list[int]]:
    """Return, for each entering tensor by its position, the outputs from which autograd has recorded it; a tensor comes after those.

    Outputs are counted as in ``entering`` followed by ``views``.

    Nodes that were recorded before all outputs are not visited. Nodes of other threads are numbered by themselves, so a relation may be
    missed if an output was recorded in another thread; then no path leads from one of the two to the other.
    """
    outputs = [*entering, *(tensor for tensor, _, _ in views)]
    edges = [get_gradient_edge(each) for each in outputs]
    least = -1 if any(each.is_leaf for each in outputs) else min(number_of_node(edge.node) for edge in edges)
    positions = {(edge.node, edge.output_nr): i for i, edge in enumerate(edges)}
    at = {edge.node: i for i, edge in enumerate(edges)}  # of several outputs of one node, any: they were recorded from the same outputs
    found: dict[int, set[int]] = {}

    def visit(i: int) -> set[int]:
        if i in found:
            return found[i]
        waiting, seen, mine = list(edges[i].node.next_functions), set(), set[int]()
        while waiting:
            edge = waiting.pop()
            if edge in seen or edge[0] is None:
                continue
            seen.add(edge)
            mine |= {positions[edge]} if edge in positions else set()
            if edge[0] in at:
                mine |= visit(at[edge[0]])
            elif number_of_node(edge[0]) > least:
                waiting += edge[0].next_functions
        return found.setdefault(i, mine)

    return {i: sorted(visit(i)) for i in sorted(range(len(entering)), key=lambda i: len(visit(i)))}


class _Once(torch.autograd.Function):
    """A number, 0. A backward pass that reaches it gives ``total``, the sum of the penalties, the gradient ``scale`` once."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.zeros((), device=total.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (scale,) = ctx.saved_tensors
        return scale, None


class _Linked(torch.autograd.Function):
    """The identity on one output.

    In each backward pass that reaches the output, autograd also runs the node of ``token``. ``targets``: the outputs, as they are returned,
    from which this one was computed. If one of them has a hook, retains its gradient, or is itself what the pass differentiates by, this
    node computes the gradient by it (by its ``edge``, at which the model computed it), and sends it there. It arrives at the node of its
    ``source`` (the target, or that of which it is a view), which subtracts it, because it flows upstream from this output anyway. So what a
    hook changes arrives upstream, and nothing arrives twice.
    """

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, probe: Tensor, way: Way, edges: Sequence[GradientEdge], sources: Sequence[Tensor], output: Tensor,
        *targets: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.targets, ctx.edges, ctx.device = targets, edges, token.device
        ctx.nodes = [source.grad_fn for source in sources]
        ctx.sent = (NO_BACKWARD, None)  # a backward pass, and the gradient that nodes of later outputs sent here in it
        (joined,) = identity((way,), (output,))
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice()
        (task, sent), ctx.sent = ctx.sent, (NO_BACKWARD, None)
        if grad is not None and task == backward_task():
            grad = None if grad is sent else grad - sent
        if grad is None:
            return (None,) * (6 + len(ctx.targets))
        return (torch.zeros((), device=ctx.device), None, None, None, None, grad, *_sent(ctx, grad))


def _sent(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients that a node of ``_Linked`` sends to its targets. ``grad``: the gradient by its own output."""
    _, (probe, _), output, *nodes = ctx.next_functions
    in_part = not will_run(probe)  # torch.autograd.grad, or backward(inputs=...): only some nodes run, and not that of a tensor of ours
    asked = [i for i, each in enumerate(ctx.targets) if has_hook(each) or (in_part and will_run(nodes[i][0]))]
    sent: list[Tensor | None] = [None] * len(nodes)
    if not asked:
        return sent
    edges, task = [ctx.edges[i] for i in asked], backward_task()
    found = torch.autograd.grad((GradientEdge(*output),), edges, (grad,), retain_graph=True, allow_unused=True)
    for i, gradient in zip(asked, found, strict=True):
        if gradient is None:
            continue
        sent[i], node, arrives = gradient, ctx.nodes[i], gradient
        if nodes[i][0] is not node:  # the target is a view
            (arrives,) = torch.autograd.grad((GradientEdge(*nodes[i]),), (GradientEdge(node, 0),), (gradient,), retain_graph=True)
        node.sent = (task, arrives if node.sent[0] != task else node.sent[1] + arrives)
    return sent


class _Attached(torch.autograd.Function):
    """The identity on the outputs. In each backward pass, ``total``, the sum of the penalties, gets the gradient ``scale`` once."""

    @staticmethod
    def forward(total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        return identity(ways, outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        total, scale = inputs[:2]
        ctx.save_for_backward(scale)
        level = transform_level()
        ctx.below = None if level is None else one_level_below(total) if level_of(total) == level else total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_twice(ctx.below)
        (scale,) = ctx.saved_tensors
        return (scale, None, None, *grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], total: Tensor, scale: Tensor, ways: tuple[Way, ...], *outputs: Tensor) -> tuple[Any, ...]:
        """Join the sum of the penalties: each element of the batch is a call of its own, with a penalty of its own."""
        if in_dims[1] is not None:
            raise GraphRegError("penalties='attach' under torch.vmap: the scale differs from row to row. Scale the loss outside of vmap.")
        summed = total * info.batch_size if in_dims[0] is None else total.sum()
        return _Attached.apply(summed, scale, ways, *outputs), tuple(in_dims[3:])  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise GraphRegError(_FORWARD_MODE)
