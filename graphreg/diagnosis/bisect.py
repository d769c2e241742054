"""Runs the experiments of ``probes.py``, finds the settings of torch that cause wrong masks, and makes the findings of ``doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from graphreg.compiler.settings import Setting, changed_settings, defaults, patched_settings, setting
from graphreg.diagnosis.findings import ISSUES, NONE, Finding, cause, issue_addresses, seed_cures, set_back, shares, site_names
from graphreg.diagnosis.probes import InnerBackend, Probed, measure, measure_order, measure_streams
from graphreg.ir.random_ops import DropoutKind, NativeDropout
from graphreg.torch_internals.config import INDUCTOR

Kinds = Mapping[DropoutKind, Sequence[NativeDropout]]


def by_kind(operations: Iterable[NativeDropout]) -> dict[DropoutKind, list[NativeDropout]]:
    """Group the model's own random operations by the experiment that tests them.

    The dropout between the layers of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` is left out. This
    dropout needs no experiment, because the backward pass of the layer raises an error if the masks
    of the forward are gone.
    """
    kinds: dict[DropoutKind, list[NativeDropout]] = {}
    for operation in operations:
        if not (operation.kind == "layer" and operation.rate is not None):
            kinds.setdefault("attention" if operation.kind == "heads" else operation.kind, []).append(operation)
    return kinds


@dataclass(frozen=True)
class Bench:
    """Runs experiments with one backend on one device.

    Attributes:
        backend: A backend of torch.compile, by name or as a callable.
        device: The device on which the experiments run.
        show: A function that shows progress. It is called with a description of each experiment
            before the experiment runs.
    """

    backend: InnerBackend
    device: torch.device
    show: Callable[[str], None]

    def native(self, kinds: Kinds) -> list[Finding]:
        """Test the model's own random operations, kind by kind, and return the findings."""
        wrong: dict[tuple[str, tuple[Setting, ...]], list[tuple[DropoutKind, Probed]]] = {}
        unlike = list[tuple[DropoutKind, float]]()
        for kind in kinds:
            again = partial(measure, kind, self.backend, self.device)
            result = self._try(f"native dropout ({kind})", again)
            if result.wrong:
                wrong.setdefault((result.error, self.blame(again)), []).append((kind, result))
            if result.eager:
                unlike.append((kind, result.eager))

        # One finding for all kinds that have the same error and the same settings to blame.
        findings = [_wrong(error, blamed, results, kinds) for (error, blamed), results in wrong.items()]
        if unlike:
            return [*findings, self._unlike(unlike, kinds)]
        # The order of draws can be compared only if each single draw is that of eager.
        return findings or self._order([operation for operations in kinds.values() for operation in operations])

    def streams(self, sites: tuple[str, ...]) -> list[Finding]:
        """Test graphreg's streams, from which the module draws at ``sites``, and return the findings."""
        again = partial(measure_streams, self.backend, self.device)
        result = self._try("graphreg's streams", again)
        if not result.wrong and not result.eager:
            return []
        blamed = self.blame(again)
        shown = result.error or f"graphreg's masks differ for {result.backward:.0%} of elements in backward, {result.eager:.0%} compiled"
        return [Finding("refused" if result.error else "wrong", cause(blamed), shown, sites, set_back(blamed), issue_addresses(blamed))]

    def blame(self, again: Callable[[], Probed]) -> tuple[Setting, ...]:
        """Return the settings that cause a fault, as few as the search can find; () if torch's defaults do not cure the fault.

        The search starts with all settings that are not at their default. A setting is left out if
        the defaults of the remaining settings still cure the fault. ``again``: repeats the
        experiment that shows the fault.
        """
        needed = changed_settings()
        if not needed or not self._cured(needed, again):
            return ()

        # A single setting is to blame already: its default has cured the fault.
        for each in [*needed] if len(needed) > 1 else []:
            fewer = [other for other in needed if other is not each]
            if fewer and self._cured(fewer, again):
                needed = fewer
        return tuple(needed)

    def _cured(self, set_back: Sequence[Setting], again: Callable[[], Probed]) -> bool:
        with defaults(set_back):
            result = self._try(f"the same with {', '.join(each.name for each in set_back)} at the default", again)
        return not result.wrong

    def _try(self, what: str, experiment: Callable[[], Probed]) -> Probed:
        self.show(what)
        return experiment()

    def _unlike(self, unlike: Sequence[tuple[DropoutKind, float]], kinds: Kinds) -> Finding:
        """Make the finding that compiled code draws other masks than eager. Test whether ``fallback_random`` removes the difference."""
        operations = [operation for kind, _ in unlike for operation in kinds[kind]]
        observed = f"from one seed, compiled code and eager draw different masks: {shares(unlike)}"
        fallback = setting(INDUCTOR, "fallback_random")
        if fallback is not None and not fallback.value:
            # With ``fallback_random``, Inductor calls the random operations of eager.
            with patched_settings((fallback, True)):
                retried = [partial(measure, kind, self.backend, self.device) for kind, _ in unlike]
                results = [self._try("the same with fallback_random", experiment) for experiment in retried]
            if not any(each.eager or each.error for each in results):
                cure = seed_cures(operations, f"{fallback.place}.{fallback.name} = True (slower)")
                return Finding("differs", str(fallback), observed, site_names(operations), cure, ISSUES["fallback_random"])
        why = "the backend generates random numbers in its own way"
        return Finding("differs", why, observed, site_names(operations), seed_cures(operations), NONE)

    def _order(self, operations: Sequence[NativeDropout]) -> list[Finding]:
        """Test whether a compiled graph makes several draws in the order of eager. Call this if each single draw matches eager."""
        if len(operations) < 2:
            return []
        result = self._try("the order of draws", partial(measure_order, self.backend, self.device))
        if result.error:
            return [Finding("refused", cause(()), result.error, site_names(operations), "")]
        if not result.eager:
            return []
        observed = f"of two draws in one graph the second has another mask than in eager: {result.eager:.0%} of elements"
        why = "the compiler draws in another order than eager"
        return [Finding("differs", why, observed, site_names(operations), seed_cures(operations), ISSUES["order"])]


def _wrong(error: str, blamed: Sequence[Setting], results: Sequence[tuple[DropoutKind, Probed]], kinds: Kinds) -> Finding:
    operations = [operation for kind, _ in results for operation in kinds[kind]]
    if error:
        return Finding("refused", cause(blamed), error, site_names(operations), set_back(blamed), issue_addresses(blamed))
    observed = f"backward has other masks than the forward: {shares([(kind, each.backward) for kind, each in results])}"
    cures = seed_cures(operations, set_back(blamed))
    return Finding("wrong", cause(blamed), observed, site_names(operations), cures, issue_addresses(blamed))
