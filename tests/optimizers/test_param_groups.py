"""``param_groups``: which parameter is in which group, with which options, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn

import graphreg
from graphreg import NoMatchError, RegularizerError, by_depth, param_groups


class Words(nn.Module):
    """A small transformer: its head is tied to its words."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.tensor(1.0))
        self.words, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        z = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.cls_token * self.scale
        for layer in self.layers:
            z = z + layer(z)
        result: Tensor = self.head(self.norm(z))
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.back = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.back(self.wide(self.norm(z)).relu())
        return result


def of_name(groups: Any, option: str) -> dict[str, Any]:
    """The value of an option for each parameter that a group has, by name."""
    return {name: group.get(option) for group in groups for name in group["param_names"]}


MATRICES = {f"layers.{i}.{name}.weight" for i in range(3) for name in ("wide", "back")}


# Which parameter is in which group


def test_the_table_by_hand() -> None:
    model = Words()
    drawn, attributes = torch.get_rng_state(), list(vars(model))
    selectors: Any = {"layers.*": {"lr": 0.1}, "layers.2.*": {"lr": 0.2, "betas": (0.9, 0.95)}, "positions.*": "frozen"}
    groups = param_groups(model, selectors, default={"lr": 1e-3, "weight_decay": 0.05}, decay="standard")
    assert (
        groups.text()
        == """\
Words: 23 parameters in 5 groups, 1 frozen
group   lr     weight_decay  betas        parameters  elements  names
0       0.001  0                          5           41        cls_token, scale and 3 more
1       0.1    0                          8           40        layers.0.norm.weight, layers.0.norm.bias and 6 more
2       0.1    0.05                       4           128       layers.0.wide.weight, layers.0.back.weight and 2 more
3       0.2    0             (0.9, 0.95)  4           20        layers.2.norm.weight, layers.2.norm.bias and 2 more
4       0.2    0.05          (0.9, 0.95)  2           64        layers.2.wide.weight, layers.2.back.weight
frozen                                    1           20        positions.weight"""
    )
    assert torch.equal(torch.get_rng_state(), drawn) and list(vars(model)) == attributes and model.training
    named = dict(model.named_parameters())
    assert all(p is named[name] for g in groups for p, name in zip(g["params"], g["param_names"], strict=True))
    assert groups.frozen == ("positions.weight",) and model.positions.weight.requires_grad
    before = str(groups)
    torch.optim.AdamW(groups)  # adds its defaults to the groups
    assert str(groups) == before and json.loads(json.dumps(groups.to_dict()))["frozen"] == ["positions.weight"]
    assert type(groups[0]["params"][0]) is nn.Parameter and len(copy.deepcopy(groups)) == 5


@hypothesis.given(
    st.dictionaries(
        st.sampled_from(["*", "layers.*", "**.weight", "**.bias", "**@LayerNorm", "!layers.1.*", ("words.*", "scale")]),
        st.one_of(st.just("frozen"), st.fixed_dictionaries({}, optional={"lr": st.sampled_from([0.1, 0.2]), "weight_decay": st.just(0.3)})),
        max_size=4,
    ),
    st.sampled_from([None, "standard"]),
)
def test_each_trainable_parameter_is_in_one_group(selectors: Any, decay: Any) -> None:
    """Against a loop over the parameters; that the later option wins, too."""
    model = Words()
    model.norm.bias.requires_grad_(False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {selector: options for selector, options in selectors.items() if options}
    found = {selector: set(graphreg.named_parameters(model, selector)) for selector in wanted}
    frozen = {name for selector, options in wanted.items() if options == "frozen" for name in found[selector]}
    try:
        groups = param_groups(model, wanted, default={"lr": 1.0}, decay=decay)
    except RegularizerError as error:
        assert frozen and ("tied" in str(error) or "left to train" in str(error))
        return
    inside = [name for group in groups for name in group["param_names"]]
    assert sorted(inside) == sorted(names - frozen) and set(groups.frozen) == frozen | {"norm.bias"}
    for name, lr in of_name(groups, "lr").items():
        rates = [each["lr"] for selector, each in wanted.items() if each != "frozen" and name in found[selector] and "lr" in each]
        assert lr == (rates or [1.0])[-1]
    keys = [json.dumps({key: value for key, value in group.items() if key not in ("params", "param_names")}) for group in groups]
    assert len(set(keys)) == len(keys)


def test_it_trains_as_groups_by_hand() -> None:
    model = Words()
    twin = copy.deepcopy(model)
    decayed = [p for name, p in twin.named_parameters() if name in MATRICES]
    others = [p for name, p in twin.named_parameters() if name not in MATRICES]
    by_hand = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.3}], lr=0.01)
    ours = torch.optim.AdamW(param_groups(model, default={"weight_decay": 0.3}, decay="standard"), lr=0.01)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.arange(5)[None]
    for _ in range(2):
        for run, optimizer in ((compiled, ours), (twin, by_hand)):
            optimizer.zero_grad()
            run(ids).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# The usual decay


