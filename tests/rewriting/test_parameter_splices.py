"""Splices on parameters: what reads the result, in every kind of layer; the parameter itself stays as it is."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import GraphRegError, Noise, NoMatchError, Regularizer, RegularizerError, Splice, TraceError
from graphreg.passes import BernoulliDropout, WeightL2, WeightNoise
from lowering_check import check
from pages import run_page


class Scaled(Splice, on="parameters"):
    """w (1 + s): it draws nothing, so an oracle is the model with scaled weights."""

    min_dims = 1

    def __call__(self, w: Tensor, weight: Tensor) -> Tensor:
        return w * (1 + weight).to(w.dtype)


class Tied(nn.Module):
    """The head's weight is the table; the root reads the table, too."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.mid(self.emb(ids))
        return self.head(h) + F.linear(h, self.emb.weight)  # type: ignore[no-any-return]


class Own(nn.Module):
    """A module with code of its own that reads its parameter, called twice, and a root that reads another module's."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fc = Own.Scale(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale(self.scale(x)), self.fc.weight)  # type: ignore[no-any-return]


class Attends(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # type: ignore[no-any-return]


IDS = torch.tensor([[1, 2, 0], [3, 4, 1]])
X = torch.linspace(-1, 1, 24).view(3, 2, 4)


def small() -> Tied:
    torch.manual_seed(0)
    return Tied()


def text(code: str) -> str:
    """The statements of a forward, without the releases of values."""
    return "\n".join(line.split(";")[0].strip() for line in code.strip().splitlines()[1:])


def acting(model: nn.Module, *regularizers: Regularizer, **options: Any) -> Any:
    return graphreg.regularize(model, *regularizers, rng=0, **options)


# The text


def test_a_layer_is_called_with_other_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module = acting(model, WeightNoise("*", 0.1), WeightL2("*", 0.1))
    assert (
        text(module.code)
        == """input_1 = input
key = self.graphreg_rules.key()
_0_weight = getattr(self, "0").weight
_0_weight_weight_noise = self.graphreg_rules._0_weight_weight_noise(_0_weight, key)
_0_layer = getattr(self, "0")
_0 = graphreg_ir_layer_calls_call_with(input_1, graphreg_layer = _0_layer, graphreg_parameters = {'weight': _0_weight_weight_noise})
_1 = getattr(self, "1")(_0)
_0_weight_1 = getattr(self, "0").weight
weight_l2 = self.graphreg_rules.weight_l2(_0_weight_1)
return graphreg_Regularized(_1, {'weight_l2': weight_l2})"""
    )
    assert graphreg.strip(module).code == graphreg.strip(acting(model, WeightL2("*", 0.1))).code


def test_reads_in_the_models_code_are_replaced() -> None:
    """Both calls of ``scale`` read the one result."""
    module = acting(Own(), Scaled("scale.w", 0.5))
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
scale_w = self.scale.w
scale_w_scaled = self.graphreg_rules.scale_w_scaled(scale_w, key)
matmul = x @ scale_w_scaled
matmul_1 = matmul @ scale_w_scaled
fc_weight = self.fc.weight
linear = torch._C._nn.linear(matmul_1, fc_weight)
return graphreg_Regularized(linear, {})"""
    )
    assert "scaled" not in graphreg.strip(module).code


def test_a_layer_and_the_models_code_read_one_parameter() -> None:
    module = acting(small(), Scaled("**emb.weight", 0.5))
    assert (
        text(module.code)
        == """key = self.graphreg_rules.key()
emb_weight_1 = self.emb.weight
emb_weight_scaled = self.graphreg_rules.emb_weight_scaled(emb_weight_1, key)
emb_layer = self.emb
emb = graphreg_ir_layer_calls_call_with(ids, graphreg_layer = emb_layer, graphreg_parameters = {'weight': emb_weight_scaled})
mid = self.mid(emb)
head_layer = self.head
head = graphreg_ir_layer_calls_call_with(mid, graphreg_layer = head_layer, graphreg_parameters = {'weight': emb_weight_scaled})
emb_weight = self.emb.weight
emb_weight_replaced = graphreg_ir_layer_calls_instead_of(emb_weight, emb_weight_scaled)
linear = torch._C._nn.linear(mid, emb_weight_replaced)
add = head + linear
return graphreg_Regularized(add, {})"""
    )
    assert graphreg.strip(module).code == graphreg.strip(acting(small(), WeightL2("*", 0.1))).code


def test_a_diff_says_what_reads_it() -> None:
    lines = str(graphreg.diff(acting(small(), Scaled("emb.weight", 0.5)))).splitlines()
    said = [line.partition("  # ")[2] for line in lines if "  # " in line]
    assert said == [
        "draws of scaled",
        "scaled at emb.weight",
        "scaled at emb.weight",
        "the layer emb, to be called with what replaces its parameters",
        "reads scaled at emb.weight",
        "returns no penalty",
    ]


