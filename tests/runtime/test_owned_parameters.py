"""Parameters that regularizers own: whose they are, where they are saved, what follows them, who misses them."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, Noise, Penalty, RegularizerError, Splice
from graphreg.passes import L0Gates

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
KEY = "graphreg_rules.scale_of.state._1.scale"


class ScaleOf(Splice, keys=("scale_of",)):
    """Multiplies by a scale that it learns, and counts calls; the square of ``weight`` pulls the scale to 1."""

    off_at_zero = False

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"scale": nn.Parameter(torch.full(like.shape[-1:], 2.0)), "calls": torch.zeros(())}

    def __call__(self, z: Tensor, noise: Noise, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return z * state["scale"].to(z.dtype), {"calls": state["calls"] + 1}

    def in_eval(self, z: Tensor, state: dict[str, Tensor]) -> Tensor:
        return z * state["scale"].to(z.dtype) + state["calls"].to(z.dtype)

    def penalty(self, state: dict[str, Tensor], weight: Tensor) -> Tensor:
        return weight.square() * (state["scale"] - 1).square().sum()


class Noted(Splice, keys=("noted_factor",), on="parameters"):
    """Multiplies a parameter by a factor that it learns; it has no penalty."""

    off_at_zero = False

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"factor": nn.Parameter(like.new_full((1,), 3.0))}

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise, state: dict[str, Tensor]) -> Tensor:
        return w * state["factor"].to(w.dtype)


class Centre(Penalty, keys=("centre_of",), on="parameters"):
    """The distance from a centre that it learns."""

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"centre": nn.Parameter(torch.zeros(1))}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
        return (w - state["centre"]).square().mean()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def made(model: nn.Module | None = None, **options: Any) -> Any:
    return graphreg.regularize(net() if model is None else model, ScaleOf("1", 3.0), example_inputs=X, rng=0, **options)


def number(value: Tensor) -> float:
    return float(value.detach())


def calls(module: nn.Module) -> float:
    return float(graphreg.rng_state(module)["state"]["scale_of"]["1"]["calls"])


# What the protocol says


def test_a_splice_by_hand() -> None:
    """Value, penalty and gradients: the scale is 2 for each of 4 units, so that the penalty is 3² · 4 · (2 - 1)²."""
    model = net()
    module = made(model, verify=True)
    output, penalties = module(X)
    torch.testing.assert_close(output, model[2](2 * model[1](model[0](X))))
    assert number(penalties["scale_of"]) == 36
    (output.sum() + penalties["scale_of"]).backward()
    by_hand = (model[1](model[0](X)) * model[2].weight.sum(0)).sum(0) + 9 * 2
    torch.testing.assert_close(module.get_parameter(KEY).grad, by_hand)
    torch.testing.assert_close(module.eval()(X).output, model[2](2 * model[1](model[0](X)) + 1))  # one call was counted
    assert number(module(X).penalties["scale_of"]) == 36 and calls(module) == 1


def test_a_splice_on_a_parameter_and_a_penalty_by_hand() -> None:
    model = net()
    module = graphreg.regularize(model, Noted("0.weight", 0.1), Centre("2.weight", 0.5), rng=0)
    output, penalties = module(X)
    by_hand = model[2](torch.tanh(X @ (3 * model[0].weight).T + model[0].bias))
    torch.testing.assert_close(output, by_hand)
    assert list(penalties) == ["centre_of"]
    (output.sum() + penalties["centre_of"]).backward()
    own = {name: p.grad for name, p in module.named_parameters() if name.startswith("graphreg_rules.")}
    assert list(own) == ["graphreg_rules.noted_factor.state._0_weight.factor", "graphreg_rules.centre_of.state._2_weight.centre"]
    (of_hand,) = torch.autograd.grad(by_hand.sum(), model[0].weight)
    torch.testing.assert_close(own["graphreg_rules.noted_factor.state._0_weight.factor"], (of_hand * model[0].weight).sum()[None] / 3)
    torch.testing.assert_close(own["graphreg_rules.centre_of.state._2_weight.centre"], -2 * 0.5 * model[2].weight.detach().mean()[None])
    torch.testing.assert_close(module.eval()(X).output, model(X))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend: str) -> None:
    """Values, gradients, and the state that moves on, in both modes, in one graph each."""
    torch._dynamo.reset()
    results: list[Any] = []
    for compiled in (False, True):
        every = [ScaleOf("1", 3.0), Noted("2.weight", 0.1), Centre("0.weight", 0.5), L0Gates("1", 0.1)]
        module = graphreg.regularize(net(), every, example_inputs=X, rng=0)
        run = torch.compile(module, backend=backend, fullgraph=True) if compiled else module
        found: list[Any] = []
        for mode in (True, False):
            module.train(mode)
            for _ in range(2):
                output, penalties = run(X)
                module.zero_grad()
                (output.square().sum() + sum(penalties.values())).backward()
                found += [output, penalties, [p.grad.clone() for p in module.parameters() if p.grad is not None]]
        results.append([found, calls(module)])
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1] == 2


def test_blocks_are_the_flat_form() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    every = [ScaleOf("*.1", 3.0), L0Gates("*.0", 0.1)]
    flat, blocks = (graphreg.regularize(model, every, example_inputs=X, rng=0, blocks=blocks) for blocks in (None, ["0", "1"]))
    assert "self.graphreg_rules._1_1_scale_of" not in blocks.compiled_code
    gradients = []
    for module in (flat, blocks):
        for mode in (True, True, False):
            output, penalties = module.train(mode)(X)
        total = output.sum() + sum(penalties.values())
        gradients.append(torch.autograd.grad(total, [*module.parameters()]))
    assert torch.equal(flat(X).output, blocks(X).output) and len(gradients[0]) == 10
    assert all(map(torch.equal, *gradients))
    assert list(blocks.state_dict()) == list(flat.state_dict())


def test_two_graphs_and_attached_penalties() -> None:
    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.relu() if self.training else h)  # type: ignore[no-any-return]

    module = graphreg.regularize(Modes(), L0Gates("a", 0.1), example_inputs=X, rng=0, penalties="attach", scale=2.0)
    module.eval()(X)
    module.train()(X).sum().backward()
    (gates,) = [p for name, p in module.named_parameters() if name.startswith("graphreg_rules.")]
    attached, returned = gates.grad, graphreg.regularize(Modes(), L0Gates("a", 0.1), example_inputs=X, rng=0)
    returned.load_state_dict(module.state_dict())
    output, penalties = returned(X)
    (output.sum() + 2 * penalties["l0_gates"]).backward()
    torch.testing.assert_close(attached, [*returned.parameters()][-1].grad)


def test_strengths_by_site_and_by_depth() -> None:
    """With weights 1 and 3 for two sites of penalty 1²·4 and 3²·4 (the class squares its weight), the mean is 20."""
    module = graphreg.regularize(net(), ScaleOf(["0", "1"], 1.0), example_inputs=X, rng=0)
    graphreg.set_strength(module, "scale_of", {"1": 3.0})
    assert number(module(X).penalties["scale_of"]) == 20
    graphreg.set_strength(module, "scale_of", 0.0)
    assert number(module(X).penalties["scale_of"]) == 0
    deep = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    ramp = graphreg.regularize(deep, ScaleOf("*.1", graphreg.by_depth(0.0, 2.0)), example_inputs=X, rng=0)
    assert number(ramp(X).penalties["scale_of"]) == pytest.approx((0 + 1 + 4) * 4 / 3)


def test_under_autocast_and_in_half_precision() -> None:
    module = made()
    with torch.autocast("cpu", torch.bfloat16):
        penalty = module(X).penalties["scale_of"]
    assert penalty.dtype == torch.float32 and module.get_parameter(KEY).dtype == torch.float32
    parameter = module.get_parameter(KEY)
    module.to(torch.bfloat16)
    assert module.get_parameter(KEY) is parameter and parameter.dtype == torch.bfloat16
    assert module(X.bfloat16()).penalties["scale_of"].dtype == torch.float32
    assert graphreg.rng_state(module)["state"]["scale_of"]["1"]["calls"].dtype == torch.bfloat16
    assert module.double()(X.double()).output.dtype == torch.float64 and graphreg.strengths(module) == {"scale_of": 3.0}


# Whose they are, and where they are saved


def test_they_are_parameters_of_the_module_and_not_of_the_model() -> None:
    model = net()
    before, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    module = made(model)
    assert [*dict(module.named_parameters())] == [*names, KEY] and list(module.state_dict()) == [*names, KEY]
    assert module.state_dict()._metadata == before._metadata  # type: ignore[attr-defined]
    assert list(dict(model.named_parameters())) == names and KEY not in graphreg.strip(module).state_dict()
    assert module.state_dict(keep_vars=True)[KEY] is module.get_parameter(KEY)
    for wrapped in (module, torch.compile(module)):
        state = graphreg.model_state_dict(wrapped)
        assert list(state) == names and state._metadata == before._metadata  # type: ignore[attr-defined]
    net().load_state_dict(graphreg.model_state_dict(module))
    placed = graphreg.regularize_(net(), hidden_dropout=0.1)
    assert list(graphreg.model_state_dict(placed)) == names
    with pytest.raises(GraphRegError, match=r"Sequential is not a module that graphreg rewrote\. Give what graphreg\.regularize returned"):
        graphreg.model_state_dict(net())


def test_checkpoints_load_strictly() -> None:
    """Its own, one of the model's alone, and not one that has the parameters of some of the sites."""
    module, other = made(), made()
    with torch.no_grad():
        module.get_parameter(KEY).add_(1.0)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    kept = other.get_parameter(KEY)
    other.load_state_dict(torch.load(buffer))
    assert other.get_parameter(KEY) is kept and kept.tolist() == [3.0] * 4
    other.load_state_dict(net().state_dict())
    assert kept.tolist() == [3.0] * 4
    two = graphreg.regularize(net(), ScaleOf(["0", "1"], 1.0), example_inputs=X, rng=0)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "graphreg_rules\.scale_of\.state\._0\.scale"'):
        two.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "graphreg_rules\.scale_of\.state\._0\.scale"'):
        module.load_state_dict(two.state_dict())
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        twin.load_state_dict(net().state_dict())
        assert twin.get_parameter(KEY).tolist() == [3.0] * 4
    other.load_state_dict({name: tensor + 1 for name, tensor in module.state_dict().items()}, assign=True)
    assert other(X).penalties["scale_of"].item() == 9 * 4 * 9


