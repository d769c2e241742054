"""``keep=``: the values that a selector names come out of the call, as hooks that clone would see them, by value and by gradient."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torchvision
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchvision.models import feature_extraction

import graphreg
from graphreg import GraphRegError, NoMatchError, RegularizerError
from graphreg.cli import main as cli
from graphreg.passes import BernoulliDropout, GaussianNoise, HiddenL1
from saved_tensors import saved_bytes

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A norm that differs by mode, and writes in place: into what a module returns, and into a part of a value, by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.relu, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.fc(x))) * 2
        left, right = h[:, :4], h[:, 4:]
        right += left
        return self.out(torch.cat((right, torch.exp(h)), 1).tanh())  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def by_hand(model: Net, x: Tensor) -> dict[str, Tensor]:
    """The values at the moment when they are produced, by the names that they have."""
    fc = model.fc(x)
    norm = model.norm(fc)
    relu = norm.relu()
    mul = relu * 2
    add = mul[:, 4:] + mul[:, :4]
    exp = torch.cat((mul[:, :4], add), 1).exp()
    cat = torch.cat((add, exp), 1)
    values = {"x": x, "fc": fc, "norm": norm, "relu": relu, "mul": mul, "getitem_1": mul[:, 4:], "add": add, "exp": exp, "cat": cat}
    return {**values, "tanh": cat.tanh(), "out": model.out(cat.tanh())}


NAMES = ("x", "fc", "norm", "relu", "mul", "getitem_1", "add", "exp", "cat", "tanh", "out")


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tuple(model.parameters())))


@hypothesis.settings(phases=(hypothesis.Phase.generate,), max_examples=10)
@hypothesis.given(names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_values_and_gradients_are_those_of_the_moment(names: set[str]) -> None:
    model, twin, x = net().double(), net().double(), X.double()
    values, expected = graphreg.regularize(model, keep=sorted(names))(x).values, by_hand(twin, x)
    assert values.keys() == names
    for name in names:
        assert torch.equal(values[name], expected[name]), name
    if names != {"x"}:
        losses = [sum(of[name].square().sum() * len(name) for name in names) for of in (values, expected)]
        parameters = [tuple(each.parameters()) for each in (model, twin)]
        found, wanted = (torch.autograd.grad(loss, of, allow_unused=True) for loss, of in zip(losses, parameters, strict=True))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("front_end", "is_compiled"), [("symbolic", False), ("export", True)])
def test_both_modes_and_front_ends_in_one_graph(front_end: Any, is_compiled: bool) -> None:
    model, kept = net(), ("norm", "relu", "tanh")
    module = graphreg.regularize(model, keep=kept, hidden_l1={"weight": 0.1, "pattern": "tanh"}, example_inputs=X, front_end=front_end)
    counter = CompileCounterWithBackend("aot_eager")
    run: Any = torch.compile(module, backend=counter, fullgraph=True) if is_compiled else module
    for mode in (True, False):
        twin = copy.deepcopy(model)
        module.train(mode), twin.train(mode)  # type: ignore[func-returns-value]
        result = run(X)
        expected = by_hand(twin, X)
        assert type(result) is graphreg.Kept and result.penalties.keys() == {"hidden_l1"} and tuple(result.values) == kept
        torch.testing.assert_close((result.output, *result.values.values()), (expected["out"], *(expected[name] for name in kept)))
        ours, theirs = (out.sum() + sum(of[name].square().sum() for name in kept) for out, of in (
            (result.output, result.values), (expected["out"], expected)
        ))  # fmt: skip
        torch.testing.assert_close(gradients(ours, module), gradients(theirs, twin))
    assert counter.frame_count == (2 if is_compiled else 0)


class Ones(nn.Module):
    """Its values are 1 and -1 but for what regularizers do."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.abs(x) + 0
        return -h.neg_()


def test_behind_the_splices_or_before_them() -> None:
    """Dropout at 0.5 makes 0 and 2 of 1, which the model then overwrites with -0 and -2; the next splice adds to that."""
    x, forms = torch.ones(64), ("spliced", "clean")
    splices = [BernoulliDropout("add", 0.5), GaussianNoise("add", 0.0)]
    spliced, clean = (graphreg.regularize(Ones(), splices, keep={"add": form}, rng=0)(x) for form in forms)
    assert spliced.values["add"].unique().tolist() == [0, 2] and torch.equal(spliced.output, spliced.values["add"])
    assert torch.equal(clean.values["add"], x) and torch.equal(clean.output, spliced.output)
    # the last selector counts; in eval mode both are the model's
    module = graphreg.regularize(Ones(), splices, keep={"*d": "spliced", "add": "clean", ("n*", "abs"): "spliced"}, rng=0)
    assert torch.equal(module(x).values["add"], x) and tuple(module(x).values) == ("abs", "add", "neg_", "neg")
    assert all(torch.equal(value.abs(), x) for value in module.eval()(x).values.values())