# Values and gradients, in every layer


def layers() -> Iterator[Any]:
    made: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
        "linear": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), X),
        "conv": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2)), X),
        "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(2)), X),
        "embedding": (lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)), IDS),
        "bag": (lambda: nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2)), IDS),
        "bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), X),
        "tied": (Tied, IDS),
        "own code": (Own, X.reshape(12, 2)),
        "lstm": (lambda: Recurrent(nn.LSTM(4, 3, num_layers=2, bidirectional=True)), X),
        "gru": (lambda: Recurrent(nn.GRU(4, 3)), X),
        "attention": (Attends, X),
        "encoder layer": (lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0)), X),
        "parametrized": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), X),
    }
    for name, (make, inputs) in made.items():
        yield pytest.param(make, inputs, id=name)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)  # type: ignore[no-any-return]


def scaled_by_hand(model: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output with all parameters times 1.5, and the gradients of the parameters: 1.5 times those of the scaled ones."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    output = twin(inputs)
    output.square().sum().backward()
    return output, [None if p.grad is None else p.grad * 1.5 for p in twin.parameters()]


NOT_EXPORTED = ("linear", "embedding", "gru")  # the tied table has an embedding and a linear layer, and the LSTM is as the GRU


@pytest.mark.parametrize(
    "make, inputs, front_end",
    [
        pytest.param(*each.values, front_end, id=f"{each.id}-{front_end}")
        for each in layers() for front_end in ("symbolic", "export") if front_end == "symbolic" or each.id not in NOT_EXPORTED
    ],
)  # fmt: skip
def test_it_is_the_model_with_other_parameters(make: Callable[[], nn.Module], inputs: Tensor, front_end: Any) -> None:
    torch.manual_seed(1)
    model = make()
    expected, gradients = scaled_by_hand(model, inputs)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    values = [p.detach().clone() for p in parameters]
    module = acting(model, Scaled("**", 0.5), example_inputs=inputs, front_end=front_end)
    output = module(inputs).output
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.square().sum().backward()
    torch.testing.assert_close([p.grad for p in parameters], gradients, rtol=1e-5, atol=1e-5)
    assert list(module.state_dict()) == list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
    plain, _ = copy.deepcopy(model).eval()(inputs), module.eval()
    assert torch.equal(module(inputs).output, plain)


@pytest.mark.parametrize("make, inputs", [each for each in layers() if each.id in ("conv", "tied", "own code", "lstm", "parametrized")])
def test_compiled_is_eager(make: Callable[[], nn.Module], inputs: Tensor) -> None:
    torch._dynamo.reset()
    model = make()
    module, results = acting(model, WeightNoise("**", 0.1), example_inputs=inputs, front_end="symbolic"), []
    start = graphreg.rng_state(module)
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        graphreg.set_rng_state(module, start)
        model.zero_grad()
        outputs = [run(inputs).output for _ in range(2)]
        torch.stack(outputs).square().sum().backward()
        results.append([*outputs, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(results[0][0], results[0][1])


# Which reads


@pytest.mark.parametrize(
    "selector, replaced",
    [
        ("emb.weight", "emb"), ("head.weight", "head"), ("**@Linear", "head"), (["emb.weight", "head.weight"], "emb head"),
        ("**emb.weight", "emb head root"), ("*", "emb head root"), (lambda site: site.name == "emb.weight", "emb head root"),
    ],
)  # fmt: skip
def test_a_tied_parameter_is_replaced_where_its_named_module_reads_it(selector: Any, replaced: str) -> None:
    model = small()
    w, two = model.emb.weight, {name: 1.5 if name in replaced else 1.0 for name in ("emb", "head", "root")}
    mid = 1.5 if selector in ("*", "**@Linear") else 1.0
    h = F.linear(F.embedding(IDS, w * two["emb"]), model.mid.weight * mid, model.mid.bias)
    expected = F.linear(h, w * two["head"]) + F.linear(h, w * two["root"])
    module = acting(model, Many(selector, 0.5))
    torch.testing.assert_close(module(IDS).output, expected)
    note = str(graphreg.report(module, cost=False))
    assert ("is not replaced when read by" in note) == (replaced != "emb head root")


class Many(Scaled, on="parameters"):
    min_dims = 2


def test_several_splices_at_one_parameter() -> None:
    """The second one acts at the head alone, on what the first one gives."""
    model = small()
    w = model.emb.weight
    h = model.mid(F.embedding(IDS, w * 1.5))
    expected = F.linear(h, w * 1.5 * 2) + F.linear(h, w * 1.5)
    module = acting(model, Scaled("**emb.weight", 0.5), Scaled("head.weight", 1.0))
    torch.testing.assert_close(module(IDS).output, expected)
    with pytest.raises(RegularizerError, match=r"scaled_1 acts where emb reads emb\.weight, and scaled, which comes before it, does not"):
        acting(model, Scaled("head.weight", 1.0), Scaled("**emb.weight", 0.5))


def test_one_draw_serves_all_reads_of_a_call() -> None:
    """The module reads w twice and multiplies: with one draw of w' the result is x w' w'."""
    model = Own()
    module, seen = acting(model, WeightNoise("scale.w", 1.0)), list[Tensor]()
    module.graphreg_rules.scale_w_weight_noise.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.eye(2)
    for _ in range(2):
        output = module(x).output
        torch.testing.assert_close(output, F.linear(x @ seen[-1] @ seen[-1], model.fc.weight))
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_penalties_measure_the_parameter_itself() -> None:
    model = small()
    module = acting(model, Scaled("**", 0.5), WeightL2("mid.weight", 1.0))
    torch.testing.assert_close(module(IDS).penalties["weight_l2"], model.mid.weight.square().mean())


# The life of the module


def test_hooks_copies_pickles_and_verify() -> None:
    model, called = small(), list[nn.Module]()
    module = acting(model, WeightNoise("**", 0.1))
    handle = model.mid.register_forward_hook(lambda m, args, out: called.append(m))
    expected = module(IDS).output
    assert called == [model.mid]
    handle.remove()
    again = acting(model, WeightNoise("**", 0.1))
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(twin(IDS).output, expected)
        twin.mid.weight.grad = None
        twin(IDS).output.sum().backward()
        assert twin.mid.weight.grad is not None and model.mid.weight.grad is None
    graphreg.verify(small(), acting(small(), WeightNoise("**", 0.1)), IDS)


def test_a_recurrent_layer_holds_its_own_weights_again() -> None:
    model = Recurrent(nn.LSTM(4, 3))
    module = acting(model, WeightNoise("**", 0.1))
    module(X)
    copy.deepcopy(model)
    assert all(any(w is p for p in model.layer.parameters()) for w in model.layer._flat_weights)  # type: ignore[union-attr]
    assert torch.equal(module.eval()(X).output, model(X))


def test_frozen_parameters_and_one_that_is_lent() -> None:
    """What the user's ``functional_call`` lends is what the splice reads."""
    model = small()
    model.requires_grad_(False)
    module = acting(model, Scaled("mid.weight", 0.5))
    other = torch.zeros_like(model.mid.weight)
    expected = model.head(model.mid.bias) + F.linear(model.mid.bias, model.emb.weight)
    output = torch.func.functional_call(module, {"mid.weight": other}, (IDS,)).output
    torch.testing.assert_close(output, expected.expand_as(output))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 4)), lambda: Recurrent(nn.LSTM(4, 4))], ids=["linear", "lstm"])
