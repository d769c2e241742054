"""Runs a scene on the engine and on the plain model, and compares what can be seen after every call."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphreg
from fuzz.cases import Discarded, backward, forgotten, loaded
from fuzz.judge import Fault, Verdict, alike, broken, graded, refusal, seeded
from fuzz.scenes import STRENGTH, Scene, Step
from graphreg.errors import GraphRegError


def judge_scene(scene: Scene, compiled: str = "") -> Verdict:
    """What came of it: fine, refused or a fault. Raises Discarded where the plain model does not run its first call."""
    name = f"scene_{scene.number}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _Judge(scene, loaded(scene.source(), name), compiled).verdict()
        finally:
            forgotten(name)


class _Judge:
    def __init__(self, scene: Scene, space: dict[str, Any], compiled: str) -> None:
        self.scene, self.space, self.compiled = scene, space, compiled
        self.twin: nn.Module = space["model"]()
        self.net: nn.Module = space["model"]()
        self._discard_what_does_not_run()

    def _discard_what_does_not_run(self) -> None:
        try:
            self.space["model"]()(**self.space["call_0"]())
        except Exception as error:
            raise Discarded(f"{type(error).__name__}: {error}") from error

    def verdict(self) -> Verdict:
        refused = 0
        try:
            called = self._regularized()
            for number, step in enumerate(self.scene.steps):
                try:
                    self._step(number, step, called)
                except GraphRegError as error:
                    if self.scene.way != "in place" or "failed its check" in str(error) or self._remembers():
                        raise
                    refused, last = refused + 1, error  # in place a refused call is over: the next may be right
        except GraphRegError as error:
            return Verdict("fault", "check", str(error)) if "failed its check" in str(error) else refusal("scene", error)
        except Discarded:
            raise
        except Fault as fault:
            return Verdict("fault", fault.kind, fault.detail)
        except Exception as error:
            if (inner := _graphregs(error)) is not None:
                return refusal("scene", inner)
            return broken("scene", error)
        return refusal("scene", last) if refused else Verdict("fine")

    def _remembers(self) -> bool:
        """Whether a call changes the model, so that after a refused one the two are no longer the same."""
        return any(True for _ in self.twin.buffers()) or any(each.watched for each in self.scene.fragments)

    def _regularized(self) -> Any:
        scene = self.scene
        regs = [eval(text, vars(graphreg.passes)) for text in scene.regs]
        example = None if scene.way == "no example" else self.space["call_0"]()
        options: dict[str, Any] = {"front_end": scene.front_end, "penalties": scene.penalties, "rng": scene.number}
        before = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        seeded(7)
        self.net.train()
        if scene.way == "in place":
            self.module = graphreg.regularize_(self.net, *regs, missing="ignore", **options)
        else:
            self.module = graphreg.regularize(self.net, *regs, example_inputs=example, missing="ignore", **options)
        after = self.net.state_dict()
        if [*before] != [*after] or not all(torch.equal(value, after[name]) for name, value in before.items()):
            raise Fault("model changed", f"{[*before]}, {[*after]}")
        return torch.compile(self.module, backend=self.compiled) if self.compiled else self.module

    def _step(self, number: int, step: Step, called: Any) -> None:
        self.twin.train(step.mode == "train"), self.module.train(step.mode == "train"), self.net.train(step.mode == "train")
        change, call = self.space[f"change_{number}"], self.space[f"call_{number}"]
        expected, wrong = self._plain(number, change, call)
        seeded(50 + number)
        change(self.net)
        given = call()
        seeded(100 + number)
        if wrong is not None:
            self._raises(called, given, wrong)
            return
        where = f"call {number} ({step.mode})"
        answer = called(**given)
        output, penalties = self._parts(answer, step)
        alike(output, expected, f"output at {where}", "output")
        if self.scene.weighs and penalties is not None:
            self._penalty(penalties, where)
        for (name, mine), (other, value) in zip(self.net.named_buffers(), self.twin.named_buffers(), strict=True):
            if name != other:
                raise Fault("buffer", f"{name} for {other} after {where}")
            alike(mine, value, f"buffer {name} after {where}", "buffer")
        self._gradients(output, penalties, expected, where, step)
        if self.scene.way == "in place" and step.mode == "train":
            self._attributes(where)

    def _plain(self, number: int, change: Any, call: Any) -> tuple[Any, Exception | None]:
        seeded(50 + number)
        try:
            change(self.twin)
        except Exception as error:
            raise Discarded(f"the change raises: {error}") from error
        seeded(100 + number)
        try:
            return self.twin(**call()), None
        except Exception as error:
            return None, error

    @staticmethod
    def _raises(called: Any, given: Any, wrong: Exception) -> None:
        try:
            called(**given)
        except Exception:
            return  # of whatever kind
        raise Fault("not refused", f"the plain model raises {type(wrong).__name__}: {wrong}")

    def _parts(self, answer: Any, step: Step) -> tuple[Any, Any]:
        """The output and the penalties; None for penalties that are not measured."""
        own = self.scene.way == "in place" and step.mode == "eval"
        if self.scene.penalties == "return" and not own:
            return answer
        return answer, None if own else self.module.penalties() if self.scene.weighs else {}

    def _expected_penalty(self) -> Tensor:
        wide = [p for p in self.twin.parameters() if p.dim() >= 2]
        return STRENGTH * torch.stack([(p.float() ** 2).mean() for p in wide]).mean()

    def _penalty(self, penalties: Any, where: str) -> None:
        if not self._weights_are_plain():
            return
        if list(penalties) != ["weight_l2"]:
            raise Fault("penalty", f"{where}: penalties {list(penalties)}")
        alike(penalties["weight_l2"].detach(), self._expected_penalty().detach(), f"penalty at {where}", "penalty")

    def _weights_are_plain(self) -> bool:
        """Whether each parameter is what the formula acts on: pruned and parametrized ones are not."""
        return not any("_orig" in name or "parametri" in name for name, _ in self.twin.named_parameters())

    def _gradients(self, output: Any, penalties: Any, expected: Any, where: str, step: Step) -> None:
        if not self._weights_are_plain() and self.scene.weighs:
            return
        for parameter in [*self.net.parameters(), *self.twin.parameters()]:
            parameter.grad = None
        mine, wanted = backward(output), backward(expected)
        if not wanted.requires_grad:
            if mine.requires_grad and self.scene.penalties == "return":
                raise Fault("gradient", f"{where}: the output needs a gradient, and the plain one does not")
            return
        if not mine.requires_grad:
            raise Fault("gradient", f"{where}: the output needs no gradient")
        if penalties is not None and self.scene.weighs:
            wanted = wanted + self._expected_penalty().double()
            if self.scene.penalties == "return":
                mine = mine + sum(value.double() for value in penalties.values())
        mine.backward()  # type: ignore[no-untyped-call]
        wanted.backward()  # type: ignore[no-untyped-call]
        ours, theirs = dict(self.net.named_parameters()), dict(self.twin.named_parameters())
        if [*ours] != [*theirs]:
            raise Fault("gradient", f"{where}: parameters {[*ours]}, expected {[*theirs]}")
        for name, parameter in theirs.items():
            graded(ours[name].grad, parameter.grad, f"gradient of {name} at {where}", 2e-5)

    def _attributes(self, where: str) -> None:
        """What the forward assigns is assigned, or the report names it."""
        for name in [each for fragment in self.scene.fragments for each in fragment.watched]:
            mine, other = vars(self.net).get(name, "nothing"), vars(self.twin).get(name, "nothing")
            try:
                alike(mine, other, name, "attribute")
            except Fault as fault:
                if name not in str(graphreg.report(self.net)):
                    raise Fault("attribute", f"{where}: {fault.detail}; the report does not name it") from None


def _graphregs(error: BaseException | None) -> GraphRegError | None:
    """What graphreg raised, where torch wraps it."""
    while error is not None:
        if isinstance(error, GraphRegError):
            return error
        error = error.__cause__ or error.__context__
    return None


def failing_scene(scene: Scene, compiled: str = "") -> str:
    """The kind of fault, or nothing."""
    try:
        verdict = judge_scene(scene, compiled)
    except Discarded:
        return ""
    return verdict.kind if verdict.result == "fault" else ""


def shrunk_scene(scene: Scene, compiled: str = "") -> Scene:
    """The scene with fewer fragments, calls and regularizers, as long as it fails in the same way."""
    kind, progress = failing_scene(scene, compiled), True
    while kind and progress:
        progress = False
        for smaller in _smaller(scene):
            if failing_scene(smaller, compiled) == kind:
                scene, progress = smaller, True
                break
    return scene


def _smaller(scene: Scene) -> list[Scene]:
    found = []
    for i in range(len(scene.fragments)):
        if len(scene.fragments) > 1:
            other = Scene.from_dict(scene.to_dict())
            del other.fragments[i]
            found.append(other)
    for i in range(1, len(scene.steps)):
        other = Scene.from_dict(scene.to_dict())
        del other.steps[i]
        found.append(other)
    for i in range(len(scene.regs)):
        if len(scene.regs) > 1:
            other = Scene.from_dict(scene.to_dict())
            del other.regs[i]
            found.append(other)
    return found


def write_scene(out: Path, scene: Scene, compiled: str = "") -> Path:
    """A scene as a file, to be read and to be replayed."""
    out.mkdir(parents=True, exist_ok=True)
    verdict = judge_scene(scene, compiled)
    kind = "".join(c if c.isalnum() else "-" for c in verdict.kind.partition(" in ")[0])[:30].strip("-")
    path = out / f"{scene.kind}-{kind or 'fine'}-{scene.number}-{zlib.crc32(scene.source().encode()) % 10**6:06d}.py"
    said = "\n".join(f"# {line}" for line in verdict.detail.splitlines()[-12:])
    by = f" --compiled {compiled}" if compiled else ""
    how = f"# {scene.way}, front_end={scene.front_end!r}, penalties={scene.penalties!r}: {', '.join(scene.regs)}"
    head = f"# {verdict.result}: {verdict.kind}\n{said}\n# python -m fuzz --replay {path.name}{by}\n{how}\n"
    path.write_text(f"{head}\n{scene.source()}\n# scene: {json.dumps(scene.to_dict())}\n")
    return path


__all__ = ["failing_scene", "judge_scene", "shrunk_scene", "write_scene"]
