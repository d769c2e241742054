"""Many modules of one kind: stacked for vmap, averaged, compiled once for all; and programs that torch.export saves."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, stack_module_state
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import graphreg
from graphreg import GraphRegError
from graphreg.runtime.result import Regularized
from graphreg.runtime.rewritten_module import RewrittenModule

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
ALL: dict[str, Any] = {"hidden_dropout": 0.4, "hidden_l1": 0.1, "weight_l2": 0.01}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 2))


def made(seed: int = 0, **options: Any) -> RewrittenModule:
    return graphreg.regularize(net(seed), rng=seed, **(options or ALL))


# --- torch.func --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["made", "copied"])
@pytest.mark.parametrize("training", [True, False])
def test_stacked(how: str, training: bool) -> None:
    """Outputs, penalties and their gradients, all models in one call."""
    options = {"hidden_l1": 0.1, "weight_l2": 0.01}
    first = made(**options)
    modules = [first] + [made(i, **options) if how == "made" else copy.deepcopy(first) for i in (1, 2)]
    for module in modules[1:] if how == "copied" else ():
        nn.init.normal_(module.get_parameter("0.weight"))
    graphreg.set_strength(modules[1], "hidden_l1", 0.5)
    for module in modules:
        module.train(training)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.train(False)
    assert len({type(module) for module in modules}) == 1
    params, buffers = stack_module_state(modules)  # type: ignore[arg-type]
    base = copy.deepcopy(first).to("meta")

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, penalties = functional_call(base, (params, buffers), (x,))
        return output.square().sum() + sum(penalties.values()), penalties

    values, penalties = torch.vmap(loss, (0, 0, None))(params, buffers, X)
    values.sum().backward()
    for i, module in enumerate(modules):
        output, expected = module(X)
        (output.square().sum() + sum(expected.values())).backward()
        torch.testing.assert_close({name: value[i] for name, value in penalties.items()}, expected)
        for name, parameter in module.named_parameters():
            assert params[name].grad is not None
            torch.testing.assert_close(params[name].grad[i], parameter.grad)


def test_those_of_another_structure_have_another_class() -> None:
    kinds = [made(), made(hidden_dropout=0.4), made(**ALL, penalties="attach", scale=1), graphreg.strip(made())]
    kinds += [graphreg.regularize(nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 2)), hidden_dropout=0.1) for n in (2, 3)]
    kinds += [graphreg.regularize(nn.Sequential(nn.Dropout(p), nn.Linear(4, 4)), weight_l2=0.1) for p in (0.1, 0.2)]
    assert len({type(module) for module in kinds}) == len(kinds)
    with pytest.raises(RuntimeError, match="same class"):
        stack_module_state(kinds[-2:])  # type: ignore[arg-type]


def test_a_graph_that_is_edited_is_the_modules_own() -> None:
    first, second, third = made(1), made(2), made(3)
    kind, expected = type(first), [module.eval()(X).output for module in (first, second, third)]
    assert type(second) is type(third) is kind
    linear = next(node for node in second.graph.nodes if node.target == "2")
    with second.graph.inserting_after(linear):
        negated = second.graph.call_function(torch.neg, (linear,))
    linear.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
    second.recompile()
    assert type(first) is type(third) is kind is not type(second) and isinstance(second, fx.GraphModule)
    for module, sign, output in zip((first, second, third), (1, -1, 1), expected, strict=True):
        assert torch.equal(module(X).output, sign * output)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(X).output, sign * output) and (type(twin) is type(module))
    assert type(second).__name__ == type(first).__name__ == "Sequential"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_class_and_nothing_else_in_common(copied: Callable[[RewrittenModule], RewrittenModule]) -> None:
    module = made()
    twin = copied(module)
    assert type(twin) is type(module) and twin.graph is not module.graph and twin.graph.owning_module is twin
    module(X)
    assert graphreg.rng_state(module)["call"] == 1 and graphreg.rng_state(twin)["call"] == 0


def test_a_shallow_copy_follows_its_own_mode() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), hidden_dropout=0.5, rng=0)
    twin, expected = copy.copy(module), copy.deepcopy(module)
    twin.training = False
    assert torch.equal(module(X).output, expected(X).output) and not torch.equal(module(X).output, twin(X).output)
    graphreg.set_strength(twin, "hidden_dropout", 0.1)
    assert graphreg.strengths(module) == {"hidden_dropout": 0.5} and twin.get_parameter("0.weight") is module.get_parameter("0.weight")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of an autograd.Function
@pytest.mark.parametrize("penalties", ["return", "attach"])
def test_compiled_once_and_right_for_each(penalties: str) -> None:
    """A class in common is a code object in common: what was compiled for one module runs for the others, each with what is its own."""
    options = ALL if penalties == "return" else {**ALL, "penalties": "attach", "scale": 1}
    counter = CompileCounterWithBackend("aot_eager")
    modules = [made(i, **options) for i in range(5)]
    modules[2].get_submodule("1").eval()
    graphreg.set_strength(modules[3], "hidden_dropout", 0.9)
    twins = [copy.deepcopy(module) for module in modules]
    assert len({type(module) for module in (*modules, *twins)}) == 1
    for module, twin in zip(modules, twins, strict=True):
        run = torch.compile(module, fullgraph=True, backend=counter)
        for _ in range(2):
            given = []
            for call, of in ((run, module), (twin, twin)):
                of.zero_grad()
                answer = call(X)
                output, total = (answer.output, sum(answer.penalties.values())) if penalties == "return" else (answer, 0)
                (output.square().sum() + total).backward()
                given.append([output, *(p.grad for p in of.parameters())])
            torch.testing.assert_close(*given)
        assert graphreg.rng_state(module) == graphreg.rng_state(twin)
    assert counter.frame_count <= 3


# --- averages ----------------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """As trainers have it: the rewritten module within another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


