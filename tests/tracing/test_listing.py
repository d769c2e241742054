"""``names``: what is listed, what is selected, and which inputs are used where none are given."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, NoMatchError, TraceError
from graphreg.tracing.listing import usual_inputs

IDS = torch.tensor([[1, 2, 3]])


class Words(nn.Module):
    """It decides on a shape, so that a trace needs inputs; ``dummy_inputs`` as in transformers."""

    def __init__(self, **dummy: Tensor) -> None:
        super().__init__()
        self.table, self.out, self.dummy = nn.Embedding(9, 4), nn.Linear(4, 2), dummy

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return self.dummy

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        batch, steps = ids.shape
        x = self.table(ids).reshape(batch * steps, -1)
        for _ in range(min(steps, 2)):
            x = torch.relu(x)
        return self.out(x)


class Images(nn.Module):
    default_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 8, 8)}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


def test_what_is_no_tensor_is_left_out() -> None:
    few, every = (graphreg.names(Words(), IDS, all=all) for all in (False, True))
    left_out = len(every.sites) - len(few.sites)
    assert left_out >= 2 and {site.why_not for site in every.sites if site.name not in few} == {"no tensor"}
    assert few.notes[0] == f"not listed: {left_out} values that are no tensors, such as sizes (all=True lists them)"
    assert not any(note.startswith("not listed") for note in every.notes)


def test_select() -> None:
    traced = graphreg.trace(Words(), IDS)
    assert [site.name for site in graphreg.names(traced, select="out*").sites] == ["out", "out.weight", "out.bias"]
    some = graphreg.names(traced, select=["out*", "!*.bias"], on="parameters")
    assert ([site.name for site in some.sites], some.title) == (["out.weight"], "Words, 'out*' '!*.bias'")
    assert [site.name for site in graphreg.names(traced, select=lambda site: site.op == "relu").sites] == ["relu", "relu_1"]
    with pytest.raises(NoMatchError, match="'outt' matches no site of Words"):
        graphreg.names(traced, select="outt")
    with pytest.raises(GraphRegError, match="give select=, too"):
        graphreg.names(traced, on="values")
    with pytest.raises(GraphRegError, match="on='weights' is unknown"):
        graphreg.names(traced, select="out", on="weights")  # type: ignore[arg-type]


def test_inputs_of_the_library() -> None:
    listed = graphreg.names(Words(ids=IDS))
    assert {site.name: site.shape for site in listed.sites}["out"] == (3, 2)
    assert "example inputs: model.dummy_inputs (ids 1x3)" in listed.notes
    assert {site.name: site.shape for site in graphreg.names(Images()).sites}["relu"] == (2, 2, 6, 6)
    assert usual_inputs(Words()) is None and usual_inputs(Words(pixels=IDS)) is None and usual_inputs(nn.Linear(2, 2)) is None


def test_inputs_of_the_library_that_do_not_fit_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "default_cfg", {"input_size": (1, 8, 8)})
    listed = graphreg.names(Images())
    assert {site.name: site.shape for site in listed.sites}["relu"] is None and listed.notes == ()


def test_the_error_names_the_arguments() -> None:
    with pytest.raises(TraceError, match=r"Give example_inputs, a tensor,.* dict of the arguments of forward\(ids, mask=None\)\."):
        graphreg.names(Words())
    with pytest.raises(TraceError, match=r"so it needs example_inputs.*of forward\(ids, mask=None\)"):
        graphreg.trace(Words(ids=IDS), front_end="export")  # what is trained is traced with inputs that its user gave


def test_notebooks() -> None:
    traced = graphreg.trace(Words(), IDS)
    plan = graphreg.plan(traced, graphreg.build("dropout", weight=0.1, pattern=lambda site: site.op == "relu"))
    for shown in (graphreg.names(traced), plan):
        assert "<table>" in shown._repr_html_() and repr(shown) == str(shown) == shown.text()
    assert "&lt;&lt;lambda&gt;&gt;" in plan._repr_html_() or "&lt;lambda&gt;" in plan._repr_html_()