def test_a_run_goes_on() -> None:
    """From state_dict and rng_state together."""
    module, other = made(), made()
    for _ in range(2):
        module(X)
    other.load_state_dict(module.state_dict())
    graphreg.set_rng_state(other, graphreg.rng_state(module))
    assert calls(other) == 2 and torch.equal(other.eval()(X).output, module.eval()(X).output)
    gates = graphreg.regularize(net(), L0Gates("1", 0.1), example_inputs=X, rng=0)
    assert graphreg.rng_state(gates)["version"] == 1 and "state" not in graphreg.rng_state(gates)


def test_copies_have_parameters_of_their_own() -> None:
    module = made()
    with torch.no_grad():
        module.get_parameter(KEY).fill_(5.0)
    module(X)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        own = twin.get_parameter(KEY)
        assert own is not module.get_parameter(KEY) and own.tolist() == [5.0] * 4 and calls(twin) == 1
        output, penalties = twin(X)
        (output.sum() + penalties["scale_of"]).backward()
        assert own.grad is not None and module.get_parameter(KEY).grad is None
        assert calls(twin) == 2 and calls(module) == 1


def test_functional_calls_averages_and_resets() -> None:
    module = made()
    values = {**dict(module.named_parameters()), KEY: torch.full((4,), 4.0)}
    assert number(functional_call(module, values, (X,)).penalties["scale_of"]) == 9 * 4 * 9
    averaged = AveragedModel(module)
    with torch.no_grad():
        module.get_parameter(KEY).fill_(6.0)
    averaged.update_parameters(module)
    averaged.update_parameters(module)
    assert averaged.module.get_parameter(KEY).tolist() == [6.0] * 4
    parameter = module.get_parameter(KEY)
    module(X)
    graphreg.reset_state(module, "scale_of")
    assert module.get_parameter(KEY) is parameter and parameter.tolist() == [2.0] * 4 and calls(module) == 0


