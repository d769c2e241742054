"""With blocks, a rewritten module is the same as without, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from block_nets import CASES, Case

KEYWORDS: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_noise": 0.1, "hidden_l1": 0.1, "weight_l2": 0.1, "rng": 3}


def both(case: Case) -> tuple[Any, Any, Any]:
    """The module without blocks, the one with them, and the arguments of a call."""
    torch.manual_seed(1)
    given = case.inputs()
    options = {**KEYWORDS, **case.more}
    flat = graphreg.regularize(case.model(), example_inputs=given, **options)
    module = graphreg.regularize(case.model(), example_inputs=given, blocks=case.blocks, **options)
    return flat, module, given if isinstance(given, tuple) else (given,)


def step(module: Any, given: Any, run: Any = None) -> list[Any]:
    """What a training step computes: the output, the penalties and the gradients, those of the inputs among them."""
    module.zero_grad()
    inputs = [value.clone().requires_grad_() for value in given]
    torch.manual_seed(2)
    result = (module if run is None else run)(*inputs)
    output, penalties = result if isinstance(result, graphreg.Regularized) else (result, {})
    flat = [value for value in torch.utils._pytree.tree_leaves(output) if isinstance(value, Tensor)]
    loss = sum(value.square().mean() for value in flat) + sum(penalties.values())
    loss.backward()  # type: ignore[union-attr]
    return [output, penalties, {n: p.grad for n, p in module.named_parameters()}, [value.grad for value in inputs]]


def assert_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("name", CASES)
def test_values_penalties_and_gradients_are_equal(name: str) -> None:
    flat, module, given = both(CASES[name])
    for _ in range(2):
        assert_equal(step(module, given), step(flat, given))
    flat.eval(), module.eval()
    assert_equal(step(module, given), step(flat, given))
    if CASES[name].more.get("hidden_dropout", 0.2):
        with graphreg.noise_on(flat), graphreg.noise_on(module):
            assert_equal(step(module, given), step(flat, given))
    assert graphreg.rng_state(module) == graphreg.rng_state(flat)


@pytest.mark.parametrize("name", CASES)
def test_names_and_state_are_equal(name: str) -> None:
    flat, module, _ = both(CASES[name])
    assert list(module.state_dict()) == list(flat.state_dict())
    assert module.state_dict()._metadata == flat.state_dict()._metadata
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in flat.named_parameters()]
    assert graphreg.strengths(module) == graphreg.strengths(flat)
    assert module.code == flat.code
    assert str(graphreg.diff(module)) == str(graphreg.diff(flat))


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_called(name: str) -> None:
    _, module, given = both(CASES[name])
    called: list[str] = []
    blocks = graphreg.plan(graphreg.trace(CASES[name].model(), given), [], blocks=CASES[name].blocks).blocks
    for path in blocks:
        module.get_submodule(path).register_forward_hook(lambda m, args, output, path=path: called.append(path))
    module(*given)
    assert set(called) == set(blocks)


@pytest.mark.parametrize("name", CASES)
def test_compiled_it_is_equal(name: str) -> None:
    flat, module, given = both(CASES[name])
    compiled = step(module, given, torch.compile(module, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    assert_equal(compiled, step(flat, given, torch.compile(flat, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_are_equal(name: str) -> None:
    flat, module, given = both(CASES[name])
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)]
    expected = step(flat, given)
    for twin in (*copies, module):
        assert_equal(step(twin, given), expected)
        twin.eval()
        twin.train()


@pytest.mark.parametrize("name", CASES)
def test_verified(name: str) -> None:
    case = CASES[name]
    given = case.inputs()
    graphreg.regularize(case.model(), example_inputs=given, blocks=case.blocks, verify=True, **{**KEYWORDS, **case.more})


@pytest.mark.parametrize("name", CASES)
def test_stripped_it_is_the_model(name: str) -> None:
    case = CASES[name]
    _, module, given = both(case)
    stripped, model = graphreg.strip(module).eval(), case.model().eval()
    assert_equal(stripped(*given), model(*given))
    again = graphreg.regularize(stripped.train(), blocks=case.blocks, **{**KEYWORDS, **case.more})
    assert_equal(step(again, given), step(both(case)[1], given))


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_unchanged(name: str) -> None:
    case = CASES[name]
    model = case.model()
    before = [(path, module, type(module), dict(vars(module)), dict(module._modules)) for path, module in model.named_modules()]
    module: nn.Module = graphreg.regularize(model, example_inputs=case.inputs(), blocks=case.blocks, **{**KEYWORDS, **case.more})
    module.eval()
    assert not any(inner.training for inner in model.modules())
    module.train()
    model.eval()
    assert not any(inner.training for path, inner in module.named_modules() if not path.startswith("graphreg_rules"))
    model.train()
    for path, inner, kind, attributes, children in before:
        assert model.get_submodule(path) is inner and type(inner) is kind
        assert vars(inner) == attributes and dict(inner._modules) == children
