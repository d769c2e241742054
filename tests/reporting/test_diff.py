"""The difference in the emitted Python, whole, and what it says of each line."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

import graphreg
from graphreg.passes import BernoulliDropout, Contractive, HiddenL1, WeightL2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.drop, self.out = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hid(x)
        h += 1
        return self.out(self.drop(h.relu()))  # type: ignore[no-any-return]


WHOLE = """\
--- Net
+++ Net, regularized
@@ -1,7 +1,18 @@
+# contractive: Contractive 0.1 on 'relu', wrt='*', estimator='projection', n=1, always=False
+# dropout: BernoulliDropout 0.1 on 'hid'
+# weight_l2: WeightL2 0.2 on 'out.*', reduction='mean'
+# own_dropout seeded: drop
 def forward(self, x):
+    key = self.graphreg_rules.key()                                                   # draws of contractive, dropout, own_dropout
+    x_wrt = self.graphreg_rules.x_wrt(x)                                              # contractive with respect to x
-    hid = self.hid(x)
+    hid = self.hid(x_wrt)                                                             # reads contractive at x
+    hid_dropout = self.graphreg_rules.hid_dropout(hid, key)                           # dropout at hid
+    hid_kept = torch.clone(hid_dropout)                                               # copy for dropout at hid: the model writes into it
-    hid += 1;  iadd = hid
+    hid_kept += 1;  iadd = hid_kept                                                   # reads dropout at hid
     relu = iadd.relu()
+    contractive = self.graphreg_rules.contractive({'relu': relu}, {'x': x_wrt}, key)  # contractive at relu
-    drop = self.drop(relu)
+    drop = self.graphreg_rules.drop_own(relu, noise = key)                            # own_dropout at drop: seeded
     out = self.out(drop)
+    out_weight = self.out.weight                                                      # weight_l2 at out.weight
+    weight_l2 = self.graphreg_rules.weight_l2(out_weight)                             # weight_l2 at out.weight
-    return out
+    return graphreg_Regularized(out, {'contractive': contractive, 'weight_l2': weight_l2})  # returns contractive, weight_l2"""


def test_whole() -> None:
    rules = [Contractive("relu", 0.1), BernoulliDropout("hid", 0.1), WeightL2("out.*", 0.2)]
    difference = graphreg.diff(graphreg.regularize(Net(), rules, own_dropout="seeded"))
    assert difference.text() == WHOLE
    assert all(line.regularizers for line in difference.lines if line.sign == "+")
    kinds = {line.kind for line in difference.lines if line.sign == "+"}
    assert kinds == {"rule", "key", "track", "splice", "clone", "reads", "own", "total", "read"}
    splice = next(line for line in difference.lines if line.kind == "splice")
    assert (splice.regularizers, splice.sites) == (("dropout",), ("hid",))
    assert splice.code == "    hid_dropout = self.graphreg_rules.hid_dropout(hid, key)"


def test_the_added_lines_are_those_of_the_code() -> None:
    """What it shows as the new source is the emitted code, without what frees values."""
    module = graphreg.regularize(Net(), hidden_dropout=0.1, hidden_l1=0.1)
    shown = [line.code for line in graphreg.diff(module, context=99).lines if line.sign in (" ", "+") and line.kind != "rule"]
    assert shown == [line.partition(";  hid")[0].split(";  x =")[0] for line in without_frees(module.code)]
    old = [line.code for line in graphreg.diff(module, context=99).lines if line.sign in (" ", "-")]
    assert old == without_frees(graphreg.strip(module).code)


def without_frees(code: str) -> list[str]:
    lines = []
    for line in filter(None, code.splitlines()):
        kept, _, freed = line.rpartition(";  ")
        lines.append(kept if freed.endswith(" = None") else line)
    return [line for line in lines if line.strip()]


def test_two_modules() -> None:
    model = Net()
    first = graphreg.regularize(model, HiddenL1("relu", 0.1), BernoulliDropout("relu", 0.1))
    second = graphreg.regularize(model, HiddenL1("relu", 0.1, clean=True), BernoulliDropout("relu", 0.2))
    moved = [line for line in graphreg.diff(first, second).lines if line.sign in "+-"]
    assert [line.text for line in moved if line.kind == "rule"] == [
        "-# hidden_l1: HiddenL1 0.1 on 'relu'", "+# hidden_l1: HiddenL1 0.1 on 'relu', clean=True",
        "-# dropout: BernoulliDropout 0.1 on 'relu'", "+# dropout: BernoulliDropout 0.2 on 'relu'",
    ]  # fmt: skip
    assert [(line.sign, line.sites) for line in moved if line.kind == "measure"] == [("+", ("relu",)), ("-", ("relu",))]
    assert not graphreg.diff(first, first) and str(graphreg.diff(first, first)) == "no difference between a: Net and b: Net"


