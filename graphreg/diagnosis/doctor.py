"""``graphreg.doctor`` tests the masks of a module under torch's settings, or which parts of graphreg work with the installed torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphreg.diagnosis.bisect import Bench, by_kind
from graphreg.diagnosis.findings import NONE, Diagnosis, Finding, seed_cures, site_names
from graphreg.diagnosis.probes import InnerBackend
from graphreg.diagnosis.step_watch import Observed, observe
from graphreg.diagnosis.torch_check import check_torch
from graphreg.errors import GraphRegError, RegularizerError, listed, shown, suggestions_text
from graphreg.ir.random_ops import NativeDropout
from graphreg.runtime.clock import clock_of
from graphreg.runtime.noise_keys import key_rule_of
from graphreg.runtime.runtime_module import DrawingRule
from graphreg.session.hosts import native_draws, record_of, rewritten, rules_of

KINDS = ("wrong", "refused", "differs")


def doctor(
    module: nn.Module | None = None,
    step: Callable[[], Any] | None = None,
    *,
    backend: InnerBackend = "inductor",
    progress: bool | None = None,
) -> Diagnosis:
    """Test whether, under torch's current settings, masks are the same in backward as in the forward, and in compiled code as in eager.

    ``doctor`` compiles tiny functions and compares their masks. One function draws as graphreg's regularizers do. The other functions draw
    from torch's random generator: one function for each kind of random operation, such as dropout, that the model itself still draws from
    this generator. If a mask is wrong, ``doctor`` finds the settings of torch that are not at their defaults, repeats the test with these
    at their defaults, and names the settings whose defaults cure the fault. The process caches the measurements for each combination of
    settings. The module, its gradients, the generators, the settings and all compiled code stay as they are.

    Without a module, ``doctor`` tests in a separate process which parts of graphreg work with the installed torch.

    Args:
        module: The module that ``regularize`` returned; None tests torch.
        step: A callable without arguments that runs forward and backward. ``doctor`` calls it once, to detect whether backward draws new
            random numbers, as with activation checkpointing around the whole module. The call needs memory for a copy of parameters and
            buffers. Do not step an optimizer in the callable, because ``doctor`` does not restore the state of an optimizer.
        backend: A backend of torch.compile, by name or as a callable.
        progress: Whether to show a line of progress on stderr; None shows it if stderr is a terminal.

    Returns:
        A diagnosis, which prints as text. ``bool(diagnosis)`` is True if nothing is wrong, refused or broken.

    Raises:
        GraphRegError: graphreg did not rewrite the module, the step runs no backward pass, or the backward pass calls the module again
            without torch.compile and outside of ``with frozen_noise(...)``.
        RegularizerError: The value of ``step``, ``backend`` or ``progress`` is not allowed.
    """
    _check(step, backend, progress)
    if module is None:
        if step is not None or backend != "inductor":
            raise RegularizerError("step= and backend= are about a module, and none is given. graphreg.doctor() alone tests torch.")
        with _line(sys.stderr.isatty() if progress is None else progress) as show:
            return check_torch(show)

    inner, native = rewritten(module), native_draws(module)
    rules = rules_of(module)
    key = key_rule_of(rules)
    drawing = tuple(child.site for child in rules.children() if isinstance(child, DrawingRule))
    first = next(inner.parameters(), None)
    # On meta nothing is computed, so the experiments run on the CPU then.
    device = torch.device("cpu") if first is None or first.device.type == "meta" else first.device

    with _line(sys.stderr.isatty() if progress is None else progress) as show:
        findings, right = _run_experiments(Bench(backend, device, show), native, drawing if key is not None else None)
        if step is not None:
            show("your step")
            # The counter of the noise comes first, because only the first one is compared.
            of_step = _of_step(observe(inner, [each for each in (key, clock_of(rules)) if each is not None], step), drawing, native)
            findings += of_step
            right += [] if of_step else ["your step: backward drew nothing anew"]

    if key is None and not native:
        right.append("nothing random: no splice of graphreg's, and no random operation of the model's own that acts")
    # The worst first; the sort is stable, so findings of one kind keep the order of the tests.
    findings.sort(key=lambda finding: KINDS.index(finding.kind))
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    return Diagnosis(f"{record_of(module).plan.title}: torch {torch.__version__}, {name}, {device}", tuple(findings), tuple(right))


def _run_experiments(bench: Bench, native: Sequence[NativeDropout], drawing: tuple[str, ...] | None) -> tuple[list[Finding], list[str]]:
    """Run the experiments. Return the findings, and sentences about the masks that were tested and are right.

    ``native``: the model's random operations that draw from torch's generator. ``drawing``: the sites that draw from graphreg's streams;
    None if the module has no streams.
    """
    kinds = by_kind(native)
    findings = bench.native(kinds)
    right = _right([operation for operations in kinds.values() for operation in operations], findings)
    if drawing is not None:
        of_streams = bench.streams(drawing)
        findings = [*findings, *of_streams]
        right += [] if of_streams else ["graphreg's streams: in backward as in the forward, compiled as in eager"]
    return findings, right


def _check(step: object, backend: object, progress: object) -> None:
    if step is not None and not callable(step):
        raise RegularizerError(f"step={shown(step)} is not allowed; give a callable without arguments that runs one forward and backward.")
    if isinstance(backend, str):
        # By default, the list lacks the backends that are meant for debugging, such as aot_eager.
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            suggestions = suggestions_text(backend, known, "Near names")
            raise RegularizerError(
                f"backend={shown(backend)} is unknown to torch.compile; give a name it knows, or a callable.{suggestions}"
            )
    elif not callable(backend):
        raise RegularizerError(f"backend={shown(backend)} is not allowed; give a name or a callable, as torch.compile takes it.")
    if progress is not None and not isinstance(progress, bool):
        raise RegularizerError(
            f"progress={shown(progress)} is not allowed; give True, False, or None for a line where stderr is a terminal."
        )


def _right(operations: Sequence[NativeDropout], findings: Sequence[Finding]) -> list[str]:
    # Masks that differ from those of eager may still be the same in forward and backward.
    bad = {site for finding in findings if finding.kind != "differs" for site in finding.sites}
    names = [operation.site.name for operation in operations if operation.site.name not in bad]
    unlike = any(finding.kind == "differs" for finding in findings)
    return [f"{listed(names)}: in backward as in the forward" + ("" if unlike else ", compiled as in eager")] if names else []


def _of_step(seen: Observed, drawing: tuple[str, ...], native: Sequence[NativeDropout]) -> list[Finding]:
    if not seen.backwards:
        raise GraphRegError("the step ran no backward pass, so there was nothing to watch. Let it call the module and then backward().")
    findings = []
    if seen.again:
        why = "your step runs the module again in backward: activation checkpointing around the whole module"
        # Without splices, the counter that was compared is that of the schedules.
        calls, own = ("that drew masks", "masks") if drawing else ("in train mode", "scheduled strengths")
        observed = f"calls {calls}: {seen.forward} in the forward, {seen.again} in backward, each with {own} of its own"
        cure = "'with graphreg.frozen_noise(module):' around forward and backward, or checkpoint blocks inside the model instead"
        findings.append(Finding("wrong", why, observed, drawing, cure, ""))
    if seen.moved:
        why = "your step draws from torch's generator in backward"
        observed = f"a generator had moved after {seen.moved} of {seen.backwards} backward pass{'es' * (seen.backwards != 1)}"
        cure = seed_cures(native, "preserve_rng_state=True in checkpoints, and the defaults of the settings that other findings blame")
        findings.append(Finding("wrong", why, observed, site_names(native), cure, NONE))
    return findings


@contextmanager
def _line(shown: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a line of progress on stderr, in place of the line before it. Clear the line at the end of the block."""

    def show(text: str) -> None:
        if shown:
            # Back to the start of the line, and clear it: the escape sequence EL of terminals.
            sys.stderr.write(f"\r\x1b[Kgraphreg.doctor: {text}")
            sys.stderr.flush()

    try:
        yield show
    finally:
        if shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
