"""What is asked of each model: a column is a function of a subject that raises Failed, or returns a remark ("" for none)."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import get_graph_node_names

import graphreg
from zoo.providers import tensors
from zoo.subject import Subject

TIMED = 3


class Failed(Exception):
    """A model that does not come out as it should; says how."""


def names(subject: Subject) -> str:
    """The names are torchvision's, save what DESIGN's section on names sets apart; every module called is named."""
    traced, model = subject.traced, subject.model
    listed = {label.text for site in traced.values for label in site.labels}
    listed |= {name.partition(":")[0] for name in listed}
    paths = {path for path, _ in model.named_modules() if path}  # one that is shared goes by the first of its paths
    unseen = {path for path in paths if any(path.startswith(f"{leaf}.") for leaf in traced.leaves)}
    unnamed = paths - listed - unseen - never_called(subject)
    if unnamed:
        raise Failed(f"{len(unnamed)} modules are called and have no name: {', '.join(sorted(unnamed)[:3])}")
    try:
        theirs = get_graph_node_names(model, suppress_diff_warning=True)
    except Exception as error:  # what torchvision's tracer has against a model
        return f"torchvision cannot trace it: {one_line(error)}"
    # torchvision strips "_N" from a leaf module's own name (its ln_1 is the output of ln_2); here a module keeps its path
    shortened = {path.rpartition("_")[0] for path in paths if path.rpartition("_")[2].isdigit()}
    missing = [n for n in dict.fromkeys(theirs[0] + theirs[1]) if n not in listed and n not in shortened]
    if missing:
        raise Failed(f"{len(missing)} of torchvision's names are missing: {', '.join(missing[:3])}")
    return ""


def never_called(subject: Subject) -> set[str]:
    """Containers and modules that the forward does not call have no value to name."""
    called: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda m, a, o: called.add(m)) for m in subject.model.modules()]
    for training in (True, False):
        subject.output(subject.model, training)
    for handle in handles:
        handle.remove()
    return {path for path, m in subject.model.named_modules() if m not in called}


def step(subject: Subject) -> str:
    """One training step with all three regularizers: finite, and each parameter that had a gradient has one."""
    reached = gradients(subject, subject.model)
    ours = gradients(subject, subject.module)
    lost = [name for name in reached if name not in ours]
    if lost:
        raise Failed(f"{len(lost)} parameters lost their gradient: {', '.join(lost[:3])}")
    infinite = [name for name, finite in ours.items() if not finite and reached.get(name, True)]
    if infinite:
        raise Failed(f"{len(infinite)} gradients are not finite: {', '.join(infinite[:3])}")
    return ""


def gradients(subject: Subject, module: nn.Module) -> dict[str, bool]:
    """After one step in train mode: the parameters with a gradient, and whether it is finite."""
    loss = loss_of(subject.call(module.train()))
    if not loss.isfinite():
        raise Failed(f"the loss is {loss.item()}")
    loss.backward()
    found = {n: bool(p.grad.isfinite().all()) for n, p in subject.model.named_parameters() if p.grad is not None}
    subject.model.zero_grad()
    return found


def loss_of(output: object) -> Tensor:
    penalties: Mapping[str, Tensor] = {}
    if hasattr(output, "penalties"):
        output, penalties = output.output, output.penalties  # type: ignore[attr-defined]
    floating = [t for t in tensors(output) if t.is_floating_point()]
    return sum((t.square().mean() for t in floating), torch.zeros(())) + sum(penalties.values())


def same(expected: object, ours: object, what: str) -> None:
    if type(expected) is not type(ours):
        raise Failed(f"{what}: {type(ours).__name__} is returned, not {type(expected).__name__}")
    pairs = list(zip(tensors(expected), tensors(ours), strict=True))
    apart = [float((a - b).abs().max()) for a, b in pairs if not torch.equal(a, b)]
    if apart:
        raise Failed(f"{what}: {len(apart)} of {len(pairs)} outputs differ, by {max(apart):.1e} at most")


def evaluation(subject: Subject) -> str:
    """In eval mode the rewritten module is the model, bit for bit."""
    same(subject.output(subject.model, False), subject.output(subject.module, False).output, "eval mode")  # type: ignore[attr-defined]
    return ""


def stripped(subject: Subject) -> str:
    """Without its additions the module is the model, bit for bit, in both modes."""
    for training in (False, True):
        mode = "train" if training else "eval"
        same(subject.output(subject.model, training), subject.output(subject.stripped, training), f"{mode} mode")
    return ""


def zero(subject: Subject) -> str:
    """With all strengths zero the module is the model in train mode too, bit for bit, and its penalties are zero."""
    expected, before = subject.output(subject.model, True), graphreg.strengths(subject.module)
    for name in before:
        graphreg.set_strength(subject.module, name, 0.0)
    try:
        output, penalties = subject.output(subject.module, True)  # type: ignore[misc]
    finally:
        for name, value in before.items():
            graphreg.set_strength(subject.module, name, value)
    same(expected, output, "train mode, zero strengths")
    if any(value != 0 for value in penalties.values()):
        raise Failed(f"with zero strengths the penalties are {penalties}")
    return ""


def keys(subject: Subject) -> str:
    """``state_dict`` has the model's keys in the model's order; parameters, buffers, attributes are the model's own."""
    module, _, before, after = subject.rewritten
    changed = [what for what in before if what != "modes" and before[what] != after[what]]
    if changed:
        raise Failed(f"tracing changed the model's {', '.join(changed)}")
    state, own = module.state_dict(), subject.model.state_dict()
    if list(state) != list(own) or dict(state._metadata) != dict(own._metadata):  # type: ignore[attr-defined]
        raise Failed(f"{len(set(state) ^ set(own))} keys of state_dict differ, or their order or metadata")
    given = dict(module.named_parameters(remove_duplicate=False))
    if any(given.get(name) is not p for name, p in subject.model.named_parameters(remove_duplicate=False)):
        raise Failed("a parameter is not the model's own")
    return ""