def test_the_standard_rule() -> None:
    groups = param_groups(Words(), default={"weight_decay": 0.1}, decay="standard")
    assert {name for name, value in of_name(groups, "weight_decay").items() if value} == MATRICES


def test_what_is_asked_for_by_name_is_decayed() -> None:
    """A string that matches undecayed parameters alone means them; one that matches others, too, means the others."""
    asked: Any = {
        "layers.0.*": {"weight_decay": 0.2},
        "**@Embedding": {"weight_decay": 0.3},
        ("**.weight", "**.wide.bias"): {"weight_decay": 0.4},
    }
    found = of_name(param_groups(Words(), asked, decay="standard"), "weight_decay")
    assert {name for name, value in found.items() if value == 0.4} == MATRICES | {f"layers.{i}.wide.bias" for i in range(3)}
    assert {name for name, value in found.items() if value == 0.3} == {"words.weight", "positions.weight"}
    assert {value for name, value in found.items() if "norm" in name or name in ("cls_token", "scale", "layers.0.back.bias")} == {0.0}
    # Without a decay of their own, the others have the optimizer's.
    assert {"weight_decay" in group for group in param_groups(Words(), decay="standard")} == {True, False}


def test_a_models_own_lists() -> None:
    class Mixer(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"wei*"}

    class LeafNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    model = nn.Sequential(nn.Linear(4, 4), Mixer(4, 4), nn.Linear(4, 4), LeafNorm(), nn.LSTM(4, 4))
    model[2].weight._no_weight_decay = True
    groups = param_groups(model, default={"weight_decay": 0.1}, decay="standard")
    assert {name for name, value in of_name(groups, "weight_decay").items() if value} == {"0.weight", "4.weight_ih_l0", "4.weight_hh_l0"}


# Kinds of models


def test_modules_of_graphreg() -> None:
    """Parameters that regularizers learn have no decay, unless they are asked for; the model's are its own, in every form of the model."""
    model, ids = Words(), torch.arange(5)[None]
    gates: Any = {"l0_gates": {"weight": 0.1, "pattern": "layers.0.wide"}}
    module = graphreg.regularize(model, example_inputs=ids, **gates)
    selectors: Any = {"*": {"weight_decay": 0.1}, "**@Words": {"lr": 0.5}}
    groups = param_groups(module, selectors)
    found, plain = of_name(groups, "weight_decay"), param_groups(model, selectors)
    owned = {name for name in found if name.startswith("graphreg_rules.")}
    assert owned and {found[name] for name in owned} == {0.0} and {found[name] for name in found.keys() - owned} == {0.1}
    assert of_name(plain, "lr") == {name: lr for name, lr in of_name(groups, "lr").items() if name not in owned}
    assert {name for name, lr in of_name(plain, "lr").items() if lr} == {"cls_token", "scale"} and str(groups).startswith("Words: ")
    assert set(of_name(param_groups(module, {"graphreg_rules.*": {"weight_decay": 0.2}}), "weight_decay").values()) == {None, 0.2}
    steps = param_groups(module, {"*": {"lr": by_depth(decay=0.5)}}, default={"lr": 1.0})
    assert {lr for name, lr in of_name(steps, "lr").items() if name in owned} == {1.0}

    decayed: Any = {"*": {"lr": by_depth(decay=0.5)}}
    blocks = graphreg.regularize(model, example_inputs=ids, hidden_dropout=0.1, blocks="layers.*")
    assert param_groups(blocks, decayed, default={"lr": 1.0}).to_dict() == param_groups(model, decayed, default={"lr": 1.0}).to_dict()

    graphreg.regularize_(model, example_inputs=ids, hidden_dropout=0.1)
    assert param_groups(model, selectors).to_dict() == plain.to_dict()
    assert param_groups(torch.compile(model, backend="eager"), selectors).to_dict() == plain.to_dict()


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(Layer(), nn.Linear(4, 2)), peft.LoraConfig(r=2, target_modules=["wide", "back"]))
    groups = param_groups(model, {"**.lora_B.*": {"lr": 0.16}}, default={"lr": 0.01})
    found = of_name(groups, "lr")
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad} and len(groups) == 2
    assert all(lr == (0.16 if "lora_B" in name else 0.01) for name, lr in found.items()) and len(groups.frozen) == 8
    with pytest.raises(RegularizerError, match=r"selects only parameters that are frozen \(.*wide.base_layer.weight.*requires_grad_"):
        param_groups(model, {"**.base_layer.weight": {"lr": 1.0}})


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    groups = param_groups(model, {"*.weight": {"lr": 0.1}})
    optimizer = torch.optim.SGD(groups, lr=1.0)
    with pytest.raises(RegularizerError, match="0.weight has no shape yet.*Run the model once"):
        param_groups(model, decay="standard")
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    assert len(groups[0]["params"]) == 2 and "elements" not in str(groups)
    assert [len(group["params"]) for group in param_groups(model, decay="standard")] == [1, 3]