def test_strengths_and_rates_alone() -> None:
    module, other = (graphreg.regularize(Net(), hidden_dropout=0.1, own_dropout=rate) for rate in (0.2, 0.3))
    moved = [(line.sign, line.text.rpartition("own_dropout")[2]) for line in graphreg.diff(module, other).lines if line.sign in "+-"]
    assert moved == [
        ("-", " seeded at 0.2: drop"), ("+", " seeded at 0.3: drop"),
        ("-", " at drop: seeded at 0.2"), ("+", " at drop: seeded at 0.3"),
    ]  # fmt: skip
    graphreg.set_strength(module, "hidden_dropout", 0.4)
    assert "+# hidden_dropout: BernoulliDropout 0.4 on '*'" in graphreg.diff(module).text()


def test_a_comment_that_is_true_of_one_alone_is_a_difference() -> None:
    first, second = graphreg.regularize(Net(), hidden_dropout=0.1, rng=0), graphreg.regularize(Net(), hidden_dropout=0.1, noise=0.1, rng=0)
    keys = [(line.sign, line.regularizers) for line in graphreg.diff(first, second).lines if line.kind == "key"]
    assert keys == [("-", ("hidden_dropout",)), ("+", ("hidden_dropout", "noise"))]


def test_what_differs_beside_the_code() -> None:
    model = Net()
    first, second = (graphreg.regularize(model, hidden_dropout=0.1, rng=seed) for seed in (0, 1))
    found = graphreg.diff(first, second)
    assert found and not found.lines and found.notes == ("besides the code: the noise is seeded differently (relu_hidden_dropout)",)
    assert found.text() == "no difference between a: Net and b: Net in code, regularizers and strengths\n" + found.notes[0]
    assert found.to_dict()["notes"] == found.notes and found.notes[0] in found._repr_html_()
    wider = Net()
    wider.hid = nn.Linear(5, 8)
    assert graphreg.diff(graphreg.regularize(model, weight_l2=0.1), graphreg.regularize(wider, weight_l2=0.1)).notes == (
        "besides the code: parameters have other shapes (hid.weight 8x4 and 8x5)",
    )
    traced = graphreg.trace(model)
    plans = [graphreg.plan(traced, graphreg.build("dropout", weight=0.1)) for _ in range(2)]
    assert not graphreg.diff(*plans) and not graphreg.diff(first, first)  # a plan has no seed yet


@pytest.mark.parametrize(("scale", "told"), [(8, "scale 8"), (torch.tensor(2.0), "scale 2"), (float, "scaled by float")])
def test_the_scale_of_attached_penalties(scale: Any, told: str) -> None:
    module = graphreg.regularize(Net(), weight_l2=0.1, penalties="attach", scale=scale)
    assert f"+# attach: {told}" in graphreg.diff(module).text().splitlines()
    assert f"attached: backward adds the gradient of the penalties, {told}; if the output has a loss" in graphreg.report(module).text(None)
    assert graphreg.diff(module, graphreg.strip(module)).after == "b: Net, stripped"
    ones = [graphreg.regularize(Net(), weight_l2=0.1, penalties="attach", scale=one) for one in (1, 1.0)]
    assert not graphreg.diff(*ones)


