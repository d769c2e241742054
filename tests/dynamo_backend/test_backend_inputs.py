"""Options that name inputs of the model, through the backend: where a graph has the argument; an error where it has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import ModelInput, Noise, NoMatchError, Penalty, RegularizerError, Splice
from graphreg.passes import RecurrentState
from lacking import needs_result

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]


class MaskedL1(Penalty):
    mask: ModelInput = None

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        return (z.abs() * mask[..., None]).sum() / mask.sum()


class MaskedDropout(Splice):
    mask: ModelInput = None

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], z * noise.keep(z, weight) / (1 - weight), z).to(z.dtype)


class Net(nn.Module):
    def __init__(self, breaks: bool = False, reads: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.breaks, self.reads = nn.Linear(4, 6), nn.Linear(6, 3), breaks, reads

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.body(x * attention_mask[..., None] if self.reads else x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(h)


REGULARIZERS = [
    MaskedL1("tanh", 0.5, mask="attention_mask"), MaskedDropout("body", 0.5, mask="attention_mask"),
    RecurrentState("tanh", 0.5, lengths="attention_mask"),
]  # fmt: skip


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, behind a break
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("penalties", ["return", pytest.param("attach", marks=needs_result)])
def test_they_are_those_of_regularize(breaks: bool, penalties: Any) -> None:
    """Outputs, penalties and gradients, in train and eval mode; also for another number of examples, and by keyword."""
    model, twin, attached = Net(breaks), Net(), penalties == "attach"
    backend = graphreg.backend(*REGULARIZERS, inner="eager", rng=1, penalties=penalties, scale=1 if attached else None)
    run, module = torch.compile(model, backend=backend), graphreg.regularize(twin, REGULARIZERS, rng=1)
    for mode, rows in ((True, 3), (False, 3), (True, 2), (True, 3)):
        expected = module.train(mode)(X[:rows], MASK[:rows])
        model.train(mode)
        found = run(X[:rows], attention_mask=MASK[:rows])
        torch.testing.assert_close(found, expected.output)
        torch.testing.assert_close(backend.penalties(), dict(expected.penalties))
        loss = found.sum() + (0 if attached else sum(backend.penalties().values()))
        torch.testing.assert_close(gradients(model, loss), gradients(twin, expected.output.sum() + sum(expected.penalties.values())))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own, behind a break
@pytest.mark.parametrize("option", ["mask", "lengths"])
@pytest.mark.parametrize(
    ("model", "site"), [(Net(reads=False), "tanh"), (Net(breaks=True), "head")], ids=["no graph reads it", "a graph after a break"]
)
def test_a_graph_that_does_not_have_it(model: nn.Module, site: str, option: str) -> None:
    kind: Any = MaskedL1 if option == "mask" else RecurrentState
    run = torch.compile(model, backend=graphreg.backend(kind(site, 0.5, **{option: "attention_mask"}), inner="eager"))
    sentence = (
        rf"{kind.__name__}: {option}='attention_mask': 'attention_mask' is an argument of the model, but the graph in which the "
        r"regularizer acts does not get it\. torch\.compile gives a graph only those .* Use graphreg\.regularize or graphreg\.regularize_"
    )
    with pytest.raises(NoMatchError, match=sentence):
        run(X, MASK)


def test_a_misspelt_name() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(MaskedL1("tanh", 0.5, mask="attention_mas"), inner="eager"))
    with pytest.raises(NoMatchError, match=r"mask='attention_mas': no input of the model has that name\. Near names: attention_mask\. Inp"):
        run(X, MASK)


def test_a_penalty_on_parameters_is_refused() -> None:
    class Rows(Penalty, on="parameters"):
        rows: ModelInput = None

        def __call__(self, w: Tensor, rows: Tensor) -> Tensor:
            return w[rows].square().mean()

    with pytest.raises(RegularizerError, match=r"rows: rows='labels' is not possible in a backend, which computes penalties on parameters"):
        graphreg.backend(Rows("*", 0.1, rows="labels"))
    graphreg.backend(Rows("*", 0.1), inner="eager")


def test_a_splice_on_a_parameter() -> None:
    class RowNoise(Splice, on="parameters"):
        rows: ModelInput = None

        def __call__(self, w: Tensor, weight: Tensor, noise: Noise, rows: Tensor) -> Tensor:
            return w + (noise.normal(w) * weight * torch.zeros(len(w), 1).index_fill(0, rows, 1.0)).to(w.dtype)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            return self.head(x) + rows.sum()

    model, rows = Reads(), torch.tensor([2, 2, 0])
    splice = RowNoise("head.weight", 0.5, rows="rows")
    expected = graphreg.regularize(model, splice, rng=1)(X, rows).output
    torch.testing.assert_close(torch.compile(model, backend=graphreg.backend(splice, inner="eager", rng=1))(X, rows), expected)
