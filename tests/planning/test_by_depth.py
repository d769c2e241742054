"""``by_depth``: the strength of each block, in plans, reports and the values themselves; as timm's schedule."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.passes import BernoulliDropout, DropConnect, DropPath, HiddenL2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.again = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.again(x)


class Blocks(nn.Module):
    """Five blocks of two branches, in two stages, of which the one that was made last runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(*(Block() for _ in range(2)))
        self.early = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)))


PATHS = ["early.0", "early.1", "early.2", "late.0", "late.1"]
RATES = [0.0, 0.05, 0.1, 0.15, 0.2]


def weights(plan: graphreg.Plan) -> dict[str, float]:
    return {edit.site.name: edit.weight for edit in plan.edits}


def test_a_stage_that_begins_with_a_smaller_size_is_no_block() -> None:
    """timm's StarNet has such stages; its own rates count the blocks alone."""
    stages = [nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), Block(), Block()) for _ in range(2)]
    plan = graphreg.plan(graphreg.trace(nn.Sequential(nn.Sequential(*stages), nn.Linear(4, 2))), DropPath("*", graphreg.by_depth(0, 0.3)))
    rates = {path: weight for path, weight in weights(plan).items() if path.endswith("again")}
    assert rates == pytest.approx({"0.0.1.again": 0.0, "0.0.2.again": 0.1, "0.1.1.again": 0.2, "0.1.2.again": 0.3})


def test_each_block_has_its_strength_in_the_order_in_which_it_runs() -> None:
    plan = graphreg.plan(graphreg.trace(Blocks()), DropPath("*", graphreg.by_depth(0, 0.2)))
    expected = {f"{path}.{name}": rate for path, rate in zip(PATHS, RATES, strict=True) for name in ("mlp.2", "again")}
    assert weights(plan) == pytest.approx(expected) and list(weights(plan).values())[-1] == 0.2
    assert re.search(r"early\.1\.again +Linear +DropPath drop_path +0\.05 +\*\n", str(plan))
    assert "drop_path: weight by_depth(0, 0.2)" in str(plan)
    assert plan.to_dict()["regularizers"]["drop_path"]["weight"] == "by_depth(0, 0.2)"
    assert [edit["weight"] for edit in plan.to_dict()["edits"]] == list(weights(plan).values())


def test_parameters_follow_the_order_of_the_forward_too() -> None:
    plan = graphreg.plan(graphreg.trace(Blocks()), graphreg.build("weight_l2", weight=graphreg.by_depth(1, 5), pattern="*.again.weight"))
    assert weights(plan) == {f"{path}.again.weight": i for i, path in enumerate(PATHS, 1)}


def test_a_site_outside_of_blocks_is_a_block_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    plan = graphreg.plan(graphreg.trace(model), BernoulliDropout("*", graphreg.by_depth(0.5, 0.1)))
    assert weights(plan) == pytest.approx({"1": 0.5, "3": 0.3, "5": 0.1})


