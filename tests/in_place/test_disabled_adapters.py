"""While adapters of PEFT are disabled, regularizers whose sites are adapters add nothing, and all others act as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from perceptron import perceptron
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, RegularizerError

peft = pytest.importorskip("peft")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))


def with_adapters() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["hid"], r=2, init_lora_weights=False, lora_dropout=0.1)
    return peft.get_peft_model(perceptron(), config)


def adapted(**options: Any) -> tuple[Any, Any]:
    """A perceptron with adapters, and the model inside, which is regularized in place."""
    model = with_adapters()
    return model, graphreg.regularize_(model.base_model.model, scale=1.0, **options)


def on_all(site: Any) -> bool:
    return "lora_A" in site.name


REGULARIZERS: dict[str, dict[str, Any]] = {
    "penalty on weights": {"weight_l2": {"weight": 5.0, "pattern": "**lora_*"}},
    "frozen weights as well": {"weight_l2": 5.0},
    "a state": {"l2_sp": {"weight": 5.0, "pattern": "**lora_*"}, "spectral": {"weight": 5.0, "pattern": "**lora_*"}},
    "penalty on values": {"hidden_l2": {"weight": 5.0, "pattern": "**lora_A.default"}},
    "splice": {"dropout": {"**lora_A.default": 0.5}},
    "splice on weights": {"weight_noise": {"weight": 0.5, "pattern": "**lora_B*"}},
    "a function, and a number of sites": {"noise": {"weight": 0.5, "pattern": on_all, "expect": 1}},
    "native dropout": {"own_dropout": {"**lora_dropout*": 0.5}},
}


@pytest.mark.parametrize("first", [True, False], ids=["disabled first", "enabled first"])
@pytest.mark.parametrize("options", REGULARIZERS.values(), ids=REGULARIZERS)
def test_they_add_nothing(options: dict[str, Any], first: bool) -> None:
    """The pass without adapters is that of a model that is not regularized; the pass with them is as if there had been none without."""
    (model, inner), (alone, _) = (adapted(rng=0, **options) for _ in range(2))
    plain = with_adapters()
    for each in () if first else (model, alone):
        torch.manual_seed(1)
        each(X)
    before = {name: (p.requires_grad, vars(p)) for name, p in model.named_parameters()}
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        frozen = [p.requires_grad for p in model.parameters()]
        for _ in range(2):
            assert torch.equal(model(X), plain(X))
        assert sum(inner.penalties().values()) == 0 and frozen == [p.requires_grad for p in model.parameters()]
        idle = "" if "own_dropout" in options else f", so {', '.join(graphreg.strengths(inner))} add"
        assert f"adapters are disabled{idle}" in str(graphreg.report(inner, cost=False))
    assert before == {name: (p.requires_grad, vars(p)) for name, p in model.named_parameters()}
    found = []
    for each in (model, alone):
        torch.manual_seed(1)
        output = each(X)
        (output.sum() * 1.0).backward()
        found.append([output, {name: p.grad for name, p in each.named_parameters()}])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert "adapters are disabled" not in str(graphreg.report(inner, cost=False))
    assert [len(graphs) for graphs in vars(inner)["graphreg_in_place"]._made.values()] == [2]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.head(torch.relu(self.body(x)))
        return {"loss": y.square().mean(), "logits": y}


def test_a_head_that_trains_with_the_adapters() -> None:
    """With them, PEFT's copy of it is replaced by the frozen original. A regularizer that acts at other sites, too, acts there."""
    model = peft.get_peft_model(Classifier(), peft.LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    inner = graphreg.regularize_(model.base_model.model, weight_l2={"weight": 5.0, "pattern": ["head.*", "**lora_*"]}, rng=0,
                                 dropout={"weight": 0.5, "pattern": ["**modules_to_save.default", "relu"]})  # fmt: skip
    with torch.no_grad(), model.disable_adapter():
        losses = [model(X)["loss"] for _ in range(2)]
        assert inner.penalties() == {"weight_l2": 0} and losses[0] != losses[1]
    model(X)["loss"].backward()
    assert inner.penalties()["weight_l2"] > 0
    assert [len(entry.sites) for entry in graphreg.report(inner, cost=False).regularizers] == [2, 4]


def test_a_penalty_that_trains_adapters_alone() -> None:
    """Its site is elsewhere, and stays; while they are disabled, nothing trains. Without adapters at all, that is an error."""
    options = {"z_loss": {"weight": 5.0, "pattern": "out"}}
    model, inner = adapted(**options)
    with model.disable_adapter():
        output = model(X)
        assert inner.penalties()["z_loss"].item() == pytest.approx(5 * output.logsumexp(1).square().mean().item())
    (model(X).sum() * 0).backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    frozen = graphreg.regularize_(perceptron().requires_grad_(False), **options)
    with pytest.raises(RegularizerError, match="z_loss: no parameter that can train reaches its sites"):
        frozen(X)


def test_what_acts_elsewhere_acts() -> None:
    model, inner = adapted(weight_l2={"weight": 5.0, "pattern": "**lora_*"}, hidden_dropout=0.5, rng=0)
    with model.disable_adapter():
        assert (model(X) != model(X)).any()
        assert [(entry.name, len(entry.sites)) for entry in graphreg.report(inner, cost=False).regularizers] == [
            ("hidden_dropout", 1), ("weight_l2", 0),
        ]  # fmt: skip


def test_strengths_that_were_set_before_the_first_call() -> None:
    """Sites of adapters get theirs, although the first graph has no such sites."""
    model, inner = adapted(dropout={"weight": 0.1, "pattern": "**lora_*.default"})
    graphreg.set_strength(inner, "dropout", {"**lora_A*": 0.75})
    with model.disable_adapter():
        model(X)
    model(X)
    assert set(graphreg.site_strengths(inner)["dropout"].values()) == {0.75, 0.1}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": {"weight": 0.5, "pattern": ["**lora_A.default", "dead*"]}}, NoMatchError, "'dead*' matches no value"),
        ({"weight_l2": {"weight": 5.0, "pattern": "hid.base_layer*"}}, RegularizerError, "selects only parameters that are frozen"),
        ({"hidden_l2": {"weight": 5.0, "pattern": "**lora_A.default", "expect": 3}}, NoMatchError, "expect=3, found 1"),
    ],
)
def test_dead_selectors_are_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """With adapters and without them."""
    model, _ = adapted(**options)
    for _ in range(2):
        with model.disable_adapter(), pytest.raises(error) as raised:
            model(X)
        assert message in str(raised.value)
        with pytest.raises(error):
            model(X)