def test_threads_read_their_own(make: Callable[[], nn.Module]) -> None:
    """Of two modules that share a layer; another thread reads the parameter itself."""
    model, differing = make(), list[str]()
    modules = [acting(model, Scaled("**", strength)) for strength in (0.5, 1.0)]
    pairs = [(module, module(X).output) for module in modules]
    name = next(iter(dict(model.named_parameters())))

    def run(module: nn.Module, expected: Tensor) -> None:
        differing.extend("output" for _ in range(50) if not torch.equal(module(X).output, expected))

    def read() -> None:
        differing.extend("parameter" for _ in range(200) if type(model.get_parameter(name)) is not nn.Parameter)

    threads = [threading.Thread(target=run, args=pair) for pair in pairs * 2] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differing == []
    assert all(type(inner._parameters) is dict for inner in model.modules())


def test_in_place() -> None:
    model, twin = small(), small()
    expected = acting(twin, WeightNoise("**", 0.1))(IDS).output
    keys = list(model.state_dict())
    graphreg.regularize_(model, WeightNoise("**", 0.1), rng=0)
    assert torch.equal(model(IDS), expected) and list(model.state_dict()) == keys
    assert torch.equal(model.eval()(IDS), twin.eval()(IDS))
    graphreg.strip_(model)
    assert type(model) is Tied


def test_in_a_drawing_and_a_report() -> None:
    module = acting(small(), WeightNoise("**", 0.1), WeightL2("mid.weight", 1.0), example_inputs=IDS)
    graph = graphreg.to_networkx(module)
    added = {name: data["added"] for name, data in graph.nodes(data=True) if data["kind"] == "addition"}
    assert sorted(added.values()) == ["key", "parameter", "parameter", "read", "replaced", "splice", "splice", "total"]
    assert list(graph.successors("$mid_weight_weight_noise")) == ["mid"] and graph.nodes["mid"]["target"] == "mid"
    report = graphreg.report(module)
    assert [(site.name, [act.does for act in site.acts]) for site in report.sites] == [
        ("emb.weight", ["replaces"]), ("mid.weight", ["replaces", "measures"]), ("mid.bias", ["replaces"])
    ][:2]  # fmt: skip
    assert report.regularizers[1].trains == ("mid.weight",) and report.cost is not None and "other" not in report.cost.operations