@contextmanager
def mesh() -> Iterator[Any]:
    hook = sys.excepthook  # init_process_group replaces it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield dist.device_mesh.DeviceMesh("cpu", [0])
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def test_sharded_models() -> None:
    """Names, classes and groups are those of the model before ``fully_shard``; parameters are those that an optimizer needs."""
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  (it takes a second)

    selectors: Any = {"**@Linear": {"lr": 0.1}, "*": {"weight_decay": 0.1}}
    model = nn.Sequential(Layer(), Layer())
    plain = param_groups(model, selectors, decay="standard")
    with mesh() as alone:
        for layer in (model[0].wide, model[0], model):
            fully_shard(layer, mesh=alone, reshard_after_forward=False)
        model(torch.randn(2, 4)).sum().backward()
        model[0](torch.randn(2, 4))  # leaves gathered tensors in place of the parameters
        groups = param_groups(model, selectors, decay="standard")
        assert [(g["param_names"], g.get("lr"), g["weight_decay"]) for g in groups] == [
            (g["param_names"], g.get("lr"), g["weight_decay"]) for g in plain
        ]
        assert {type(p.data).__name__ for group in groups for p in group["params"]} == {"DTensor"}
        torch.optim.SGD(groups, lr=1.0).step()


# Depth


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
def test_layer_decay_is_timms(kind: str) -> None:
    import timm  # noqa: PLC0415  (it takes seconds)
    from timm.optim import param_groups_layer_decay  # noqa: PLC0415

    models: dict[str, Any] = {
        "vit": lambda: timm.models.VisionTransformer(32, 16, depth=4, embed_dim=16, num_heads=2),
        "swin": lambda: timm.models.SwinTransformer(32, 2, embed_dim=8, depths=(2, 3), num_heads=(1, 2), window_size=4),
        "convnext": lambda: timm.models.ConvNeXt(depths=(2, 1, 3, 2), dims=(4, 4, 8, 8)),
    }
    model = models[kind]()
    theirs = param_groups_layer_decay(model, 0.05, getattr(model, "no_weight_decay", set)(), layer_decay=0.65)
    default = {"lr_scale": 1.0, "weight_decay": 0.05}
    ours = param_groups(model, {"*": {"lr_scale": by_depth(decay=0.65)}}, default=default, decay="standard")
    expected = {id(p): (group["lr_scale"], group["weight_decay"]) for group in theirs for p in group["params"]}
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in ours for p in group["params"]}
    assert found.keys() == expected.keys() and all(found[each] == pytest.approx(expected[each], rel=1e-12) for each in found)


