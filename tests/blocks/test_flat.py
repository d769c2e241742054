"""With blocks, a rewritten module is the same as without, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from block_nets import CASES, Case, rewritten

KEYWORDS: dict[str, Any] = {"hidden_dropout": 0.2, "hidden_noise": 0.1, "hidden_l1": 0.1, "weight_l2": 0.1, "rng": 3}


def both(case: Case, model: nn.Module | None = None) -> tuple[Any, Any, tuple[Any, ...]]:
    """The module without blocks, the one with them, both of one trace, and the arguments of a call."""
    torch.manual_seed(1)
    given = case.inputs()
    traced, options = graphreg.trace(case.model(), given), {**KEYWORDS, **case.more}
    flat, module = rewritten(traced, case.model(), **options), rewritten(traced, model or case.model(), blocks=case.blocks, **options)
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
def test_it_computes_is_named_copied_and_stripped_as_flat(name: str) -> None:
    """Values, penalties and gradients in both modes, states, copies, and the model, which is unchanged."""
    case = CASES[name]
    model, options = case.model(), {**KEYWORDS, **case.more}
    before = [(path, module, type(module), dict(vars(module)), dict(module._modules)) for path, module in model.named_modules()]
    flat, module, given = both(case, model)
    assert_named_alike(module, flat)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)]

    called, blocks = list[str](), module.graphreg_state.blocks
    handles = [module.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path)) for path in blocks]
    expected = step(flat, given)
    assert_equal(step(module, given), expected)
    assert set(called) == set(blocks) and blocks
    for handle in handles:
        handle.remove()
    for twin in copies[:2]:
        assert_equal(step(twin, given), expected)
        twin.eval()
        twin.train()
    assert_equal(step(module, given), step(flat, given))

    flat.eval(), module.eval()
    assert not any(inner.training for inner in model.modules())
    assert_equal(step(module, given), step(flat, given))
    if case.more.get("hidden_dropout", 0.2):
        with graphreg.noise_on(flat), graphreg.noise_on(module):
            assert_equal(step(module, given), step(flat, given))
    assert graphreg.rng_state(module) == graphreg.rng_state(flat)
    assert_unchanged(model, module, before)
    assert_equal(step(copies[2].train(), given), expected)  # it shares the buffers, which only eval mode reads

    stripped = graphreg.strip(module).eval()
    assert_equal(stripped(*given), model.eval()(*given))
    again = graphreg.regularize(stripped.train(), blocks=case.blocks, **options)
    assert_equal(step(again, given), expected)


def assert_named_alike(module: Any, flat: Any) -> None:
    assert list(module.state_dict()) == list(flat.state_dict())
    assert module.state_dict()._metadata == flat.state_dict()._metadata
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in flat.named_parameters()]
    assert graphreg.strengths(module) == graphreg.strengths(flat)
    assert module.code == flat.code
    assert str(graphreg.diff(module)) == str(graphreg.diff(flat))


def assert_unchanged(model: nn.Module, module: nn.Module, before: list[Any]) -> None:
    """The modes of both follow each other, and the model has the modules, the attributes and the classes that it had."""
    module.train()
    model.eval()
    assert not any(inner.training for path, inner in module.named_modules() if not path.startswith("graphreg_rules"))
    model.train()
    for path, inner, kind, attributes, children in before:
        assert model.get_submodule(path) is inner and type(inner) is kind
        assert vars(inner) == attributes and dict(inner._modules) == children


@pytest.mark.parametrize("name", CASES)
def test_compiled_it_is_equal(name: str) -> None:
    flat, module, given = both(CASES[name])
    compiled = step(module, given, torch.compile(module, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    assert_equal(compiled, step(flat, given, torch.compile(flat, backend="aot_eager", fullgraph=True)))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in CASES if name != "stack"])
def test_verified(name: str) -> None:
    case = CASES[name]
    given = case.inputs()
    graphreg.regularize(case.model(), example_inputs=given, blocks=case.blocks, verify=True, **{**KEYWORDS, **case.more})
