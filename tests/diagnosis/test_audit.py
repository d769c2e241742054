"""``graphreg.audit``: each remark where it belongs and nowhere else."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import graphreg
from graphreg import RegularizerError


class Of(nn.Module):
    """Calls ``forward_of(self, x)``; has two Linear layers, norms and dropouts."""

    def __init__(self, forward_of: Any) -> None:
        super().__init__()
        self.a, self.b, self.d, self.e = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.2)
        self.bn, self.ln, self.forward_of = nn.BatchNorm1d(4), nn.LayerNorm(4), forward_of

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.forward_of(self, x)
        return y


def remarks(forward_of: Any) -> dict[str, tuple[str, ...]]:
    audit = graphreg.audit(Of(forward_of))
    assert audit.ok == bool(audit) == (not {remark.kind for remark in audit.remarks} - {"rate 0"})
    return {remark.kind: remark.sites for remark in audit.remarks}


CASES: list[tuple[Any, dict[str, tuple[str, ...]]]] = [
    (lambda m, x: m.b(m.d(F.relu(m.a(x)))), {}),
    (lambda m, x: F.dropout(m.a(x)), {"acts in eval mode": ("dropout",)}),
    (lambda m, x: F.dropout(m.a(x), 0.0), {"rate 0": ("dropout",)}),
    (lambda m, x: F.dropout(m.a(x), 0.5, m.training), {}),
    (lambda m, x: F.dropout(m.a(x), 0.5, False), {"never acts": ("dropout",)}),
    (lambda m, x: F.dropout(m.a(x), 0.0, False), {"rate 0": ("dropout",)}),
    (lambda m, x: F.dropout(m.a(x), 1.0, m.training), {"drops everything": ("dropout",)}),
    # a batch norm behind the dropout: at once, behind one layer, behind a view and a ReLU; not behind a function between two layers,
    # or another norm
    (lambda m, x: m.bn(m.d(x)), {"before batch norm": ("d",)}),
    (lambda m, x: m.bn(F.relu(m.a(m.d(x))).view(-1, 4)), {"before batch norm": ("d",)}),
    (lambda m, x: F.batch_norm(m.d(x), m.bn.running_mean, m.bn.running_var), {"before batch norm": ("d",)}),
    (lambda m, x: x + m.bn(m.a(x)) + m.d(x), {}),
    (lambda m, x: m.bn(m.a(m.b(m.d(x)))), {"before batch norm": ("d",)}),
    (lambda m, x: m.bn(m.a(F.relu(m.b(m.d(x))))), {}),
    # another reader takes the value elsewhere
    (lambda m, x: m.bn(m.a(y := m.d(x))) + y, {}),
    (lambda m, x: m.e((h := m.d(m.a(x)) + x) + m.b(h)), {}),
    (lambda m, x: (h := m.d(x + m.a(x))) + m.b(h), {}),
    (lambda m, x: (k := m.e((h := m.d(x)) + m.a(h))) + m.b(k), {"on the trunk": ("d", "e")}),
    (lambda m, x: m.bn(m.a(m.ln(m.d(x)))), {}),
    (lambda m, x: m.d(m.bn(x)), {}),
    (lambda m, x: m.ln(m.d(x)), {}),
    # two dropouts on one value
    (lambda m, x: m.e(m.d(x).view(-1, 4) * 2), {"stacked": ("d", "e")}),
    (lambda m, x: m.e(m.ln(m.d(x))), {"stacked": ("d", "e")}),
    (lambda m, x: m.e(m.a(m.d(x))), {}),
    (lambda m, x: m.e(F.relu(m.a(m.d(x)))), {}),
    (lambda m, x: m.d(x) + m.e(x), {}),
    (lambda m, x: m.e(F.dropout(m.d(x), 0.0, m.training)), {"stacked": ("d", "e"), "rate 0": ("dropout",)}),
]


@pytest.mark.parametrize(("forward_of", "expected"), CASES)
def test_each_remark_is_where_it_belongs(forward_of: Any, expected: dict[str, tuple[str, ...]]) -> None:
    assert remarks(forward_of) == expected


def test_what_is_kept_of_a_stack() -> None:
    stacked = next(iter(graphreg.audit(Of(lambda m, x: m.e(m.d(x)))).remarks))
    assert stacked.observed == "rates 0.5, 0.2, one after another on one value"
    assert (stacked.matters, stacked.advice) == (
        "the value is dropped several times: 0.4 of it is kept",
        "keep only one of them; with rate 0.6 it keeps the same share",
    )


def test_the_first_batch_norm_is_named() -> None:
    audit = graphreg.audit(Of(lambda m, x: m.bn(m.a(m.d(x)))))
    assert audit.remarks[0].observed == "d feeds bn"


def test_weight_decay_of_biases_and_norms() -> None:
    model = Of(lambda m, x: m.b(m.ln(m.bn(m.a(x)))))
    groups = [{"params": model.a.parameters(), "weight_decay": 0.1}, {"params": [*model.bn.parameters(), *model.ln.parameters()]},
              {"params": model.b.parameters(), "weight_decay": 0.0}]  # fmt: skip
    audit = graphreg.audit(model, optimizer=torch.optim.SGD(groups, 0.1, weight_decay=0.01))
    assert [(remark.kind, remark.sites) for remark in audit.remarks] == [
        ("weight decay", ("a.bias",)),
        ("weight decay", ("bn.weight", "bn.bias", "ln.weight", "ln.bias")),
    ]
    assert [remark.observed for remark in audit.remarks] == [
        "weight_decay=0.1 on 1 parameter",
        "weight_decay=0.01 on 4 parameters",
    ]
    assert graphreg.audit(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)).ok


def test_known_models() -> None:
    assert graphreg.audit(torchvision.models.vgg11(num_classes=3)).ok
    dense = torchvision.models.densenet121(num_classes=3, drop_rate=0.1)
    with torch.device("meta"):
        wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert graphreg.audit(wide).remarks[0].sites == ("3",)
    found = graphreg.audit(dense).remarks[0]
    assert found.kind == "before batch norm" and len(found.sites) == 58  # each dense layer drops what later layers normalize


def test_the_model_stays_as_it_was() -> None:
    model = Of(lambda m, x: m.bn(m.d(x))).eval()
    model.d.train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    graphreg.audit(model, torch.randn(3, 4))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_by_torch_export_and_of_a_trace() -> None:
    model = Of(lambda m, x: m.bn(m.a(m.d(x))))
    by_export = graphreg.audit(model, torch.randn(3, 4), front_end="export")
    assert by_export.remarks == graphreg.audit(graphreg.trace(model)).remarks


def test_its_forms() -> None:
    audit = graphreg.audit(Of(lambda m, x: F.dropout(m.a(x))))
    data = json.loads(json.dumps(audit.to_dict()))
    assert (data["title"], data["ok"], data["dropouts"]) == ("Of", False, 1)
    assert data["remarks"][0]["kind"] == "acts in eval mode" and data["remarks"][0]["sites"] == ["dropout"]
    assert str(graphreg.audit(nn.Linear(2, 2))) == "Linear: 0 dropouts of its own; nothing to remark"


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ("sgd", "optimizer='sgd' is not allowed; give an instance of torch.optim.Optimizer."),
        (
            torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1),
            "optimizer=SGD(...) has none of the parameters of Linear. Give the model's own optimizer.",
        ),
    ],
)
def test_what_is_no_optimizer_of_the_model(optimizer: Any, sentence: str) -> None:
    with pytest.raises(RegularizerError) as error:
        graphreg.audit(nn.Linear(2, 2), optimizer=optimizer)
    assert str(error.value) == sentence


class Untracked(Of):
    """Batch norms without a running variance, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: F.batch_norm(m.bn(m.d(x)), None, None, training=True))
        self.bn = nn.BatchNorm1d(4, track_running_stats=False)


def test_what_eval_mode_does_not_see_is_no_fault() -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        y: Tensor = F.dropout(module.a(x), 0.3) if module.training else module.a(x)
        return y

    assert graphreg.audit(Of(forward)).ok  # the node is in the graph of train mode alone
    def whole(module: Any, x: Tensor) -> Tensor:
        y: Tensor = F.dropout(module.a(x), 1.0) if module.training else module.a(x)
        return y

    (remark,) = graphreg.audit(Of(whole)).remarks
    assert remark.kind == "drops everything"
    assert graphreg.audit(Untracked()).ok  # there is no variance of train mode that eval mode would use
    assert graphreg.audit(Of(lambda m, x: m.bn(F.alpha_dropout(x, 0.3, m.training)))).ok  # which keeps the variance
    frozen = Of(lambda m, x: m.b(m.a(x))).requires_grad_(False)
    assert graphreg.audit(frozen, optimizer=torch.optim.SGD(frozen.parameters(), 0.1, weight_decay=0.1)).ok  # nothing is decayed
