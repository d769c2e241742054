"""``graphreg.verify`` checks that a rewritten module computes what the model computes (translation validation).

Copies of both are called several times from equal seeds, and every output, buffer, written input and gradient is compared.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, RegularizerError, first_line
from graphreg.ir.metadata import is_native_dropout
from graphreg.ir.module_record import RULES, specialized_arguments
from graphreg.ir.train_eval import why_not_in_eval
from graphreg.rewriting.substitute import with_native_dropout
from graphreg.runtime.clock import set_to_zero
from graphreg.runtime.dropout import NativeDropoutRule
from graphreg.runtime.result import output_of
from graphreg.runtime.rewritten_module import RewrittenModule
from graphreg.runtime.splice import SpliceRule
from graphreg.session.hosts import graphs_of, in_place_host, regularized, rewritten, rules_of
from graphreg.torch_internals.modules import buffers_by_name, original_of, parameters_by_name
from graphreg.tracing.fake_inputs import Arguments, arguments
from graphreg.tracing.proof.first_difference import culprit, steps_of_graph, steps_of_model
from graphreg.tracing.proof.surroundings import comparable_state
from graphreg.tracing.proof.values import detached_copy, difference, leaves_with_places, tensors
from graphreg.verification.copies import M, copied_model, own_forward, title
from graphreg.verification.gradients import backward, freed_if_equal
from graphreg.verification.rounding import is_rounding
from graphreg.verification.shared_parameters import SharedParameters
from graphreg.verification.state import attribute, attributes_of, differing_parameter, dotted, first_change, parameters_of

CALLS: Mapping[str, int] = {"train": 2, "eval": 3}  # calls in each mode: more than one, because a call may change what the next computes
REVERSED = 3  # this call has the batch in reverse order: with equal inputs, a value left over from an earlier call would look right
SEED = 1618
Form = Literal["off", "copy", "native"]
FORMS: Mapping[Form, str] = {  # the forms in which a copy of the module runs, each with its description in errors; "off" bypasses splices
    "off": "",
    "copy": ", where each splice returns a copy of what it is given",
    "native": ", where graphreg's runtime modules replace the native dropout that own_dropout= selects",
}


def verify(model: nn.Module, module: nn.Module, /, *args: Any, example_inputs: Any = None, **kwargs: Any) -> None:
    """Check that a rewritten module computes what its model computes, apart from the regularizers.

    Copies of both are called several times in train and in eval mode, from equal seeds. Splices (regularizers that replace a value, such
    as dropout) are bypassed, and penalties have weight 0. Outputs, buffers, and inputs that the forward writes into must be equal bit for
    bit. Gradients must be equal except for rounding: if some differ, the calls are repeated in float64 (if a gradient is in float64
    already, in float32), because rounding makes a much smaller difference there, and a fault does not. If torch.export traced the model,
    a difference of 1e-6 of the tensor's largest value is allowed everywhere (float16 and bfloat16: four times the epsilon). The model and
    the module stay unchanged. If the module is compiled, its copies run without torch.compile.

    Args:
        model: The model that ``regularize`` was given. For a model that is regularized in place, give the model itself: its own forward,
            without regularizers, is compared with its graph.
        module: What ``regularize`` returned, or the model that is regularized in place.
        *args: Positional arguments for a call of the model.
        example_inputs: Instead of ``args`` and ``kwargs``, the arguments of the call as ``regularize`` takes them: a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. If the model's forward has an argument called ``example_inputs``, the
            value is passed to the model as this argument.
        **kwargs: Keyword arguments for that call.

    Raises:
        RegularizerError: ``example_inputs`` is given together with arguments of a call.
        TraceError: ``example_inputs`` has a type that is not allowed.
        GraphRegError: Something differs: the error says what, in which mode, and, if it can be found, which node's value differs first.
            Or the two cannot be compared: the error says why.
    """
    bare = model if (inside := original_of(model)) is None else inside
    if example_inputs is not None:
        args, kwargs = _call_of(bare, example_inputs, args, kwargs)
    placed = in_place_host(module)
    inner = rewritten(module) if placed is None else placed.graph_for(regularized(module), args, kwargs)
    if not isinstance(bare, nn.Module) or getattr(bare, RULES, None) is not None:
        raise GraphRegError(
            f"verify compares with the model that regularize was given, not with {title(bare)}: graphreg.verify(model, module, *inputs)."
        )
    if change := first_change(bare, inner):
        raise GraphRegError(
            f"this module was not made from this {title(bare)}, or the model was changed since: {change}. Give verify the model that "
            "regularize was given: the rewritten module has the same parameters and buffers as that model."
        )
    Validation(bare, own_forward(bare), inner, (args, kwargs)).run()


def _call_of(model: object, example_inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Return the arguments of the call that ``verify`` was given with ``example_inputs=``."""
    if isinstance(model, nn.Module) and "example_inputs" in inspect.signature(model.forward).parameters:
        return args, {**kwargs, "example_inputs": example_inputs}
    if args or kwargs:
        raise RegularizerError("verify takes the arguments of a call, or example_inputs=, and was given both. Give one of the two.")
    call = arguments(example_inputs)
    assert call is not None
    return call


