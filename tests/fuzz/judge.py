"""Runs cases on the engine and on the oracle, and compares all that can be seen."""

from __future__ import annotations

import importlib
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphreg.passes
from fuzz import options
from fuzz.cases import Case, Group, backward, forgotten, loaded, loaded_function
from fuzz.choices import ON_READS, SPLICES
from fuzz.formulas import Unfit
from fuzz.oracle import Run
from graphreg.errors import GraphRegError, NoMatchError
from lowering_check import check_each_rewrite

check_each_rewrite()
CALLS = ("train", "train", "eval", "eval", "train")

_MADE = re.compile(r"torch\.(zeros|ones|full|empty|arange|eye|linspace|tensor)\(|new_(zeros|ones|full|empty)")  # made by a forward
_WRITES_TENSOR = re.compile(r"self\.\w+\.\w+_\(")
_OURS = re.compile(r"graphreg\.errors|raised exception ((GraphReg|Trace|NoMatch|Regularizer|Randomness)Error|OtherInputs)\(")
_IDLE = re.compile(r"(\w+): no parameter that can train reaches its sites")


@dataclass
class Verdict:
    """What came of a case: ``fine``, ``refused`` or a ``fault``; ``kind`` in short, ``detail`` at length."""

    result: str
    kind: str = ""
    detail: str = ""