def test_a_recipe_makes_the_same_module() -> None:
    module = made()
    twin = graphreg.regularize(net(), recipe=graphreg.recipe(module), example_inputs=X)
    assert torch.equal(twin(X).output, module(X).output) and list(twin.state_dict()) == list(module.state_dict())


def test_later_passes_and_the_export_front_end() -> None:
    module = made()
    later = fx.GraphModule(module, module.graph)
    assert dict(later.named_parameters())[KEY] is module.get_parameter(KEY)
    assert later.to(torch.bfloat16).get_parameter(KEY).dtype == torch.bfloat16
    assert list(graphreg.model_state_dict(later)) == list(net().state_dict())
    result = graphreg.as_pass(ScaleOf("1", 3.0), example_inputs=X)(fx.symbolic_trace(net()))
    assert result is not None and KEY in dict(result.graph_module.named_parameters())
    exported = made(front_end="export", verify=True)
    assert list(exported.state_dict()) == [*net().state_dict(), KEY] and number(exported(X).penalties["scale_of"]) == 36


def test_the_report_names_them() -> None:
    report = graphreg.report(made())
    (entry,) = report.regularizers
    assert entry.trains == (KEY,) and not entry.penalty and report.parameters == 5
    frozen = made(net().requires_grad_(False))
    assert graphreg.report(frozen).regularizers[0].trains == (KEY,)
    measured = graphreg.regularize(net().requires_grad_(False), ScaleOf("1", 1.0), hidden_l1=0.1, example_inputs=X, rng=0)
    assert graphreg.report(measured).regularizers[1].trains == (KEY,)


