"""Strengths by site: read, set by selector, without recompilation, and kept by copies and in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphreg
from graphreg import RegularizerError, schedules
from graphreg.passes import BernoulliDropout, HiddenL1, WeightL1


def model(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) for _ in range(depth)))


def means(net: Any, x: torch.Tensor) -> list[torch.Tensor]:
    values = []
    for block in net:
        x = block(x)
        values.append(x.abs().mean())
    return values


def test_each_measurement_is_multiplied_before_the_mean() -> None:
    net, x = model(), torch.randn(5, 4)
    module = graphreg.regularize(net, HiddenL1("*.1", 0.5), WeightL1("*", 0.1))
    first = module(x).penalties
    graphreg.set_strength(module, "hidden_l1", {"0.1": 0.3, "[2]*": 0.0})
    assert graphreg.site_strengths(module)["hidden_l1"] == {"0.1": 0.3, "1.1": 0.5, "2.1": 0.0}
    assert graphreg.strengths(module) == {"hidden_l1": 0.5, "weight_l1": 0.1}
    one, two, _ = means(net, x)
    torch.testing.assert_close(module(x).penalties["hidden_l1"], (0.3 * one + 0.5 * two) / 3)
    assert torch.equal(module(x).penalties["weight_l1"], first["weight_l1"])
    graphreg.set_strength(module, "weight_l1", {"1.0.weight": 1.0, "**": 0.0, "0.*": 0.2})
    torch.testing.assert_close(module(x).penalties["weight_l1"], 0.2 * net[0][0].weight.abs().mean() / 3)
    graphreg.set_strength(module, "hidden_l1", 0.5)
    graphreg.set_strength(module, "weight_l1", 0.1)
    assert all(torch.equal(module(x).penalties[name], first[name]) for name in first)  # shares of 1 change no bit


def test_a_sum_likewise_and_from_0() -> None:
    net, x = model(2), torch.randn(5, 4)
    module = graphreg.regularize(net, WeightL1("*", 0.0, reduction="sum"))
    graphreg.set_strength(module, "weight_l1", {"1.0.weight": 2.0})
    torch.testing.assert_close(module(x).penalties["weight_l1"], 2 * net[1][0].weight.abs().sum())
    assert graphreg.site_strengths(module) == {"weight_l1": {"0.0.weight": 0.0, "1.0.weight": 2.0}}
    graphreg.set_strength(module, "weight_l1", {"*": 0.0})
    assert float(module(x).penalties["weight_l1"].detach()) == 0.0


def test_a_splice_has_its_rate_at_each_site() -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.ones(100, 100)
    with pytest.warns(UserWarning, match="2 times in a row"):
        module = graphreg.regularize(net, BernoulliDropout(["0", "1"], 0.5), rng=0)
    graphreg.set_strength(module, "dropout", {"0": 0.0})
    y = module(x).output
    assert float((y != 0).float().mean()) == pytest.approx(0.5, abs=0.03) and set(y.unique().tolist()) == {0.0, 2.0}
    graphreg.set_strength(module, "dropout", {"1": 0.0})
    assert torch.equal(module(x).output, x)


def test_masks_at_other_sites_stay() -> None:
    masks = []
    for other in (0.5, 0.9):
        net = nn.Sequential(nn.Identity(), nn.Linear(50, 50), nn.Identity())
        module = graphreg.regularize(net, BernoulliDropout(["0", "2"], 0.5), rng=0)
        graphreg.set_strength(module, "dropout", {"2": other})
        rules = module.graphreg_rules
        masks.append(rules.get_submodule("_0_dropout")(torch.ones(5, 50), rules.get_submodule("key")()))
    assert torch.equal(*masks) and set(masks[0].unique().tolist()) == {0.0, 2.0}


def test_nothing_is_recompiled() -> None:
    torch._dynamo.reset()
    net, x = model(), torch.randn(5, 4)
    module = graphreg.regularize(net, HiddenL1("*.1", 0.5), BernoulliDropout("*.0", 0.0), rng=0)
    graphs = []

    def counted(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    step = torch.compile(module, backend=counted, fullgraph=True)
    plain = step(x).penalties["hidden_l1"]
    graphreg.set_strength(module, "hidden_l1", {"0.1": 0.3, "2.1": 0.0})
    one, two, _ = means(net, x)
    torch.testing.assert_close(step(x).penalties["hidden_l1"], (0.3 * one + 0.5 * two) / 3)
    graphreg.set_strength(module, "dropout", {"2.0": 0.5})
    assert not torch.equal(step(x).output, net(x))
    graphreg.set_strength(module, "hidden_l1", 0.5)
    graphreg.set_strength(module, "dropout", 0.0)
    assert torch.equal(step(x).penalties["hidden_l1"], plain) and len(graphs) == 1


def test_copies_keep_them() -> None:
    module = graphreg.regularize(model(), HiddenL1("*.1", 0.5))
    graphreg.set_strength(module, "hidden_l1", {"0.1": 0.3})
    expected = graphreg.site_strengths(module)
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert graphreg.site_strengths(each) == expected
    averaged = torch.optim.swa_utils.AveragedModel(module.float(), use_buffers=True)
    graphreg.set_strength(module, "hidden_l1", {"1.1": 0.1})
    averaged.update_parameters(module)
    assert graphreg.site_strengths(averaged.module) == graphreg.site_strengths(module)


def test_the_graph_of_a_mode_that_has_fewer_sites() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.b(self.a(x).tanh()).sigmoid() if self.training else self.a(x).tanh()
            return self.c(h * 2).relu()

    net, x = Modes(), torch.randn(3, 2)
    module = graphreg.regularize(net, HiddenL1(["tanh", "sigmoid", "relu"], 0.5))
    graphreg.set_strength(module, "hidden_l1", {"tanh": 0.1, "relu": 0.7})
    h = net.a(x).tanh()
    torch.testing.assert_close(module.eval()(x).penalties["hidden_l1"], (0.1 * h.abs().mean() + 0.7 * net.eval()(x).abs().mean()) / 2)
    deep = net.b(h).sigmoid()
    expected = (0.1 * h.abs().mean() + 0.5 * deep.abs().mean() + 0.7 * net.c(deep * 2).relu().abs().mean()) / 3
    torch.testing.assert_close(module.train()(x).penalties["hidden_l1"], expected)


def test_in_place_all_graphs_have_them() -> None:
    net = graphreg.regularize_(model(), HiddenL1("*.1", 0.5), scale=1.0, rng=0)
    graphreg.set_strength(net, "hidden_l1", {"0.1": 0.8})  # a number ends it
    graphreg.set_strength(net, "hidden_l1", 0.4)
    net(torch.randn(5, 4))
    graphreg.set_strength(net, "hidden_l1", {"0.1": 0.3})
    expected = {"hidden_l1": {"0.1": 0.3, "1.1": 0.4, "2.1": 0.4}}
    net(torch.randn(5, 2, 4))  # another structure
    assert graphreg.site_strengths(net) == expected and graphreg.strengths(net) == {"hidden_l1": 0.4}
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        twin(torch.randn(5, 4))
        assert graphreg.site_strengths(twin) == expected


WAITS: dict[str, Callable[[Any], Any]] = {
    "the model itself": lambda net: net,
    "a copy": copy.deepcopy,
    "a pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "its recipe, in place": lambda net: graphreg.regularize_(model(), recipe=graphreg.recipe(net)),
    "a copy of a copy": lambda net: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(net)))),
}


def untraced(weight: Any = 0.5, **options: Any) -> Any:
    net = model()
    return graphreg.regularize_(net, HiddenL1("*.1", weight), **{"penalties": "return", "rng": 0, **options})


def test_in_place_they_wait_for_the_first_trace() -> None:
    """The last selector that matches counts, as it does afterwards; a recipe has them."""
    net = untraced()
    graphreg.set_strength(net, "hidden_l1", {"0.1": 0.9})
    graphreg.set_strength(net, "hidden_l1", {"**": 0.1, "2.*": 0.7, "1.1": 0.2})
    graphreg.set_strength(net, "hidden_l1", {"[12].1": 0.3})
    graphreg.set_strength(net, "hidden_l1", {"1.1": 0.4})
    twins = [made(net) for made in WAITS.values()]
    recipe, x = graphreg.recipe(net), torch.randn(5, 4)
    rewritten = graphreg.regularize(model(), recipe=recipe)
    expected = {"hidden_l1": {"0.1": 0.1, "1.1": 0.4, "2.1": 0.3}}
    for twin in twins:
        assert graphreg.recipe(twin) == recipe
        penalties = twin(x).penalties
        assert graphreg.site_strengths(twin) == expected == graphreg.site_strengths(rewritten)
        assert torch.equal(penalties["hidden_l1"], rewritten(x).penalties["hidden_l1"])
        twin(torch.randn(5, 2, 4))
        assert graphreg.site_strengths(twin) == expected
        again = graphreg.regularize_(model(), recipe=graphreg.recipe(twin))
        assert graphreg.recipe(again) == graphreg.recipe(twin)
        again(x)
        assert graphreg.site_strengths(again) == expected


def test_in_place_a_copy_of_a_called_model_takes_them() -> None:
    net = untraced(schedules.linear(0.0, 1.0, 4))
    net(torch.randn(5, 4))
    graphreg.set_strength(net, "hidden_l1", {"0.1": 0.3})
    twin = copy.deepcopy(net)
    graphreg.set_strength(twin, "hidden_l1", {"1.*": schedules.linear(1.0, 0.0, 4)})
    twin(torch.randn(5, 4))
    assert graphreg.site_strengths(twin) == {"hidden_l1": {"0.1": 0.3, "1.1": 0.5, "2.1": 0.5}}
    assert graphreg.site_strengths(net) == {"hidden_l1": {"0.1": 0.3, "1.1": 0.25, "2.1": 0.25}}


def test_in_place_an_unknown_site_is_an_error_at_the_first_trace() -> None:
    net = untraced()
    graphreg.set_strength(net, "hidden_l1", {"1.1": 0.3, "7.1": 0.3})
    says = r"^set_strength, before the model was traced: '7\.1' matches no site of hidden_l1\..* Its sites: 0\.1, 1\.1, 2\.1\."
    for twin in [made(net) for made in WAITS.values()]:
        for _ in range(2):
            with pytest.raises(graphreg.NoMatchError, match=says):
                twin(torch.randn(5, 4))
        graphreg.set_strength(twin, "hidden_l1", 0.4)  # a number ends it, also after a trace that failed
        twin(torch.randn(5, 4))
        assert graphreg.site_strengths(twin)["hidden_l1"] == {"0.1": 0.4, "1.1": 0.4, "2.1": 0.4}


def test_in_place_what_is_wrong_without_sites_is_wrong_at_once() -> None:
    net = untraced(missing="warn")
    with pytest.raises(RegularizerError, match="weight"):
        graphreg.set_strength(net, "hidden_l1", {"0.1": -1.0})
    with pytest.raises(graphreg.NoMatchError, match="no regularizer is named 'hidden'"):
        graphreg.set_strength(net, "hidden", {"0.1": 1.0})
    graphreg.set_strength(net, "hidden_l1", {"7.1": 0.3})
    with pytest.warns(UserWarning, match=r"set_strength: '7\.1' matches no site of hidden_l1"):
        net(torch.randn(5, 4))
    at_once = graphreg.regularize_(model(), graphreg.build("contractive", weight=0.1, pattern="*.1"), scale=1, rng=0)
    with pytest.raises(RegularizerError, match="contractive takes all its sites at once"):
        graphreg.set_strength(at_once, "contractive", {"0.1": 1.0})


def test_a_trace_that_fails_forgets_no_selector() -> None:
    net = untraced()
    graphreg.set_strength(net, "hidden_l1", {"2.*": 0.3})
    hook = net[1].register_forward_hook(lambda *args: None)
    with pytest.raises(graphreg.GraphRegError, match="has a hook"):
        net(torch.randn(5, 4))
    hook.remove()
    net.append(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    net[2] = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net(torch.randn(5, 4))
    assert graphreg.site_strengths(net)["hidden_l1"]["2.1"] == 0.3


def test_errors() -> None:
    module = graphreg.regularize(model(), HiddenL1("*.1", 0.5), graphreg.build("contractive", weight=0.1, pattern="*.1"), rng=0)
    before = graphreg.site_strengths(module)
    for name, value, error, message in (
        ("hidden_l1", {"0.2": 0.1}, graphreg.NoMatchError, r"'0\.2' matches no site of hidden_l1\. .*Its sites: 0\.1, 1\.1, 2\.1"),
        ("hidden_l1", {"0.1": 0.3, "1.1": -1}, graphreg.RegularizerError, r"HiddenL1: weight=-1\.0 is not allowed; weight must be 0"),
        ("contractive", {"0.1": 0.1}, graphreg.RegularizerError, r"contractive takes all its sites at once \(Contractive\), so they"),
        ("other", {"0.1": 0.1}, graphreg.NoMatchError, r"no regularizer is named 'other'"),
    ):
        with pytest.raises(error, match=message):
            graphreg.set_strength(module, name, value)  # type: ignore[arg-type]
    assert graphreg.site_strengths(module) == before and "contractive" not in before


@pytest.mark.parametrize("key", [1, ("0", "2"), None, lambda site: True])
def test_a_selector_that_is_no_text_is_refused(key: Any) -> None:
    module = graphreg.regularize(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), hidden_dropout=0.1)
    for target in (module, graphreg.backend(hidden_dropout=0.1)):
        with pytest.raises(graphreg.RegularizerError, match="hidden_dropout: .* is no selector; give a dict from texts to strengths"):
            graphreg.set_strength(target, "hidden_dropout", {key: 0.3})
        assert graphreg.strengths(target) == {"hidden_dropout": 0.1}