def modes(subject: Subject) -> str:
    """Every submodule keeps its mode, the one that was set apart too."""
    _, _, before, after = subject.rewritten
    moved = [name for name, mode in before["modes"].items() if after["modes"][name] != mode]  # type: ignore[attr-defined,index]
    if moved:
        raise Failed(f"{len(moved)} submodules changed their mode: {', '.join(moved[:3])}")
    return ""


COLUMNS: Mapping[str, Callable[[Subject], str]] = {
    "names": names, "step": step, "eval": evaluation, "stripped": stripped, "zero": zero, "keys": keys, "modes": modes,
}  # fmt: skip


def figures(subject: Subject) -> dict[str, object]:
    """What is measured beside: sites, seconds to regularize, milliseconds of a step without and with regularizers."""
    traced = subject.traced
    return {
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "sites": len(traced.values),
        "hidden": sum(site.role == "hidden" for site in traced.values),
        "kept whole": dict(traced.leaves),
        "graphs": len(traced.graphs),
        "examples": subject.examples is not None,
        "regularize": subject.rewritten[1],
        "plain step": step_time(subject, subject.model),
        "step": step_time(subject, subject.module),
    }


def step_time(subject: Subject, module: nn.Module) -> float:
    times = []
    module.train()
    for _ in range(TIMED):
        start = time.perf_counter()
        loss_of(subject.call(module)).backward()
        times.append(time.perf_counter() - start)
        subject.model.zero_grad()
    return statistics.median(times)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def examine(subject: Subject) -> dict[str, object]:
    """Every column's answer, and the figures."""
    answers: dict[str, dict[str, object]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, column in COLUMNS.items():
            try:
                answers[name] = {"passed": True, "remark": column(subject)}
            except Exception as error:  # one column's failure must not hide the others'
                reason = str(error) if isinstance(error, Failed) else one_line(error)
                answers[name] = {"passed": False, "remark": reason}
        found: dict[str, object] = {"columns": answers}
        try:
            found["figures"] = figures(subject)
        except Exception as error:
            found["figures"] = {"missing": one_line(error)}
    return found