class Recurrent(nn.Module):
    """A cell of torch's, one of the user's, and a ReLU that reads its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.own, self.relu = nn.LSTMCell(3, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[1], 4)
        own = torch.ones_like(h)
        for step in range(3):
            h, c = self.cell(x[step], (h, c))
            own = self.relu(self.own(own + h))
        return own


def test_the_calls_of_a_cell_are_one_sequence() -> None:
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(3, 2, 3)
    h, c, own, steps = torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4), list[tuple[Tensor, ...]]()
    for step in range(3):
        h, c = model.cell(x[step], (h, c))
        own = model.own(own + h)
        steps.append((h, c, own, own := own.relu()))
    cell, states, made, _ = map(torch.stack, zip(*steps, strict=True))

    def second(site: graphreg.Site) -> bool:
        return "own_1" in site.names

    keep = {("cell", "cell:c", "own", "relu"): "spliced", second: "clean"}
    module = graphreg.regularize(model, keep=keep, example_inputs=x)
    values = module(x).values
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "cell": (3, 2, 4), "cell:c": (3, 2, 4), "own": (3, 2, 4), "own_1": (2, 4), "relu": (2, 4)
    }  # fmt: skip
    expected = {"cell": cell, "cell:c": states, "own": made, "own_1": steps[1][2], "relu": steps[0][3]}
    torch.testing.assert_close(dict(values), expected)
    assert "own (3 calls)" in str(graphreg.report(module)) and "keeps the calls of own as one sequence" in graphreg.diff(module).text()
    # a call that is excluded is left out, and noise at each call is in the sequence
    some = graphreg.regularize(model, BernoulliDropout(("own", "own_?"), 0.5), keep=("own", "!own_1"), rng=0)(x).values["own"]
    assert some.shape == (2, 2, 4) and (some == 0).any(dim=(1, 2)).all()


class Shrinking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))  # type: ignore[no-any-return]


def shrinking(**options: Any) -> object:
    return graphreg.regularize(Shrinking(), example_inputs=torch.ones(1, 1, 9), **options)


class Modes(nn.Module):
    """Its part returns another value in eval mode, and one value there is in train mode alone."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x).exp() if self.training else torch.tanh(x)

    def __init__(self) -> None:
        super().__init__()
        self.part = Modes.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * 2  # type: ignore[no-any-return]


def test_two_graphs() -> None:
    module = graphreg.regularize(Modes(), keep=("part", "part.tanh"))
    train, evaluated = module(X).values, module.eval()(X).values
    assert torch.equal(train["part"], X.tanh().exp()) and torch.equal(train["part.tanh"], X.tanh())
    assert torch.equal(evaluated["part"], X.tanh())
    only = graphreg.regularize(Modes(), keep="part.exp")
    assert tuple(only(X).values) == ("part.exp",) and only.eval()(X).values == {}


def test_as_torchvision_extracts_features_but_in_both_modes() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=4), torch.randn(2, 3, 32, 32)
    nodes = ["relu", "layer1.0.relu", "layer2", "layer3.0", "flatten"]
    twin, module = feature_extraction.create_feature_extractor(copy.deepcopy(model), nodes), graphreg.regularize(model, keep=nodes)
    for mode in (True, False):
        theirs, ours = twin.train(mode)(x), module.train(mode)(x).values
        assert list(ours) == nodes
        for name in nodes:
            assert torch.equal(ours[name], theirs[name]), name


