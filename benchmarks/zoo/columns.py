"""What is asked of each model: a column is a function of a subject that raises Failed, or says what its cell holds."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import graphreg
from zoo.names import names_missing, torchvision_names, unnamed
from zoo.providers import call, one_line, tensors
from zoo.subject import Failed, Gradients, Subject, loss_of
from zoo.ways import Captured, Penalized, Rewritten

TIMED = 3
NEAR, SAME_GRADIENT = 1e-6, 1e-4  # of the largest value


@dataclass(frozen=True)
class Cell:
    """``remark``: what stands below the table."""

    text: str = "yes"
    remark: str = ""


def names(subject: Subject) -> Cell:
    """The names are torchvision's, but for the two differences that the page lists; every module called is named."""
    way = subject.way
    if isinstance(way, Captured):
        return Cell("n/a")  # many graphs, no listing of one model's
    without = unnamed(subject, way.traced)
    if without:
        raise Failed(f"called modules without a name ({len(without)}): {', '.join(sorted(without)[:3])}")
    if way.front_end != "symbolic":
        return Cell("n/a")  # torch.fx, and with it torchvision, cannot trace these
    try:
        theirs = torchvision_names(subject.model)
    except Exception as error:  # what torchvision's tracer has against a model
        return Cell("n/a", f"torchvision cannot trace it: {one_line(error)}")
    missing = names_missing(subject.model, way.traced, theirs)
    if missing:
        raise Failed(f"{len(missing)} of torchvision's names are missing: {', '.join(missing[:3])}")
    return Cell()


def step(subject: Subject) -> Cell:
    """One training step with all three regularizers: finite, and no parameter that had a gradient is without."""
    check_step(subject, lambda: subject.way(subject.inputs))
    return Cell()


def check_step(subject: Subject, forward: Callable[[], Penalized]) -> None:
    ours = subject.gradients(subject.way, forward)
    lost(subject.reached, ours)
    finite = {name: bool(gradient.isfinite().all()) for name, gradient in subject.reached.items()}
    infinite = [name for name, gradient in ours.items() if finite.get(name, True) and not gradient.isfinite().all()]
    if infinite:
        raise Failed(f"{len(infinite)} gradients are not finite: {', '.join(infinite[:3])}")


def lost(reached: Gradients, ours: Gradients) -> None:
    without = [name for name in reached if name not in ours]
    if without:
        raise Failed(f"{len(without)} parameters lost their gradient: {', '.join(without[:3])}")


def gradients(subject: Subject) -> Cell:
    """Of the output alone, strengths zero: the same parameters have a gradient as in the original, and the same one."""
    reached = subject.reached
    with subject.at_zero():
        ours = subject.gradients(subject.way, lambda: subject.way(subject.inputs), penalized=False)
    lost(reached, ours)
    more = [name for name in ours if name not in reached and bool(ours[name].any())]
    if more:
        raise Failed(f"{len(more)} parameters have a gradient that the original's have not: {', '.join(more[:3])}")
    scale = max((float(g.abs().max()) for g in reached.values() if g.numel()), default=0.0)
    apart = max((float((ours[name] - g).abs().max()) for name, g in reached.items() if g.numel()), default=0.0)
    if not apart <= SAME_GRADIENT * scale:
        raise Failed(f"a gradient differs by {apart:.1e}, where the largest is {scale:.1e}")
    return Cell()


def same(expected: object, ours: object, what: str, exact: bool) -> Cell:
    """Bit for bit; or, where the operators are not the model's own, to ``NEAR``."""
    if type(expected) is not type(ours):
        raise Failed(f"{what}: {type(ours).__name__} is returned, not {type(expected).__name__}")
    theirs, mine = tensors(expected), tensors(ours)
    if [t.shape for t in theirs] != [t.shape for t in mine]:
        raise Failed(f"{what}: {len(mine)} outputs are returned where the model has {len(theirs)}, or of other shapes")
    apart = [
        (float((a.double() - b.double()).abs().max()), float(a.abs().max()))
        for a, b in zip(theirs, mine, strict=True)
        if not torch.equal(a, b)
    ]
    if not apart:
        return Cell()
    if exact or any(not difference <= NEAR * max(1.0, largest) for difference, largest in apart):
        raise Failed(f"{what}: {len(apart)} of {len(mine)} outputs differ, by {max(apart)[0]:.1e} at most")
    return Cell(f"{NEAR:g}")


def evaluation(subject: Subject) -> Cell:
    """In eval mode what is regularized is the model."""
    return same(subject.original(False), subject.ours(False)[0], "eval mode", subject.way.front_end == "symbolic")


def stripped(subject: Subject) -> Cell:
    """Without its additions the module is the model, in both modes."""
    way = subject.way
    if not isinstance(way, Rewritten):
        return Cell("n/a")  # nothing was added to the model
    cells = []
    for training in (False, True):
        output = subject.run(way.stripped, lambda: call(way.stripped, subject.inputs), training)
        what = f"{'train' if training else 'eval'} mode"
        cells.append(same(subject.original(training), output, what, way.front_end == "symbolic"))
    return max(cells, key=lambda cell: cell != Cell())


def zero(subject: Subject) -> Cell:
    """With all strengths zero what is regularized is the model in train mode too, and its penalties are zero."""
    expected = subject.original(True)
    with subject.at_zero():
        output, penalties = subject.ours(True)
    cell = same(expected, output, "train mode, zero strengths", subject.way.front_end == "symbolic")
    if any(value != 0 for value in penalties.values()):
        raise Failed(f"with zero strengths the penalties are {penalties}")
    return cell