def test_a_selector_whose_adapters_are_merged_is_an_error() -> None:
    other, _ = adapted(dropout={"**lora_A.default": 0.5})
    other(X)
    other.merge_adapter()
    with pytest.raises(NoMatchError, match="adapters are merged"):
        other(X)


def test_all_parameters_are_frozen_for_a_while() -> None:
    """A discriminator while the generator trains, also for arguments of another structure; then it trains as one that never was frozen."""

    class Discriminator(Classifier):
        def forward(self, x: Tensor, factor: Tensor | None = None) -> Any:
            return super().forward(x if factor is None else x * factor)["logits"]

    torch.manual_seed(0)
    model = graphreg.regularize_(Discriminator(), weight_l2=5.0, hidden_l1=1.0, scale=1)
    other = copy.deepcopy(model)
    model(X).sum().backward()
    model.zero_grad()
    before = model.penalties()
    model.requires_grad_(False)
    given = X.clone().requires_grad_()
    model(given, given).sum().backward()
    assert given.grad is not None and model.penalties()["weight_l2"] == 0
    assert "all parameters are frozen, so weight_l2 adds nothing" in str(graphreg.report(model, cost=False))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(teacher(X), graphreg.strip_(copy.deepcopy(model))(X))
    model.requires_grad_(True)
    for each in (model, other):
        each(X, X).sum().backward()
    assert model.penalties()["weight_l2"] == before["weight_l2"] > 0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_from_the_first_call_on_is_an_error() -> None:
    model = graphreg.regularize_(Classifier().requires_grad_(False), weight_l2=5.0)
    with pytest.raises(
        RegularizerError, match=r"selects only parameters that are frozen .* such as a teacher.*strip_\(copy\)"
    ):
        model(X)