class Steady(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hid(x)
        return self.out(h.relu()) if self.training else self.out(h)  # type: ignore[no-any-return]


def test_a_forward_for_each_mode() -> None:
    module = graphreg.regularize(Steady(), HiddenL1("relu", 0.1))
    heads = [line.text for line in graphreg.diff(module).lines if line.sign in ("---", "+++")]
    assert heads == [
        "--- Steady, in train mode", "+++ Steady, regularized, in train mode",
        "--- Steady, in eval mode", "+++ Steady, regularized, in eval mode",
    ]  # fmt: skip
    assert "# hidden_l1: 0, for none of its sites is in this forward" in graphreg.diff(module).text()
    plain = graphreg.regularize(Net(), HiddenL1("relu", 0.1))
    assert [line.text for line in graphreg.diff(plain, module).lines if line.sign == "+++"] == [
        "+++ b: Steady, in train mode", "+++ b: Steady, in eval mode",
    ]  # fmt: skip


def test_attached_penalties_and_copies() -> None:
    module = graphreg.regularize(Net(), hidden_noise=0.1, hidden_l1={"weight": 0.1, "pattern": "hid"}, penalties="attach", scale=1.0)
    told = {line.kind: line.text.rpartition("# ")[2] for line in graphreg.diff(module).lines if line.sign == "+"}
    assert told["attach"] == told["attached"] == "hidden_l1 attached to the output"
    assert told["copy"] == "copy for hidden_l1 at hid: the model writes into it"
    assert told["reads"] == "reads hidden_l1 at the output"


def test_what_it_takes() -> None:
    model = Net()
    module = graphreg.regularize(model, hidden_dropout=0.1)
    difference = graphreg.diff(module)
    assert graphreg.diff(torch.compile(module, backend="eager")) == difference
    assert graphreg.diff(graphreg.plan(graphreg.trace(model), BernoulliDropout("*", 0.1, name="hidden_dropout"))) == difference
    stripped = graphreg.strip(module)
    assert str(graphreg.diff(stripped)) == "no difference between Net and Net, stripped"
    assert [line.text[1:] for line in graphreg.diff(stripped, module).lines if line.sign == "+"] == [
        line.text[1:] for line in difference.lines if line.sign == "+"
    ]


def test_the_work_of_other_passes_stays_out_of_it() -> None:
    def doubled(given: fx.GraphModule) -> PassResult:
        relu = next(node for node in given.graph.nodes if node.target == "relu")
        with given.graph.inserting_after(relu):
            twice = given.graph.call_function(torch.mul, (relu, 2))
        relu.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
        given.recompile()
        return PassResult(given, True)

    module = graphreg.regularize(Net(), HiddenL1("hid", 0.1))
    doubled(module)
    lines = graphreg.diff(module).lines
    assert [line.sign for line in lines if "mul" in line.code] == [" ", " "]


def test_a_monitored_module() -> None:
    module = graphreg.regularize(Net(), HiddenL1("relu", 0.1))
    before = graphreg.diff(module)
    watching = graphreg.monitor(module)
    told = [(line.regularizers, line.text.rpartition("# ")[2]) for line in graphreg.diff(module).lines if line.kind == "watch"]
    assert told == [(("monitor",), "monitor at relu"), (("monitor",), "monitor at the penalties")]
    watching.close()
    assert graphreg.diff(module) == before


REFUSED = "is not a module that graphreg rewrote. Give what graphreg.regularize returned. With one argument, diff.module. compares"


@pytest.mark.parametrize(("given", "message"), [
    ((Net(),), f"Net {REFUSED}"), ((3,), f"int {REFUSED}"), ((None,), f"NoneType {REFUSED}"),
    ((graphreg.strip(graphreg.regularize(Net(), weight_l2=0.1)), Net()), f"Net {REFUSED}"),
    ((graphreg.backend(weight_l2=0.1),), "a backend has no module whose source could be compared"),
], ids=["model", "number", "nothing", "model beside", "backend"])  # fmt: skip
def test_what_it_does_not_take(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(graphreg.GraphRegError, match=message):
        graphreg.diff(*given)


@pytest.mark.parametrize("context", [-1, 1.0, "3", True])
def test_no_context(context: Any) -> None:
    with pytest.raises(graphreg.RegularizerError, match="give a whole number of lines, 0 or more"):
        graphreg.diff(graphreg.regularize(Net(), weight_l2=0.1), context=context)


def test_comments_fit_a_width() -> None:
    """They start behind the longest line that has room for its own, or else right behind their own, or below it. No code is broken."""
    difference = graphreg.diff(graphreg.regularize(Net(), hidden_dropout=0.1), context=0)
    assert difference.text(70).split("*'\n")[1] == """\
@@ -1,0 +3 @@
+    key = self.graphreg_rules.key()       # draws of hidden_dropout
@@ -5 +7,2 @@
+    relu_hidden_dropout = self.graphreg_rules.relu_hidden_dropout(relu, key)
+        # hidden_dropout at relu
-    drop = self.drop(relu)
+    drop = self.drop(relu_hidden_dropout)
+        # reads hidden_dropout at relu
@@ -7 +10 @@
-    return out
+    return graphreg_Regularized(out, {})  # returns no penalty"""
    assert "+    key = self.graphreg_rules.key()  # draws of" in difference.text(66)
    assert difference.text(200) == difference.text()


def test_a_module_that_cannot_be_stripped() -> None:
    module = graphreg.regularize(Net(), hidden_dropout=0.1)
    with pytest.raises(graphreg.GraphRegError, match="node.meta no longer says so"):
        graphreg.diff(fx.Transformer(module).transform())


def test_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = graphreg.diff(graphreg.regularize(Net(), hidden_l1={"weight": 0.1, "pattern": lambda site: site.name == "relu"}))
    assert (difference.added, difference.removed) == (4, 1) and difference
    read = json.loads(json.dumps(difference.to_dict()))
    assert read["added"] == 4 and [line["text"] for line in read["lines"]] == difference.text().splitlines()
    html = difference._repr_html_()
    assert html.count("background:rgba(46,160,67") == 4 and html.count("background:rgba(248,81,73") == 1
    assert "on &#x27;&lt;&lt;lambda&gt;&gt;&#x27;" in html and ">--- Net</span>" in html
    assert str(difference) == repr(difference) == difference.text()
    narrow = difference.text(60).splitlines()
    words = [Counter(word for line in lines for word in line.lstrip("+- ").split()) for lines in (narrow, difference.text().splitlines())]
    assert words[0] == words[1] and len(narrow) > len(difference.text().splitlines())  # nothing is broken or lost
    assert all(len(line) <= 60 or "#" not in line for line in narrow)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    heads = ["\x1b[1m--- Net\x1b[0m", "\x1b[1m+++ Net, regularized\x1b[0m", "\x1b[36m@@ -1,7 +1,10 @@\x1b[0m"]
    assert str(difference).splitlines()[:3] == heads
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(difference) == difference.text()
