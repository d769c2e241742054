"""Translation validation: ``graphreg.verify`` runs a rewritten module against the user's own model, on copies, value for value."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from graphreg.errors import GraphRegError, first_line, shown
from graphreg.ir import RULES, is_own
from graphreg.rewriting import restored
from graphreg.runtime import OwnRule, Regularized, RewrittenModule, SpliceRule, graphs_of, rewritten, rules_of
from graphreg.torch_internals import original_of
from graphreg.tracing import Arguments, arguments, without_caches
from graphreg.verification.first_difference import first_differing, graph_of
from graphreg.verification.values import difference, leaves, snapshot, tensors

CALLS: Mapping[str, int] = {"train": 2, "eval": 3}  # what a call leaves behind shows at the next
REVERSED = 3  # the call whose batch is in reverse order, for with equal inputs what is left of the call before may be right
SEED = 1618
M = TypeVar("M", bound=nn.Module)
Form = Literal["off", "copy", "own"]
FORMS: Mapping[Form, str] = {
    "off": "",
    "copy": ", where each splice returns a copy of what it is given",
    "own": ", with own_dropout's additions in place",
}


def verify(model: nn.Module, module: nn.Module, /, *args: Any, **kwargs: Any) -> None:
    """Raise GraphRegError where a rewritten module is not the model that it was made from.

    ``args`` and ``kwargs``: of a call of the model. Copies of both run it several times in train and in eval mode, from equal seeds,
    with splices bypassed and penalties at weight 0. Outputs, buffers, inputs that are written into, and gradients are compared: bit
    for bit, or to 1e-6 of the largest value where torch.export traced the model. The error names what differs, the mode, and the
    first node of the graph whose value does. ``model`` and ``module`` stay as they are; a compiled module is compared in eager.
    """
    inner = rewritten(module)
    own = model if (inside := original_of(model)) is None else inside
    if not isinstance(own, nn.Module) or getattr(own, RULES, None) is not None:
        raise GraphRegError(
            f"verify compares with the model that regularize was given, not with {_title(own)}: graphreg.verify(model, module, *inputs)."
        )
    if told := changed(own, inner):
        raise GraphRegError(
            f"this module was not made from this {_title(own)}, or the model was changed since: {told}. Give verify the model that "
            "regularize was given; a module shares its parameters and buffers."
        )
    Validation(copied(own), inner, (args, kwargs)).run()


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A copy of a model, without gradients."""
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise GraphRegError(
            f"{_title(model)} cannot be copied ({first_line(error)}), and verify runs copies alone, so that it leaves yours as they are. "
            "Make copy.deepcopy(model) work, or regularize without verify."
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def validate(before: nn.Module, model: nn.Module, module: fx.GraphModule, example_inputs: Any) -> None:
    """``verify`` against a copy from before the trace, which also tells whether tracing has changed the user's model."""
    if told := changed(before, model, attributes=True):
        raise GraphRegError(f"tracing {_title(model)} has changed it: {told}. Give regularize a copy, and please report this.")
    call = arguments(example_inputs)
    assert call is not None
    Validation(before, module, call).run()


def changed(expected: nn.Module, ours: nn.Module, attributes: bool = False) -> str:
    """The first parameter, buffer or (if asked for) tensor that is an attribute in which two modules differ."""
    theirs, mine = _state(expected, attributes), _state(ours, attributes)
    for name in [*theirs, *mine]:
        if name not in mine or name not in theirs:
            return f"{name} is {'not in the module' if name in theirs else 'not in the model'}"
        if theirs[name] is not mine[name] and not nn.parameter.is_lazy(theirs[name]) and (told := difference(theirs[name], mine[name])):
            return f"{name} {told}"
    return ""


def _state(module: nn.Module, attributes: bool) -> dict[str, Any]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    own = {name: value for name, value in named.items() if not name.startswith(f"{RULES}.")}
    return own | ({_dotted(path, name): value for path, name, value in _attributes(module)} if attributes else {})


def _attributes(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """The tensors that are plain attributes of modules, and are no buffers."""
    return [(path, name, v) for path, m in module.named_modules() for name, v in vars(m).items() if isinstance(v, Tensor)]


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _title(model: object) -> str:
    return type(model).__name__.removesuffix("Impl") if isinstance(model, nn.Module) else shown(model)


@dataclass
class Call:
    """What one call gave, by its place, in the order of comparison; ``failed``: what its backward pass raised."""

    values: dict[str, Any] = field(default_factory=dict)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    failed: Exception | None = None


class Validation:
    """The comparison of a copy of the model with copies of a rewritten module, for one call's arguments."""

    def __init__(self, model: nn.Module, module: fx.GraphModule, call: Arguments) -> None:
        self.model, self.module, self.call, self.title = model, module, call, _title(model)
        if any(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers(), *tensors(call))):
            raise GraphRegError(f"verify compares values, and {self.title} or its inputs have none (device meta). Materialize them first.")
        record = rules_of(module).build_record
        self.exported = record is not None and record.front_end == "export"
        self.differentiates = True  # whether the inputs are given so that they have gradients
        self.modes = {path: m.training for path, m in model.named_modules(remove_duplicate=False)}
        self.attaches = getattr(rules_of(module), "attach", None) is not None

    def run(self) -> None:
        """Compare in both modes, in every form."""
        with _surroundings(self.model if self.exported else nn.Module()):
            for mode in CALLS:
                for form in self._forms(mode):
                    try:
                        self._compare(mode, form)
                    except _Refuses:  # an input that requires a gradient; then the inputs as they are
                        self.differentiates = False
                        self._compare(mode, form)

    def _forms(self, mode: str) -> Iterator[Form]:
        yield "off"
        if any(isinstance(m, SpliceRule) for m in self.module.modules()):
            yield "copy"
        own = [m for graph in graphs_of(self.module).values() for m in graph.nodes if is_own(m)]
        always = any(isinstance(rule := self.module.get_submodule(str(node.target)), OwnRule) and rule.always for node in own)
        if mode == "eval" and own and not always:
            yield "own"

    def _compare(self, mode: str, form: Form) -> None:
        theirs, ours = self._model(mode), self._twin(mode, form)
        for number in range(1, CALLS[mode] + 1):
            expected = self._expected(theirs, number)
            if expected is None:
                break
            try:
                found = self._called(ours, number, expected)
            except Exception as error:
                told = f"the rewritten module raises {first_line(error)}, and the model does not"
                raise self._error(mode, form, number, told) from error
            if told := self._differing(expected, found):
                raise self._error(mode, form, number, told)

    # the copies

    def _model(self, mode: str) -> nn.Module:
        return self._in_mode(copied(self.model), mode)

    def _twin(self, mode: str, form: Form) -> fx.GraphModule:
        """A copy of the rewritten module: its splices bypassed, its penalties at weight 0."""
        rules = rules_of(self.module)
        outside = [getattr(getattr(rules, "attach", None), "scale", None), rules.watching]  # a GradScaler, a monitor: not to be copied
        twin = copied(self.module, {id(each): None for each in outside if not isinstance(each, (int, float))})
        for strength in rules_of(twin).strengths.values():
            strength.zero_()
        for leaf in twin.modules():
            if isinstance(leaf, SpliceRule):
                vars(leaf).update(acts=lambda: form == "copy", _formula=lambda z, weight, noise: z.clone())
        if form != "own":  # graphreg's masks are not torch's: the model's own calls again
            _restore(twin)
        self._in_mode(twin, mode).get_submodule(RULES).train(twin.training)
        return twin

    def _in_mode(self, twin: M, mode: str) -> M:
        """The mode, and of a module that the user set apart its own: as the two modes were traced."""
        as_given = self.modes[""] == (mode == "train")
        paths = dict(twin.named_modules(remove_duplicate=False))
        for path, training in self.modes.items():
            if path in paths:
                paths[path].training = training if as_given else mode == "train"
        return twin

    # a call

    def _expected(self, model: nn.Module, number: int) -> Call | None:
        """What the model gives; None where it does not take the batch in reverse order."""
        try:
            return self._called(model, number, None)
        except Exception as error:
            if number == REVERSED:
                return None
            if self.differentiates:
                raise _Refuses from error
            error.add_note(f"This is {self.title}'s own error: graphreg.verify ran a copy of it.")
            raise

    def _called(self, twin: nn.Module, number: int, expected: Call | None) -> Call:
        """One call and its backward pass. ``expected``: what the model's gave, if this is the rewritten module's."""
        args, kwargs, inputs = self._given(number)
        parameters = {name: p for name, p in twin.named_parameters() if not name.startswith(f"{RULES}.")}
        for parameter in parameters.values():
            parameter.grad = None
        before = [(path, name, v, v.clone()) for path, name, v in _attributes(twin)] if expected is None else []
        _seed(number)
        value = twin(*args, **kwargs)
        output = value.output if isinstance(value, Regularized) else value
        call = Call({place: snapshot(leaf) for place, leaf in leaves(output, "output")})
        for place, leaf in [*leaves(args, "args"), *leaves(kwargs, "kwargs")]:
            if isinstance(leaf, Tensor):
                call.values[f"{place} after the call"] = snapshot(leaf.detach())
        call.values |= {f"the buffer {n}": snapshot(b) for n, b in twin.named_buffers() if not n.startswith(f"{RULES}.")}
        for path, name, held, was in before:  # written into; one that is assigned is no part of what is promised
            if getattr(twin.get_submodule(path), name, None) is held and difference(was, held.detach()):
                call.values[f"the attribute {_dotted(path, name)}"] = snapshot(held.detach())
        if expected is not None:
            for place in expected.values:
                if place.startswith("the attribute "):
                    call.values[place] = snapshot(_attribute(twin, place.removeprefix("the attribute ")))
        if expected is None or expected.failed is None:
            call.failed = _backward(output)
        call.gradients = {f"the gradient of {name}": p.grad for name, p in parameters.items()}
        call.gradients |= {f"the gradient of {place}": leaf.grad for place, leaf in inputs.items()}
        return call

    def _given(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """The arguments on tensors of their own; and by place those that gather gradients."""
        memo, inputs = dict[int, Any](), dict[str, Tensor]()
        batch = next((t.shape[0] for t in tensors(self.call) if t.dim()), None) if number == REVERSED else None
        for place, leaf in [*leaves(self.call[0], "args"), *leaves(self.call[1], "kwargs")]:
            if not isinstance(leaf, Tensor) or id(leaf) in memo:
                continue
            own = leaf.detach().clone()
            if own.stride() != leaf.stride():  # expanded, or with gaps: with its storage
                own = copy.deepcopy(leaf.detach())
            elif self.differentiates and leaf.is_floating_point():
                inputs[place] = own.requires_grad_()
                own = own.clone()  # a leaf may not be written into
            if leaf.dim() and leaf.shape[0] == batch and leaf.layout == torch.strided:
                own = own.flip(0)
            memo[id(leaf)] = own
        args, kwargs = copy.deepcopy(self.call, memo)
        return args, kwargs, inputs

    # what differs

    def _differing(self, expected: Call, found: Call) -> str:
        for place, value in expected.values.items():
            if place not in found.values:
                return f"{place} is missing, and is {value if not isinstance(value, Tensor) else 'a tensor'} in the model"
            if told := difference(value, found.values[place], self.exported):
                return f"{place} {told}"
        if more := next((place for place in found.values if place not in expected.values), None):
            return f"{more} is there, and not in the model"
        if expected.failed is not None:  # the model does not train
            return ""
        if found.failed is not None:
            return f"the backward pass raises {first_line(found.failed)}, and the model's does not"
        for place, gradient in expected.gradients.items():
            theirs, ours = gradient, found.gradients.get(place)
            if self.attaches or self.exported:  # a penalty at weight 0 brings zeros where there was nothing
                theirs, ours = _zeros(theirs, ours), _zeros(ours, theirs)
            if told := difference(theirs, ours, self.exported):
                return f"{place} {told}"
        return ""

    def _error(self, mode: str, form: Form, number: int, told: str) -> GraphRegError:
        if own := self._unlike_itself(mode):
            return GraphRegError(
                f"{self.title} cannot be verified, for it is not the same from run to run: from equal seeds, in {mode} mode, {own}. Draw "
                "from torch's, Python's or numpy's global generator, or regularize without verify."
            )
        return GraphRegError(
            f"the rewritten {self.title} is not the model: in {mode} mode, at call {number} of {CALLS[mode]} with "
            f"{'the batch in reverse order' if number == REVERSED else 'equal inputs'}{FORMS[form]}, {told}."
            f"{self._culprit(mode, form, number)} Do not train it, and please report this."
        )

    def _unlike_itself(self, mode: str) -> str:
        """What differs between two copies of the model."""
        one, other = self._model(mode), self._model(mode)
        for number in range(1, CALLS[mode] + 1):
            first, second = self._expected(one, number), self._expected(other, number)
            if first is not None and second is not None and (told := self._differing(first, second)):
                return told
        return ""

    def _culprit(self, mode: str, form: Form, number: int) -> str:
        theirs, ours = self._model(mode), self._twin(mode, form)
        try:
            for earlier in range(1, number):
                self._called(ours, earlier, self._called(theirs, earlier, None))
        except Exception:
            return ""
        calls = self._given(number)[:2], self._given(number)[:2]
        graphs = graph_of(ours, mode), graph_of(self.module, mode)
        return first_differing(theirs, ours, calls, graphs, lambda: _seed(number), self.exported)


def _restore(twin: fx.GraphModule) -> None:
    if isinstance(twin, RewrittenModule):
        twin.graphs.update({mode: restored(graph) for mode, graph in twin.graphs.items()})
        twin.recompile()
    else:
        twin.graph = restored(twin.graph)


class _Refuses(Exception):
    """The model does not run on inputs that require gradients."""


def _zeros(gradient: Tensor | None, other: Tensor | None) -> Tensor | None:
    return torch.zeros_like(other) if gradient is None and other is not None else gradient


def _attribute(twin: nn.Module, dotted: str) -> Any:
    path, _, name = dotted.rpartition(".")
    return getattr(twin.get_submodule(path), name, None)


def _backward(output: Any) -> Exception | None:
    """Run the backward pass from every tensor of an output, with weights that no symmetry cancels; what it raises."""
    ends = list({id(t): t for t in tensors(output) if t.requires_grad and t.is_floating_point()}.values())
    weights = [torch.arange(t.numel(), dtype=torch.float64, device=t.device).cos().to(t.dtype).view(t.shape) for t in ends]
    try:
        if ends:
            torch.autograd.backward(ends, weights)
    except Exception as error:
        return error
    return None


def _seed(number: int) -> None:
    torch.manual_seed(SEED + number)
    random.seed(SEED + number)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(SEED + number)


@contextmanager
def _surroundings(cached: nn.Module) -> Iterator[None]:
    """Autograd on, generators put back afterwards, torch's layers by their own code in eval mode too, ``cached`` without caches."""
    numpy: Any = sys.modules.get("numpy")
    drawn = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_caches(cached, []))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(drawn[0])
            torch.set_rng_state(drawn[1])
            if numpy is not None:
                numpy.random.set_state(drawn[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