def test_a_parameter_outside_of_blocks_stands_where_it_is_read_first() -> None:
    """Such parameters came after all blocks, in the order in which they were registered: a stem had the strength of the end."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.stem = nn.Linear(4, 4), nn.Linear(4, 4)
            self.blocks = nn.Sequential(*(Block() for _ in range(2)))
            self.scale = nn.Parameter(torch.ones(1, 4))
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.stem.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.head(self.blocks(self.stem(x) * self.scale)))

    pattern = ["*.again.weight", "stem.weight", "head.weight", "scale"]
    plan = graphreg.plan(graphreg.trace(Between()), graphreg.build("weight_l2", weight=graphreg.by_depth(0, 4), pattern=pattern))
    expected = {"stem.weight": 0.0, "scale": 1.0, "blocks.0.again.weight": 2.0, "blocks.1.again.weight": 3.0, "head.weight": 4.0}
    assert weights(plan) == expected


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_rates_are_timms(kind: str) -> None:
    import timm  # noqa: PLC0415  (it takes seconds)

    models: dict[str, Any] = {
        "vit": lambda: timm.models.VisionTransformer(32, 16, depth=4, embed_dim=16, num_heads=2, drop_path_rate=0.2),
        "resnet": lambda: timm.models.ResNet(timm.models.resnet.BasicBlock, (2, 2, 2, 2), channels=(8, 8, 8, 8), drop_path_rate=0.2),
    }
    model = models[kind]()
    plan = graphreg.plan(graphreg.trace(model), DropPath("*", graphreg.by_depth(0, 0.2)))
    paths = {path: m.drop_prob for path, m in model.named_modules() if type(m).__name__ == "DropPath"}
    ours = {name: weight for name, weight in weights(plan).items() if weight}
    assert ours == pytest.approx(paths, rel=1e-6) and len(paths) == {"vit": 6, "resnet": 7}[kind]


def test_the_values_are_dropped_at_these_rates() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Identity(), nn.Identity()) for _ in range(3)))
    with pytest.warns(UserWarning, match="0.28 of it is kept, not 0.4"):
        module = graphreg.regularize(model, BernoulliDropout("*.1", graphreg.by_depth(0, 0.6)), rng=0)
    x = torch.ones(200, 200)
    y = module(x).output
    assert float((y != 0).float().mean()) == pytest.approx(0.28, abs=0.01)
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7 / 0.4))
    assert graphreg.strengths(module) == {"dropout": 0.6}
    assert graphreg.site_strengths(module) == {"dropout": {"0.1": 0.0, "1.1": 0.3, "2.1": 0.6}}


def test_a_penalty_weighs_each_measurement() -> None:
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(3))), torch.randn(4, 3)
    module = graphreg.regularize(model, HiddenL2("*.1", graphreg.by_depth(0.2, 0.6)))
    plain, values = x, []
    for block in model:
        plain = block(plain)
        values.append(plain.square().mean())
    expected = (0.2 * values[0] + 0.4 * values[1] + 0.6 * values[2]) / 3
    penalty = module(x).penalties["hidden_l2"]
    torch.testing.assert_close(penalty, expected)
    ours, theirs = (torch.autograd.grad(each, list(model.parameters())) for each in (penalty, expected))
    torch.testing.assert_close(ours, theirs)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert all(torch.equal(each(x).penalties["hidden_l2"], penalty) for each in copies)


def test_compiled_it_is_eager() -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
        module = graphreg.regularize(model, drop_path=graphreg.by_depth(0.2, 0.5), hidden_l2=graphreg.by_depth(0.1, 0.2), rng=1)
        x = torch.randn(6, 4, requires_grad=True)
        output, penalties = (torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module)(x)
        (output.sum() + penalties["hidden_l2"]).backward()
        results.append((output, penalties, x.grad))
    torch.testing.assert_close(results[0], results[1])


def test_in_report_and_diff() -> None:
    module = graphreg.regularize(Blocks(), drop_path=graphreg.by_depth(0, 0.2), rng=0)
    report = graphreg.report(module)
    assert [act.strength for site in report.sites for act in site.acts] == pytest.approx([rate for rate in RATES for _ in range(2)])
    assert report.regularizers[0].strength == 0.2 and "strength 0 to 0.2 by site" in report.regularizers[0].notes
    assert "drop_path 0.15" in str(report) and "# drop_path: DropPath 0 to 0.2 on '*'" in str(graphreg.diff(module))


def test_in_place() -> None:
    model = graphreg.regularize_(Blocks(), drop_path=graphreg.by_depth(0, 0.2), example_inputs=torch.randn(2, 4), rng=0)
    at = graphreg.site_strengths(model)["drop_path"]
    assert at["early.2.again"] == pytest.approx(0.1) and at["late.1.mlp.2"] == 0.2


def test_repeats_are_judged_by_the_strengths_of_their_sites() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"\(1, 2, .*: 0\.648 of it is kept, not 0\.8"):
        graphreg.regularize(model, BernoulliDropout("[12]", graphreg.by_depth(0.1, 0.2)))


def test_as_a_value() -> None:
    ramp = graphreg.by_depth(0, 0.2)
    assert repr(ramp) == "by_depth(0, 0.2)" and float(ramp) == 0.2 and f"{ramp:g}" == "0.2"
    assert ramp == graphreg.by_depth(0.0, 0.2) and ramp != 0.2 and ramp != graphreg.by_depth(0.1, 0.2)
    assert pickle.loads(pickle.dumps(ramp)) == copy.deepcopy(ramp) == ramp and DropPath("*", ramp) != DropPath("*", 0.2)
    assert graphreg.from_kwargs(Blocks(), drop_path={"early.*": ramp, "late.**#branch": 0.1})[0].weight == ramp


def test_errors() -> None:
    for ends in ((None, 0.1), (0, "0.1"), (float("nan"), 0.1), (True, 0.1)):
        with pytest.raises(graphreg.RegularizerError, match=r"by_depth: (first|last)=.* is not allowed; give two numbers: by_depth\(0, 0"):
            graphreg.by_depth(*ends)  # type: ignore[arg-type]
    with pytest.raises(graphreg.RegularizerError, match=r"DropPath: weight=by_depth\(0, 1\) is not allowed; weight must be in \[0, 1\)"):
        DropPath("*", graphreg.by_depth(0, 1))
    with pytest.raises(graphreg.RegularizerError, match=r"DropPath: weight=-0\.1 is not allowed; weight must be in \[0, 1\)"):
        DropPath("*", graphreg.by_depth(-0.1, 0.2))
    with pytest.raises(graphreg.RegularizerError, match=r"Contractive: weight=by_depth\(0, 1\) is not allowed, because the formula"):
        graphreg.build("contractive", weight=graphreg.by_depth(0, 1))
    with pytest.raises(graphreg.RegularizerError, match=r"needs sites in two .* all sites that 'early.0\.\*' selects are in 'early.0'"):
        graphreg.regularize(Blocks(), DropPath("early.0.*", graphreg.by_depth(0, 0.1)))
    with pytest.raises(graphreg.RegularizerError, match=r"drop_path: weight=by_depth\(0, 0\.1\) is not allowed in a backend"):
        graphreg.backend(drop_path=graphreg.by_depth(0, 0.1))
    module = graphreg.regularize(Blocks(), drop_path=0.1)
    with pytest.raises(graphreg.RegularizerError, match=r"takes a number or a dict .* scale the strengths in graphreg\.site_strengths"):
        graphreg.set_strength(module, "drop_path", graphreg.by_depth(0, 0.1))


class Reread(Blocks):
    """Reads a block's weight a second time, outside of the block."""

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.early[0]
        return self.head(F.linear(self.late(self.early(x)), first.again.weight))


def test_the_note_has_the_depth_beside_reads_that_are_not_replaced() -> None:
    plan = graphreg.plan(graphreg.trace(Reread()), DropConnect("early.*.again.weight", graphreg.by_depth(0, 0.2)))
    assert "early.0.again.weight is not replaced when read by Reread; weight by_depth(0, 0.2)" in str(plan)


class Convolution(nn.Module):
    """Two of its parts are alike, as in the convolution modules of speechbrain's conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(8, 16), nn.GLU())
        self.after = nn.Sequential(nn.SiLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.after(self.before(x))


class Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(8, 8), Convolution(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        x = x + self.first(x)
        x = x + self.conv(x)
        return x + self.last(x)


def test_parts_of_a_layer_that_are_alike_are_no_blocks() -> None:
    module = graphreg.regularize(nn.Sequential(*(Conformer() for _ in range(3))), drop_path=graphreg.by_depth(0, 0.2))
    rates = graphreg.site_strengths(module)["drop_path"]
    assert [round(rate, 6) for rate in rates.values()] == [0, 0, 0, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