# Errors


class Decides(nn.Module):
    """It decides by the value of a tensor, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w
        self.w.mul_(2)
        return y


@pytest.mark.parametrize(
    "model, options, error, said",
    [
        (Own(), {"pattern": "fc.weight"}, RegularizerError, r"Many at fc\.weight: the module that has the parameter does not read it; the "
         r"model's own forward does\. '\*\*fc\.weight' acts at every read, whichever module it is in"),
        (Own(), {"pattern": "fc.bias"}, NoMatchError, r"matches no parameter of 2 dims or more of Own.*fc\.bias \(1 dim, 2 needed\)"),
        (nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), {}, RegularizerError, r"Many at 0\.weight: '0' has max_norm=1, so it writes"),
        (Attends(0.1), {"own_dropout": "seeded"}, RegularizerError, "many acts on attention.in_proj_weight in the call of 'attention', "
         "whose dropout own_dropout= replaces, but a call can be replaced only once"),
        (nn.Sequential(Decides()), {}, RegularizerError, r"Many at 0\.fc\.weight: '0' is an opaque module \(.*\), so it is not known when"),
        (Writes(), {}, TraceError, "many cannot replace the parameter w: the forward writes into it, and the write would be lost"),
    ],
)  # fmt: skip
def test_errors(model: nn.Module, options: dict[str, Any], error: type[GraphRegError], said: str) -> None:
    with pytest.raises(error, match=said):
        acting(model, Many(options.pop("pattern", "*"), 0.5), **options)


class Unread(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def test_a_parameter_that_nothing_reads_is_left_out_or_named() -> None:
    module = acting(Unread(), Many("*", 0.5))
    assert graphreg.report(module, cost=False).regularizers[0].sites == ("fc.weight",)
    with pytest.raises(NoMatchError, match=r"other\.weight \(no operation reads it\)"):
        acting(Unread(), Many("other.weight", 0.5))


def test_what_a_formula_may_ask_for() -> None:
    with pytest.raises(RegularizerError, match=r"Sequence\.__call__ asks for lengths; the engine supplies w, values, weight, noise, "):

        class Sequence(Splice, on="parameters"):
            lengths: str | None = None

            def __call__(self, w: Tensor, weight: Tensor, lengths: Any) -> Tensor:
                return w

    with pytest.raises(RegularizerError, match=r"share_axes=\('time',\) is not allowed on parameters"):
        Shared("*", 0.1)


class Shared(Splice, on="parameters"):
    share_axes: Any = ("time",)

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return w * noise.keep(w, weight)


# The check


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a call gets the parameter itself": (
        lambda n: setattr(n["mid"], "kwargs", {**n["mid"].kwargs, "graphreg_parameters": {"weight": n["mid_weight"]}}),
        "scaled does not act on the parameter mid.weight where mid reads it",
    ),
    "a call gets another's parameter": (
        lambda n: setattr(n["head"], "kwargs", {**n["head"].kwargs, "graphreg_parameters": {"weight": n["mid_weight_many"]}}),
        "scaled does not act on the parameter emb.weight where head reads it",
    ),
    "a call calls another layer": (
        lambda n: setattr(n["mid_layer"], "target", "head"), "mid does not call the layer that it calls in the model",
    ),
    "the model's code reads the parameter": (
        lambda n: n["emb_weight_replaced"].replace_all_uses_with(n["emb_weight"]),
        "scaled does not act on the parameter emb.weight where linear reads it",
    ),
    "a splice reads another parameter": (
        lambda n: setattr(n["mid_weight"], "target", "emb.weight"), "scaled does not read the parameter mid.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_check_finds(damage: str) -> None:
    traced = graphreg.trace(small())
    plan = graphreg.plan(traced, [Many("*", 0.5)])
    module: Any = graphreg.rewrite(traced, plan, rng=0)
    do, said = DAMAGES[damage]
    do({node.name: node for node in module.graph.nodes})
    module.recompile()
    with pytest.raises(GraphRegError, match=said.replace("scaled", "many")):
        check(module, traced, plan)


def test_values_and_parameters_together() -> None:
    """A splice on a value acts on what the layer gives with the replaced weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    module = acting(model, Scaled("0.weight", 1.0), BernoulliDropout("0", 0.5))
    kept = module(torch.ones(100, 4)).output
    both = torch.stack([torch.zeros(4), 2 * (8 + model[0].bias)])
    assert bool(torch.isclose(kept, both[:, None]).any(0).all()) and bool((kept == 0).any())


def test_the_page_runs() -> None:
    run_page("parameters.md", None)