class Fault(Exception):
    """What the engine does is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Judge:
    """One model, traced once, for all of its cases. ``compiled``: a backend of torch.compile, or nothing."""

    def __init__(self, group: Group, compiled: str = "") -> None:
        self.group, self.compiled = group, compiled
        self.name = f"fuzzed_{group.seed}"
        space = loaded(group.source, self.name)
        self.model: nn.Module = space["model"]()
        self.twin: nn.Module = space["model"]()
        self.given: tuple[Any, ...] = space["inputs"]()
        self.state = snapshot(self.model)
        self.apart = [name for name, m in self.model.named_modules() if name and not m.training]
        self.traced: Any = None

    def verdicts(self) -> list[Verdict]:
        """One a case."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                trouble = self._trace()
                if trouble is not None:
                    return [trouble for _ in self.group.cases]
                return [self._verdict(case) for case in self.group.cases]
            finally:
                forgotten(self.name)

    def _trace(self) -> Verdict | None:
        try:
            self.traced = engine("trace")(self.model, self.inputs() if self.group.sized else None, self.group.front_end)
            self._untouched("trace")
            if self.group.front_end == "symbolic":
                self._named()
        except GraphRegError as error:
            return refusal("trace", error)
        except Fault as fault:
            return Verdict("fault", fault.kind, fault.detail)
        except Exception as error:
            return broken("trace", error)
        return None

    def _named(self) -> None:
        sites = [site.name for site in self.traced.values if site.selectable]
        extra, lacking = sorted({*sites}.difference(self.group.sites, self.group.others)), sorted({*self.group.sites}.difference(sites))
        extra = [name for name in extra if not name.rpartition(".")[2].startswith("setitem")]
        if (extra or lacking) and _MADE.search(self.group.source):
            raise GraphRegError("what an operation on a tensor that the forward fills is called is left open")
        if extra or lacking:
            raise Fault("names", f"the trace has {extra} besides, and lacks {lacking}")

    def inputs(self) -> tuple[Any, ...]:
        graded = self.group.input_grads
        return tuple(x.clone().requires_grad_(graded and x.is_floating_point()) if isinstance(x, Tensor) else x for x in self.given)

    def _untouched(self, what: str) -> None:
        changed = [name for name, value in snapshot(self.model).items() if name not in self.state or not same(value, self.state[name])]
        if changed or len(snapshot(self.model)) != len(self.state):
            raise Fault("model changed", f"{what} changed {changed}")

    def _restore(self, model: nn.Module, state: dict[str, Any] | None = None) -> None:
        tensors, state = dict(tensors_of(model)), state or self.state
        with torch.no_grad():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[name].copy_(value)
        for parameter in model.parameters():
            parameter.grad = None
        for name, module in model.named_modules():
            module.training = state[f"{name}.training"]

    def _verdict(self, case: Case) -> Verdict:
        self._restore(self.model)
        self._restore(self.twin)
        expected = [text for each in case.found for text in each.empty]
        try:
            module = self._rewritten(case)
            if expected:
                raise Fault("not refused", f"{expected} matches nothing, and the plan has it")
            self._untouched("rewrite")
            self._compare(case, module)
            if case.stripped and not self.compiled:
                self._strip(module)
        except GraphRegError as error:
            if "failed its check" in str(error):  # the engine met a fault of its own
                return Verdict("fault", "check", str(error))
            if isinstance(error, NoMatchError) and expected:
                return Verdict("fine", "refused as it should be")
            if (idle := _IDLE.match(str(error))) and self._trains(case, idle[1]):
                return Verdict("fault", "wrongly refused", str(error))
            return refusal("case", error)
        except Fault as fault:
            if self.compiled and fault.kind in ("gradient", "output") and (theirs := self._torchs_own()):
                return refusal("case", GraphRegError(theirs))
            # the penalty has a gradient through a tensor of the model, which the plain model's loss need not have
            if self.compiled and fault.kind == "gradient" and _WRITES_TENSOR.search(self.group.source):
                return refusal("case", GraphRegError("torch computes again, in backward, with a tensor written since (pytorch#197039)"))
            if case.later and fault.kind == "gradient" and case.penalties == "attach" and "as_strided" in self.group.source:
                return refusal("case", GraphRegError("torch gives the plain model a wrong gradient through as_strided"))
            return Verdict("fault", fault.kind, fault.detail)
        except Exception as error:
            inner: BaseException | None = error
            while inner is not None:  # Dynamo wraps what a formula raises
                if isinstance(inner, GraphRegError):
                    return refusal("case", inner)
                inner = inner.__cause__ or inner.__context__
            if self.compiled and _OURS.search(str(error)):
                return refusal("case", error)
            if self.compiled and (theirs := self._torchs_own(error)):
                return refusal("case", GraphRegError(theirs))
            return broken("case", error)
        return Verdict("fine")

    def _trains(self, case: Case, penalty: str) -> bool:
        """Whether the oracle's penalty has a gradient for a parameter."""
        self._restore(self.twin)
        run = Run(case.regs, case.names, [f.sites for f in case.found], case.rng, case.strengths())
        run.start(self.twin)
        try:
            loaded_function(case.oracle)(self.twin, run, *self.inputs())[1][penalty].backward()
        except RuntimeError:  # nothing that it depends on needs a gradient; or it cannot be computed
            return False
        return any(parameter.grad is not None for parameter in self.twin.parameters())

    def _torchs_own(self, error: Exception | None = None) -> str:
        """What torch.compile does wrong by itself: it cannot run the user's own model, or computes something else. "" if neither.

        A splice at an input makes the input a computed value, so the model is also tried with inputs that the compiled code computes.

        Args:
            error: What it raised with the rewritten module, if it did.
        """
        if self.compiled == "aot_eager" and "view size is not compatible with input tensor" in str(error):
            return "a kernel of torch gives other strides than its meta function"  # 2.13: softplus_backward, hardtanh_backward and others

        def with_computed_inputs(*inputs: Any) -> Any:
            return self.twin(*(x * 1 if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))

        same = True
        try:
            for plain in (self.twin, with_computed_inputs):
                eager = self._computed(plain)
                with torch._dynamo.config.patch(allow_rnn=True):  # graphreg's modules have them compiled without it
                    compiled = self._computed(self._compiled(plain))
                same = same and all((a is None) == (b is None) and (a is None or near(a, b)) for a, b in zip(eager, compiled, strict=True))
        except Exception as theirs:
            return "torch.compile cannot run the plain model, either" if type(theirs) is type(error) else ""
        finally:
            self._restore(self.twin)
        return "" if same else "torch.compile gives the plain model another gradient or output than eager"

    def _compiled(self, model: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        called: Callable[..., Any] = torch.compile(model, backend=self.compiled, fullgraph=True, dynamic=False)
        return called

    def _computed(self, called: Callable[..., Any]) -> list[Tensor | None]:
        """The loss of one call, and the gradients of parameters and inputs."""
        self._restore(self.twin)
        inputs = self.inputs()
        seeded(100)
        loss = backward(called(*inputs))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        given = [x for x in inputs if isinstance(x, Tensor)]
        return [loss.detach(), *(None if t.grad is None else t.grad.clone() for t in (*self.twin.parameters(), *given))]

    def _rewritten(self, case: Case) -> nn.Module:
        regs = options.made(case)
        plan = engine("plan")(self.traced, regs, own_dropout=case.own_dropout, **({"blocks": case.blocks} if case.blocks else {}))
        if self.group.front_end == "symbolic":
            self._planned(case, plan)
        attach: dict[str, Any] = {"penalties": "attach", "scale": case.scale} if case.penalties == "attach" else {}
        module: nn.Module = engine("rewrite")(self.traced, plan, case.rng, **attach)
        return module

    def _planned(self, case: Case, plan: Any) -> None:
        for name, found in zip(case.names, case.found, strict=True):
            if found.empty:
                continue
            sites = {site.name for edit in plan.of(name) for site in edit.sites}
            wrong = (sites ^ set(found.sites)).difference(found.unsure, self.group.others)
            if wrong:
                raise Fault("sites", f"{name} acts at {sorted(sites)}, and should at {sorted(found.sites)}")
            if sites != set(found.sites):
                raise GraphRegError("whether a value that is only written counts as used is left open")
        counts = [reg.kind == "Contractive" and bool(reg.options.get("always")) for reg in case.regs]
        if self.group.two_modes and any(counts) and (not all(counts) or any(case.own.values())):
            raise GraphRegError("whether a call in a mode without the sites of always= counts is left open")
        own = sorted(edit.dropout.site.name for edit in plan.native_dropout)
        if own != sorted(case.own_sites):
            raise Fault("sites", f"own dropout at {own}, and should be at {sorted(case.own_sites)}")

    def _compare(self, case: Case, module: nn.Module) -> None:
        forward = loaded_function(case.oracle)
        self.tolerance = 1e-3 if any(r.kind == "Contractive" for r in case.regs) else 2e-5  # second derivatives of a norm, in float32
        run = Run(case.regs, case.names, [f.sites for f in case.found], case.rng, case.strengths())
        run.start(self.twin)
        called: Any = module
        if self.compiled:
            called = self._compiled(module)
        if (self.group.writes or "as_strided" in self.group.source) and not self.compiled:
            self._replaceable(case, forward, run, module)
        for number, mode in enumerate(CALLS[:4] if self.compiled else CALLS):
            where = f"call {number} ({mode})"
            for each in (module, self.twin):
                each.train(mode == "train")
            for path in self.apart:
                self.twin.get_submodule(path).eval()
                self.model.get_submodule(path).eval()
            ours, theirs = self.inputs(), self.inputs()
            for name, value in run.strengths.change(number):
                graphreg.set_strength(module, name, options.strength(value))
            seeded(100 + number)
            run.begin(mode == "train")
            again = Again(forward, run, number, mode, snapshot(self.twin), dict(run.states))
            try:
                expected, penalties = forward(self.twin, run, *theirs)
                wanted = self._wanted(case, expected, penalties)
            except Unfit as error:
                self._called(called, ours, str(error))
            except RuntimeError as error:  # a derivative that the model has no use for, of what it overwrites
                self._raises_too(called, module, ours, case, error, mode)
                return
            seeded(100 + number)
            got = self._called(called, ours, run.must_raise)
            try:
                self._seen(case, where, mode, (got, module), (expected, penalties, wanted), (ours, theirs))
            except Fault as fault:
                if fault.kind == "gradient" and self._shaky(case, again, ours, theirs):
                    raise GraphRegError("the oracle's own gradient moves as far, if its numbers move by a unit of rounding") from fault
                raise
            run.call += self._draws(case, run, mode)
            run.strengths.clock += mode == "train"
            if case.moves:
                moved(self.model)
                moved(self.twin)

    def _shaky(self, case: Case, again: Again, ours: Any, theirs: Any) -> bool:
        """Whether the gradients differ by no more than the oracle's, if parameters and inputs differ in the last bits."""
        mine, expected = gradients(self.model, ours), gradients(self.twin, theirs)
        reach = [torch.zeros_like(each) for each in expected]
        for seed in range(4):
            self._restore(self.twin, again.state)
            again.run.states = dict(again.states)
            again.run.begin(again.mode == "train")
            bits = torch.Generator().manual_seed(seed)
            inputs = self.inputs()
            with torch.no_grad():
                for each in (*self.twin.parameters(), *(x for x in inputs if isinstance(x, Tensor) and x.is_floating_point())):
                    eps = 4 * torch.finfo(each.dtype).eps
                    each.mul_(1 + eps * (2 * torch.rand(each.shape, generator=bits, dtype=torch.float64) - 1).to(each.dtype))
            seeded(100 + again.number)
            try:
                self._wanted(case, *again.forward(self.twin, again.run, *inputs))
            except RuntimeError:
                return False
            reach = [torch.maximum(far, (a - b).abs()) for far, a, b in zip(reach, gradients(self.twin, inputs), expected, strict=True)]
        return all(
            close(a, b, self.tolerance) or bool(((a - b).abs().max() <= 10 * far.max()).all())
            for a, b, far in zip(mine, expected, reach, strict=True)
        )

    @staticmethod
    def _called(called: Any, inputs: Any, must_raise: str) -> Any:
        """What the module gives. ``must_raise``: why it should not, or nothing."""
        if not must_raise:
            return called(*inputs)
        try:
            called(*inputs)
        except Exception as error:
            raise GraphRegError(f"refused as it should be: {must_raise}") from error
        raise Fault("not refused", must_raise)

    def _draws(self, case: Case, run: Run, mode: str) -> bool:
        """Whether the call moves the noise on."""
        # in a mode in which the forward has none of its sites, a contractive penalty draws nothing
        always = any(r.options.get("always") and (r.kind != "Contractive" or mode == "train" or run.values) for r in case.regs)
        return always or (mode == "train" and (bool(case.own) or any(r.kind in (*SPLICES, *ON_READS, "Contractive") for r in case.regs)))

    def _replaceable(self, case: Case, forward: Any, run: Run, module: nn.Module) -> None:
        """Remember whether splices that change nothing leave the model as it is: else only a refusal is right."""
        self.must_refuse = ""
        if not any(reg.kind in SPLICES for reg in case.regs):
            return
        self._restore(self.twin)
        self.twin.train()
        for path in self.apart:
            self.twin.get_submodule(path).eval()
        run.bypass = True
        run.begin(True)
        seeded(99)
        try:
            bare, _ = forward(self.twin, run, *self.inputs())
        except Unfit:
            return  # the call is refused
        finally:
            run.bypass = False
        self._restore(self.twin)
        seeded(99)
        plain = self.twin(*self.inputs())
        self._restore(self.twin)
        for a, b in zip(pytree.tree_leaves(bare), pytree.tree_leaves(plain), strict=True):
            if not (near(a, b) if isinstance(a, Tensor) else a == b):  # another layout may round otherwise
                module(*self.inputs())  # where elements share memory, the call refuses it
                raise Fault("not refused", "a splice that changes nothing, at these sites, changes what the model computes")

    def _wanted(self, case: Case, output: Any, penalties: dict[str, Tensor]) -> Tensor:
        """The oracle's loss, of which backward has run."""
        for parameter in self.twin.parameters():
            parameter.grad = None
        loss, extra = backward(output), sum((v.double() for v in penalties.values()), torch.zeros((), dtype=torch.float64))
        if case.penalties == "return":
            loss = loss + extra
        elif loss.requires_grad:
            loss = loss + case.scale * extra
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def _raises_too(self, called: Any, module: nn.Module, inputs: Any, case: Case, error: RuntimeError, mode: str) -> None:
        try:
            self._loss(case, called(*inputs), module).backward()  # type: ignore[no-untyped-call]
        except GraphRegError:
            raise
        except RuntimeError as own:
            raise GraphRegError(f"torch raises, here and in the oracle: {type(own).__name__}") from own
        if mode == "eval" and any(reg.kind in SPLICES for reg in case.regs):  # where the oracle, like the model, has no copy
            raise GraphRegError("the copies behind splices that do not act allow a derivative that torch refuses the oracle")
        if self.compiled and "modified by an inplace operation" in str(error):
            raise GraphRegError("torch.compile makes no write, and so differentiates what torch refuses the oracle in eager")
        raise Fault("gradient", f"the oracle cannot be differentiated, and the module is: {error}")

    def _loss(self, case: Case, answer: Any, module: Any) -> Tensor:
        if case.penalties == "attach":
            return backward(answer)
        return backward(answer.output) + sum((v.double() for v in answer.penalties.values()), torch.zeros((), dtype=torch.float64))

    def _seen(self, case: Case, where: str, mode: str, got: Any, expected: Any, inputs: Any) -> None:
        (answer, module), (output, penalties, wanted) = got, expected
        if case.penalties == "attach":
            ours, measured = answer, module.penalties() if penalties else {}
        else:
            ours, measured = answer
        # what a batch norm keeps of train mode has the rounding of the splices of 0.2, of which only the formula is fixed
        exact = mode == "eval" and not self.compiled and not (case.later and any(True for _ in self.model.buffers()))
        alike(ours, output, f"output at {where}", "output", exact)
        if list(measured) != list(penalties):
            raise Fault("penalty", f"{where}: penalties {list(measured)}, expected {list(penalties)}")
        for name, value in penalties.items():
            alike(measured[name], value, f"penalty {name} at {where}", "penalty")
        for ours_in, theirs_in in zip(*inputs, strict=True):
            alike(ours_in, theirs_in, f"input after {where}", "input")
        self._gradients(self._loss(case, answer, module), wanted, where, inputs)
        for (name, mine), (_, other) in zip(module_buffers(self.model), module_buffers(self.twin), strict=True):
            alike(mine, other, f"buffer {name} after {where}", "buffer")

    def _gradients(self, total: Tensor, wanted: Tensor, where: str, inputs: Any) -> None:
        if total.requires_grad != wanted.requires_grad:
            raise Fault("gradient", f"{where}: the loss needs a gradient: {total.requires_grad}, expected {wanted.requires_grad}")
        for parameter in self.model.parameters():
            parameter.grad = None
        if not wanted.requires_grad:
            return
        total.backward()  # type: ignore[no-untyped-call]
        for (name, mine), other in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            graded(mine.grad, other.grad, f"gradient of {name} at {where}", self.tolerance)
        for i, (mine, other) in enumerate(zip(*inputs, strict=True)):
            if isinstance(mine, Tensor):
                graded(mine.grad, other.grad, f"gradient of input {i} at {where}", self.tolerance)

    def _strip(self, module: nn.Module) -> None:
        stripped = engine("strip")(module)
        if list(stripped.state_dict()) != list(self.twin.state_dict()):
            raise Fault("state_dict", f"{list(stripped.state_dict())}")
        if list(module.state_dict()) != list(self.twin.state_dict()):
            raise Fault("state_dict", f"{list(module.state_dict())}")
        self._restore(self.model)
        self._restore(self.twin)
        stripped.eval()
        self.twin.eval()
        alike(stripped(*self.inputs()), self.twin(*self.inputs()), "strip's output", "strip", True)


@dataclass
class Again:
    """What a call of the oracle began with, so that it can be made again."""

    forward: Any
    run: Run
    number: int
    mode: str
    state: dict[str, Any]
    states: dict[tuple[str, str], Tensor]


def gradients(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The gradients of all parameters and inputs; zeros where there is none."""
    leaves = [*model.parameters(), *(x for x in inputs if isinstance(x, Tensor))]
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in leaves]


def seeded(number: int) -> None:
    """``torch.manual_seed`` for the CPU alone: that one formats a stack for devices that are not there yet, which takes a millisecond."""
    torch.default_generator.manual_seed(number)


def engine(name: str) -> Any:
    """``trace``, ``plan``, ``rewrite``, ``strip``, as they are now: a fault may have been put in."""
    room = {"trace": "tracing", "plan": "planning", "rewrite": "rewriting", "strip": "rewriting"}[name]
    return getattr(importlib.import_module(f"graphreg.{room}.{name}"), name)


def moved(model: nn.Module) -> None:
    """What an optimizer might do: all parameters change."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(torch.linspace(-0.1, 0.1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape))


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors that are plain attributes."""
    found = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        found += [(f"{path}:{name}", value) for name, value in vars(module).items() if isinstance(value, Tensor)]
    return found


def module_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.named_buffers() if "graphreg_rules" not in name]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a user could see change."""
    state: dict[str, Any] = {name: value.detach().clone() for name, value in tensors_of(model)}
    return state | {f"{name}.training": module.training for name, module in model.named_modules()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return bool(a == b)


def alike(ours: Any, expected: Any, what: str, kind: str, exact: bool = False) -> None:
    """Raise Fault where structures, types, shapes or values differ."""
    mine, one = pytree.tree_flatten(ours)
    other, two = pytree.tree_flatten(expected)
    if one != two:
        raise Fault(kind, f"{what}: {one}, expected {two}")
    for a, b in zip(mine, other, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                raise Fault(kind, f"{what}: {a!r}, expected {b!r}")
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape or (a.dtype != b.dtype and kind != "penalty"):
            raise Fault(kind, f"{what}: {described(a)}, expected {described(b)}")
        if not (same(a, b) if exact else near(a, b)):
            raise Fault(kind, f"{what}: {numbers(a)}, expected {numbers(b)}")


def near(a: Tensor, b: Tensor, tolerance: float = 2e-5, least: float = 1e-2) -> bool:
    """``least``: the size of the numbers whose rounding counts, if those that are compared are smaller."""
    if not b.is_floating_point():
        return bool(torch.equal(a, b))
    a, b = a.detach().double(), b.detach().double()
    scale = float(b.nan_to_num().abs().max()) if b.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, least), equal_nan=True))


def close(ours: Tensor, expected: Tensor, tolerance: float) -> bool:
    """``near``, for gradients: sums of terms of size 1, whose rounding is left where they add up to less."""
    return near(ours, expected, tolerance, least=max(5e-2, 4e-6 / tolerance))


def graded(ours: Tensor | None, expected: Tensor | None, what: str, tolerance: float) -> None:
    """Gradients: nothing is the same as zeros."""
    if ours is None and expected is None:
        return
    mine = torch.zeros_like(expected) if ours is None else ours  # type: ignore[arg-type]
    other = torch.zeros_like(ours) if expected is None else expected  # type: ignore[arg-type]
    if mine.shape != other.shape or not close(mine, other, tolerance):
        raise Fault("gradient", f"{what}: {numbers(mine)}, expected {numbers(other)}")


def described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def numbers(value: Tensor) -> str:
    text = re.sub(r"\s+", " ", str(value.detach().flatten()[:8].tolist()))
    return text


def refusal(stage: str, error: BaseException) -> Verdict:
    """A refusal, by the kind of error and its first words that name nothing of the model."""
    name = type(error).__name__ if isinstance(error, GraphRegError) else "GraphRegError"
    text = str(error)
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)", "…", text)
    words = [("…" if re.search(r"[\d_]|^[a-z]*\.[a-z]", word) else word) for word in plain.split()[:8]]
    return Verdict("refused", f"{name}: {' '.join(words)}", text)


def broken(stage: str, error: BaseException) -> Verdict:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = re.sub(r"\d+", "", last.filename.rpartition("/")[2])
    kind = f"{type(error).__name__} in {stage}, {place}:{last.name}"
    return Verdict("fault", kind, "".join(traceback.format_exception(error))[-3000:])


def judge(group: Group, compiled: str = "") -> list[Verdict]:
    return Judge(group, compiled).verdicts()


__all__ = ["Fault", "Judge", "Mapping", "Verdict", "judge"]
