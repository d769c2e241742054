"""Every mistake a stranger can make: a GraphRegError that says what was given, what is allowed and what to do.

After each the model is as it was before, attribute by attribute.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphreg
from graphreg import GraphRegError, NoMatchError, Penalty, RegularizerError, Splice, TraceError, regularize
from graphreg.passes import BernoulliDropout, Contractive, GaussianNoise, HiddenL1, WeightL1, WeightL2, WeightNoise

Call = Callable[[nn.Module], object]


class Same:
    """A thing, equal to itself alone; it is kept alive, so that no other can take its place."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self.thing).__name__} at {id(self.thing):#x}"


def _content(value: object) -> object:
    if isinstance(value, dict):
        return Same(value), [(key, Same(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return Same(value), [Same(item) for item in value]
    return (Same(value), sorted(value)) if isinstance(value, set) else Same(value)


def fingerprint(model: nn.Module) -> dict[str, object]:
    """All that a model is: the attributes of each module in order, hooks and modes with them, its tensors, its state_dict."""
    tensors = {n: (Same(t), t._version, t.requires_grad, Same(t.grad)) for n, t in model.named_parameters(remove_duplicate=False)}
    buffers = {n: (Same(t), t._version) for n, t in model.named_buffers(remove_duplicate=False)}
    state = model.state_dict()
    return {
        "modules": {name: Same(module) for name, module in model.named_modules(remove_duplicate=False)},
        "classes": [(type(module), Same(type(module).forward)) for module in model.modules()],
        "modes": {name: module.training for name, module in model.named_modules(remove_duplicate=False)},
        "attributes": {name: [(key, _content(value)) for key, value in m.__dict__.items()] for name, m in model.named_modules()},
        "tensors": tensors,
        "buffers": buffers,
        "state_dict": (list(state), {key: dict(value) for key, value in getattr(state, "_metadata", {}).items()}),
    }


@contextmanager
def refused(model: nn.Module, kind: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """What happens inside is refused with ``kind`` and a sentence like ``match``, and the model does not notice."""
    before = fingerprint(model)
    with pytest.raises(kind, match=match) as caught:
        yield caught
    assert isinstance(caught.value, GraphRegError)
    assert fingerprint(model) == before


def net() -> nn.Sequential:
    """hid1, act1, hid2, act2, out; with hooks, a module in another mode, and attributes of its own to lose."""
    model = nn.Sequential(OrderedDict(hid1=nn.Linear(4, 6), act1=nn.Tanh(), hid2=nn.Linear(6, 5), act2=nn.Tanh(), out=nn.Linear(5, 2)))
    model.hid2.eval()
    model.act1.register_forward_hook(lambda module, args, out: None)
    model.register_forward_pre_hook(lambda module, args: None)
    model.note = ["mine"]
    return model


class Several(nn.Module):
    """A submodule that returns a dict, and a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.rnn, self.head = Pair(), nn.GRU(3, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.pair(x)
        out, last = self.rnn(found["left"])
        return self.head(out + found["right"] + last.transpose(0, 1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"left": self.a(x), "right": self.b(x)}


def never(site: graphreg.Site) -> bool:
    return False


def table(*rows: tuple[str, Call, str]) -> Any:
    return pytest.mark.parametrize(("call", "match"), [pytest.param(call, match, id=name) for name, call, match in rows])


def test_the_kinds_are_the_builtin_ones_too() -> None:
    assert issubclass(NoMatchError, LookupError) and issubclass(RegularizerError, ValueError)
    assert all(issubclass(kind, GraphRegError) for kind in (NoMatchError, RegularizerError, TraceError))


def test_the_fingerprint_sees_changes() -> None:
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m.hid1.train(False),
        lambda m: setattr(m.act2, "extra", 1),
        lambda m: setattr(m.hid1, "weight", nn.Parameter(m.hid1.weight.detach())),
        lambda m: m.hid1.bias.requires_grad_(False),
        lambda m: torch.nn.init.zeros_(m.hid1.weight),
        lambda m: m.act1.register_forward_hook(lambda module, args, out: None),
        lambda m: m._forward_pre_hooks.clear(),
        lambda m: m.add_module("graphreg_rules", nn.Identity()),
        lambda m: m.note.append("yours"),
        lambda m: m.register_buffer("step", torch.zeros(())),
    ]
    for change in changes:
        model = net()
        before = fingerprint(model)
        assert fingerprint(model) == before
        change(model)
        assert fingerprint(model) != before, inspect.getsource(change)


# Keywords and options


@table(
    ("a keyword misspelt", lambda m: regularize(m, hiden_dropout=0.1), r"'hiden_dropout' is no.*Near keys: hidden_dropout.*registered"),
    ("a key misspelt", lambda m: regularize(m, wieght_l2=0.1), r"'wieght_l2' is no option.*Near keys: .*weight_l2.*registered"),
    ("an option misspelt", lambda m: regularize(m, exampel_inputs=None), r"'exampel_inputs' is no option.*Near keys: example_inputs"),
    ("another option misspelt", lambda m: regularize(m, mising="warn"), r"'mising' is no option.*Near keys: missing"),
    ("a keyword like no other", lambda m: regularize(m, zzz=0.1), r"'zzz' is no option.*no key.*graphreg\.registered\(\) lists"),
    ("a keyword that is off", lambda m: regularize(m, hiden_dropout=0), r"'hiden_dropout'.*hidden_dropout"),
    ("from_kwargs", lambda m: graphreg.from_kwargs(m, hiden_dropout=0.1), r"'hiden_dropout'.*hidden_dropout"),
    ("in regularizers=", lambda m: regularize(m, regularizers={"hiden_dropout": 0.1}), r"'hiden_dropout'.*hidden_dropout"),
    ("build", lambda m: graphreg.build("dropot", weight=0.1), r"no regularizer is called 'dropot'.*Near keys: dropout.*registered"),
    ("build without a text", lambda m: graphreg.build(None, weight=0.1), r"no regularizer is called None.*registered"),
)
def test_unknown_keyword(call: Call, match: str) -> None:
    model = net()
    with refused(model, NoMatchError, match):
        call(model)


@table(
    ("misspelt", lambda m: regularize(m, WeightL2("*", 0.1, reducton="sum")), r"WeightL2 has no option 'reducton'.*Near.*: reduction"),
    ("misspelt in a dict", lambda m: regularize(m, weight_l2={"weight": 0.1, "reducton": "sum"}), r"no option 'reducton'.*reduction"),
    ("misspelt in build", lambda m: graphreg.build("weight_l2", wieght=0.1), r"no option 'wieght'.*Near options: weight"),
    ("another name for the weight", lambda m: graphreg.build("dropout", rate=0.1), r"BernoulliDropout has no option 'rate'.*weight"),
    ("a class variable", lambda m: WeightL2("*", 0.1, keys=("x",)), r"WeightL2 has no option 'keys'"),
    ("another class variable", lambda m: WeightL2("*", 0.1, on="values"), r"WeightL2 has no option 'on'"),
    ("a penalty without it", lambda m: HiddenL1("*", 0.1, reduction="sum"), r"HiddenL1 has no option 'reduction'"),
    ("a value that is not allowed", lambda m: WeightL2("*", 0.1, reduction="max"), r"reduction='max' is not allowed.*'mean' or 'sum'"),
    (
        "clean, of a parameter",
        lambda m: WeightL2("*", 0.1, clean=True),
        r"WeightL2: clean=True is not allowed; clean must be False, because penalties",
    ),
    ("clean, of no kind", lambda m: HiddenL1("*", 0.1, clean=2), r"HiddenL1: clean=2 is not allowed; clean must be True or False"),
    ("by position", lambda m: WeightL2("*", 0.1, "sum"), r"WeightL2 takes a selector and a weight by position.*by name"),
)
def test_unknown_option(call: Call, match: str) -> None:
    model = net()
    with refused(model, RegularizerError, match):
        call(model)


def test_the_options_that_an_error_lists_are_options() -> None:
    with pytest.raises(RegularizerError) as caught:
        WeightL2("*", 0.1, reducton="sum")
    listed = str(caught.value).rpartition("Options: ")[2].rstrip(".").split(", ")
    assert sorted(listed) == ["clean", "expect", "name", "pattern", "reduction", "strength", "weight"]


@table(
    ("front_end", lambda m: regularize(m, weight_l2=0.1, front_end="symbolc"), r"front_end='symbolc' is unknown.*'auto', 'symbolic'"),
    ("front_end None", lambda m: graphreg.trace(m, front_end=None), r"front_end=None is unknown.*'auto'"),
    ("missing", lambda m: regularize(m, weight_l2=0.1, missing="warning"), r"missing='warning' is unknown.*'error', 'warn' or 'ignore'"),
    ("missing None", lambda m: regularize(m, weight_l2=0.1, missing=None), r"missing=None is unknown.*'error', 'warn'"),
    ("penalties", lambda m: regularize(m, weight_l2=0.1, penalties="atach"), r"penalties='atach' is unknown.*'return' or 'attach'"),
    ("penalties True", lambda m: regularize(m, weight_l2=0.1, penalties=True), r"penalties=True is unknown.*'return' or 'attach'"),
    ("compile", lambda m: regularize(m, weight_l2=0.1, compile="yes"), r"compile='yes' is not allowed.*True, False or a dict"),
    ("compile option", lambda m: regularize(m, weight_l2=0.1, compile={"nope": 1}), r"torch.compile has no option 'nope'; it has backend"),
    ("compile 1", lambda m: regularize(m, weight_l2=0.1, compile=1), r"compile=1 is not allowed.*True, False or a dict"),
    ("compile None", lambda m: regularize(m, weight_l2=0.1, compile=None), r"compile=None is not allowed.*True, False or a dict"),
    ("scale of returned", lambda m: regularize(m, weight_l2=0.1, scale=2), r"scale= is for penalties='attach'"),
    ("scale below 0", lambda m: regularize(m, weight_l2=0.1, penalties="attach", scale=-2), r"scale=-2 is not allowed.*above 0"),
)
def test_value_of_an_option_of_regularize(call: Call, match: str) -> None:
    model = net()
    with refused(model, GraphRegError, match):
        call(model)


# Weights


FINITE = r"must be a finite number\..*Write "


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (1.0, r"weight=1\.0 is not allowed.*in \[0, 1\)"),
        (1.5, r"weight=1\.5 is not allowed.*in \[0, 1\)"),
        (-0.1, r"weight=-0\.1 is not allowed.*in \[0, 1\)"),
        (math.nan, r"weight is nan.*" + FINITE),
        (math.inf, r"weight is inf.*" + FINITE),
        (-math.inf, r"weight is -inf.*" + FINITE),
        ("0.1", r"weight is '0\.1'.*" + FINITE),
        ([0.1], r"weight is \[0\.1\].*" + FINITE),
        (1j, r"weight is 1j.*" + FINITE),
        (torch.tensor([0.1, 0.2]), r"weight is tensor.*" + FINITE),
        pytest.param(10**400, r"weight.*finite number", id="an int that no float can hold"),
    ],
    ids=repr,
)
def test_weight(value: Any, match: str) -> None:
    model = net()
    for call in (
        lambda: regularize(model, BernoulliDropout("*", value)),
        lambda: regularize(model, hidden_dropout=value),
        lambda: regularize(model, dropout={"hid1": value}),
        lambda: regularize(model, hidden_dropout={"weight": value}),
        lambda: graphreg.build("dropout", weight=value),
    ):
        with refused(model, RegularizerError, "BernoulliDropout( hidden_dropout| dropout)?: " + match):
            call()


@pytest.mark.parametrize("cls", [WeightL2, HiddenL1, GaussianNoise])
def test_weight_below_zero(cls: type[graphreg.Regularizer]) -> None:
    model = net()
    with refused(model, RegularizerError, rf"{cls.__name__}: weight=-1\.0 is not allowed.*0 or more"):
        regularize(model, cls("*", -1))


@hypothesis.given(st.floats().filter(lambda x: not 0 <= x < 1))
@hypothesis.example(-5e-324)
@hypothesis.example(math.nextafter(1.0, 2.0))
def test_no_rate_outside_its_range_passes(rate: float) -> None:
    with pytest.raises(RegularizerError, match="weight"):
        BernoulliDropout("*", rate)


def test_none_as_a_weight() -> None:
    model = net()
    with refused(model, RegularizerError, r"WeightL2: weight is None.*" + FINITE):
        regularize(model, WeightL2("*", None))
    with refused(model, RegularizerError, r"HiddenL1: weight is None.*" + FINITE):
        regularize(model, hidden_l1={"weight": None})


@table(
    ("only a selector", lambda m: regularize(m, WeightL2("*")), r"WeightL2: weight was not given.*" + FINITE),
    ("nothing", lambda m: regularize(m, BernoulliDropout()), r"BernoulliDropout: weight was not given.*" + FINITE),
    ("build", lambda m: graphreg.build("weight_l2"), r"WeightL2: weight was not given.*" + FINITE),
    ("a dict", lambda m: regularize(m, weight_l2={"pattern": "*"}), r"weight_l2=\{'pattern': '\*'\} has no 'strength'.*\{'strength': 0\.1"),
    ("a prefixed dict", lambda m: regularize(m, hidden_dropout={"expect": 2}), r"\{'expect': 2\} has no 'strength'.*'strength': 0\.1"),
    ("an empty dict", lambda m: regularize(m, hidden_l1={}), r"hidden_l1=\{\} has no 'strength'.*\{'strength': 0\.1"),
)
def test_missing_weight(call: Call, match: str) -> None:
    model = net()
    with refused(model, RegularizerError, match):
        call(model)


def test_pattern_in_a_prefixed_keyword() -> None:
    model = net()
    with refused(model, RegularizerError, r"hidden_dropout names its own sites.*dropout=\{selector: rate\}"):
        regularize(model, hidden_dropout={"weight": 0.1, "pattern": "hid1"})


# Selectors


@pytest.mark.parametrize(
    ("selector", "match"),
    [
        (0.1, r"a string, a sequence of strings or a function of a site, not 0\.1.*selector comes first and the weight second"),
        (None, r"a string, a sequence of strings or a function of a site, not None"),
        ({"hid1": 0.1}, r"a string, a sequence of strings or a function of a site, not \{'hid1': 0\.1\}"),
        (nn.Linear, r"a string, a sequence of strings or a function of a site, not <class"),
        ("", r"'' is no selector.*Write \[!\]name\[@op\]\[:port\]\[#role\]"),
        ("  ", r"'  ' is no selector.*Write \[!\]name"),
        ("!", r"'!' is no selector.*Write \[!\]name"),
        ("hid1@", r"'hid1@' is no selector.*Write \[!\]name"),
        ("hid1:", r"'hid1:' is no selector.*Write \[!\]name"),
        (["hid1", ""], r"'' is no selector.*Write \[!\]name"),
        ([], r"one string or several, not \[\].*'\*' means the default sites"),
        ((), r"one string or several, not \(\).*'\*' means the default sites"),
        (["hid1", 3], r"one string or several, not \['hid1', 3\]"),
        ([None], r"one string or several, not \[None\]"),
        (b"hid1", r"one string or several, not b'hid1'"),
        ("hid1#hiden", r"'hid1#hiden' asks for the role 'hiden'.*input, hidden, output"),
        ("#", r"'#' asks for the role ''.*input, hidden, output"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("cls", [BernoulliDropout, WeightL2])
def test_no_selector(cls: type[graphreg.Regularizer], selector: Any, match: str) -> None:
    model = net()
    with refused(model, RegularizerError, match):
        regularize(model, cls(selector, 0.1))


@pytest.mark.parametrize("selector", [0.1, None, "", ()], ids=repr)
def test_no_selector_in_a_dict_of_rates(selector: Any) -> None:
    model = net()
    with refused(model, RegularizerError, "selector"):
        regularize(model, dropout={selector: 0.1})


@table(
    ("nothing near", lambda m: BernoulliDropout("zzz", 0.1), r"'zzz' matches no value of Sequential\. List all: graphreg\.names\(model\)"),
    ("near names", lambda m: BernoulliDropout("hid3", 0.1), r"'hid3' matches no value of Sequential.*: hid[12], hid[12].*graphreg\.names"),
    ("one of several", lambda m: BernoulliDropout(["hid1", "hdi2"], 0.1), r"'hdi2' matches no value.*Near names: hid2.*graphreg\.names"),
    ("another case", lambda m: BernoulliDropout("HID1", 0.1), r"'HID1' matches no value of Sequential.*graphreg\.names"),
    ("a glob", lambda m: BernoulliDropout("layer5.*", 0.1), r"'layer5\.\*' matches no value of Sequential.*graphreg\.names"),
    ("an exclude of nothing", lambda m: BernoulliDropout(["*", "!act9"], 0.1), r"'!act9' matches no value.*Near names: act[12], act[12]"),
    ("an exclude leaves nothing", lambda m: HiddenL1(["hid1", "!hid1"], 0.1), r"\['hid1', '!hid1'\] leaves no value of Sequential.*'!'"),
    ("an exclude of all defaults", lambda m: HiddenL1(["!act1", "!act2"], 0.1), r"\['!act1', '!act2'\] leaves no value.*'!'"),
    ("a port", lambda m: BernoulliDropout("hid1:h_n", 0.1), r"'hid1:h_n' matches no value.*but not with this op.*ports out"),
    ("an op", lambda m: BernoulliDropout("hid*@Conv2d", 0.1), r"'hid\*@Conv2d' matches no value.*It has: ops Linear"),
    ("an op in another case", lambda m: BernoulliDropout("@linear", 0.1), r"'@linear' matches no value.*It has: ops .*Linear"),
    ("a role", lambda m: BernoulliDropout("hid*#hidden", 0.1), r"'hid\*#hidden' matches no value.*It has: .*roles none"),
    ("the role of others", lambda m: BernoulliDropout("act*#output", 0.1), r"'act\*#output' matches no value.*roles hidden"),
    ("a function", lambda m: BernoulliDropout(never, 0.1), r"BernoulliDropout chooses no value of Sequential.*graphreg\.names"),
    ("more than expected", lambda m: BernoulliDropout("hid*", 0.1, expect=1), r"expect=1, found 2 sites \(hid1, hid2\).*Change"),
    ("one is expected", lambda m: BernoulliDropout("hid1", 0.1, expect=2), r"expect=2, found 1 site \(hid1\).*Change"),
    ("a role of a parameter", lambda m: WeightL2("*#hidden", 0.1), r"'\*#hidden' matches no parameter.*#hidden is a role of values, and W"),
    ("fewer than expected", lambda m: BernoulliDropout("hid*", 0.1, expect=3), r"expect=3, found 2 sites \(hid1, hid2\).*Change"),
    ("no parameter", lambda m: WeightL2("hid1.wieght", 0.1), r"'hid1\.wieght' matches no parameter.*: hid1\.weight.*graphreg\.names"),
    ("a module, not a parameter", lambda m: WeightL2("hid1", 0.1), r"'hid1' matches no parameter.*Near names: hid1\.weight"),
    ("a parameter, not a value", lambda m: BernoulliDropout("*.weight", 0.1), r"'\*\.weight' matches no value of Sequential.*parameter"),
    ("1-d parameters", lambda m: WeightL2("*.bias", 0.1), r"'\*\.bias' matches no parameter of 2 dims.*hid1\.bias \(1 dim, 2 needed\)"),
)
def test_selector_that_finds_nothing(call: Callable[[nn.Module], graphreg.Regularizer], match: str) -> None:
    model = net()
    with refused(model, NoMatchError, match):
        regularize(model, call(model))


@pytest.mark.parametrize("expect", ["2", -1, 1.5, True], ids=repr)
def test_expect_is_a_count(expect: Any) -> None:
    model = net()
    with refused(model, RegularizerError, rf"expect={expect!r} is no count of sites.*whole number"):
        regularize(model, BernoulliDropout("hid*", 0.1, expect=expect))


@table(
    ("a key that is not there", lambda m: HiddenL1("pair:middle", 0.1), r"'pair:middle' matches no value of Several.*ports left, right"),
    ("no default port", lambda m: HiddenL1("pair", 0.1), r"'pair' matches no value of Several.*several ports.*pair:left, pair:right"),
    ("a port of a GRU", lambda m: HiddenL1("rnn:c_n", 0.1), r"'rnn:c_n' matches no value of Several.*ports .*h_n.*out"),
)
def test_ports(call: Callable[[nn.Module], graphreg.Regularizer], match: str) -> None:
    model = Several()
    with refused(model, NoMatchError, match):
        regularize(model, call(model))


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 2), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(3, 2), nn.ReLU())], ids=["linear", "relu", "both"]
)
def test_no_hidden_site(model: nn.Module) -> None:
    with refused(model, NoMatchError, rf"{type(model).__name__} has no.*hidden.*graphreg\.names\(model\)"):
        regularize(model, hidden_dropout=0.1)


def test_no_parameter_at_all() -> None:
    model = nn.Sequential(nn.ReLU())
    with refused(model, NoMatchError, r"Sequential has no.*parameter of 2 dims or more.*graphreg\.names\(model\)"):
        regularize(model, weight_l2=0.1)


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.text(alphabet="hidact12.out*?[]!@:#Ltanh ", min_size=0, max_size=10) | st.text(max_size=8))
@hypothesis.example("[")
@hypothesis.example("hid[")
@hypothesis.example("**")
@hypothesis.example("!!hid1")
def test_any_text_is_a_selector_or_an_error_of_ours(text: str) -> None:
    try:
        found = graphreg.plan(TRACED, BernoulliDropout(text, 0.1))
    except (NoMatchError, RegularizerError) as error:
        assert repr(text) in str(error) or repr(text)[1:-1] in str(error) or text.strip() == "*"
    else:
        assert found.edits


TRACED = graphreg.trace(net())


def test_missing_warns_or_is_silent() -> None:
    model = net()
    before = fingerprint(model)
    for selector, match in (
        ("hid3", r"'hid3' matches no value.*Near names: hid"),
        (["hid1", "hdi2"], r"'hdi2' matches no value.*Near names: hid2"),
        (["hid1", "!hid1"], r"leaves no value"),
        ("hid*@Conv2d", r"It has: ops Linear"),
    ):
        with pytest.warns(UserWarning, match=match):
            warned = regularize(model, HiddenL1(selector, 0.1), missing="warn")
        silent = regularize(model, HiddenL1(selector, 0.1), missing="ignore")  # warnings are errors here
        for module in (warned, silent):
            output, penalties = module(torch.ones(1, 4))
            assert torch.equal(output, model(torch.ones(1, 4)))
            assert (penalties["hidden_l1"].item() > 0) == (selector == ["hid1", "hdi2"])
    assert fingerprint(model) == before


def test_missing_warns_of_a_function_too() -> None:
    with pytest.warns(UserWarning, match="chooses no value of Sequential"):
        regularize(net(), BernoulliDropout(never, 0.1), missing="warn")
    regularize(net(), BernoulliDropout(never, 0.1), missing="ignore")


def test_missing_does_not_relax_expect() -> None:
    model = net()
    for missing in ("warn", "ignore"):
        with warnings.catch_warnings(), refused(model, NoMatchError, r"expect=1, found 0 sites \(none\)"):
            warnings.simplefilter("ignore")
            regularize(model, HiddenL1("hid3", 0.1, expect=1), missing=missing)


# What is no regularizer


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (BernoulliDropout, r"BernoulliDropout is a class; make an instance: BernoulliDropout\('\*', 0\.1\)"),
        (3, r"3 is no regularizer.*Give instances, e\.g\. .*or keywords"),
        ("dropout", r"'dropout' is no regularizer.*Give instances"),
        (nn.Dropout(0.1), r"Dropout\(p=0\.1.* is no regularizer.*Give instances"),
        (torch.relu, r"is no regularizer.*Give instances"),
    ],
    ids=["a class", "a number", "a text", "a module", "a function"],
)
def test_no_regularizer(given: Any, match: str) -> None:
    model = net()
    for call in (
        lambda: regularize(model, given),
        lambda: regularize(model, [WeightL2("*", 0.1), given]),
        lambda: regularize(model, regularizers=given),
        lambda: regularize(model, regularizers=[given]),
        lambda: graphreg.plan(graphreg.trace(model), given),
    ):
        with refused(model, RegularizerError, match):
            call()


def test_dict_of_keywords_by_position() -> None:
    model = net()
    with refused(model, RegularizerError, r"\{'dropout': 0\.1\} is no regularizer.*or keywords"):
        regularize(model, {"dropout": 0.1})


def test_a_keyword_given_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dict's holds, as in theanets, but not in silence."""
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("graphreg"), "warning", lambda text, *args: told.append(text % args))
    (kept,) = graphreg.from_kwargs(net(), regularizers={"dropout": 0.1}, dropout=0.2)
    assert kept.weight == 0.1 and told[0].startswith("dropout is given twice: 0.1 in regularizers={...} is used")
    assert "0.2 is not used" in told[0]
    with refused(net(), RegularizerError, "a keyword is given twice, in upper and lower case: dropout, Dropout"):
        graphreg.from_kwargs(net(), regularizers={"Dropout": 0.1}, dropout=0.2)


def test_keywords_both_ways_are_combined() -> None:
    found = graphreg.from_kwargs(net(), regularizers={"weight_l2": 0.1, "hidden_l1": 0.2}, dropout=0.3, weight_decay=0.4)
    assert [(type(each).__name__, each.weight) for each in found] == [
        ("BernoulliDropout", 0.3), ("WeightL2", 0.4), ("WeightL2", 0.1), ("HiddenL1", 0.2)
    ]  # fmt: skip


def _starts(site: graphreg.sites.Site) -> bool:
    assert site.role
    return site.shape is not None and site.shape[0] > 1


def _misspelt(site: graphreg.sites.Site) -> bool:
    return bool(site.nmae == "act1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("regularizer", "match"),
    [
        (BernoulliDropout(lambda s: s.shape[1] > 3, 0.1), r"<lambda> raised TypeError: .* site 'input' \(value, op"),
        (WeightL2(_starts, 0.1), r"<_starts> raised AssertionError.*'hid1\.weight' \(parameter"),
        (HiddenL1(_misspelt, 0.1), r"<_misspelt> raised AttributeError: .*nmae.*'input'.*example_inputs"),
        (Contractive("act1", 0.1, wrt=lambda s: 1 / 0), r"raised ZeroDivisionError: division by zero .*'input'"),
        (HiddenL1(lambda s: torch.ones(2), 0.1), r"raised RuntimeError: Boolean value.*'input'"),
    ],
    ids=["a splice", "a penalty", "an attribute", "wrt", "no answer"],
)
def test_a_predicate_that_raises(regularizer: graphreg.Regularizer, match: str) -> None:
    model = net()
    with refused(model, RegularizerError, match) as caught:
        regularize(model, regularizer)
    assert isinstance(caught.value.__cause__, Exception)


def test_a_predicate_that_raises_among_own_dropouts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    with refused(model, RegularizerError, r"the selector <lambda> raised KeyError: '1' when it was called with the site '1'"):
        regularize(model, own_dropout={lambda site: {}[site.name]: "off"})


def test_an_error_of_graphregs_in_a_predicate_is_its_own() -> None:
    model = net()

    def choose(site: graphreg.sites.Site) -> bool:
        raise NoMatchError("mine")

    with refused(model, NoMatchError, "^mine$"):
        regularize(model, HiddenL1(choose, 0.1))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.tanh(self.layer(x)))


def test_a_complex_value() -> None:
    """By its name where dtypes are known; by the call where they are not. Its absolute value is to be had by its parts."""
    model, x = Complex(), torch.ones(3, 4, dtype=torch.complex64)
    with refused(model, NoMatchError, r"'tanh' matches no value.*tanh \(complex numbers\)"):
        regularize(model, HiddenL1("tanh", 0.1), example_inputs=x)
    with refused(model, RegularizerError, "a value of torch.complex64 cannot be regularized: only floating-point values can"):
        regularize(model, HiddenL1("tanh", 0.1))(x)
    module = regularize(model, HiddenL1("view_as_real", 0.5), example_inputs=x)
    output, penalties = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    by_hand = model(x).abs().mean() * 0.5
    found = torch.autograd.grad(penalties["hidden_l1"], list(model.parameters()))
    torch.testing.assert_close(found, torch.autograd.grad(by_hand, list(model.parameters())))


# Models


class Undecided(nn.Module):
    """Asks a tensor what to do, after it wrote into itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.seen = nn.Linear(4, 4), 0, []
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.add_module("late", nn.Identity())
        return self.fc(x) if x.sum() > 0 else x  # the line that cannot be traced


class Averaging(Undecided):
    """Writes a buffer, too."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean(0)
        return super().forward(x)


@pytest.mark.parametrize("cls", [Undecided, Averaging])
def test_untraceable(cls: type[Undecided]) -> None:
    model = cls()
    source, first = inspect.getsourcelines(Undecided.forward)
    line = first + next(i for i, text in enumerate(source) if "cannot be traced" in text)
    match = rf"{cls.__name__} cannot be traced symbolically at .*{re.escape(Path(__file__).name)}:{line}: .*x\.sum\(\) > 0"
    for call in (lambda: regularize(model, weight_l2=0.1), lambda: graphreg.trace(model), lambda: graphreg.names(model)):
        with refused(model, TraceError, match + r".*submodule of its own.*torch\.fx\.wrap"):
            call()


@pytest.mark.parametrize("cls", [Undecided, Averaging])
def test_untraceable_part_becomes_opaque(cls: type[Undecided]) -> None:
    model = nn.Sequential(OrderedDict(hid1=nn.Linear(4, 4), part=cls(), out=nn.Linear(4, 2)))
    before = fingerprint(model)
    traced = graphreg.trace(model)
    assert list(traced.opaque_modules) == ["part"]
    assert fingerprint(model) == before


@table(
    ("a class", lambda m: nn.Linear, r"takes a torch\.nn\.Module, not the class Linear; make an instance"),
    ("a function", lambda m: torch.relu, r"takes a torch\.nn\.Module, not builtin_function_or_method; wrap it in a module"),
    ("a lambda", lambda m: lambda x: x, r"takes a torch\.nn\.Module, not function; wrap it in a module"),
    ("a bound forward", lambda m: m.forward, r"takes a torch\.nn\.Module, not method; wrap it in a module"),
    ("a name", lambda m: "resnet18", r"takes a torch\.nn\.Module, not str"),
    ("None", lambda m: None, r"takes a torch\.nn\.Module, not NoneType"),
    ("a list of models", lambda m: [m], r"takes a torch\.nn\.Module, not list"),
)
def test_no_model(call: Call, match: str) -> None:
    model = net()
    thing: Any = call(model)
    for use in (regularize, graphreg.trace, graphreg.names, graphreg.from_kwargs):
        with refused(model, TraceError, match):
            use(thing)


WRAPPED = r"wrapped already \({}\).*adapters, then graphreg\.regularize, then torch\.compile, then the distributed.*the inner model"


def compiled(model: nn.Module) -> Any:
    with warnings.catch_warnings():  # torch's own, on the first import of Dynamo
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.compile(model)


def test_compiled() -> None:
    model = net()
    wrapped = compiled(model)
    with refused(model, TraceError, WRAPPED.format("OptimizedModule")):
        regularize(wrapped, hidden_dropout=0.1)


def test_compiled_in_place() -> None:
    model = net()
    compiled(nn.Identity())
    model.compile()
    with refused(model, TraceError, WRAPPED.format(r"module\.compile\(\)")):
        regularize(model, hidden_dropout=0.1)


def test_data_parallel() -> None:
    wrapped = nn.DataParallel(net())
    with refused(wrapped, TraceError, WRAPPED.format("DataParallel")):
        regularize(wrapped, hidden_dropout=0.1)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed() -> None:
    wrapped = DistributedDataParallel(net())
    with refused(wrapped, TraceError, WRAPPED.format("DistributedDataParallel")):
        regularize(wrapped, hidden_dropout=0.1)


@pytest.mark.usefixtures("process_group")
def test_fully_sharded() -> None:
    model = net()
    fully_shard(model)
    with refused(model, TraceError, WRAPPED.format("FSDPModule")):
        regularize(model, hidden_dropout=0.1)


class FullyShardedDataParallel(nn.Module):
    """Stands in for torch's first one, which cannot be built without an accelerator; it is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def test_fully_sharded_by_name() -> None:
    wrapped = FullyShardedDataParallel(net())
    with refused(wrapped, TraceError, WRAPPED.format("FullyShardedDataParallel")):
        regularize(wrapped, hidden_dropout=0.1)


def test_rewritten_twice() -> None:
    model = net()
    module = regularize(model, weight_l2=0.1)
    with refused(model, TraceError, r"rewritten already.*graphreg\.strip\(module\).*regularize that"):
        regularize(module, hidden_dropout=0.1)
    with refused(model, GraphRegError, r"submodule '0' is a rewritten module.*graphreg\.strip on it"):
        regularize(nn.Sequential(module, nn.Linear(2, 2)), hidden_dropout=0.1)
    assert list(module(torch.ones(1, 4)).penalties) == ["weight_l2"]


@pytest.mark.parametrize("thing", [nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4)), "mine"], ids=lambda t: type(t).__name__)
def test_the_name_graphreg_rules_is_taken(thing: Any) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.graphreg_rules = thing

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Owner()
    with refused(model, TraceError, "graphreg_rules"):
        regularize(model, weight_l2=0.1)
    with pytest.raises(TraceError) as caught:
        regularize(model, weight_l2=0.1)
    assert "strip" not in str(caught.value), "strip refuses this model"


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_root_with_backward_hooks(register: str) -> None:
    model = net()
    getattr(model, register)(lambda *args: None)
    with refused(model, TraceError, r"Sequential has backward hooks.*Remove them, regularize, and register them on the result"):
        regularize(model, weight_l2=0.1)


@pytest.mark.parametrize(
    "inputs", [(torch.ones(1, 4), torch.ones(1)), {"y": torch.ones(1, 4)}, {"input": torch.ones(1, 4), "y": 1}, {}, ()],
    ids=["too many", "another keyword", "one keyword too many", "no keyword", "none"],
)  # fmt: skip
def test_example_inputs_that_do_not_fit(inputs: Any) -> None:
    model = net()
    for use in (lambda: regularize(model, weight_l2=0.1, example_inputs=inputs), lambda: graphreg.names(model, inputs)):
        with refused(model, TraceError, r"example_inputs do not fit Sequential\.forward\(input\): .*argument"):
            use()


@pytest.mark.parametrize("inputs", [7, "x", np.ones((1, 4))], ids=["a number", "a text", "an array of numpy"])
def test_example_inputs_of_another_kind(inputs: Any) -> None:
    model = net()
    with refused(model, GraphRegError, "example_inputs"):
        regularize(model, weight_l2=0.1, example_inputs=inputs)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.fc(x) * scale
        return y if mask is None else y * mask

    def describe(self) -> str:
        return "mine"


def test_held_argument_with_another_value() -> None:
    model, x = Optional(), torch.ones(2, 4)
    module = regularize(model, weight_l2=0.1)
    for call in (lambda: module(x, mask=x), lambda: module(x, x)):
        with refused(model, GraphRegError, r"mask was specialized to None when the model was traced.*example_inputs that carry mask"):
            call()
    with refused(model, GraphRegError, r"scale was specialized to 1\.0.*example_inputs with the scale that you need"):
        module(x, scale=2.0)
    assert torch.equal(module(x, None, scale=1.0).output, model(x))


def test_method_of_the_model() -> None:
    model = Optional()
    before = fingerprint(model)
    module = regularize(model, weight_l2=0.1)
    with pytest.raises(AttributeError, match=r"'describe' belongs to Optional.*Call it on the model itself"):
        module.describe()
    with pytest.raises(AttributeError, match=r"no attribute 'descibe'"):
        module.descibe()
    assert fingerprint(model) == before


def test_frozen() -> None:
    model = net().requires_grad_(False)
    with refused(model, RegularizerError, r"WeightL2\('\*'\) selects only parameters that are frozen \(hid1\.weight, .*Unfreeze one"):
        regularize(model, weight_l2=0.1)
    with refused(model, RegularizerError, r"hidden_l1: no parameter that can train reaches its sites.*Unfreeze a parameter"):
        regularize(model, hidden_l1=0.1)
    model.hid1.requires_grad_(True)
    with refused(model, RegularizerError, r"selects only parameters that are frozen \(hid2\.weight\)"):
        regularize(model, WeightL2("hid2.*", 0.1))
    regularize(model, weight_l2=0.1, hidden_l1=0.1, hidden_dropout=0.1)


def test_frozen_before_the_site() -> None:
    model = net()
    model.hid1.requires_grad_(False)
    with refused(model, RegularizerError, r"hidden_l1: no parameter that can train reaches its sites.*leave the penalty out"):
        regularize(model, HiddenL1("act1", 0.1))
    with refused(model, RegularizerError, r"hidden_l1: no parameter that can train reaches its sites"):
        regularize(model, HiddenL1("#input", 0.1))


class TrainsByAWrite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(-1)
        x.mul_(self.scale)
        return y.exp()


class TrainsInTrainMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).exp() if self.training else x.exp()


@pytest.mark.parametrize("kind", [TrainsByAWrite, TrainsInTrainMode])
def test_a_parameter_reaches_a_site_by_a_write_or_in_one_mode_alone(kind: type[nn.Module]) -> None:
    model = kind()
    regularize(model, HiddenL1("exp", 1.0))(torch.ones(1, 4)).penalties["hidden_l1"].backward()
    torch.testing.assert_close(model.scale.grad, torch.full((4,), 2.0).exp() / 4)


def test_a_model_that_fails_on_its_example_fails_with_its_own_error_alone(capfd: pytest.CaptureFixture[str]) -> None:
    for ask in (graphreg.trace, graphreg.names, lambda model, x: regularize(model, weight_l2=0.1, example_inputs=x)):
        with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(2x9 and 4x4\)") as told:
            ask(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.ones(2, 9))  # type: ignore[no-untyped-call]
        assert told.value.__notes__ == ["This is Sequential's own error: graphreg ran it on the example_inputs."]
        assert told.value.__context__ is None
    with pytest.raises(RuntimeError) as exported:
        graphreg.trace(nn.Linear(4, 4), torch.ones(2, 9), front_end="export")
    assert exported.value.__notes__ == ["This is Linear's own error: graphreg ran it on the example_inputs."]
    assert exported.value.__context__ is None
    assert capfd.readouterr() == ("", "")  # torch logs a traceback of fake tensors otherwise


# The result


@pytest.mark.parametrize(
    "use",
    [
        graphreg.strip,
        graphreg.report,
        graphreg.strengths,
        graphreg.rng_state,
        lambda m: graphreg.set_strength(m, "weight_l2", 0.1),
        lambda m: graphreg.set_rng_state(m, {}),
        lambda m: graphreg.noise_on(m).__enter__(),
    ],
    ids=["strip", "report", "strengths", "rng_state", "set_strength", "set_rng_state", "noise_on"],
)
def test_foreign_module(use: Callable[[Any], object]) -> None:
    model = net()
    with refused(model, GraphRegError, r"Sequential is not a module that graphreg rewrote.*what graphreg\.regularize returned"):
        use(model)
    with refused(model, GraphRegError, r"Sequential is not a module that graphreg rewrote"):
        use(graphreg.strip(regularize(model, weight_l2=0.1)))
    with pytest.raises(GraphRegError, match=r"NoneType is not a module that graphreg rewrote"):
        use(None)


@pytest.mark.parametrize("name", ["hiden_dropout", "weight", "", None], ids=repr)
def test_unknown_strength(name: Any) -> None:
    model = net()
    module = regularize(model, hidden_dropout=0.1, weight_l2=0.2, rng=0)
    with refused(model, NoMatchError, rf"no regularizer is named {name!r}.*hidden_dropout, weight_l2"):
        graphreg.set_strength(module, name, 0.3)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.1, "weight_l2": 0.2}


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, math.inf, "0.1", None], ids=repr)
def test_strength_out_of_range(value: Any) -> None:
    model = net()
    module = regularize(model, hidden_dropout=0.1, rng=0)
    with refused(model, RegularizerError, r"BernoulliDropout( hidden_dropout)?: weight.*(in \[0, 1\)|finite number)"):
        graphreg.set_strength(module, "hidden_dropout", value)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.1}


@pytest.mark.parametrize("rng", ["3", 1.0, True, np.random.RandomState(0)], ids=["str", "float", "bool", "RandomState"])
def test_rng(rng: Any) -> None:
    model = net()
    match = r"rng=.* is not allowed.*an int, a torch\.Generator, or None"
    for call in (
        lambda: regularize(model, hidden_dropout=0.1, rng=rng),
        lambda: regularize(model, weight_l2=0.1, rng=rng),
        lambda: regularize(model, BernoulliDropout("*", 0.1, rng=rng)),
        lambda: regularize(model, hidden_noise={"weight": 0.1, "rng": rng}),
    ):
        with refused(model, RegularizerError, match):
            call()


def test_rng_state_of_another_module() -> None:
    model = net()
    module = regularize(model, hidden_dropout=0.1, rng=0)
    other = graphreg.rng_state(regularize(model, BernoulliDropout("hid1", 0.1), rng=0))
    with refused(model, RegularizerError, r"with other streams.*the state lacks: act1.*Build the module as for the run"):
        graphreg.set_rng_state(module, other)
    with refused(model, RegularizerError, r"has no version.*that graphreg\.rng_state returned"):
        graphreg.set_rng_state(module, {})
    with refused(model, GraphRegError, r"draws no noise: it has no splice"):
        graphreg.set_ranks(regularize(model, weight_l2=0.1), "same")


def test_plan_of_another_model() -> None:
    model = net()
    found = graphreg.plan(graphreg.trace(Several()), [WeightL2("*", 0.1)])
    traced = graphreg.trace(model)
    with refused(model, GraphRegError, r"the plan is for Several and names 'pair\.a\.weight', which Sequential does not have.*Plan again"):
        graphreg.rewrite(traced, found)


# Names and definitions


@pytest.mark.parametrize("name", ["not an identifier", "x.y", "", 3, "class"], ids=repr)
def test_name_that_is_no_identifier(name: Any) -> None:
    model = net()
    for make in (WeightL2, BernoulliDropout):
        with refused(model, RegularizerError, rf"name={name!r} is not allowed.*one Python identifier"):
            regularize(model, make("*", 0.1, name=name))


@pytest.mark.parametrize("name", ["train", "forward", "training", "_modules", "key", "attach"])
def test_name_that_is_taken(name: str) -> None:
    model = net()
    for make in (WeightL2, BernoulliDropout):
        with refused(model, RegularizerError, rf"name='{name}' is a name that .* themselves; choose another"):
            regularize(model, make("*", 0.1, name=name))


def test_definition_asks_for_what_nobody_supplies() -> None:
    before = graphreg.registered()
    with pytest.raises(RegularizerError, match=r"Odd\.__call__ asks for phase; the engine supplies z, values, weight.* on values"):

        class Odd(Penalty, keys=("odd",)):
            def __call__(self, z: Tensor, phase: Tensor) -> Tensor:
                return z.mean()

    with pytest.raises(RegularizerError, match=r"__call__ asks for noise; the engine supplies z, values, weight"):

        class Noisy(Penalty, keys=("noisy",)):
            def __call__(self, z: Tensor, noise: graphreg.Noise) -> Tensor:
                return z.mean()

    with pytest.raises(RegularizerError, match=r"__call__ asks for z; the engine supplies w, values, weight.* on parameters"):

        class Value(Penalty, keys=("value",), on="parameters"):
            def __call__(self, z: Tensor) -> Tensor:
                return z.mean()

    assert graphreg.registered() == before


def test_definition_of_a_splice_on_parameters() -> None:
    before = graphreg.registered()
    with pytest.raises(RegularizerError, match=r"Shake\.__call__ asks for z; the engine supplies w, values, weight, noise, state on"):

        class Shake(Splice, keys=("shake",), on="parameters"):
            def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
                return z

    assert graphreg.registered() == before


def test_definition_on_what_is_not_there() -> None:
    with pytest.raises(RegularizerError, match=r"on='value'.*values.*parameters"):

        class Odd(Penalty, on="value"):
            def __call__(self, z: Tensor) -> Tensor:
                return z.mean()


@pytest.mark.parametrize("key", ["missing", "compile", "rng", "model", "regularizers", "PENALTIES", "hidden_dropout", "output_noise"])
def test_definition_with_the_key_of_an_option(key: str) -> None:
    before = graphreg.registered()
    with pytest.raises(RegularizerError, match=rf"Odd cannot have the key '{key.lower()}'.*an option of graphreg\.regularize"):

        class Odd(Penalty, keys=("odd", key)):
            def __call__(self, z: Tensor) -> Tensor:
                return z.mean()

    assert graphreg.registered() == before


@pytest.mark.parametrize("key", ["weight_l2", "Weight_Decay", "WeightL2", "dropout"])
def test_definition_with_a_taken_key(key: str) -> None:
    before = graphreg.registered()
    with pytest.raises(RegularizerError, match=rf"the key '{key.lower()}' of Odd belongs to graphreg\.passes\.\w+\.\w+ already"):

        class Odd(Penalty, keys=("odd", key)):
            def __call__(self, z: Tensor) -> Tensor:
                return z.mean()

    assert graphreg.registered() == before


def test_inputs_in_the_place_of_a_regularizer() -> None:
    model = net()
    with refused(model, RegularizerError, r"Tensor of shape \(3, 4\) is no regularizer. Give example inputs by name"):
        regularize(model, torch.randn(3, 4))


def test_a_rate_of_the_models_own_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    with refused(model, RegularizerError, r"own_dropout=1.5 \(for '1'\) is not allowed; it is 'keep'"):
        regularize(model, own_dropout={"1": 1.5})
    module = regularize(model, own_dropout={"1": 0.2})
    for name in ("1", "own_dropout"):
        with refused(model, NoMatchError, r"no regularizer is named.*Names: none. The rate of a native dropout is set once"):
            graphreg.set_strength(module, name, 0.3)


def test_true_is_no_strength() -> None:
    """It would be taken for 1."""
    module = graphreg.regularize(nn.Linear(2, 2), weight_l2=0.1)
    with pytest.raises(RegularizerError, match="weight is True; it must be a finite number"):
        graphreg.set_strength(module, "weight_l2", True)
    with pytest.raises(RegularizerError, match="weight is True; it must be a finite number"):
        WeightL2("*", True)


class Wrong(Penalty):
    """A formula that gives no 0-d tensor."""

    kind: str = "float"

    def __call__(self, z: Tensor) -> Any:
        values = {"float": lambda: float(z.detach().abs().mean()), "nothing": lambda: None, "vector": lambda: z.abs().mean(0)}
        return values[self.kind]()


WRONG = {
    "float": r"Wrong at 1 gave a value of type float, which has no gradient\. A penalty is a 0-d tensor\. Return one",
    "nothing": r"Wrong at 1 gave None: does it lack a return\? A penalty is a 0-d tensor\. Return one",
    "vector": r"Wrong at 1 gave a tensor of shape \(8,\); a penalty is a 0-d tensor\. Average it\.",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_penalty_that_is_no_0d_tensor(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    module = regularize(model, Wrong("1", 0.1, kind=kind))
    with refused(model, RegularizerError, WRONG[kind]):
        module(torch.ones(3, 4))


PLAIN = [
    ({"hidden_dropout": {"linear": [0, 0.2]}}, r"linear=\[0, 0\.2\] is not allowed; give a list \[start, stop, steps\]"),
    ({"dropout": {"1": {"piecewise": [0, 0.2]}}}, r"piecewise=\[0, 0\.2\] is not allowed; give a list of pairs"),
    ({"weight_l2": {"weight": {"by_depth": [0, 1, 2]}}}, r"by_depth=\[0, 1, 2\] is not allowed; give a list of two numbers"),
    ({"own_dropout": {"linear": [0, 1, 10]}}, r"own_dropout=linear\(0, 1, 10\) is not allowed; .* or a rate in \[0, 1\)"),
    ({"hidden_dropout": "linear(0, 0.2, 10)"}, r"is no text; as data it is a dict: \{'linear': \[0, 0\.5, 1000\]\},"),
    ({"hidden_dropout": lambda step: 0.1}, r"must be a finite number\. A strength that changes is a schedule, .*\.linear"),
]


@pytest.mark.parametrize(("keywords", "says"), PLAIN)
def test_a_schedule_as_plain_data_or_as_a_function(keywords: dict[str, Any], says: str) -> None:
    with refused(net(), RegularizerError, says):
        regularize(net(), **keywords)


def test_a_site_may_be_called_like_a_schedule() -> None:
    model = nn.Sequential(OrderedDict(linear=nn.Linear(4, 8), act=nn.ReLU()))
    assert graphreg.strengths(regularize(model, dropout={"linear": 0.1})) == {"dropout": 0.1}


def test_a_shape_in_place_of_example_inputs() -> None:
    says = r"do not fit .*forward\(input\): too many positional arguments\. They are the arguments .*torch\.randn\(3, 4\), and"
    with refused(net(), TraceError, says):
        regularize(net(), hidden_dropout=0.1, example_inputs=(3, 4))
    with pytest.raises(TypeError, match="must be Tensor, not int") as caught:  # the model's own error
        regularize(net(), hidden_dropout=0.1, example_inputs=(3,))
    assert caught.value.__notes__[-1].endswith("They are the arguments of a call, such as torch.randn(3), and not the shape of one.")
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught_shape:
        regularize(net(), hidden_dropout=0.1, example_inputs=torch.ones(3, 5))
    assert caught_shape.value.__notes__[-1].endswith("own error: graphreg ran it on the example_inputs.")


def test_a_number_in_place_of_a_name() -> None:
    for keywords in ({"dropout": {1: 0.1}}, {"hidden_l1": {"weight": 0.1, "pattern": 1}}, {"dropout": {(1, 2): 0.1}}):
        with refused(net(), RegularizerError, r"If 1 is a name, put it in quotes: '1'\."):
            regularize(net(), **keywords)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError) as caught:
        BernoulliDropout(0.1)  # type: ignore[arg-type,call-arg]
    assert "quotes" not in str(caught.value) and "The selector comes first and the weight second" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_model_of_torch_jit() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    with pytest.raises(TraceError, match=r"is compiled by torch\.jit\. Give regularize the model it was made from\."):
        regularize(model, hidden_dropout=0.1)


def test_a_key_in_place_of_keys() -> None:
    with pytest.raises(RegularizerError, match=r"Keyed: key='keyed' is not allowed; write keys=\('keyed',\)\."):

        class Keyed(Penalty, key="keyed"):
            pass


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


@pytest.mark.parametrize("text", ["*.weight", "0.weight", "**.weight"])
def test_the_name_that_a_parametrized_weight_had(text: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    for layer in (model[0], model[2]):
        nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    says = r"matches no parameter .* 0\.weight is parametrized, and its parameter is 0\.parametrizations\.weight\.original: '\*\*\.orig"
    with refused(model, NoMatchError, says):
        regularize(model, weight_l2={"weight": 0.1, "pattern": text})
    found = graphreg.report(regularize(model, weight_l2={"weight": 0.1, "pattern": "**.original"})).regularizers[0].sites
    assert found == ("0.parametrizations.weight.original", "2.parametrizations.weight.original")
    with pytest.raises(NoMatchError) as caught:
        regularize(model, weight_l2={"weight": 0.1, "pattern": "9.*"})
    assert "parametrized" not in str(caught.value)


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(x @ self.codes.float())
        return y


def test_a_parameter_of_whole_numbers_is_no_site() -> None:
    """Of NNSmith's models 8, 91, 281, 405 and 421 of seed 33: with ``*`` they raised an error at the first call."""
    for pattern in ("*", "**"):
        module = graphreg.regularize(Quantized(), WeightL1(pattern, 1.0))
        torch.testing.assert_close(module(torch.ones(2, 4)).penalties["weight_l1"], module.last.weight.abs().mean())
    for named in (WeightL1("codes", 1.0), WeightNoise(["codes", "last.weight"], 0.1)):
        with pytest.raises(NoMatchError, match=re.escape("It finds only what cannot be regularized: codes (of torch.uint8).")):
            graphreg.regularize(Quantized(), named)