def test_values_by_depth() -> None:
    """Embedding, three layers (the last one with the norm behind it), and no head, because it is tied to the embedding."""
    model = Words()
    decayed = of_name(param_groups(model, {"*": {"lr": by_depth(decay=0.5)}}, default={"lr": 0.8}), "lr")
    ramp = of_name(param_groups(model, {"*": {"lr": by_depth(0.1, 0.4)}}), "lr")
    for name in decayed:
        level = 3 if name.startswith("norm") else int(name[7]) + 1 if name.startswith("layers") else 0
        assert math.isclose(decayed[name], 0.8 * 0.5 ** (3 - level)) and math.isclose(ramp[name], 0.1 * (level + 1))
    # The factor is 1 in the last block that is selected. An earlier selector may give the base.
    part = of_name(param_groups(model, {"*": {"lr": 0.8}, "layers.[01].*": {"lr": by_depth(decay=0.5)}}), "lr")
    assert part["layers.0.back.bias"] == 0.4 and part["layers.1.back.bias"] == part["layers.2.back.bias"] == 0.8
    ends = of_name(param_groups(model, {("words.*", "norm.*"): {"lr": by_depth(decay=0.5)}}, default={"lr": 0.8}), "lr")
    assert ends["words.weight"] == 0.1 and ends["norm.bias"] == ends["layers.0.norm.bias"] == 0.8


def test_experts_and_adapted_projections_are_no_blocks() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList(Layer() for _ in range(2))})
            self.attention = nn.ModuleDict({"query": Layer(), "key": Layer()})

    model = nn.Sequential(nn.Embedding(3, 4), Expert(), Expert())
    found = of_name(param_groups(model, {"*": {"lr": by_depth(decay=0.5)}}, default={"lr": 1.0}), "lr")
    assert {name[0]: lr for name, lr in found.items()} == {"0": 0.25, "1": 0.5, "2": 1.0} and len(set(found.values())) == 3


# Frozen


def test_a_tied_parameter_needs_all_its_names() -> None:
    model = Words()
    with pytest.raises(
        RegularizerError, match=r"'frozen' selects words.weight, which is tied to head.weight: .* Freeze 'head.weight', too, or"
    ):
        param_groups(model, {"words.*": "frozen"}, freeze=True)
    assert all(p.requires_grad for p in model.parameters())
    groups = param_groups(model, {"words.*": "frozen", ("head.*", "scale"): "frozen", "*": {"lr": 0.1}}, freeze=True)
    assert set(groups.frozen) == {"words.weight", "scale"} == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert param_groups(model, {lambda site: site.name == "words.weight": "frozen"}).frozen == ("scale", "words.weight")


# What is refused


@pytest.mark.parametrize(
    ("selectors", "sentence"),
    [
        ({"layer.*": {"lr": 1.0}}, r"'layer.*' matches no parameter of Words. Near names: layers"),
        ({("scale", "scael"): "frozen"}, r"'scael' matches no parameter of Words. Near names: scale"),
        ({"layers.1": {"lr": 1.0}}, r"'layers.1' is a module; 'layers.1.*' selects its parameters"),
        ({"*#hidden": {"lr": 1.0}}, r"#hidden is a role of values, and param_groups acts on a parameter"),
        ({"*": 0.1}, r"'\*' has 0.1; give a dict of the optimizer's options.*or 'frozen'"),
        ({"*": {}}, r"'\*' has no options. Give some, 'frozen', or leave it out"),
        ({"*": {"params": []}}, r"'\*' gives 'params', which the selectors decide"),
        ({"*": {"lr": "1e-4"}}, r"gives lr='1e-4'. A number in quotes is a string"),
        ({"*": {"lr": graphreg.schedules.linear(0, 1, 9)}}, r"an optimizer's options follow no schedule.*torch.optim.lr_scheduler"),
        ({"*": {"lr": by_depth(decay=0.5)}}, r"multiplies a number that the default or an earlier selector gives, and cls_token has none"),
        ({"norm.*": {"lr": by_depth(0.1, 0.2)}}, r"needs parameters in two blocks or more, and all that it selects are in one"),
        ({"*": "frozen"}, r"no parameter of Words is left to train: all 24 are frozen"),
        ([], r"param_groups: \[\] is not allowed; give a dict of selectors to options"),
        ([("*", {})], r"is not allowed; give a dict of selectors to options"),
    ],
)
def test_refused(selectors: Any, sentence: str) -> None:
    with pytest.raises((NoMatchError, RegularizerError), match=sentence):
        param_groups(Words(), selectors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decay": "usual"}, r"decay='usual' is not allowed; give 'standard' or None"),
        ({"default": 0}, r"default has 0; give a dict of the optimizer's options"),
        ({"default": 0.1}, r"default has 0.1; give a dict of the optimizer's options"),
        (
            {"default": {"lr": by_depth(0, 1)}},
            r"default has lr=by_depth\(0, 1\); give a value by depth to a selector: \{'\*': \{'lr': ...\}\}",
        ),
        ({"recipe": {"hidden_dropout": 0.1}}, r"the recipe has no param_groups"),
        (
            {"recipe": {"param_groups": {"selector": {}}}},
            r"the recipe, at param_groups: 'selector' is no key of param_groups.*Near keys: selectors",
        ),
        ({"recipe": {"param_groups": {"selectors": ["*"]}}}, r"selectors is a dict of selectors to options, or a list of pairs"),
        ({"recipe": {"param_groups": 3}}, r"this must be a dict with some of selectors, default, decay, not 3"),
    ],
)
def test_options_refused(options: Any, sentence: str) -> None:
    with pytest.raises(RegularizerError, match=sentence):
        param_groups(Words(), **options)


