"""torch.export and torch.onnx take a stripped module, and a rewritten one in eval mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn

import graphreg


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 36, 8), nn.Tanh(), nn.Linear(8, 2)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (small, (2, 3, 8, 8)),
    "resnet18": (lambda: tv.resnet18(num_classes=4), (2, 3, 64, 64)),
}


def made(name: str) -> tuple[nn.Module, graphreg.Regularized, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name][0](), torch.randn(MODELS[name][1])
    module = graphreg.regularize(model, hidden_dropout=0.1, hidden_l1=0.1, weight_l2=0.1, own_dropout="keep").eval()
    return model, module(x), module, x


@pytest.mark.parametrize("name", MODELS)
def test_export_of_a_stripped_module(name: str) -> None:
    model, _, module, x = made(name)
    stripped = graphreg.strip(module).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(stripped, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x), model(x))
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), model(more))
    assert program.state_dict.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_export_of_a_rewritten_module_in_eval_mode(name: str) -> None:
    _, expected, module, x = made(name)
    output, penalties = torch.export.export(module, (x,)).module()(x)
    assert torch.equal(output, expected.output)
    torch.testing.assert_close(penalties, expected.penalties)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # torch's own exporter
@pytest.mark.parametrize("stripped", [True, False])
def test_onnx(stripped: bool) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, expected, module, x = made("small")
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
