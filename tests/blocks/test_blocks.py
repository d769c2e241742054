"""Which modules are blocks, what their code is, regional compilation, hooks, and what is refused."""

from __future__ import annotations

import copy
import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import graphreg
from block_nets import CASES, Nested, Residual, Skips, Stack
from graphreg.passes import BernoulliDropout, HiddenL1
from pages import DOCS, run_page


def planned(model: nn.Module, blocks: Any, **more: Any) -> tuple[str, ...]:
    return graphreg.plan(graphreg.trace(model), [], blocks=blocks, **more).blocks


def regularized(model: nn.Module, **more: Any) -> Any:
    return graphreg.regularize(model, **{"hidden_dropout": 0.2, "hidden_l1": 0.1, "rng": 3, "blocks": "layers.*", **more})


# Which


def test_selectors() -> None:
    assert planned(Stack(), "layers.*") == ("layers.0", "layers.1", "layers.2")
    assert planned(Stack(), ["layers.*", "!layers.1"]) == ("layers.0", "layers.2")
    assert planned(Stack(), "**@Residual") == ("layers.0", "layers.1", "layers.2")
    assert planned(Stack(), lambda site: site.name.endswith("2")) == ("layers.2",)
    assert planned(Nested(), ["stages.*", "stages.0.*"]) == ("stages.0", "stages.0.0", "stages.0.1", "stages.1")
    assert planned(Nested(), "stages.**@Sequential") == ("stages.0", "stages.1")
    assert planned(Stack(), None) == ()
    assert planned(Stack(), "stages.*", missing="ignore") == ()


def test_a_selector_that_matches_nothing() -> None:
    with pytest.raises(graphreg.NoMatchError, match=r"'layer\.\*' matches no called module of Stack\. Near names: layers\.\*"):
        planned(Stack(), "layer.*")
    for text in ("*", "layers.*:out", "layers.*#hidden"):
        with pytest.raises(graphreg.RegularizerError, match="names no modules. Give the paths of the blocks, such as blocks='layers"):
            planned(Stack(), text)


def test_the_plan_and_the_report_show_blocks() -> None:
    traced = graphreg.trace(Stack())
    plan = graphreg.plan(traced, [BernoulliDropout("layers.0", 0.2)], blocks="layers.*")
    assert str(plan).endswith("\n3 blocks: layers.0, layers.1, layers.2") and plan.to_dict()["blocks"] == list(plan.blocks)
    module = graphreg.rewrite(traced, plan, 0)
    assert isinstance(module.layers[0], Residual) and graphreg.strip(module)(torch.ones(1, 8)).shape == (1, 4)


def test_a_layer_is_called_anyway() -> None:
    module = regularized(Stack(), blocks=["layers.0", "head"])
    assert type(module.head) is nn.Linear and module(torch.ones(2, 8)).output.shape == (2, 4)


# The code


def test_the_whole_code() -> None:
    module = graphreg.regularize(Stack(1), [BernoulliDropout("layers.0", 0.2), HiddenL1("layers.0.relu", 0.1)], rng=0, blocks="layers.*")
    assert statements(module.compiled_code) == [
        "key = self.graphreg_rules.key()",
        "layers_0_add_dropout_key = key[0]",
        'layers_0 = getattr(self.layers, "0")(x, graphreg_keys = (layers_0_add_dropout_key,), graphreg_variant = 0)',
        "layers_0_add_dropout = layers_0[0]",
        "layers_0_relu_hidden_l1 = layers_0[1]",
        "head = self.head(layers_0_add_dropout)",
        "hidden_l1 = self.graphreg_rules.hidden_l1(layers_0_relu_hidden_l1)",
        "return graphreg_Regularized(head, {'hidden_l1': hidden_l1})",
    ]
    (source,) = module.layers[0].graphreg_block.sources
    assert statements(source) == [
        "norm = self.norm(value)",
        "up = self.up(norm)",
        "relu = torch.relu(up)",
        "relu_hidden_l1 = self.graphreg_rules.relu_hidden_l1(relu)",
        "drop = self.drop(relu)",
        "down = self.down(drop)",
        "gain = self.gain",
        "mul = gain * down",
        "add = value + mul",
        "add_dropout = self.graphreg_rules.add_dropout(add, key)",
        "return (add_dropout, relu_hidden_l1)",
    ]


def statements(code: str) -> list[str]:
    """The lines of a function, without those that only free values."""
    return [line.partition(";")[0].strip() for line in code.strip().splitlines()[1:]]


RELU = "layers.*.relu"
AT_RELU: dict[str, Any] = {"hidden_dropout": None, "dropout": {RELU: 0.2}, "hidden_l1": {"weight": 0.1, "pattern": RELU}}


def test_equal_blocks_have_one_code() -> None:
    module = regularized(Stack(6), **AT_RELU)
    assert len({layer.graphreg_block.eager[0][0] for layer in module.layers}) == 1


