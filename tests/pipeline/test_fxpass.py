"""``as_pass`` in torch.fx's own PassManager, before and after passes of other people."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper, this_before_that_pass_constraint
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval

import graphreg
from graphreg import NoMatchError, RegularizerError, TraceError
from graphreg.passes import BernoulliDropout, HiddenL1
from lacking import copied
from ten_models import TEN, build


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x)) + x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.out = Block(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


X = torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)

BEFORE = """block_conv = self.block.conv(x)
block_bn = self.block.bn(block_conv)
add = block_bn + x
relu = add.relu()
out = self.out(relu)
return out"""

AFTER = """key = self.graphreg_rules.key()
block_conv = self.block.conv(x)
block_bn = self.block.bn(block_conv)
add = block_bn + x
relu = add.relu()
block_relu_hidden_dropout = self.graphreg_rules.block_relu_hidden_dropout(relu, key)
block_relu_hidden_l1 = self.graphreg_rules.block_relu_hidden_l1(block_relu_hidden_dropout)
out = self.out(block_relu_hidden_dropout)
hidden_l1 = self.graphreg_rules.hidden_l1(block_relu_hidden_l1)
return graphreg_Regularized(out, {'hidden_l1': hidden_l1})"""

FUSED_AFTER = AFTER.replace("block_bn = self.block.bn(block_conv)\n", "").replace("block_bn", "block_conv")


def text(code: str) -> str:
    """The statements of a forward, without the releases of values that fx writes behind them."""
    return "\n".join(line.split(";")[0].strip() for line in code.strip().splitlines()[1:])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def ours(**more: Any) -> PassBase:
    return graphreg.as_pass(**({"hidden_dropout": 0.5, "hidden_l1": 1e-3, "rng": 0} | more))


# Passes of other people


def fuse_in_place(module: fx.GraphModule) -> PassResult:
    """Conv and batch norm to one conv, editing the graph that is there."""
    modules, modified = dict(module.named_modules()), False
    for node in list(module.graph.nodes):
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d) or not isinstance(before, fx.Node):
            continue
        conv = modules.get(str(before.target))
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            parent, _, name = str(before.target).rpartition(".")
            setattr(module.get_submodule(parent), name, fuse_conv_bn_eval(conv, modules[node.target]))
            node.replace_all_uses_with(before)
            module.graph.erase_node(node)
            modified = True
    module.delete_all_unused_submodules()
    module.recompile()
    return PassResult(module, modified)


def without_dead_code(module: fx.GraphModule) -> PassResult:
    modified = module.graph.eliminate_dead_code()
    module.recompile()
    return PassResult(module, modified)


def with_shapes(module: fx.GraphModule) -> PassResult:
    ShapeProp(module).propagate(X)
    return PassResult(module, False)


def relu_to_gelu(module: fx.GraphModule) -> PassResult:
    for node in module.graph.find_nodes(op="call_method", target="relu"):
        with module.graph.inserting_after(node):
            new = module.graph.call_function(torch.nn.functional.gelu, node.args)
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    return PassResult(module, True)


def provenance(module: fx.GraphModule) -> dict[str, Any]:
    return {node.name: node.meta["graphreg"] for node in module.graph.nodes if "graphreg" in node.meta}


PROVENANCE = {
    "key": {"kind": "key"},
    "block_relu_hidden_dropout": {"kind": "splice", "regularizer": "hidden_dropout", "site": "block.relu"},
    "block_relu_hidden_l1": {"kind": "measure", "regularizer": "hidden_l1", "site": "block.relu"},
    "hidden_l1": {"kind": "total", "regularizer": "hidden_l1"},
}


# Alone


def test_before_and_after() -> None:
    given = fx.symbolic_trace(net())
    result = ours()(given)
    assert result is not None and isinstance(result, PassResult) and result.modified
    assert text(result.graph_module.code) == AFTER
    assert text(given.code) == BEFORE and all("site" not in node.meta for node in given.graph.nodes)
    assert isinstance(result.graph_module, fx.GraphModule) and provenance(result.graph_module) == PROVENANCE
    assert text(graphreg.strip(result.graph_module).code) == BEFORE


def test_it_is_regularize() -> None:
    """The same masks and penalties, from the model and from torch.fx's trace of it."""
    model = net()
    module, other = ours()(fx.symbolic_trace(model)).graph_module, graphreg.regularize(model, hidden_dropout=0.5, hidden_l1=1e-3, rng=0)
    assert text(module.code) == text(other.code) and graphreg.report(module) == graphreg.report(other)
    for _ in range(3):
        output, penalties = module(X)
        expected, wanted = other(X)
        assert torch.equal(output, expected) and torch.equal(penalties["hidden_l1"], wanted["hidden_l1"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_it_was_traced_in(training: bool) -> None:
    """torch.fx leaves the blocks it makes in train mode; a splice in one is off in eval mode all the same."""
    model = net().train(training)
    module = ours()(fx.symbolic_trace(model)).graph_module
    assert module.training is training and module.get_submodule("block").training is training
    plain = copy.deepcopy(model)(X)
    assert torch.equal(module(X).output, plain) is not training
    module.eval()
    model.eval()
    assert torch.equal(module(X).output, model(X))
    module.train()
    assert not torch.equal(module(X).output, module(X).output)


class Named(nn.Module):
    """Functions in blocks, a block without a layer, one called twice, one that returns two values."""

    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sigmoid()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(self.linear(x) + h)

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.act, self.outer = self.Cell(), self.Swish(), nn.Sequential(nn.Linear(3, 3), self.Swish())

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.cell(x, x))
        return self.outer(self.act(h))


def test_names_of_functions_and_blocks() -> None:
    names = list(graphreg.names(Named()))
    assert {"cell", "cell_1", "cell.tanh", "cell.tanh_1", "act", "act.mul", "outer", "outer.1", "outer.1.mul"} <= set(names)
    assert list(graphreg.names(fx.symbolic_trace(Named()))) == names
    module = graphreg.as_pass(BernoulliDropout(["act", "outer.1.sigmoid"], 0.5), rng=0)(fx.symbolic_trace(Named())).graph_module
    x = torch.ones(4, 3)
    assert not torch.equal(module(x).output, module(x).output)
    assert torch.equal(module.eval()(x).output, module(x).output)


@pytest.mark.parametrize("name", TEN)
def test_names_are_the_models(name: str) -> None:
    model, _ = build(name)

    def values(module: nn.Module) -> list[str]:
        return [name for site in graphreg.trace(module).values for name in site.names if not name.startswith("aux")]

    assert values(fx.symbolic_trace(model.eval())) == values(model)  # without googlenet's, which are there in train mode alone


def test_an_optional_argument_of_the_graph_stays_optional() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.linear(x) * scale

    model = Scaled()
    module = graphreg.as_pass(weight_l2=0.1)(fx.symbolic_trace(model)).graph_module
    x = torch.ones(2, 3)
    assert torch.equal(module(x).output, model(x)) and torch.equal(module(x, 3.0).output, model(x, 3.0))


# In a PassManager


@pytest.mark.parametrize("penalties", ["return", "attach"])
@pytest.mark.parametrize("other", [without_dead_code, CSEPass(), with_shapes, fuse_in_place], ids=lambda p: getattr(p, "__name__", "cse"))
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_before_and_after_another(other: Callable[[fx.GraphModule], PassResult], first: bool, penalties: Any) -> None:
    """In eval mode, where a fuse is possible: the same code in both orders, the model's output, provenance, and strip."""
    model = net().eval()
    mine = ours(penalties=penalties, scale=1.0 if penalties == "attach" else None)
    passes = [other, mine] if first else [mine, other]
    linted: list[int] = []
    manager = PassManager(passes=passes, run_checks_after_each_pass=True)
    manager.add_checks(lambda module: linted.append(module.graph.lint()))  # type: ignore[arg-type, attr-defined, func-returns-value]
    result = manager(fx.symbolic_trace(model))
    module, fused = result.graph_module, other is fuse_in_place
    assert result.modified and len(linted) == 3
    if penalties == "return":
        after = FUSED_AFTER if fused else AFTER
        assert text(module.code) == (copied(after) if isinstance(other, CSEPass) and not first else after)
        assert provenance(module) == PROVENANCE
        assert torch.allclose(module(X).output, model(X), atol=1e-6)
    else:
        assert {kind["kind"] for kind in provenance(module).values()} >= {"key", "splice", "measure", "total", "attach", "attached"}
        assert torch.allclose(module(X), model(X), atol=1e-6)
    assert all("site" in node.meta or "graphreg" in node.meta or node.op == "output" for node in module.graph.nodes)
    stripped = graphreg.strip(module)
    assert text(stripped.code) == (BEFORE if not fused else text(fuse_in_place(fx.symbolic_trace(model)).graph_module.code))
    assert torch.allclose(stripped(X), model(X), atol=1e-6)
    assert graphreg.report(module).text(None).splitlines()[9].split() == ["block.relu", "relu", "unknown", "hidden_dropout", "*"]
    assert graphreg.strengths(module) == {"hidden_dropout": 0.5, "hidden_l1": 1e-3}
    module.train()
    outputs = [module(X) if penalties == "attach" else module(X).output for _ in range(2)]
    assert not torch.equal(*outputs)


def test_what_a_later_pass_takes_out_is_reported_gone() -> None:
    def without_splices(module: fx.GraphModule) -> PassResult:
        for node in [n for n in module.graph.nodes if n.meta.get("graphreg", {}).get("kind") == "splice"]:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        return without_dead_code(module)

    module = PassManager(passes=[ours(), without_splices])(fx.symbolic_trace(net())).graph_module
    assert (
        text(module.code)
        == """block_conv = self.block.conv(x)
block_bn = self.block.bn(block_conv)
add = block_bn + x
relu = add.relu()
block_relu_hidden_l1 = self.graphreg_rules.block_relu_hidden_l1(relu)
out = self.out(relu)
hidden_l1 = self.graphreg_rules.hidden_l1(block_relu_hidden_l1)
return graphreg_Regularized(out, {'hidden_l1': hidden_l1})"""
    )
    gone = "gone: hidden_dropout at block.relu (a later pass took it out of the graph)"
    assert [line for line in graphreg.report(module).notes if "gone" in line] == [gone]
    assert text(graphreg.strip(module).code) == BEFORE


def test_common_subexpressions_merge_and_the_splice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.relu(h) + torch.relu(h))

    result = PassManager(passes=[graphreg.as_pass(dropout={"relu": 0.5}, rng=0), CSEPass()])(fx.symbolic_trace(Twice()))
    module = result.graph_module
    assert text(module.code) == copied(
        """key = self.graphreg_rules.key()
a = self.a(x)
relu = torch.relu(a)
relu_dropout = self.graphreg_rules.relu_dropout(relu, key)
add = relu_dropout + relu
b = self.b(add)
return graphreg_Regularized(b, {})"""
    )
    assert torch.equal(module.eval()(X[0, 0, :, :3]).output, Twice.forward(module, X[0, 0, :, :3]))
    assert type(module).__mro__[1] is fx.GraphModule and graphreg.strengths(module) == {"dropout": 0.5}
    first = PassManager(passes=[CSEPass(), graphreg.as_pass(dropout={"relu": 0.5}, rng=0)])(fx.symbolic_trace(Twice())).graph_module
    assert "add = relu_dropout + relu_dropout" in first.code