AVERAGES: list[dict[str, Any]] = [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": get_ema_avg_fn(0.9)}]


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("average", AVERAGES, ids=lambda average: next(iter(average), "swa"))
def test_averages_are_those_of_the_models_own(average: Any, use_buffers: bool) -> None:
    within = use_buffers == ("avg_fn" not in average)  # with each average once, and with buffers and without
    module, plain = made(), net()
    model = Outer(module) if within else module
    averaged, expected = (AveragedModel(m, use_buffers=use_buffers, **average) for m in (model, plain))
    inner: Any = averaged.module.inner if within else averaged.module
    for step in range(10):
        if step == 7:
            graphreg.set_strength(module, "hidden_dropout", 0.8)
            graphreg.set_strength(module, "weight_l2", 0.0)
        module(X)
        with torch.no_grad():
            for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
                ours.add_(0.1 * step)
                theirs.copy_(ours)
            for ours, theirs in zip([b for n, b in module.named_buffers() if "rules" not in n], plain.buffers(), strict=True):
                theirs.copy_(ours)
        averaged.update_parameters(model)
        expected.update_parameters(plain)
        assert graphreg.strengths(inner) == graphreg.strengths(module) and graphreg.rng_state(inner) == graphreg.rng_state(module)
    assert [name for name, _ in averaged.named_buffers() if "rules" in name]  # for everything else they are buffers as others
    theirs = dict(expected.module.state_dict())
    assert all(torch.equal(value, theirs[name]) for name, value in inner.state_dict().items())
    inner.train(), module.train()
    inner.load_state_dict(module.state_dict())
    assert torch.equal(inner(X).output, module(X).output)  # and the masks are those of the module


# --- torch.export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_program_is_saved_and_loaded(training: bool) -> None:
    module = made().train(training)
    graphreg.set_strength(module, "hidden_l1", 0.7)
    state = graphreg.rng_state(module)
    with pytest.warns(UserWarning, match="will draw the same masks at each call. Export it in eval mode") if training else nullcontext():
        program = torch.export.export(module, (X,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()(X)
    graphreg.set_rng_state(module, state)
    expected = module(X)
    assert type(loaded) is Regularized and list(loaded.penalties) == list(expected.penalties)
    torch.testing.assert_close(tuple(loaded), tuple(expected), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # torch's own, if it is strict
@pytest.mark.parametrize("strict", [True, False])
def test_a_program_that_draws_says_that_its_masks_stay(strict: bool) -> None:
    module = made()
    with pytest.warns(UserWarning, match="^this module is exported while it draws noise, and the program will draw the same masks"):
        program = torch.export.export(module, (X,), strict=strict).module()
    assert torch.equal(program(X).output, program(X).output)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this module is exported")
        torch.export.export(module.eval(), (X,), strict=strict)


def test_torch_jit_would_freeze_the_masks() -> None:
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), hidden_dropout=0.5)
    stripped, x = graphreg.strip(module), torch.ones(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about what it freezes
        with pytest.raises(GraphRegError, match=r"^torch\.jit\.trace would freeze the masks of this call"):
            torch.jit.trace(module, (x,))  # type: ignore[no-untyped-call]
        traced = torch.jit.trace(stripped.eval(), (x,))  # type: ignore[no-untyped-call]
    assert torch.equal(traced(x), stripped(x))