class Blocks(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.inner = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(torch.tanh(self.fc(x)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Blocks.Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("blocks", ["layers.*", ("layers.*", "layers.0.inner")])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_values_that_leave_blocks(blocks: Any, is_checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, keep = Blocks(), ("layers.*", "**.tanh", "layers.0.inner.0")
    flat, module = (graphreg.regularize(model, keep=keep, dropout={"**.tanh": 0.2}, rng=0, blocks=b) for b in (None, blocks))
    if is_checkpointed:
        module.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in module.layers)
    ours, theirs = module(X), flat(X)
    assert list(ours.values) == list(theirs.values) == ["layers.0.tanh", "layers.0.inner.0", "layers.0", "layers.1.tanh", "layers.1"]
    found, wanted = (list(result.values.values()) for result in (ours, theirs))
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, *(gradients(sum(v.square().sum() for v in each), model) for each in (found, wanted))))


def test_autograd_saves_no_more() -> None:
    """What is kept is alive, and nothing else: not even for backward."""
    model = net()
    plain, module = graphreg.regularize(model), graphreg.regularize(model, keep=("fc", "norm", "tanh"))
    (_, before), (result, after) = saved_bytes(lambda: plain(X)), saved_bytes(lambda: module(X))
    # norm is written into by the ReLU: of that, a copy is kept, which backward does not need
    assert before == after and len(result.values) == 3
    compiled = [torch.compile(each, backend="aot_eager", fullgraph=True) for each in (plain, module)]
    assert len({saved_bytes(lambda run=run: run(X))[1] for run in compiled}) == 1


def test_the_model_stays_the_model() -> None:
    model = net()
    keys, state = list(model.state_dict()), torch.get_rng_state()
    options: dict[str, Any] = {"dropout": {"tanh": 0.5}, "keep": {"tanh": "clean", "fc": "spliced"}, "rng": 0}
    module = graphreg.regularize(model, verify=True, example_inputs=X, **options)
    assert torch.equal(state, torch.get_rng_state()) and list(module.state_dict()) == keys and module.fc is model.fc
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        with graphreg.frozen_noise(module), graphreg.frozen_noise(twin):
            assert torch.equal(twin(X).values["tanh"], module(X).values["tanh"])
    stripped = graphreg.strip(module).eval()
    assert torch.equal(stripped(X), model.eval()(X)) and "keep" not in graphreg.recipe(graphreg.regularize(stripped))
    assert graphreg.sample(module, X, n=2).mean.shape == (4, 3)  # of the output
    program = torch.export.export(module, (X,))
    assert torch.equal(program.module()(X).values["fc"], model.fc(X))


def test_a_recipe_has_it(tmp_path: Path) -> None:
    for keep in ("tanh", ["tanh", "fc"], {"tanh": "clean", "fc": "spliced"}, {("tanh", "fc"): "clean"}):
        module = graphreg.regularize(net(), dropout={"tanh": 0.5}, keep=keep, rng=0)
        graphreg.save_recipe(module, tmp_path / "r.json")
        again = graphreg.regularize(net(), recipe=tmp_path / "r.json")
        assert graphreg.recipe(again) == graphreg.recipe(module) == json.loads((tmp_path / "r.json").read_text())
        assert torch.equal(again(X).values["tanh"], module(X).values["tanh"])
    assert graphreg.plan(graphreg.trace(net()), recipe=tmp_path / "r.json").keep == {("tanh", "fc"): "clean"}
    with pytest.raises(RegularizerError, match=r"keep is <function .*>, which a recipe cannot hold"):
        graphreg.recipe(graphreg.regularize(net(), keep=lambda site: site.name == "fc"))
    for other in (graphreg.regularize_, graphreg.regularize_stage):
        more = {"whole": net(), "microbatches": 1} if other is graphreg.regularize_stage else {}
        with pytest.raises(RegularizerError, match=r"at keep: only graphreg\.regularize has this option"):
            other(net(), recipe=tmp_path / "r.json", **more)  # type: ignore[operator]


def test_plan_report_diff_and_drawing_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traced = graphreg.trace(net(), X)
    plan = graphreg.plan(traced, [HiddenL1("tanh", 0.1)], keep={"norm": "clean", "t*": "spliced"})
    tables = """
2 values kept
kept  site  op           shape  dtype    form     matched by
norm  norm  BatchNorm1d  4x8    float32  clean    norm
tanh  tanh  tanh         4x12   float32  spliced  t*
"""
    assert tables.strip() in str(plan) and plan.to_dict()["kept"][0]["form"] == "clean"
    report = graphreg.report(plan)
    assert tables.split("kept\n", 1)[1].strip() in str(report) and "2 values kept" in str(report)
    assert report.to_dict()["kept"][1]["name"] == "tanh"
    diff = graphreg.diff(plan).text()
    assert "norm_kept = torch.clone(norm)" in diff and "# copy for keep= at norm: the model writes into it" in diff
    assert "# returns hidden_l1; keeps norm, tanh" in diff
    graph = graphreg.to_networkx(plan)
    assert {key: of["kept"] for key, of in graph.nodes(data=True) if "kept" in of} == {"norm": "norm", "tanh": "tanh"}
    assert graphreg.draw(plan, tmp_path / "d.svg").read_text().count(">kept<") == 2
    module = graphreg.rewrite(traced, plan)
    with graphreg.monitor(module, "tanh") as watched:
        module(X)
    assert watched.values()["penalty/hidden_l1"] > 0
    given = ["--kwargs", '{"in_features": 2, "out_features": 3}', "--input", "1x2"]
    assert cli.main(["plan", "torch.nn:Linear", *given, "--keep", "linear"]) == 0
    assert "1 value kept" in capsys.readouterr().out


def test_as_a_pass() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 2), nn.Tanh()))
    result = graphreg.as_pass(keep="0")(graph)
    assert result is not None and result.modified and result.graph_module(X).values.keys() == {"0"}


