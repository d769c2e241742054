"""The examples of docs/trainers.md with the callbacks."""

from __future__ import annotations

import pytest

from pages import run_page


def test_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert run_page("trainers.md", "transformers, in place")["trainer"].state.global_step == 2


@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's, of what Lightning uses
def test_lightning() -> None:
    pytest.importorskip("lightning")
    assert run_page("trainers.md", "Lightning, in place")["trainer"].global_step == 2


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    assert run_page("trainers.md", "accelerate")["accelerator"].gradient_accumulation_steps == 2