def test_constraints_names_and_rounds() -> None:
    """Two equal passes are two; a round that changes nothing ends the manager's rounds."""
    ran: list[str] = []

    def noted(module: fx.GraphModule) -> PassResult:
        ran.append(type(module).__mro__[1].__name__)
        return PassResult(module, False)

    mine, twin = ours(), ours()
    assert mine != twin and len({mine, twin}) == 2
    manager = PassManager(passes=[mine, noted], constraints=[this_before_that_pass_constraint(noted, mine)], steps=3)
    result = manager(fx.symbolic_trace(net()))
    assert manager.passes == [noted, mine] and ran == ["GraphModule", "RewrittenModule"]
    assert result.modified and text(result.graph_module.code) == AFTER
    assert mine(copy.deepcopy(result.graph_module)).modified is False
    with pytest.raises(Exception, match=r"'Regularize' pass after the following passes: \['Regularize'\]") as caught:
        PassManager(passes=[mine, twin])(fx.symbolic_trace(net()))
    assert isinstance(caught.value.__cause__, TraceError) and "rewritten already" in str(caught.value.__cause__)
    wrapped = PassManager(passes=[pass_result_wrapper(mine)])(fx.symbolic_trace(net()))
    assert text(wrapped.graph_module.code) == AFTER


def test_fuse_of_torch_fx() -> None:
    """``optimization.fuse`` copies and makes a GraphModule of its own; ours is one it can take with ``no_trace=True``."""
    model = net().eval()
    module = ours()(fuse(model)).graph_module
    assert text(module.code) == FUSED_AFTER
    later = fuse(ours()(fx.symbolic_trace(model)).graph_module, no_trace=True)
    assert text(later.code) == FUSED_AFTER and provenance(later) == PROVENANCE
    for fused in (module, later):
        assert torch.allclose(fused(X).output, model(X), atol=1e-6)
        fused.train()
        assert not torch.equal(fused(X).output, fused(X).output)