# Regional compilation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo's, also for plain blocks
@pytest.mark.parametrize(("options", "graphs"), [(AT_RELU, 2), ({"hidden_dropout": 0.2, "hidden_l1": 0.1}, 3)])
def test_equal_blocks_compile_two_graphs(options: dict[str, Any], graphs: int) -> None:
    """The first block has a graph of its own, because its input requires no gradient. By default, the last block has a site more."""
    flat, module, x = regularized(Stack(5), blocks=None, **options), regularized(Stack(5), **options), torch.randn(4, 8)
    module.load_state_dict(flat.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    for layer in module.layers:
        layer.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        torch.manual_seed(0)
        expected = flat(x)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x), expected)
    assert counter.frame_count == graphs


# Hooks and policies


def test_hooks_see_the_call() -> None:
    module, x = graphreg.regularize(Stack(2), hidden_dropout=0.2, rng=0, blocks="layers.*"), torch.randn(3, 8)
    seen: list[Any] = []
    module.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args))
    module.layers[0].register_forward_hook(lambda block, args, output: seen.append(output))
    module.layers[1].register_forward_pre_hook(lambda block, args: seen.append(args))
    module(x)
    assert seen[0][0] is x and len(seen[0]) == 1
    assert isinstance(seen[1], Tensor) and seen[2] == (seen[1],)


def test_a_hook_changes_the_result() -> None:
    module, x = graphreg.regularize(Stack(2), hidden_dropout=0.2, rng=0, blocks="layers.*").eval(), torch.randn(3, 8)
    before = module(x).output
    handle = module.layers[1].register_forward_hook(lambda block, args, output: output * 0)
    torch.testing.assert_close(module(x).output, module.head.bias.expand(3, 4))
    handle.remove()
    assert torch.equal(module(x).output, before)


def test_hooks_of_the_model_are_in_the_graph_once() -> None:
    model, x = Stack(2).eval(), torch.randn(3, 8)
    model.layers[0].register_forward_hook(lambda block, args, output: output * 2)
    expected = model(x)
    module = regularized(model)
    torch.testing.assert_close(module(x).output, expected, rtol=0, atol=0)
    assert not module.layers[0]._forward_hooks and len(model.layers[0]._forward_hooks) == 1


def test_policies_find_the_blocks() -> None:
    module = regularized(Stack(2))
    policy = ModuleWrapPolicy({Residual})
    assert [path for path, inner in module.named_modules() if policy(inner, False, 0)] == ["layers.0", "layers.1"]
    assert type(module.layers[0]).__qualname__ == "Residual" and type(module.layers[0]).__module__ == "block_nets"
    assert [type(layer).__name__ for layer in module.layers[:1]] == ["Residual"]


# What is refused


def test_a_block_is_called_by_the_whole_module_only() -> None:
    module = regularized(Stack(2))
    for path, kind in (("layers.0", "Residual"), ("layers", "ModuleList")):
        sentence = rf"'{path}' \({kind}\) is a part of a rewritten module, and only that module can call this part"
        with pytest.raises(graphreg.GraphRegError, match=sentence):
            module.get_submodule(path)(torch.ones(1, 8))


def test_a_block_that_was_replaced() -> None:
    module = regularized(Stack(2))
    module.layers[0] = Residual()
    with pytest.raises(graphreg.GraphRegError, match=r"^a block of the rewritten module was replaced\. Put the block back, or regularize"):
        module(torch.ones(1, 8))
    with pytest.raises(graphreg.GraphRegError, match=r"the block 'layers\.0' of the rewritten module was replaced"):
        module.recompile()
    module = regularized(Stack(2))
    module.layers[0] = copy.deepcopy(module.layers[0])
    with pytest.raises(graphreg.GraphRegError, match=r"^the block 'layers\.0' of the rewritten module was replaced"):
        module(torch.ones(1, 8))


def test_operations_between() -> None:
    """A graph of another library may put an operation into a block's middle and leave its record out."""
    traced = graphreg.trace(Stack(1))
    graph = traced.graphs["both"]
    inner = next(node for node in graph.nodes if node.name == "relu")
    inner.meta["calls"] = ()
    with pytest.raises(graphreg.TraceError, match=r"the block 'layers\.0' cannot be one call: operations outside of it read values"):
        graphreg.rewrite(traced, graphreg.plan(traced, [], blocks="layers.*"))


def test_where_blocks_is_no_option() -> None:
    with pytest.raises(graphreg.GraphRegError, match="blocks= is no option of graphreg.backend"):
        graphreg.backend(hidden_dropout=0.1, blocks="layers.*")


def test_of_a_graph_module_and_as_a_pass() -> None:
    traced, x = torch.fx.symbolic_trace(CASES["skips"].model()), torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_l1": 0.1, "rng": 3}
    module = graphreg.as_pass(**options, blocks=["down*", "up*"])(traced).graph_module
    torch.testing.assert_close(module(x), graphreg.regularize(traced, **options)(x), rtol=0, atol=0)
    assert "self.down1(x" in module.compiled_code and isinstance(Skips(), nn.Module)


def test_the_page() -> None:
    assert type(run_page("blocks.md")["model"]).__name__ == "Net"
    page, space = (DOCS / "blocks.md").read_text(), dict[str, Any](__name__="page")
    pairs = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", page, re.DOTALL)
    for code, expected in pairs:
        with redirect_stdout(StringIO()) as printed:
            exec(code, space)
        assert printed.getvalue() == expected
    assert len(pairs) == 4
