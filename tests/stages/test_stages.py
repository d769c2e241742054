"""Stages of a pipeline, called one after the other in one process, are the whole model: values, masks, penalties and gradients."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg import schedules
from graphreg.passes import (
    BernoulliDropout,
    DropConnect,
    EmbeddingDropout,
    HiddenL1,
    RecurrentState,
    WeightL1,
    WeightL2,
)
from pages import DOCS, run_page
from stage_nets import (
    FirstFunctions,
    FirstModes,
    Functions,
    LastFunctions,
    LastModes,
    Modes,
    Net,
    Recurrent,
    Shared,
    Steps,
    Tied,
    net,
    stage_of,
)

Stages = Sequence[Any]
M = 2


def batches(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator, dtype=torch.double) for _ in range(2 * M)]


def whole_of(model: nn.Module, *regularizers: Any, **options: Any) -> Any:
    return graphreg.regularize(copy.deepcopy(model), *regularizers, penalties="attach", scale=1 / M, rng=5, **options)


def stages_of(parts: Stages, whole: Any, *regularizers: Any, **options: Any) -> list[Any]:
    options = {"rng": 5, "microbatches": M, "scale_grads": False, **options}
    return [graphreg.regularize_stage(part, *regularizers, whole=whole, **options) for part in parts]


def run(stages: Stages, x: Any) -> Any:
    for stage in stages:
        x = stage(x)
    return x


def trained(stages: Stages, x: Tensor) -> Tensor:
    """The output of a step. Gradients go from stage to stage as in a pipeline: each stage has a backward pass of its own."""
    given: list[Any] = []
    for stage in stages:
        if given:
            x = torch.utils._pytree.tree_map_only(Tensor, lambda value: value.detach().requires_grad_(), given[-1][1])
        given.append((x, stage(x)))
    output: Tensor = given[-1][1]
    gradient: Any = torch.autograd.grad(output.square().mean(), output, retain_graph=True)[0]
    for entered, left in reversed(given):
        flat = torch.utils._pytree.tree_leaves
        torch.autograd.backward(flat(left), flat(gradient))
        gradient = torch.utils._pytree.tree_map_only(Tensor, lambda value: value.grad, entered)
    return output


def gradients(modules: Stages) -> dict[str, Tensor]:
    return {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}


def assert_whole(stages: Stages, whole: Any, inputs: Sequence[Tensor]) -> None:
    """Two steps of two microbatches each, then a call in eval mode."""
    close: Any = {"rtol": 1e-12, "atol": 1e-12}
    for module in (*stages, whole):
        module.train()
    for x in inputs:
        ours, theirs = trained(stages, x), whole(x)
        torch.testing.assert_close(ours, theirs, **close)
        theirs.square().mean().backward()
        if hasattr(whole.graphreg_rules, "attach"):
            each = [stage.penalties() for stage in stages]
            total = {name: sum(penalties[name] for penalties in each) for name in each[0]}
            torch.testing.assert_close(total, whole.penalties(), **close)
    torch.testing.assert_close(gradients(stages), gradients([whole]), **close)
    for module in (*stages, whole):
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(stages, inputs[0]), whole(inputs[0]), **close)


WAYS: dict[str, dict[str, Any]] = {
    "splices and penalties": {"hidden_dropout": 0.2, "input_noise": 0.1, "hidden_l1": 0.3, "weight_l2": 0.1},
    "native dropout and sums": {
        "own_dropout": {"*": "seeded", "layers.1.*": 0.4, "layers.3.*": "off"}, "hidden_l2": 0.2, "hidden_l1": 0.1,
        "weight_l1": {"weight": 0.1, "reduction": "sum"},
    },
    "parameters and units": {"drop_connect": 0.2, "weight_noise": 0.1, "weight_l1": 0.1, "decov": 0.1, "variance_floor": 0.1},
    "branches and state": {"drop_path": 0.3, "layer_drop": {"layers.*": 0.3}, "l0_gates": {"**@relu": 0.1}, "l2_sp": 0.1},
    "by depth and schedules": {
        "drop_path": graphreg.by_depth(0.0, 0.5), "hidden_l1": graphreg.by_depth(0.1, 0.4),
        "hidden_dropout": schedules.linear(0.1, 0.5, 4), "weight_l2": schedules.linear(0.1, 0.5, 4),
    },
    "twice": {"regularizers": [BernoulliDropout("layers.*", 0.2), BernoulliDropout("layers.1", 0.3), HiddenL1("layers.*", 0.1)]},
    "only in the first": {"hidden_dropout": 0.2, "hidden_l1": {"weight": 0.3}, "weight_l2": {"first.weight": 0.1}},
    "no noise": {"weight_l2": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_two_stages_are_the_whole(way: str) -> None:
    model, options = net(0.3 if "own_dropout" in WAYS[way] else 0.0), WAYS[way]
    examples: dict[str, Any] = {"example_inputs": torch.zeros(3, 4).double()} if "state" in way or "units" in way else {}
    whole = whole_of(model, **options, **examples)
    inputs = [{"example_inputs": torch.zeros(3, 4 if i == 0 else 8).double()} if examples else {} for i in range(2)]
    told = graphreg.trace(model, **examples)
    stages = [stages_of([stage_of(model, i)], told, **options, **inputs[i])[0] for i in range(2)]
    assert_whole(stages, whole, batches(3, 4))


def test_four_stages_and_one() -> None:
    options = WAYS["splices and penalties"]
    model = net()
    for count in (1, 4):
        stages = stages_of([stage_of(model, i, count) for i in range(count)], model, **options)
        assert_whole(stages, whole_of(model, **options), batches(3, 4))


def test_the_whole_may_have_no_values_yet() -> None:
    with torch.device("meta"):
        model = Net().double()
    options = WAYS["splices and penalties"]
    assert_whole(stages_of([stage_of(net(), i) for i in range(2)], model, **options), whole_of(net(), **options), batches(3, 4))


def test_functions_have_the_numbers_of_the_whole_model() -> None:
    """In the last stage by itself, F.relu of its input would be ``relu``, and not the first of three."""
    torch.manual_seed(0)
    model = Functions().double()
    options: Any = {"regularizers": [BernoulliDropout("relu_1", 0.5), HiddenL1("relu", 0.3), WeightL2("*", 0.1)]}
    stages = stages_of([FirstFunctions(model), LastFunctions(model)], model, **options)
    assert [entry.sites for entry in graphreg.report(stages[1]).regularizers] == [("relu_1",), ("relu",), ("b.weight", "c.weight")]
    assert [entry.sites for entry in graphreg.report(stages[0]).regularizers] == [(), (), ("a.weight",)]
    assert_whole(stages, whole_of(model, **options), batches(3, 6))


def test_modules_with_other_names() -> None:
    """A stage that was put together anew; its parameters then have the names of the whole model."""
    model, options = net(0.3), {"hidden_dropout": 0.2, "drop_connect": 0.1, "weight_l2": 0.1, "own_dropout": "seeded"}
    twin = stage_of(model, 1)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.out = nn.Sequential(*twin.layers.values()), twin.last

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.blocks(x)))  # type: ignore[misc, no-any-return]

    with pytest.raises(graphreg.RegularizerError, match=r"parameter 'blocks\.0\.up\.weight', and Net has none.*names=\{'0': 'layers\.4'\}"):
        stages_of([Last()], model, **options)
    names = {"blocks.0": "layers.2", "blocks.1": "layers.3", "out": "last"}
    stages = stages_of([stage_of(model, 0)], model, **options) + stages_of([Last()], model, names=names, **options)
    assert {name for name, _ in stages[1].named_parameters()} == {name for name, _ in twin.named_parameters()}
    assert_whole(stages, whole_of(model, **options), batches(3, 4))


def test_a_stage_that_is_frozen() -> None:
    """What trains nothing here trains something in the whole model."""
    model, options = net(), {"hidden_l1": 0.3, "weight_l2": 0.1}
    for parameter in (*model.first.parameters(), *model.layers["0"].parameters(), *model.layers["1"].parameters()):  # type: ignore[union-attr]
        parameter.requires_grad_(False)
    stages, whole, x = stages_of([stage_of(model, i) for i in range(2)], model, **options), whole_of(model, **options), batches(3, 4)[0]
    run(stages, x).square().mean().backward()
    whole(x).square().mean().backward()
    torch.testing.assert_close(gradients(stages), gradients([whole]), rtol=1e-12, atol=1e-12)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(graphreg.RegularizerError, match="selects only parameters that are frozen"):
        stages_of([stage_of(model, 0)], model, weight_l2=0.1)


def test_what_the_stage_shares_with_the_whole_is_recognized() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))).double()
    options: Any = {"hidden_dropout": 0.3, "weight_l2": 0.1}
    stages = stages_of([nn.Sequential(*model[:2]), nn.Sequential(*model[2:])], model, **options)
    assert [name for name, _ in stages[1].named_parameters()] == ["2.0.weight", "2.0.bias", "3.0.weight", "3.0.bias"]
    assert stages[1].get_submodule("3.0") is model[3][0]
    whole = whole_of(model, **options)
    assert_whole(stages, whole, batches(3, 6))


def test_a_stage_that_is_one_module_of_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))).double()
    options: Any = {"hidden_dropout": 0.3, "weight_l2": 0.1, "hidden_l1": 0.2}
    stages = stages_of([nn.Sequential(copy.deepcopy(model[0]))], model, **options)
    stages += stages_of([copy.deepcopy(model[1])], model, names={"": "1"}, **options)
    assert_whole(stages, whole_of(model, **options), batches(3, 4))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_graph_for_each_mode(mode: str) -> None:
    """In eval mode there are fewer sites, so that the mean is over another number."""
    torch.manual_seed(0)
    model = Modes().double()
    options: Any = {"regularizers": [HiddenL1("**@relu", 0.3), BernoulliDropout("relu_1", 0.5)]}
    stages, whole = stages_of([FirstModes(model), LastModes(model)], model, **options), whole_of(model, **options)
    for module in (*stages, whole):
        module.train(mode == "train")
    x = batches(3, 6)[0]
    torch.testing.assert_close(run(stages, x), whole(x))
    assert len(stages[1].graphs) == 2
    total = sum(stage.penalties()["hidden_l1"] for stage in stages)
    torch.testing.assert_close(total, whole.penalties()["hidden_l1"], rtol=1e-12, atol=1e-12)


def tied_parts() -> tuple[Tied, list[Any]]:
    torch.manual_seed(0)
    model = Tied().double()
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.head = last.embedding = last.middle = None
    return model, [first, last]


def test_a_tied_parameter_counts_in_the_stage_that_reads_it_first() -> None:
    model, parts = tied_parts()
    stages = stages_of(parts, model, WeightL2("**", 0.3, reduction="mean"))
    assert [entry.sites for stage in stages for entry in graphreg.report(stage).regularizers] == [
        ("embedding.weight", "middle.weight"), ()
    ]  # fmt: skip
    whole, x = whole_of(model, WeightL2("**", 0.3, reduction="mean")), torch.arange(6)
    run(stages, x).square().mean().backward()
    whole(x).square().mean().backward()
    torch.testing.assert_close(sum(stage.penalties()["weight_l2"] for stage in stages), whole.penalties()["weight_l2"])
    both = stages[0].embedding.weight.grad + stages[1].head.weight.grad  # as a pipeline adds up what is tied
    torch.testing.assert_close(both, whole.embedding.weight.grad, rtol=1e-12, atol=1e-12)


def test_a_splice_on_a_tied_parameter() -> None:
    model, parts = tied_parts()
    with pytest.raises(graphreg.RegularizerError, match=r"drop_connect at embedding\.weight: the parameter is tied.*as head\.weight"):
        stages_of(parts, model, DropConnect("**", 0.3))
    splice = EmbeddingDropout("embedding.weight", 0.3)  # acts where the embedding reads, and nowhere else
    stages, whole, x = stages_of(parts, model, splice), whole_of(model, splice), torch.arange(6)
    torch.testing.assert_close(run(stages, x), whole(x))


def test_an_unread_copy_of_a_parameter_does_not_count() -> None:
    """A stage may keep layers that it does not run."""
    model = net()
    kept = copy.deepcopy(model)

    class First(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers["1"](self.layers["0"](torch.tanh(self.first(x))))  # type: ignore[no-any-return, misc]

    kept.__class__ = First
    stages = stages_of([kept, stage_of(model, 1)], model, weight_l2=0.3)
    assert_whole(stages, whole_of(model, weight_l2=0.3), batches(3, 4))


def test_a_tuple_between_layers() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = copy.deepcopy(model.lstm)

        def forward(self, x: Tensor) -> Any:
            y, (h, _) = self.lstm(x)
            return y, h

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = copy.deepcopy(model.out)

        def forward(self, both: Any) -> Tensor:
            y, h = both
            return self.out(torch.relu(y) + h[0].unsqueeze(1))  # type: ignore[no-any-return]

    regularizers = [BernoulliDropout("lstm", 0.2), BernoulliDropout("lstm:h_n", 0.3), HiddenL1(["lstm", "lstm:h_n", "relu"], 0.2)]
    stages, whole = stages_of([First(), Last()], model, regularizers), whole_of(model, regularizers)
    assert [entry.sites for entry in graphreg.report(stages[0]).regularizers] == [("lstm",), ("lstm:h_n",), ("lstm", "lstm:h_n")]
    assert_whole(stages, whole, batches(3, 5, 4))


# What is refused


def test_selectors_match_in_the_whole_model() -> None:
    model = net()
    first, last = stages_of([stage_of(model, i) for i in range(2)], model, HiddenL1("layers.0.*", 0.1), WeightL1("last.weight", 0.1))
    assert [e.sites for e in graphreg.report(last).regularizers] == [(), ("last.weight",)]
    assert graphreg.strengths(first) == graphreg.strengths(last) == {"hidden_l1": 0.1, "weight_l1": 0.1}
    for part in (stage_of(model, 0), stage_of(model, 1)):
        with pytest.raises(graphreg.NoMatchError, match=r"'layers\.7\.\*' matches no value of Net\."):
            stages_of([part], model, HiddenL1("layers.7.*", 0.1))
        with pytest.raises(graphreg.NoMatchError, match="expect=3, found 1"):
            stages_of([part], model, HiddenL1("layers.0.relu", 0.1, expect=3))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"whole": "Net"}, "whole='Net' is not allowed; give the whole model"),
    ({"microbatches": 0}, "microbatches=0 is not allowed; give the schedule's n_microbatches"),
    ({"microbatches": True}, "microbatches=True is not allowed"),
    ({"scale_grads": 1}, "scale_grads=1 is not allowed"),
    ({"names": ["a"]}, r"names=\['a'\] is not allowed; give a dict"),
    ({"names": {"layer": "first"}}, r"names=\{'layer': \.\.\.\}: the stage has no module, parameter or value 'layer'. Near names: layers"),
    ({"names": {"layers": None}}, r"names=\{'layers': None\} is for a value that the whole model does not have, and 'layers' is none"),
    ({"names": {"tanh": "tanh_7"}}, r"names=\{'tanh': 'tanh_7'\}: Net has nothing like it that is called 'tanh_7'"),
    ({"names": {"layers.0": "layers.1"}}, "the same name in the whole model, 'layers.1.up.weight'"),
    ({"rng": None}, r"hidden_dropout draws, and rng= was not given: each stage would draw a seed by itself"),
    ({"rng": torch.Generator()}, "rng=.* is not allowed; give an int, the same for all stages"),
    ({"scale": -1}, "scale=-1 is not allowed"),
    ({"compile": 3}, "compile=3 is not allowed"),
    ({"contractive": 0.1}, "contractive: Contractive differentiates the whole forward, and a stage runs a part of it"),
    ({"penalties": "return"}, "'penalties'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    model = net()
    arguments: dict[str, Any] = {"whole": model, "microbatches": 2, "rng": 0, "hidden_dropout": 0.1, **options}
    with pytest.raises(graphreg.GraphRegError, match=message):
        graphreg.regularize_stage(stage_of(model, 0), **arguments)


def test_a_stage_that_is_not_of_the_whole() -> None:
    model = net()
    wide = stage_of(model, 0)
    wide.first = nn.Linear(5, 8)
    with pytest.raises(graphreg.RegularizerError, match=r"'first\.weight' has the shape \(8, 5\) in the stage, and \(8, 4\) in Net"):
        stages_of([wide], model, weight_l2=0.1)

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = copy.deepcopy(model.first)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.first(x))  # type: ignore[misc]

    with pytest.raises(graphreg.NoMatchError, match=r"the stage computes 'sigmoid' \(sigmoid\), and Net has no such value"):
        stages_of([Changed()], model, hidden_dropout=0.1)
    assert graphreg.report(stages_of([Changed()], model, weight_l2=0.1)[0]).regularizers[0].sites == ("first.weight",)
    stage = stages_of([Changed()], model, names={"sigmoid": None}, hidden_dropout=0.1)[0]
    assert graphreg.report(stage).regularizers[0].sites == ()


def test_a_value_that_could_be_another() -> None:
    model = Functions().double()

    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.relu(x)

    message = r"'relu' of the stage may be relu, relu_1, relu_2 in Functions, and it is not certain which.*names=\{'relu': 'relu'\}"
    with pytest.raises(graphreg.GraphRegError, match=message):
        stages_of([Middle()], model, hidden_dropout=0.1)
    stage = stages_of([Middle()], model, names={"relu": "relu_1"}, hidden_dropout=0.1)[0]
    assert graphreg.report(stage).regularizers[0].sites == ("relu_1",)


def test_sites_of_several_stages_at_once() -> None:
    torch.manual_seed(0)
    model = Steps().double()

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = copy.deepcopy(model.cell)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 6)
            return self.cell(x[:, 1], self.cell(x[:, 0], h))  # type: ignore[no-any-return]

    with pytest.raises(graphreg.RegularizerError, match="the calls of the recurrent cell are in several stages"):
        stages_of([First()], graphreg.trace(model, batches(3, 5, 4)[0]), RecurrentState("cell", 0.1))

    class Together(graphreg.Penalty):
        def __call__(self, values: dict[str, Tensor]) -> Tensor:
            return torch.stack([value.square().mean() for value in values.values()]).prod()

    net_ = net()
    with pytest.raises(graphreg.RegularizerError, match=r"takes all its sites at once, and this stage has 1 of 2 \(layers\.1\.add\)"):
        stages_of([stage_of(net_, 0)], net_, Together(["layers.1", "layers.2"], 0.1))
    inside = Together(["layers.0", "layers.1"], 0.1)
    assert_whole(stages_of([stage_of(net_, i) for i in range(2)], net_, inside), whole_of(net_, inside), batches(3, 4))


def shared_parts() -> tuple[Shared, list[Any]]:
    """Three stages that call one layer, each once. Which call a stage in the middle makes, its code does not say."""
    torch.manual_seed(0)
    model = Shared().double()
    parts = [copy.deepcopy(model) for _ in range(3)]
    for i, part in enumerate(parts):
        part.calls = 1
        part.first = part.first if i == 0 else None
        part.last = part.last if i == 2 else None
    return model, parts


def test_a_layer_that_several_stages_call() -> None:
    model, parts = shared_parts()
    options: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 0.1}
    with pytest.raises(graphreg.GraphRegError, match=r"'tanh' of the stage may be tanh, tanh_1, tanh_2 in Shared"):
        stages_of([parts[1]], model, **options)
    with pytest.raises(graphreg.GraphRegError, match=r"weight_l2 at layer\.weight: the parameter is read several times in the whole model"):
        stages_of([parts[1]], model, weight_l2=0.1)
    stages = [stages_of([part], model, names=n, **options)[0] for part, n in zip(parts, ({}, {"layer": "layer_1"}, {}), strict=True)]
    assert [entry.sites for stage in stages for entry in graphreg.report(stage).regularizers] == [
        ("first", "tanh"), ("first.weight", "layer.weight"), ("tanh_1",), (), ("tanh_2",), ("last.weight",)
    ]  # fmt: skip
    whole, x = whole_of(model, **options), batches(3, 6)[0]
    torch.testing.assert_close(run(stages, x), whole(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(stage.penalties()["weight_l2"] for stage in stages), whole.penalties()["weight_l2"])


# As a rewritten module


@pytest.mark.parametrize("copied", [(copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))), (copy.copy, copy.copy)])
def test_copies(copied: tuple[Callable[[Any], Any], ...]) -> None:
    options, model = WAYS["splices and penalties"], net()
    stages = [copied[i](stages_of([stage_of(model, i)], model, **options)[0]) for i in range(2)]
    assert_whole(stages, whole_of(model, **options), batches(3, 4))


def test_compiled_and_with_blocks() -> None:
    options, model = WAYS["splices and penalties"], net()
    torch._dynamo.reset()
    compiled: Any = {"compile": {"backend": "aot_eager"}, "blocks": "layers.*"}
    stages = stages_of([stage_of(model, i) for i in range(2)], model, **options, **compiled)
    assert type(stages[1].layers["2"]).__name__ == "Block"
    assert_whole(stages, whole_of(model, **options), batches(3, 4))


def test_controls_of_a_stage_that_draws_nothing() -> None:
    """All stages run the same code, so none of them refuses it."""
    model = net()
    stages = stages_of([stage_of(model, i) for i in range(2)], model, BernoulliDropout("layers.0", 0.5), weight_l2=0.1)
    for stage in stages:
        graphreg.set_ranks(stage, "same")
        graphreg.set_strength(stage, "dropout", 0.3)
        with graphreg.noise_on(stage), graphreg.frozen_noise(stage):
            stage(torch.zeros(3, 4 if stage is stages[0] else 8).double())
        state = graphreg.rng_state(stage)
        assert len(state["streams"]) == (1 if stage is stages[0] else 0) and state["ranks"] == "same"
        graphreg.set_rng_state(stage, state)
    with pytest.raises(graphreg.GraphRegError, match="this module draws no noise"):
        graphreg.set_ranks(stages_of([stage_of(model, 0)], model, weight_l2=0.1)[0], "same")


def test_stripped_it_is_the_stage() -> None:
    model = net()
    part = stage_of(model, 1).eval()
    x = torch.randn(3, 8).double()
    stage = stages_of([part], model, hidden_dropout=0.2, weight_l2=0.1)[0]
    torch.testing.assert_close(graphreg.strip(stage)(x), part(x))


def test_by_export() -> None:
    options, model = WAYS["splices and penalties"], net()
    traced = graphreg.trace(model, torch.zeros(3, 4).double(), "export")
    parts, sizes = [stage_of(model, i) for i in range(2)], (4, 8)
    stages = [
        stages_of([part], traced, example_inputs=torch.zeros(3, n).double(), **options)[0] for part, n in zip(parts, sizes, strict=True)
    ]
    assert_whole(stages, whole_of(model, **options), batches(3, 4))


def test_report_and_code() -> None:
    model = net()
    stage = stages_of([stage_of(model, 1)], model, hidden_l1=0.3, weight_l2={"weight": 0.1, "reduction": "sum"})[0]
    hidden, weights = graphreg.report(stage).regularizers
    assert hidden.notes == ("its share, 4 of 9, in the mean over the values of the whole model",)
    assert weights.notes[0] == "sum over 5 parameters"
    assert "of = 9" in stage.code and "scaled by 1/2 in each microbatch" in graphreg.report(stage).text(None)
    decays = [graphreg.report(module).regularizers[0].notes[-1] for module in stages_of([stage_of(model, 0, 1)], model, weight_l2=0.1)]
    decays += [graphreg.report(whole_of(model, weight_l2=0.1)).regularizers[0].notes[-1]]
    assert decays[0] == decays[1] and decays[0].startswith("equivalent SGD weight_decay: ")
    last = graphreg.report(stages_of([stage_of(model, 1)], model, WeightL2("last.*", 0.1))[0]).regularizers[0].notes[-1]
    assert last == graphreg.report(whole_of(model, WeightL2("last.*", 0.1))).regularizers[0].notes[-1]


def test_the_page() -> None:
    assert run_page("pipeline.md")["same"]


def test_the_page_has_the_options_and_the_defaults() -> None:
    told = dict(re.findall(r"^\| `(\w+)=(\S*)` \|", (DOCS / "pipeline.md").read_text(), re.MULTILINE))
    parameters = inspect.signature(graphreg.regularize_stage).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    shared = inspect.signature(graphreg.regularize).parameters
    assert {n: v for n, v in own.items() if n in shared} == {n: p.default for n, p in shared.items() if n in own}
    lacks = {"regularizers", "keywords", "penalties", "verify", "prove", "keep"}
    assert own.keys() - shared.keys() <= told.keys() and {*shared} - {*own, "model"} == lacks
    assert {name: str(own[name]) for name, default in told.items() if default} == {n: d for n, d in told.items() if d}


def test_from_a_recipe() -> None:
    model = net()
    told = graphreg.recipe(whole_of(model, hidden_dropout=0.2, weight_l2=0.1))
    stages = stages_of([stage_of(model, i) for i in range(2)], model, recipe=told, rng=None, scale=1)
    assert_whole(stages, whole_of(model, hidden_dropout=0.2, weight_l2=0.1), batches(3, 4))


def test_scales() -> None:
    """With ``scale_grads`` the schedule divides; a scaler's factor and a function's are divided by the number of microbatches."""
    model, x = net(), batches(3, 4)[0]
    found = []
    for options in ({"scale_grads": True}, {"scale_grads": True, "scale": 4.0}, {}, {"scale": 8.0}, {"scale": lambda: torch.tensor(8.0)}):
        stage = stages_of([stage_of(model, 0)], model, weight_l2=0.5, **options)[0]
        stage(x).sum().mul(0).backward()
        found.append(stage.first.weight.grad.clone())
    one = found[0]
    torch.testing.assert_close(found, [one, 4 * one, one / 2, 4 * one, 4 * one])


class Masked(nn.Module):
    def __init__(self, *layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Linear(3, 3, dtype=torch.double) for _ in range(2)]
        self.layers = nn.ModuleDict({str(i): made[i] for i in layers})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


class Unmasked(Masked):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


class MeanOver(graphreg.Penalty):
    mask: graphreg.ModelInput = None

    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        return (z.abs() * mask[:, None]).sum() / mask.sum()


def test_an_input_of_the_model_that_a_formula_takes() -> None:
    """The stage that takes it has the penalty of the whole model; the error of a stage that does not says how to pass it."""
    penalty = MeanOver("tanh_1", 0.5, mask="mask")
    (x, _, _, _), mask = batches(4, 3), torch.tensor([True, False, True, True])
    whole = Masked(0, 1)
    module = graphreg.regularize(copy.deepcopy(whole), penalty, penalties="attach", scale=1.0)
    module(x, mask).sum().backward()
    parts = Unmasked(0), Masked(1)
    last = graphreg.regularize_stage(parts[1], penalty, whole=whole, rng=5, microbatches=1, scale_grads=False)
    last(parts[0](x), mask).sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert {name: p.grad for part in parts for name, p in part.named_parameters()}.keys() == expected.keys()
    for part in parts:
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])
    sentence = (
        r"meanover at tanh_1: mask='mask' names an input of the model that the stage does not take\. Let its forward take mask, and "
        r"pass it to schedule\.step by that name\."
    )
    with pytest.raises(graphreg.RegularizerError, match=sentence):
        graphreg.regularize_stage(Unmasked(1), penalty, whole=whole, rng=5, microbatches=1)
