"""Decides about a call whose arguments have a structure that a rewritten module does not know: its graph may be right for it, or not.

The model is traced on the side for the call. If that gives the graph that the module was made from, the module accepts the structure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, OtherInputs, first_line
from graphreg.ir.call_structures import CallStructures, CallText
from graphreg.ir.contents import contents_of, detached, may_change, shown_contents
from graphreg.ir.module_record import traced_model
from graphreg.torch_internals import pytree
from graphreg.torch_internals.dynamo_marks import disable
from graphreg.torch_internals.fake_tensors import fake_mode
from graphreg.torch_internals.functorch import is_wrapped, transforms
from graphreg.torch_internals.other_threads import is_compiling
from graphreg.torch_internals.torch_modes import operator_modes, tracer_here
from graphreg.tracing.proof.proof import NotTheModel, Proving
from graphreg.tracing.proof.surroundings import autocast_again, plainly
from graphreg.tracing.trace import traced_for_call

_INSTEAD = "Regularize the model with example_inputs of this structure, or in place (regularize_), where each structure has a graph."


@disable()
def settle_structure(
    module: nn.Module, forward: Callable[..., Any], writer: CallText, structures: CallStructures, args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:  # fmt: skip
    """Accept the structure of a call's arguments, or raise OtherInputs or GraphRegError. Dynamo does not trace this function.

    Args:
        module: The rewritten module.
        forward: The emitted forward.
        writer: Writes the structure of a call.
        structures: The structures that the module accepts.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.
    """
    try:
        inspect.signature(forward).bind(module, *args, **kwargs)
    except TypeError:
        return  # the emitted forward raises this error, too, and names the function
    text = writer.text(args, kwargs)
    if text not in structures.refused:
        given = writer.kept(args, kwargs)
        why = _why_not(module, writer, structures, args, kwargs)
        if not why:
            structures.given.append(given)
            structures.accepted[text] = True
            return
        # Not among the refused: a call outside of the trace can find out.
        if why is _LATER:
            raise GraphRegError(f"{unlike(writer, structures, given)} {why}")
        structures.refused[text] = f"{unlike(writer, structures, given)} {why} {_INSTEAD}"
    raise OtherInputs(structures.refused[text])


_LATER = (
    "While the call is traced or transformed, graphreg cannot find out whether the graph is right for them. Call the module once with such "
    "arguments outside of torch.compile, torch.func and other tracers."
)


def _why_not(
    module: nn.Module, writer: CallText, structures: CallStructures, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """Trace the model for a call. Return ``""`` if that gives the module's graph, else a sentence that says why the call is refused."""
    if _is_traced((args, kwargs)):
        return _LATER
    model = traced_model(module)
    if model is None or isinstance(model, fx.GraphModule):
        return "This module has no link to the model (it was copied or unpickled), so graphreg cannot find out whether the graph is right."
    # The graph takes these numbers as inputs, so the trace must not fix them, either.
    inputs = [name for name, value in writer.by_name(args, kwargs).items() if type(value) in (int, float) and name in structures.inputs]
    title = type(model).__name__
    proving = Proving(around=autocast_again(model), at_call=True, asked=structures.proves)
    try:
        with plainly(model):
            front_end: Any = structures.front_end
            traced = traced_for_call(model, detached(args, kwargs), front_end, proving, inputs)
    except NotTheModel as error:
        return str(error)
    except GraphRegError as error:
        return f"{title} cannot be traced for these arguments ({first_line(error)})."
    if traced.digest != structures.digest:
        return f"Traced for these arguments, {title} gives another graph."
    return ""


def unlike(writer: CallText, structures: CallStructures, given: Mapping[str, Any]) -> str:
    """Say what is other about the arguments of a call than in the trace, and show both structures."""
    then = structures.given[0]
    other = [name for name in given if name in then and contents_of(given[name]) != contents_of(then[name])]
    fixed = [name for name in other if name not in structures.inputs and name in writer.defaults]
    lead = ""
    # Such as a list or a configuration, whose contents at the trace are in the graph.
    if fixed and may_change(then[fixed[0]]):
        lead = (
            f"{fixed[0]} was {shown_contents(then[fixed[0]])} when the model was traced, and the graph is specialized to that. It has "
            f"other contents now, or is another object. Regularize the model once more, with this {fixed[0]} in the example_inputs. "
        )
    # The argument was left out in this call.
    elif fixed and fixed[0] in structures.defaults and contents_of(given[fixed[0]]) == contents_of(structures.defaults[fixed[0]]):
        lead = (
            f"{fixed[0]} was specialized to {then[fixed[0]]!r} when the model was traced, and in this call it is its default, "
            f"{shown_contents(given[fixed[0]])}. Give {fixed[0]} at each call, or leave it out of the example_inputs. "
        )
    elif fixed:
        carried = f"Give regularize example_inputs that carry {fixed[0]}"
        wanted = f"Give example_inputs with the {fixed[0]} that you need, or regularize in place (regularize_), where it may change"
        cure = carried if then[fixed[0]] is None else wanted
        lead = f"{fixed[0]} was specialized to {then[fixed[0]]!r} when the model was traced. {cure}. "
    # An optional tensor was given at the trace, and is None in this call.
    elif other and given[other[0]] is None and not structures.assumed:
        lead = (
            f"{other[0]} was carried by the example_inputs, so the graph needs it. Give it at each call, or trace without it. "
        )
    made = "was assumed for a trace without example_inputs" if structures.assumed else "is that of the example_inputs"
    return (
        f"{lead}The arguments of this call have the structure {writer.shown(given, fixed)}, and the graph was made for "
        f"{writer.shown(then, fixed)}, which {made}."
    )


def not_settled(writer: CallText, structures: CallStructures, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphRegError:
    """Return the error for a call that Dynamo traces, if the module does not know the structure of its arguments."""
    return GraphRegError(f"{unlike(writer, structures, writer.kept(args, kwargs))} {_LATER}")


def _is_traced(arguments: Any) -> bool:
    if is_compiling() or tracer_here() or transforms() or operator_modes() or fake_mode() is not None:
        return True
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, (Tensor, fx.Proxy))]
    return any(isinstance(each, fx.Proxy) or is_wrapped(each) for each in tensors)
