"""torch.export and torch.onnx take a stripped module, and a rewritten one in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphreg


class Residual(nn.Module):
    """What a ResNet has: convolutions with batch norms, a sum, a ReLU that writes in place; and a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(3 * 64, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.conv(x)) + x))  # type: ignore[no-any-return]


def made() -> tuple[nn.Module, graphreg.Regularized, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    module = graphreg.regularize(model, hidden_dropout=0.1, hidden_l1=0.1, weight_l2=0.1, own_dropout="keep").eval()
    return model, module(x), module, x


def test_export_of_a_stripped_module_and_of_a_rewritten_one_in_eval_mode() -> None:
    model, expected, module, x = made()
    stripped = graphreg.strip(module).eval()
    program = torch.export.export(stripped, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(x), model(x))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), model(more))
    assert program.state_dict.keys() == model.state_dict().keys()
    output, penalties = torch.export.export(module, (x,)).module()(x)
    assert torch.equal(output, expected.output)
    torch.testing.assert_close(penalties, expected.penalties)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch's own exporter
@pytest.mark.parametrize("stripped", [True, False])
def test_onnx(stripped: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, expected, module, x = made()
    given = graphreg.strip(module).eval() if stripped else module
    program = torch.onnx.export(given, (x,), dynamo=True, verbose=False)
    assert program is not None
    proto = program.model_proto
    onnx.checker.check_model(proto)
    results = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    wanted = [expected.output, *([] if stripped else expected.penalties.values())]
    assert len(results) == len(wanted)
    for result, value in zip(results, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(result), value.detach())