def test_the_state_stands_still_where_it_must() -> None:
    module = made()
    module(X)
    with graphreg.noise_off(module):
        module(X)
    with torch.inference_mode():
        module(X)
    torch.func.grad(lambda x: module(x).output.sum())(X)
    module.eval()(X)
    assert calls(module) == 1
    with graphreg.noise_on(module):
        module(X)
    assert calls(module) == 1
    module.to("meta").to_empty(device="cpu")
    assert calls(module) == 1


# Who misses them


@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimizer_of_the_models_parameters_misses_them(compiled: bool) -> None:
    torch._dynamo.reset()
    model = net()
    module = made(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = torch.compile(module, backend="eager") if compiled else module
    with pytest.warns(UserWarning, match=r"the optimizer has the model's parameters, and not those that regularizers learn \(graphreg_rul"):
        run(X).output.sum().backward()
    run(X).output.sum().backward()  # it is said once
    del optimizer
    for twin in (copy.deepcopy(module), made(model)):
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        twin(X).output.sum().backward()
        optimizer.step()


def test_without_an_optimizer_nothing_is_said() -> None:
    module = made()
    module(X).output.sum().backward()
    optimizer = torch.optim.SGD(net().parameters(), 0.1)  # of another model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()(X).output.sum().backward()
    del optimizer


# What is refused


def test_modes_that_have_no_place_for_them() -> None:
    says = r"ScaleOf keeps tensors of its own, and regularize_ adds none to the model\. Use graphreg\.regularize: what it returns has them"
    with pytest.raises(RegularizerError, match=f"scale_of: {says}"):
        graphreg.regularize_(net(), ScaleOf("1", 1.0), eval_penalties=True)
    model = net()
    with pytest.raises(RegularizerError, match=r"centre_of: Centre keeps tensors of its own, and regularize_ adds none to the model"):
        graphreg.regularize_(model, Centre("*", 1.0))
    assert type(model) is nn.Sequential
    with pytest.raises(RegularizerError, match=r"ScaleOf keeps a state from call to call, and a backend's graphs keep none\. Compile what"):
        graphreg.backend(ScaleOf("1", 1.0))
    with pytest.raises(RegularizerError, match=r"ScaleOf at 1: it has a state that depends on the value's shape, and the shape is not kno"):
        graphreg.regularize(net(), ScaleOf("1", 1.0))
    with pytest.raises(GraphRegError, match=r"noted_factor keeps a state for 0\.weight, which has no values yet \(device meta\)"):
        graphreg.regularize(nn.Sequential(nn.Linear(3, 2, device="meta")), Noted("0.weight", 1.0))
    with pytest.raises(GraphRegError, match=r"scale_of keeps a state for 1, and 0\.weight has no values yet \(device meta\)"):
        graphreg.regularize(net().to("meta"), ScaleOf("1", 1.0), example_inputs=X.to("meta"))


def test_a_forward_that_backward_repeats_is_refused() -> None:
    module = made()
    value = checkpoint(lambda x: module(x).output.sum(), X.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(GraphRegError, match=r"a backward pass|in backward|checkpoint"):
        value.backward()


def test_what_a_class_may_not_say() -> None:
    with pytest.raises(RegularizerError, match=r"NoState\.penalty takes state, so __call__ must take it, too"):

        class NoState(Splice):
            def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
                return z

            def penalty(self, state: dict[str, Tensor]) -> Tensor:
                return torch.zeros(())

    with pytest.raises(RegularizerError, match=r"Asks\.penalty asks for z; the engine supplies state, weight\."):

        class Asks(ScaleOf):
            def penalty(self, state: dict[str, Tensor], z: Tensor) -> Tensor:  # type: ignore[override]
                return z.sum()

    with pytest.raises(RegularizerError, match=r"Neither\.in_eval takes neither z nor units; the engine supplies z, weight, previous"):

        class Neither(ScaleOf):
            def in_eval(self, state: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
                return state["scale"]

    with pytest.raises(RegularizerError, match=r"Stateless: __call__ takes state if and only if the class has init_state"):

        class Stateless(Splice):
            def __call__(self, z: Tensor, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
                return z

    with pytest.raises(RegularizerError, match=r"Shares: share_axes numbers the axes of z, and __call__ takes units, whose axes lie other"):

        class Shares(Splice):
            share_axes: tuple[str | int, ...] = ()

            def __call__(self, units: Tensor, weight: Tensor, noise: Noise) -> Tensor:
                return units


class Wrong(ScaleOf, keys=("wrong_scale",)):
    what: str = ""

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        more = {"training": torch.zeros(1)} if self.what == "name" else {}
        return {"scale": nn.Parameter(torch.ones(1)), "calls": torch.zeros(()), **more}

    def __call__(self, z: Tensor, noise: Noise, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return z, dict(state) if self.what == "parameters" else {"calls": state["calls"]}

    def penalty(self, state: dict[str, Tensor], weight: Tensor) -> Tensor:
        return state["scale"] if self.what == "shape" else torch.rand(()) if self.what == "draws" else weight


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("name", r"wrong_scale: init_state calls a tensor 'training', and modules use that name themselves\. Rename it\."),
        ("shape", r"Wrong wrong_scale: penalty gave \(1,\); a penalty is a 0-d tensor\. Average it\."),
        (
            "parameters",
            r"Wrong at 1: the formula returned a state with other names or shapes than init_state, its nn\.Parameters left out, which the",
        ),
        ("draws", r"Wrong.* draws random numbers"),
    ],
)
def test_what_the_methods_may_not_do(what: str, message: str) -> None:
    with pytest.raises(RegularizerError, match=message):
        graphreg.regularize(net(), Wrong("1", 1.0, what=what), example_inputs=X)(X)


def test_an_optimizer_of_their_own_is_no_reason_to_warn() -> None:
    """The model's parameters and those of the regularizer may be trained by two optimizers."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    module = graphreg.regularize(model, L0Gates("1", 0.1), example_inputs=x)
    theirs = {id(parameter) for parameter in model.parameters()}
    optimizers = [torch.optim.SGD(model.parameters(), 0.1),
                  torch.optim.Adam([p for p in module.parameters() if id(p) not in theirs], 0.01)]  # fmt: skip
    output, penalties = module(x)
    (output.sum() + sum(penalties.values())).backward()  # a warning would be an error
    assert all(group["params"] for optimizer in optimizers for group in optimizer.param_groups)