def test_a_splice_between_them_keeps_a_fuse_away() -> None:
    model = net().eval()
    module = graphreg.as_pass(BernoulliDropout("block.conv", 0.5), rng=0)(fx.symbolic_trace(model)).graph_module
    assert fuse_in_place(module).modified is False
    assert torch.equal(module(X).output, model(X))


def test_shapes_are_those_of_the_rewritten_graph() -> None:
    module = ours()(fx.symbolic_trace(net())).graph_module
    ShapeProp(module).propagate(X)  # a call like any other: it draws
    assert graphreg.rng_state(module)["call"] == 1
    shapes = {node.name: node.meta["tensor_meta"].shape for node in module.graph.nodes if node.name.startswith("block_relu")}
    assert shapes == {"block_relu_hidden_dropout": X.shape, "block_relu_hidden_l1": ()}
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(X)
    assert graphreg.rng_state(module)["call"] == 1 and isinstance(module(X).output.sum().item(), float)
    seen = graphreg.plan(graphreg.trace(graphreg.strip(module), example_inputs=X), [HiddenL1("*", 0.1)])
    assert [edit.site.shape for edit in seen.edits] == [X.shape]


def test_compiled_after_the_last_pass() -> None:
    module = PassManager(passes=[without_dead_code, ours(), without_dead_code])(fx.symbolic_trace(net())).graph_module
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(compiled(X).output, module(X).output, atol=1e-6)


