"""Bad input to the backend: every sentence, and that it comes at the call of graphreg.backend where it can."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, NoMatchError, Penalty, RegularizerError, TraceError
from graphreg.passes import BernoulliDropout
from lacking import needs_result


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.other = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        out: Tensor = self.b(h) if x.shape[0] < 100 else self.other(h)
        return out


class Spread(Penalty, keys=("spread_of_all",)):
    """Looks at all of its sites at once."""

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return torch.stack([value.mean() for value in values.values()]).var(correction=0)


X = torch.ones(2, 4)


def refused(error: type[GraphRegError], sentence: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        call()


@pytest.mark.parametrize(
    ("error", "sentence", "options"),
    [
        (RegularizerError, "inner='indctor' is no backend that torch knows. Near names: inductor. "
         "torch.compiler.list_backends(None) lists them.", {"inner": "indctor"}),
        (RegularizerError, "inner=3 is no backend; give a name of torch.compiler.list_backends(None), or a callable.", {"inner": 3}),
        (RegularizerError, "options={'fast': True} are not allowed: the inner backend 'aot_eager' takes no options.",
         {"inner": "aot_eager", "options": {"fast": True}}),
        (RegularizerError, "options={'fastest': True} are not allowed: Unexpected optimization option fastest",
         {"options": {"fastest": True}}),
        (RegularizerError, "compile= is no option of graphreg.backend: torch.compile captures the graphs, from the calls.",
         {"compile": True}),
        (RegularizerError, "front_end= is no option of graphreg.backend", {"front_end": "symbolic"}),
        (RegularizerError, "blocks= is no option of graphreg.backend", {"blocks": "fc"}),
        (RegularizerError, "scale= is for penalties='attach'", {"scale": 2.0}),
        (RegularizerError, "penalties='add' is unknown; it is 'return' or 'attach'.", {"penalties": "add"}),
        (RegularizerError, "missing='no' is unknown", {"missing": "no"}),
        (RegularizerError, "rng=1.5 is not allowed", {"rng": 1.5}),
        (RegularizerError, "own_dropout='seed' is not allowed", {"own_dropout": "seed"}),
        (NoMatchError, "'hidden_dropuot' is no option of graphreg.regularize and no key of a regularizer. Near keys: hidden_dropout",
         {"hidden_dropuot": 0.1}),
        (RegularizerError, "contractive: Contractive differentiates the whole forward, and a backend sees one graph of it at a time. "
         "Use graphreg.regularize(model, ...), whose graph is the whole forward.", {"contractive": 0.1}),
    ],
)  # fmt: skip
def test_options_are_refused_at_once(error: type[GraphRegError], sentence: str, options: dict[str, Any]) -> None:
    refused(error, sentence, lambda: graphreg.backend(**options))


def test_a_backend_within_a_backend() -> None:
    sentence = "inner= is a backend of graphreg's already; give all regularizers to one backend."
    refused(RegularizerError, sentence, lambda: graphreg.backend(inner=graphreg.backend(inner="eager")))


def test_a_torch_that_does_not_show_results_refuses_to_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphreg.dynamo_backend.options.tells_result", lambda: False)
    sentence = (
        f"penalties='attach' in a backend needs torch 2.12 or newer, and this is torch {torch.__version__}, which does not show what a "
        "compiled call returns. If the model returns a tensor that no graph computed, its backward would lack the penalties, unnoticed. "
        "Use penalties='return' and add backend.penalties() to the loss, or graphreg.regularize."
    )
    refused(GraphRegError, sentence, lambda: graphreg.backend(inner="eager", weight_l2=0.1, penalties="attach", scale=1))
    graphreg.backend(inner="eager", hidden_dropout=0.1, penalties="attach")  # nothing attaches


@needs_result
def test_attaching_without_a_scale_warns() -> None:
    with pytest.warns(UserWarning, match="^penalties='attach': a backend does not see the loss, so it cannot know how the loss is scaled"):
        graphreg.backend(inner="eager", weight_l2=0.1, penalties="attach")
    graphreg.backend(inner="eager", hidden_dropout=0.1, penalties="attach")


def test_a_selector_that_finds_nothing_is_an_error_at_the_end_of_the_first_call() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", dropout={"relux": 0.1}))
    sentence = "'relux' matches no value of Net. Near names: relu. List all: graphreg.names(compiled_model)."
    refused(NoMatchError, sentence, lambda: run(X))
    refused(NoMatchError, sentence, lambda: run(X))  # and of each call until one finds it


def test_a_module_that_the_first_call_did_not_run() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", dropout={"other": 0.1}))
    sentence = (
        "'other' matches no value of Net. List all: graphreg.names(compiled_model). 'other' is a module of Net, but no graph of the first "
        "call has it: the call did not run it, or torch.compile left it to eager. missing='ignore' waits for later calls."
    )
    refused(NoMatchError, sentence, lambda: run(X))


def test_missing_may_warn_or_be_ignored() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", dropout={"relux": 0.1}, missing="warn"))
    with pytest.warns(UserWarning, match="^'relux' matches no value of Net"):
        run(X)
    run(X)
    torch.compile(Net(), backend=graphreg.backend(inner="eager", dropout={"relux": 0.1}, missing="ignore"))(X)


def test_another_number_of_sites_than_expected() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(BernoulliDropout("*", 0.1, expect=2), inner="eager"))
    refused(NoMatchError, "BernoulliDropout('*'): expect=2, found 1 site (relu). Change the selector, or the number.", lambda: run(X))


def test_a_selector_of_weights_that_finds_nothing() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", weight_l2={"weight": 0.1, "pattern": "c.*"}))
    refused(NoMatchError, "'c.*' matches no parameter of 2 dims or more of Net.", lambda: run(X))


def test_weights_that_are_frozen() -> None:
    model = Net().requires_grad_(False)
    run = torch.compile(model, backend=graphreg.backend(inner="eager", weight_l2=0.1))
    refused(RegularizerError, "WeightL2('*') selects only parameters that are frozen (a.weight", lambda: run(X))


def test_values_that_no_parameter_reaches() -> None:
    model = Net()
    model.a.requires_grad_(False)
    run = torch.compile(model, backend=graphreg.backend(inner="eager", hidden_l1=0.1))
    refused(RegularizerError, "hidden_l1: no parameter that can train reaches its sites, so the penalty would", lambda: run(X))
    with torch.no_grad():
        run(X)


def test_an_error_of_the_models_own_stays_its_own() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", dropout={"relux": 0.1}))
    with pytest.raises(Exception, match="reduction dim") as caught:
        run(torch.ones(2, 5))
    assert not isinstance(caught.value, GraphRegError)


def test_one_backend_for_two_models() -> None:
    backend = graphreg.backend(inner="eager", hidden_dropout=0.1)
    torch.compile(Net(), backend=backend)(X)
    sentence = "this backend regularizes Net already, and one backend is for one model"
    refused(GraphRegError, sentence, lambda: torch.compile(Net(), backend=backend)(X))


def test_a_rewritten_model() -> None:
    run = torch.compile(
        graphreg.regularize(Net(), example_inputs=X, hidden_dropout=0.1), backend=graphreg.backend(inner="eager", hidden_l1=0.1)
    )
    refused(TraceError, "this model is rewritten already. Compile it with another backend", lambda: run(X))


def test_torchs_own_options_beside_the_backend() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", hidden_l1=0.1), options={"fast": True})
    refused(RegularizerError, "torch.compile was given options beside graphreg's backend, which takes no options.", lambda: run(X))


@pytest.mark.parametrize(
    ("sentence", "given"),
    [
        ("torch.compile(model, backend='graphreg') was given no options, so there is nothing to do.", {}),
        ("'hidden_dropuot' is no option of graphreg.regularize", {"options": {"hidden_dropuot": 0.1}}),
        ("inner='indctor' is no backend that torch knows.", {"options": {"inner": "indctor"}}),
        ("mode='reduce-overhead' is Inductor's", {"mode": "reduce-overhead"}),
    ],
)
def test_by_name_options_are_refused_at_the_first_call(sentence: str, given: dict[str, Any]) -> None:
    refused(GraphRegError, sentence, lambda: torch.compile(Net(), backend="graphreg", **given)(X))


def test_penalties_before_a_call() -> None:
    sentence = "there are no penalties yet: penalties() returns those of the last call of the model that was compiled with this backend"
    refused(GraphRegError, sentence, graphreg.backend(inner="eager", weight_l2=0.1).penalties)


def test_what_is_compiled_with_another_backend() -> None:
    refused(GraphRegError, "OptimizedModule was not compiled with a backend of graphreg's",
            lambda: graphreg.backend_of(torch.compile(Net(), backend="eager")))  # fmt: skip
    refused(GraphRegError, "Net was not compiled with a backend of graphreg's", lambda: graphreg.backend_of(Net()))


def test_handle() -> None:
    backend = graphreg.backend(inner="eager", hidden_dropout=0.1, rng=0)
    refused(NoMatchError, "no regularizer is named 'hiden_dropout'. Near names: hidden_dropout. Names: hidden_dropout.",
            lambda: graphreg.set_strength(backend, "hiden_dropout", 0.2))  # fmt: skip
    refused(RegularizerError, "BernoulliDropout hidden_dropout: weight=2.0 is", lambda: graphreg.set_strength(backend, "hidden_dropout", 2))
    refused(RegularizerError, "ranks='none' is not allowed", lambda: graphreg.set_ranks(backend, "none"))  # type: ignore[arg-type]
    state = graphreg.rng_state(backend)
    theirs = graphreg.rng_state(graphreg.regularize(Net(), example_inputs=X, hidden_dropout=0.1))
    for sentence, given in [
        ("the state of a rewritten module is no state of a backend's noise.", theirs),
        ("list is no state of a backend's noise.", []),
        ("the state has version 9; this graphreg reads versions 1 and 2.", {**state, "version": 9}),
        ("the state is damaged: it has seed='x', not a whole number.", {**state, "seed": "x"}),
        ("the state is damaged: it has ranks='?', not 'differ' or 'same'.", {**state, "ranks": "?"}),
        ("the state is damaged: it has epoch, which no state has.", {**state, "epoch": 3}),
        ("the state is damaged: it has calls={'a': -1}, not a dict of streams to whole numbers", {**state, "calls": {"a": -1}}),
    ]:
        refused(RegularizerError, sentence, lambda given=given: graphreg.set_rng_state(backend, given))  # type: ignore[misc]
    with graphreg.frozen_noise(backend):
        refused(GraphRegError, "the noise is frozen", lambda: graphreg.set_rng_state(backend, state))
    assert graphreg.rng_state(backend) == state


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        torch._dynamo.graph_break()
        out: Tensor = self.b(torch.tanh(h))
        return out


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_a_penalty_on_all_sites_at_once_over_two_graphs() -> None:
    def run(pattern: Any) -> Any:
        torch.compiler.reset()
        backend = graphreg.backend(Spread(pattern, 1.0), inner="eager")
        torch.compile(Broken(), backend=backend)(X)
        return backend.penalties()["spread_of_all"]

    assert run(["tanh", "b"]).dim() == 0
    sentence = "spread_of_all looks at all of its sites at once, and in this call they are in 2 graphs. Select only sites of one graph"
    refused(RegularizerError, sentence, lambda: run(["a", "b"]))


def test_recomputing_what_is_compiled_in_backward() -> None:
    backend = graphreg.backend(inner="eager", dropout={"relu": 0.5})
    run = torch.compile(Net(), backend=backend)
    x = torch.ones(2, 4, requires_grad=True)
    output = checkpoint(run, x, use_reentrant=False)
    with pytest.raises(GraphRegError, match="^a graph that draws masks runs inside a backward pass"):
        output.sum().backward()
    with graphreg.frozen_noise(backend):
        checkpoint(run, x, use_reentrant=False).sum().backward()


def test_past_dynamos_limit_nothing_runs_without_its_regularizers() -> None:
    run = torch.compile(Net(), backend=graphreg.backend(inner="eager", hidden_dropout=0.1), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        run(torch.ones(2, 4)), run(torch.ones(3, 4))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run(torch.ones(4, 4))
    assert torch._dynamo.config.fail_on_recompile_limit_hit is False


@pytest.mark.parametrize("options", [{}, {"weight_l2": 0.1}, {"hidden_l2": 0.1}])
def test_a_nested_tensor(options: dict[str, Any]) -> None:
    x = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)
    run = torch.compile(nn.Linear(4, 2), backend=graphreg.backend(inner="eager", **options))
    with pytest.raises(TraceError, match=r"^the model computes with a nested tensor, which a backend cannot take\. Pad it first"):
        run(x)


@pytest.mark.parametrize("penalties", ["return", pytest.param("attach", marks=needs_result)])
@pytest.mark.parametrize("change", ["weight_norm", "prune", "other layer"])
def test_a_penalized_parameter_that_is_gone(penalties: Any, change: str) -> None:
    """Also one that no graph reads, so that torch.compile captures nothing anew."""
    for name in ("a", "other"):
        torch.compiler.reset()
        model = Net()
        run = torch.compile(
            model, backend=graphreg.backend(inner="eager", weight_l2=0.1, penalties=penalties, scale=1 if penalties == "attach" else None)
        )
        run(X)
        if change == "weight_norm":
            nn.utils.parametrizations.weight_norm(getattr(model, name))
        elif change == "prune":
            prune.l1_unstructured(getattr(model, name), "weight", 0.5)
        else:
            setattr(model, name, nn.Sequential(getattr(model, name)))
        with pytest.raises(GraphRegError, match=rf"^a penalty measures {name}\.weight, which Net has no more as a parameter"):
            run(X)