def verified(subject: Subject) -> Cell:
    """``graphreg.verify`` finds nothing: outputs, buffers, inputs and gradients of several calls in both modes."""
    way = subject.way
    if not isinstance(way, Rewritten):
        return Cell("n/a")  # the backend compiles the model itself
    positional, named = ((), subject.inputs) if isinstance(subject.inputs, dict) else (subject.inputs, {})
    subject.restore()
    subject.forget_gradients()  # the largest models leave no room for them beside two more sets
    graphreg.verify(subject.model, way.module, *positional, **named)
    return Cell()


def keys(subject: Subject) -> Cell:
    """``state_dict`` has the model's keys in the model's order; parameters, buffers, attributes are the model's own."""
    way = subject.way
    changed = [what for what in subject.before if what != "modes" and subject.before[what] != subject.after[what]]
    if changed:
        raise Failed(f"the model's {', '.join(changed)} changed")
    if not isinstance(way, Rewritten):
        return Cell()
    state, own = way.module.state_dict(), subject.model.state_dict()
    if list(state) != list(own) or dict(state._metadata) != dict(own._metadata):  # type: ignore[attr-defined]
        raise Failed(f"{len(set(state) ^ set(own))} keys of state_dict differ, or their order or metadata")
    given = dict(way.module.named_parameters(remove_duplicate=False))
    if any(given.get(name) is not p for name, p in subject.model.named_parameters(remove_duplicate=False)):
        raise Failed("a parameter is not the model's own")
    return Cell()


def modes(subject: Subject) -> Cell:
    """Every submodule keeps its mode, the one that was set apart too."""
    _ = subject.way
    moved = [name for name, mode in subject.before["modes"].items() if subject.after["modes"][name] != mode]  # type: ignore[attr-defined,index]
    if moved:
        raise Failed(f"{len(moved)} submodules changed their mode: {', '.join(moved[:3])}")
    return Cell()


def compiled(subject: Subject) -> Cell:
    """One graph under torch.compile, or as many as the backend was given: a step runs, finite, and no gradient is lost."""
    way = subject.way
    try:
        for inner in subject.inners:
            forward = way.compiled(inner)
            check_step(subject, lambda: forward(subject.inputs))  # noqa: B023 - it is called here
    except Exception as error:
        refused = refusal(subject.model, subject) if isinstance(way, Rewritten) else ""
        if not refused or isinstance(error, Failed):
            raise
        return Cell("n/a", f"torch.compile(fullgraph=True) refuses the model itself: {refused}")
    text = f"{way.graphs} graph{'s' * (way.graphs != 1)}" if isinstance(way, Captured) else "yes"
    return Cell(text + (", Inductor" if "inductor" in subject.inners else ""))


def refusal(model: nn.Module, subject: Subject) -> str:
    """What torch.compile has against the original; nothing where it takes it."""
    torch.compiler.reset()
    try:
        made = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
        subject.gradients(model, lambda: (call(made, subject.inputs), {}))
    except Exception as error:
        return one_line(error)
    return ""


COLUMNS: Mapping[str, Callable[[Subject], Cell]] = {
    "names": names, "step": step, "gradients": gradients, "eval": evaluation, "stripped": stripped, "zero": zero, "verify": verified,
    "keys": keys, "modes": modes, "compiled": compiled,
}  # fmt: skip


def figures(subject: Subject) -> dict[str, object]:
    """What is measured beside: sites, seconds to regularize and of the traces in it, of a step without and with regularizers."""
    way, model = subject.way, subject.model
    plain = step_time(subject, model, lambda: (call(model, subject.inputs), {}))
    ours = step_time(subject, way, lambda: way(subject.inputs))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": len(way.sites),
        "hidden": list(way.sites.values()).count("hidden"),
        "kept whole": dict(way.traced.opaque_modules) if isinstance(way, Rewritten) else {},
        "front end": way.front_end,
        "refused": "" if isinstance(way, Rewritten) else way.refused,
        "graphs": way.graphs,
        "examples": way.shown,
        "bare": subject.bare,
        "named": {name: str(options["pattern"]) for name, options in way.named.items()},
        "regularize": way.seconds,
        "traces": way.tracing,
        "plain step": plain,
        "step": ours,
    }


def step_time(subject: Subject, of: object, forward: Callable[[], Penalized]) -> float:
    times = []
    of.train(True)  # type: ignore[attr-defined]
    for _ in range(TIMED):
        start = time.perf_counter()
        loss_of(*forward()).backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - start)
        subject.model.zero_grad()
    return statistics.median(times)


def examine(subject: Subject) -> dict[str, object]:
    """Every column's answer, and the figures; or the one error that no way was found with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _ = subject.way
        except Exception as error:
            return {"error": one_line(error), "ours": isinstance(error, graphreg.GraphRegError)}
        answers = {name: answer(subject, column) for name, column in COLUMNS.items()}
        try:
            return {"columns": answers, "figures": figures(subject)}
        except Exception as error:
            return {"columns": answers, "figures": {"missing": one_line(error)}}


def answer(subject: Subject, column: Callable[[Subject], Cell]) -> dict[str, object]:
    try:
        cell = column(subject)
    except Exception as error:  # one column's failure must not hide the others'
        reason = str(error) if isinstance(error, Failed) else one_line(error)
        return {"passed": False, "cell": "**no**", "remark": reason}
    return {"passed": True, "cell": cell.text, "remark": cell.remark}