def called() -> object:
    compiled = torch.compile(nn.Linear(6, 2), backend=graphreg.backend(weight_l2=0.1, inner="eager"))
    compiled(X)
    return compiled


IN_PLACE = "keep= is no option of graphreg.regularize_: in eval mode, the model's own forward runs, which returns no values."


@pytest.mark.parametrize(
    ("run", "kind", "sentence"),
    [
        (lambda: graphreg.regularize(net(), keep="tahn"), NoMatchError, "'tahn' matches no value of Net. Near names: tanh"),
        (lambda: graphreg.regularize(net(), keep=("tanh", "fc.*")), NoMatchError, "'fc.*' matches no value of Net."),
        (lambda: graphreg.regularize(net(), keep="fc.weight"), NoMatchError, "It names parameters (fc.weight), and keep= acts on a value."),
        (lambda: graphreg.regularize(net(), keep=lambda site: False), NoMatchError, "the selector <<lambda>> of keep= chooses no value"),
        (lambda: graphreg.regularize(net(), keep=5), RegularizerError, "keep=5 is not allowed; give a selector ('layer4.*', several"),  # type: ignore[arg-type]
        (lambda: graphreg.regularize(net(), keep={}), RegularizerError, "keep={} is not allowed"),
        (lambda: graphreg.regularize(net(), keep={"fc": "cleen"}), RegularizerError, "selectors to 'spliced' or 'clean', which is the"),  # type: ignore[dict-item]
        (lambda: graphreg.regularize(net(), keep="fc", penalties="attach"), RegularizerError, "keep= and penalties='attach' do not go"),
        (lambda: graphreg.as_pass(keep="fc", penalties="attach"), RegularizerError, "keep= and penalties='attach' do not go"),
        (lambda: shrinking(keep="conv"), RegularizerError, "they give different shapes: (1, 1, 7), (1, 1, 5). Select the calls one by one"),
        (lambda: graphreg.regularize_(net(), keep="fc"), RegularizerError, IN_PLACE),
        (lambda: graphreg.backend(keep="fc"), RegularizerError, "keep= is no option of graphreg.backend: a compiled call returns"),
        (lambda: graphreg.plan(called(), keep="fc"), RegularizerError, "keep= is for what graphreg.regularize makes"),
        (lambda: graphreg.regularize_stage(net(), whole=net(), microbatches=1, keep="fc"), RegularizerError, "a schedule passes on what"),
    ],
)  # fmt: skip
def test_errors(run: Callable[[], object], kind: type[GraphRegError], sentence: str) -> None:
    with pytest.raises(kind) as raised:
        run()
    assert sentence in str(raised.value)


def test_what_matches_nothing_may_be_left_out() -> None:
    module = graphreg.regularize(net(), keep=("tahn", "fc"), missing="ignore")
    assert module(X).values.keys() == {"fc"} and "matches nothing: 'tahn' of keep" in str(graphreg.report(module))
    with pytest.raises(AttributeError, match=r"this is \(output, penalties, values\), which has no 'shape'"):
        module(X).shape  # noqa: B018


def test_each_name_that_is_asked_for_is_there() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    for keep in (["1", "1.1"], {"1": "clean", "1.1": "spliced"}):
        assert list(graphreg.regularize(net, keep=keep, hidden_dropout=0.5, rng=0)(torch.ones(3, 4)).values) == ["1", "1.1"]
    none = graphreg.regularize(net, keep="nothing", missing="ignore", hidden_dropout=0.5, rng=0)(torch.ones(3, 4))
    assert isinstance(none, graphreg.Kept) and none.values == {}