def test_no_model() -> None:
    with pytest.raises(RegularizerError, match=r"the model is \[\]; give a torch.nn.Module"):
        param_groups([])  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.0, 1.5, "a", True, math.nan])
def test_a_decay_that_is_none(decay: Any) -> None:
    with pytest.raises(RegularizerError, match=r"by_depth: decay=.* is not allowed; give one number in \(0, 1\]"):
        by_depth(decay=decay)
    with pytest.raises(RegularizerError, match="together with first or last"):
        by_depth(0, 1, decay=0.5)  # type: ignore[call-overload]
    with pytest.raises(RegularizerError, match=r"weight is by_depth\(decay=0.5\); it must be a finite number"):
        graphreg.build("weight_l2", weight=by_depth(decay=0.5))


# Recipes


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
def test_recipes(suffix: str, tmp_path: Any) -> None:
    model = Words()
    last: Any = {"eps": 1e-3, "foreach": False}
    selectors: Any = {"*": {"lr": by_depth(decay=0.5), "betas": (0.9, 0.95)}, "positions.*": "frozen", "norm.*": last}
    groups = param_groups(model, selectors, default={"lr": 0.1, "weight_decay": 0.05}, decay="standard")
    module = graphreg.regularize(model, example_inputs=torch.arange(5)[None], hidden_dropout=0.1, rng=0)
    both = {**graphreg.recipe(module), **groups.recipe()}
    from graphreg.recipes.files import write  # noqa: PLC0415

    write(tmp_path / f"both.{suffix}", both)
    assert graphreg.load_recipe(tmp_path / f"both.{suffix}") == both
    again = param_groups(model, recipe=tmp_path / f"both.{suffix}")
    assert again.to_dict() == groups.to_dict()
    assert graphreg.strengths(graphreg.regularize(model, recipe=both, example_inputs=torch.arange(5)[None])) == {"hidden_dropout": 0.1}
    # The call's come after those of the recipe.
    assert param_groups(model, {"positions.*": {"lr": 9.0}}, recipe=both, default={"weight_decay": 7.0}).frozen == ()


def test_selectors_in_a_recipe() -> None:
    groups = param_groups(Words(), {("scale", "norm.*"): {"lr": by_depth(0.1, 0.2)}})
    asked = groups.recipe()["param_groups"]
    assert asked == {"selectors": [[["scale", "norm.*"], {"lr": {"by_depth": [0.1, 0.2]}}]]}
    assert param_groups(Words(), recipe={"param_groups": asked}).to_dict() == groups.to_dict()
    with pytest.raises(RegularizerError, match="is a function, which a recipe cannot hold. Write it as text"):
        param_groups(Words(), {lambda site: True: {"lr": 0.1}}).recipe()
    with pytest.raises(RegularizerError, match="lr is Tensor of shape .*, which a recipe cannot hold"):
        param_groups(Words(), default={"lr": torch.tensor(0.1)}).recipe()
