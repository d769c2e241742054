"""Tests each function of ``torch_internals`` on a tiny example, to find out which of them a new torch has broken."""

from __future__ import annotations

import pytest
import torch

import graphreg.torch_internals as door
from graphreg.torch_internals import pytree, run_canaries
from graphreg.torch_internals.canaries import CANARIES, Canary, CanaryError

TESTED = {name for each in CANARIES for name in each.names}
# What is in the door and is of graphreg or of Python alone.
NO_PART_OF_TORCH = {
    "CHUNKED", "Changes", "Chunk", "DEFAULT", "ModuleStack", "at_rest", "collector_at_rest", "deep_enough", "quiet", "raise_interrupt",
    "regions", "known_versions", "modules_by_path", "run_canaries", "show_parameters_of", "warn_if_untested",
    "with_own_code",
}  # fmt: skip


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.test.__name__)
def test_canary(canary: Canary) -> None:
    canary.run()


def test_each_function_has_a_canary() -> None:
    missing = sorted({*door.__all__, *(f"pytree.{name}" for name in pytree.__all__)} - {"pytree"} - NO_PART_OF_TORCH - TESTED)
    assert not missing, f"{missing} of graphreg/torch_internals have no canary: a new torch would break them in silence"
    gone = sorted(TESTED - {*door.__all__, *(f"pytree.{name}" for name in pytree.__all__)})
    assert not gone, f"{gone} are no names of graphreg/torch_internals any more"


def test_a_canary_falls_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls() -> None:
        raise AssertionError  # as pytest would word an assertion itself

    def lacks() -> None:
        raise AttributeError("no such name\nand more")

    canaries = [Canary("a backward pass is numbered", "the noise", ("in_backward",), test) for test in (falls, lacks)]
    sentence = (
        f"torch {torch.__version__} changed how a backward pass is numbered; this concerns the noise: "
        "in_backward in graphreg/torch_internals"
    )
    with pytest.raises(CanaryError) as caught:
        canaries[0].run()
    assert str(caught.value) == f"{sentence} (AssertionError: raise AssertionError  # as pytest would word an assertion itself)"
    monkeypatch.setattr("graphreg.torch_internals.canaries.CANARIES", [*canaries, CANARIES[0]])
    assert list(run_canaries()) == [str(caught.value), f"{sentence} (AttributeError: no such name)", ""]