# Edits of the result


def test_an_edit_takes_effect_in_both_modes() -> None:
    module = ours()(fx.symbolic_trace(net())).graph_module
    before = [module.train(mode)(X).output.detach() for mode in (True, False)]
    assert relu_to_gelu(module).modified
    assert torch.equal(module(X).output, before[1])  # not before recompile()
    module.recompile()
    gelu = net()
    gelu.block.forward = lambda x: torch.nn.functional.gelu(gelu.block.bn(gelu.block.conv(x)) + x)  # type: ignore[method-assign]
    module.load_state_dict(gelu.state_dict())
    assert torch.equal(module.eval()(X).output, gelu.eval()(X))
    assert not torch.equal(module.train()(X).output, module(X).output)
    assert "gelu" in graphreg.strip(module).code


class TwoForms(nn.Module):
    """Another structure in each mode: two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).relu()
        return self.out(h) if self.training else self.out(h).tanh()


def test_with_two_graphs_a_pass_sees_that_of_the_mode() -> None:
    stripped = graphreg.strip(graphreg.regularize(TwoForms(), weight_l2=0.1))
    module = graphreg.as_pass(dropout={"relu": 0.5}, rng=0)(stripped).graph_module
    assert list(module.graphs) == ["train", "eval"]
    for mode in (True, False):
        module.train(mode)
        assert module.graph is module.graphs["train" if mode else "eval"] and ("tanh" in module.code) is not mode
        relu_to_gelu(module)
        module.recompile()
        assert "gelu" in module.code and "relu()" not in module.code
    module.train()
    module.graph = copy.deepcopy(module.graph)
    assert "tanh" in module.graphs["eval"].python_code("self").src and "tanh" not in module.code


def test_a_replaced_module_owns_its_site() -> None:
    """The noise at ``block.conv`` follows the conv that stands there now, and what is around it when it is gone."""
    module = graphreg.as_pass(BernoulliDropout(["block.bn", "out"], 0.5), rng=0)(fx.symbolic_trace(net().eval())).graph_module
    fuse_in_place(module)
    rules = module.graphreg_rules
    assert rules.block_bn_dropout.owner == (module.get_submodule("block"),)
    assert rules.out_dropout.owner == (module.get_submodule("out"),)
    module.train()
    assert rules.block_bn_dropout.acts() and rules.key.draws()
    module.get_submodule("out").eval()
    assert not rules.out_dropout.acts()


# A GraphModule that another pass made


def made_anew() -> tuple[fx.GraphModule, fx.GraphModule]:
    module = ours()(fx.symbolic_trace(net())).graph_module
    return module, fx.GraphModule(module, copy.deepcopy(module.graph))


def test_its_mode_is_followed() -> None:
    module, anew = made_anew()
    for mode in (False, True, False):
        anew.train(mode)
        assert torch.equal(anew(X).output, anew(X).output) is not mode
    assert not graphreg.strip(module).training or not torch.equal(anew(X).output, module.train()(X).output)


def test_its_strengths_and_states() -> None:
    _, anew = made_anew()
    graphreg.set_strength(anew, "hidden_l1", 2e-8)
    anew.half()
    assert graphreg.strengths(anew) == {"hidden_dropout": 0.5, "hidden_l1": 2e-8}
    anew.float()
    state = graphreg.rng_state(anew)
    first = anew(X)
    graphreg.set_rng_state(anew, state)
    assert torch.equal(anew(X).output, first.output) and first.penalties["hidden_l1"] > 0
    anew.eval()
    with graphreg.noise_on(anew):
        assert not torch.equal(anew(X).output, anew(X).output)
    assert torch.equal(anew(X).output, anew(X).output)
    twin = copy.deepcopy(anew)
    graphreg.set_strength(twin, "hidden_dropout", 0.25)
    assert graphreg.strengths(anew)["hidden_dropout"] == 0.5 and graphreg.strengths(twin)["hidden_dropout"] == 0.25
    assert set(anew.state_dict()) == set(net().state_dict())


def test_what_lost_its_provenance_cannot_be_stripped() -> None:
    module = ours()(fx.symbolic_trace(net())).graph_module
    for node in module.graph.nodes:
        node.meta.clear()
    with pytest.raises(graphreg.GraphRegError, match=r"hidden_l1 calls an addition of graphreg and its node\.meta no longer says so"):
        graphreg.strip(module)


def test_what_reads_an_addition_cannot_be_stripped() -> None:
    module = ours()(fx.symbolic_trace(net())).graph_module
    total = next(node for node in module.graph.nodes if node.name == "hidden_l1")
    with module.graph.inserting_after(total):
        more = module.graph.call_function(torch.neg, (total,))
    module.graph.output_node().args = ((module.graph.output_node().args[0], more),)
    with pytest.raises(graphreg.GraphRegError, match=r"reads hidden_l1, which graphreg added.*undo that pass"):
        graphreg.strip(module)


# Modified, and bad input


def test_modified_says_whether_anything_changed() -> None:
    given = fx.symbolic_trace(net())
    nothing = graphreg.as_pass(penalties="attach", hidden_dropout=0)(given)
    assert nothing.graph_module is given and nothing.modified is False
    ignored = graphreg.as_pass(penalties="attach", missing="ignore", dropout={"nowhere": 0.1})(given)
    assert ignored.graph_module is given and ignored.modified is False
    returned = graphreg.as_pass(hidden_dropout=0)(given)  # the output is (output, penalties) then
    assert returned.modified and text(returned.graph_module.code).endswith("return graphreg_Regularized(out, {})")


def test_a_pass_that_matches_nothing() -> None:
    given = fx.symbolic_trace(net())
    with pytest.raises(NoMatchError, match=r"'blok\.relu' matches no value of Net.*Near names: block\.relu"):
        graphreg.as_pass(dropout={"blok.relu": 0.1})(given)
    with pytest.raises(Exception, match="An error occurred when running the 'Regularize' pass") as caught:
        PassManager(passes=[graphreg.as_pass(dropout={"blok.relu": 0.1})])(given)
    assert isinstance(caught.value.__cause__, NoMatchError)
    with pytest.warns(UserWarning, match="blok"):
        graphreg.as_pass(dropout={"blok.relu": 0.1}, missing="warn")(given)
    assert text(given.code) == BEFORE


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"hiden_dropout": 0.1}, NoMatchError, r"'hiden_dropout' is no option of graphreg\.regularize.*Near keys: hidden_dropout"),
        ({"hidden_dropout": 1.5}, RegularizerError, r"weight=1\.5 is not allowed"),
        ({"weight_l2": {"wieght": 1, "pattern": "*"}}, RegularizerError, r"has no 'strength'.* Near options: weight"),
        ({"missing": "never"}, RegularizerError, r"missing='never' is unknown"),
        ({"penalties": "give"}, RegularizerError, r"penalties='give' is unknown"),
        ({"rng": "0"}, RegularizerError, r"rng='0' is not allowed"),
        ({"scale": 2.0}, RegularizerError, r"scale= is for penalties='attach'"),
        ({"scale": -1.0, "penalties": "attach"}, RegularizerError, r"scale=-1\.0 is not allowed"),
        ({"compile": True}, RegularizerError, r"compile= is no option of a pass; compile what the last pass gives"),
        ({"front_end": "auto"}, RegularizerError, r"front_end= is no option of a pass"),
        ({"model": 1}, RegularizerError, r"'model' is an option of graphreg\.regularize"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_is_wrong_at_the_call(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        graphreg.as_pass(**options)


def test_what_is_no_regularizer() -> None:
    with pytest.raises(RegularizerError, match=r"'weight_l2' is no regularizer"):
        graphreg.as_pass("weight_l2")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match=r"a pass takes a torch\.fx\.GraphModule, not Net.*torch\.fx\.symbolic_trace\(model\)"):
        ours()(net())  # type: ignore[arg-type]