def validate(before: nn.Module, model: nn.Module, module: fx.GraphModule, example_inputs: Any) -> None:
    """Do what ``verify`` does, but compare with ``before``, a copy of ``model`` that was made before tracing.

    First check that tracing has not changed ``model``.
    """
    if change := first_change(before, model, attributes=True):
        raise GraphRegError(f"tracing {title(model)} has changed it: {change}. Give regularize a copy, and please report this.")
    call = arguments(example_inputs)
    assert call is not None
    Validation(model, before, module, call).run()


@dataclass
class ComparedCall:
    """The results of one call and its backward pass.

    Attributes:
        values: Outputs, the inputs after the call, buffers and written attributes, by their place, in the order of comparison.
        gradients: The gradients of parameters and inputs by their place.
        failed: The exception that the backward pass raised, or None.
    """

    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    failed: Exception | None = None


class Validation:
    """Compares copies of the model with copies of a rewritten module, for the arguments of one call."""

    def __init__(self, given: nn.Module, model: nn.Module, module: fx.GraphModule, call: Arguments) -> None:
        """``given``: the user's model; ``model``: a copy of it, from which further copies are made."""
        self.model, self.module, self.call, self.title = model, module, call, title(model)
        self.shared = SharedParameters(given, model, module)
        owned = (*parameters_by_name(model).values(), *buffers_by_name(model).values())
        if any(tensor.device.type == "meta" for tensor in (*owned, *tensors(call))):
            raise GraphRegError(f"verify compares values, and {self.title} or its inputs have none (device meta). Materialize them first.")
        record = rules_of(module).build_record
        self.exported = record is not None and record.front_end == "export"
        self.differentiates = True  # whether the copies of floating-point inputs require gradients
        self.modes = {path: m.training for path, m in model.named_modules(remove_duplicate=False)}
        self.attaches = getattr(rules_of(module), "attach", None) is not None

    def run(self) -> None:
        """Compare in both modes, and in each form of the rewritten module (``FORMS``)."""
        with comparable_state(self.model):
            for mode in CALLS if not why_not_in_eval(graphs_of(self.module)) else ("train",):  # in place, eval mode may have no graph
                for form in self._forms(mode):
                    try:
                        self._compare(mode, form)
                    except _Refuses:  # the model may not accept inputs that require gradients: pass inputs that require none
                        self.differentiates = False
                        self._compare(mode, form)

    def _forms(self, mode: str) -> Iterator[Form]:
        yield "off"
        if any(isinstance(m, SpliceRule) for m in self.module.modules()):
            yield "copy"
        native = [m for graph in graphs_of(self.module).values() for m in graph.nodes if is_native_dropout(m)]
        always = any(isinstance(rule := self.module.get_submodule(str(node.target)), NativeDropoutRule) and rule.always for node in native)
        if mode == "eval" and native and not always:
            yield "native"

    def _compare(self, mode: str, form: Form) -> None:
        theirs, ours = self._model(mode), self._twin(mode, form)
        for number in range(1, CALLS[mode] + 1):
            expected = self._expected(theirs, number)
            if expected is None:
                break
            if self.shared.on and self.shared.written():
                self.shared.turn_off()
                return self._compare(mode, form)
            try:
                actual = self._call_twin(ours, number, expected)
            except Exception as error:
                message = f"the rewritten module raises {first_line(error)}, and the model does not"
                raise self._error(mode, form, number, message) from error

            # While the copies share their parameters, a write shows only beside the user's model.
            if message := self._differing(expected, actual, (mode, form, number)):
                raise self._error(mode, form, number, message)
            if how := self.shared.written() if self.shared.on else differing_parameter(parameters_of(theirs), parameters_of(ours)):
                raise self._error(mode, form, number, f"after the call {how}")
            del expected, actual  # these hold all gradients: free them before the next call computes new ones

    # the copies

    def _model(self, mode: str, alone: bool = False) -> nn.Module:
        """Return a copy of the model. ``alone``: whether it has parameters of its own, rather than the shared ones."""
        return self._in_mode(copied_model(self.model, {} if alone else self.shared.memo()), mode)

    def _twin(self, mode: str, form: Form, alone: bool = False) -> fx.GraphModule:
        """Return a copy of the rewritten module that runs in a form of ``FORMS``, with all strengths 0. ``alone``: as in ``_model``."""
        rules = rules_of(self.module)
        outside = [getattr(getattr(rules, "attach", None), "scale", None), rules.watching]  # the GradScaler and the monitor: not copied
        memo = {} if alone else self.shared.memo()
        twin = copied_model(self.module, memo | {id(each): None for each in outside if not isinstance(each, (int, float))})
        set_to_zero(rules_of(twin))
        for runtime_module in twin.modules():
            if isinstance(runtime_module, SpliceRule):
                # As attributes of the instance, these replace the methods for this copy alone.
                bypass = {"acts": lambda: form == "copy", "differs_in_eval": lambda: False}
                vars(runtime_module).update(bypass, _formula=lambda z, weight, noise, **more: z.clone())
        if form != "native":  # graphreg draws other masks than torch: restore the model's own calls of dropout
            _restore(twin)
        self._in_mode(twin, mode).get_submodule(RULES).train(twin.training)
        return twin

    def _in_mode(self, twin: M, mode: str) -> M:
        """Put a copy into ``mode``. If the user's model is in ``mode``, each submodule gets the mode that it has in the user's model."""
        as_given = self.modes[""] == (mode == "train")
        paths = dict(twin.named_modules(remove_duplicate=False))
        for path, training in self.modes.items():
            if path in paths:
                paths[path].training = training if as_given else mode == "train"
        return twin

    # a call

    def _expected(self, model: nn.Module, number: int) -> ComparedCall | None:
        """Call the model and return the results; None if it does not accept the batch in reverse order."""
        try:
            return self._call_twin(model, number, None)
        except Exception as error:
            if number == REVERSED:
                return None
            if self.differentiates:
                raise _Refuses from error

            # One tuple, list or dict may be meant as all the arguments of the call.
            args, kwargs = self.call
            hint = ""
            if not kwargs and len(args) == 1 and isinstance(args[0], (tuple, list, Mapping)):
                kind = type(args[0]).__name__
                hint = f" It got one {kind}; for arguments that it holds, write verify(model, module, example_inputs=...)."
            error.add_note(f"This is {self.title}'s own error: graphreg.verify ran a copy of it.{hint}")
            raise

    def _call_twin(self, twin: nn.Module, number: int, expected: ComparedCall | None, dtype: torch.dtype | None = None) -> ComparedCall:
        """Return the results of one call and its backward pass.

        ``expected``: the model's results if ``twin`` is the rewritten module; None if ``twin`` is the model. ``dtype``: the dtype of
        floating-point inputs; None for the dtypes that they have.
        """
        args, kwargs, inputs = self._copied_arguments(number, dtype)
        parameters = parameters_of(twin)
        for parameter in parameters.values():
            parameter.grad = None
        before = [(path, name, v, v.clone()) for path, name, v in attributes_of(twin)] if expected is None else []

        _seed(number)
        output = output_of(twin(*args, **kwargs))

        call = ComparedCall({place: detached_copy(leaf) for place, leaf in leaves_with_places(output, "output")})
        for place, leaf in [*leaves_with_places(args, "args"), *leaves_with_places(kwargs, "kwargs")]:
            if isinstance(leaf, Tensor):
                call.values[f"{place} after the call"] = detached_copy(leaf.detach())
        call.values |= {f"the buffer {n}": detached_copy(b) for n, b in buffers_by_name(twin).items() if not n.startswith(f"{RULES}.")}

        # Compare attributes whose tensor the call wrote into, but not those that the forward assigned anew: graphreg does not promise
        # that a rewritten module repeats assignments.
        for path, name, tensor, was in before:
            if getattr(twin.get_submodule(path), name, None) is tensor and difference(was, tensor.detach()):
                call.values[f"the attribute {dotted(path, name)}"] = detached_copy(tensor.detach())

        # In the module, the attributes to look at are those that the model's call has written into.
        if expected is not None:
            for place in expected.values:
                if place.startswith("the attribute "):
                    call.values[place] = detached_copy(attribute(twin, place.removeprefix("the attribute ")))

        # If the model's own backward pass fails, there is nothing to compare the module's with.
        if expected is None:
            call.failed = backward(output)
        elif expected.failed is None:
            with freed_if_equal(parameters, expected.gradients, self.exported):
                call.failed = backward(output)

        call.gradients = {f"the gradient of {name}": p.grad for name, p in parameters.items()}
        call.gradients |= {f"the gradient of {place}": leaf.grad for place, leaf in inputs.items()}
        return call

    def _copied_arguments(
        self, number: int, dtype: torch.dtype | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Return copies of args and kwargs, and the leaf tensors in which the inputs' gradients accumulate, by the place of the input."""
        memo, inputs = dict[int, Any](), dict[str, Tensor]()
        batch = next((t.shape[0] for t in tensors(self.call) if t.dim()), None) if number == REVERSED else None
        for place, leaf in [*leaves_with_places(self.call[0], "args"), *leaves_with_places(self.call[1], "kwargs")]:
            if not isinstance(leaf, Tensor) or id(leaf) in memo:
                continue
            clone = leaf.detach().clone()
            if has_gaps := clone.stride() != leaf.stride():  # or it is expanded: deepcopy copies its storage and keeps its strides
                clone = copy.deepcopy(leaf.detach())
            if dtype is not None and leaf.is_floating_point():
                clone = clone.to(dtype)
            if self.differentiates and leaf.is_floating_point() and not has_gaps:
                inputs[place] = clone.requires_grad_()
                clone = clone.clone()  # autograd forbids in-place writes to a leaf
            if leaf.dim() and leaf.shape[0] == batch and leaf.layout == torch.strided:
                clone = clone.flip(0)
            memo[id(leaf)] = clone
        args, kwargs = copy.deepcopy(self.call, memo)
        return args, kwargs, inputs

    # what differs

    def _differing(self, expected: ComparedCall, actual: ComparedCall, place: tuple[str, Form, int] | None = None) -> str:
        """Describe the first difference between two calls; ``""`` if there is none.

        ``place``: the mode, the form and the number of the calls, to repeat them for gradients that may differ by rounding; None where
        nothing may differ.
        """
        for name, value in expected.values.items():
            if name not in actual.values:
                return f"{name} is missing, and is {value if not isinstance(value, Tensor) else 'a tensor'} in the model"
            if how := difference(value, actual.values[name], self.exported):
                return f"{name} {how}"
        if more := next((name for name in actual.values if name not in expected.values), None):
            return f"{more} is in the module, and not in the model"
        if expected.failed is not None:  # the model's own backward pass fails
            return ""
        if actual.failed is not None:
            return f"the backward pass raises {first_line(actual.failed)}, and the model's does not"
        unequal: dict[str, tuple[Tensor, Tensor]] = {}
        for name, gradient in expected.gradients.items():
            theirs, ours = gradient, actual.gradients.get(name)
            if self.attaches or self.exported:  # a penalty at weight 0 gives zeros where the model has no gradient
                theirs, ours = _zeros(theirs, ours), _zeros(ours, theirs)
            if how := difference(theirs, ours, self.exported):
                if place is None or theirs is None or ours is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                    return f"{name} {how}"
                unequal[name] = theirs, ours
        name = next(self._beyond_rounding(unequal, *place), "") if unequal and place else ""
        return f"{name} {difference(*unequal[name], self.exported)}" if name else ""

    def _beyond_rounding(self, gradients: Mapping[str, tuple[Tensor, Tensor]], mode: str, form: Form, number: int) -> Iterator[str]:
        """Yield the names of the gradients whose difference is not one of rounding, given the model's and the module's by name."""
        # The calls are repeated in float64, or in float32 if a gradient is in float64 already.
        is_wide = any(theirs.dtype in (torch.float64, torch.complex128) for theirs, _ in gradients.values())
        dtype = torch.float32 if is_wide else torch.float64
        try:
            # ``double`` and ``float`` leave complex parameters and buffers as they are.
            copies: tuple[nn.Module, nn.Module] = self._model(mode, True), self._twin(mode, form, True)
            model, twin = (each.float() if is_wide else each.double() for each in copies)
            for each in range(1, number + 1):
                theirs, ours = (self._call_twin(one, each, None, dtype).gradients for one in (model, twin))
            there = {name: (theirs[name], ours[name]) for name in gradients}
        except Exception:  # the model may have tensors of a fixed dtype
            there = {}
        yield from (name for name, here in gradients.items() if not is_rounding(here, there.get(name)))

    def _error(self, mode: str, form: Form, number: int, what: str) -> GraphRegError:
        if self.shared.on:  # a faulty call of the module may have written into the shared parameters
            self.shared.turn_off()
        if unlike := self._unlike_itself(mode):
            return GraphRegError(
                f"{self.title} cannot be verified, for it is not the same from run to run: from equal seeds, in {mode} mode, {unlike}. "
                "Draw from torch's, Python's or numpy's global generator, or regularize without verify."
            )
        return GraphRegError(
            f"the rewritten {self.title} is not the model: in {mode} mode, at call {number} of {CALLS[mode]} with "
            f"{'the batch in reverse order' if number == REVERSED else 'equal inputs'}{FORMS[form]}, {what}."
            f"{self._culprit(mode, form, number)} Do not train it, and please report this."
        )

    def _unlike_itself(self, mode: str) -> str:
        """Describe the first difference between two runs of the model itself; ``""`` if there is none."""
        one, other = self._model(mode), self._model(mode)
        for number in range(1, CALLS[mode] + 1):
            first, second = self._expected(one, number), self._expected(other, number)
            if first is not None and second is not None and (message := self._differing(first, second)):
                return message
        return ""

    def _culprit(self, mode: str, form: Form, number: int) -> str:
        """Repeat the calls up to the one that differs. Return a sentence that names the first node whose value differs, or ``""``."""
        theirs, ours = self._model(mode), self._twin(mode, form)
        try:
            for earlier in range(1, number):
                self._call_twin(ours, earlier, self._call_twin(theirs, earlier, None))
        except Exception:
            return ""
        try:
            _seed(number)
            expected = steps_of_model(theirs, self._copied_arguments(number)[:2])
            _seed(number)
            graph = graph_of(ours, mode)
            actual = steps_of_graph(ours, graph, inputs_of(ours, graph, self._copied_arguments(number)[:2]))
            return culprit(expected, actual, graph_of(self.module, mode), self.exported)
        except Exception:  # this adds detail to an error: a failure here must not replace that error
            return ""


def graph_of(module: fx.GraphModule, mode: str) -> fx.Graph:
    graphs = graphs_of(module)
    return graphs.get("both") or graphs[mode]


def inputs_of(module: fx.GraphModule, graph: fx.Graph, call: Arguments) -> list[Any]:
    """Return the value of each placeholder of a rewritten module's graph for the arguments of a call."""
    bound = inspect.signature(module.forward).bind(*call[0], **call[1])
    bound.apply_defaults()
    known = {**specialized_arguments(module), **bound.arguments}
    return [known[str(n.target).lstrip("*")] for n in graph.nodes if n.op == "placeholder"]


def _restore(twin: fx.GraphModule) -> None:
    """Restore the model's own calls of dropout in the graphs."""
    if isinstance(twin, RewrittenModule):
        twin.graphs.update({mode: with_native_dropout(graph) for mode, graph in twin.graphs.items()})
        twin.recompile()
    else:
        twin.graph = with_native_dropout(twin.graph)


class _Refuses(Exception):
    """The model does not run on inputs that require gradients."""


def _zeros(gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the gradient; if it is None and the other is not, return zeros."""
    return torch.zeros_like(other) if gradient is None and other is not None else gradient


def _seed(number: int) -> None:
    torch.manual_seed(SEED + number)
    random.seed(SEED + number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED + number)
