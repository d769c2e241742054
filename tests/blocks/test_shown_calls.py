"""What hooks on a block get: the arguments and the result of the model's own call, whatever crosses the border of the emitted code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
PATHS = ("inner", "last", "inner.part", "inner.part.linear")
BLOCKS = ["inner", "last", "inner.part"]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return self.linear(x).relu() if factor is None else self.linear(x) * factor


class Inner(nn.Module):
    """Returns a result of which its caller reads a part, and of which it computes a part only."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: int = 3, *, scale: float = 1.0, unread: Any = None) -> Any:
        h = self.part(x * scale).reshape(rows, -1)
        return h, x, {"mask": mask, "twice": h * 2}


class Net(nn.Module):
    """Calls a block twice, with a buffer, a number, a size, a keyword and a value that the block does not read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = Inner(), Part()
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y, _, _ = self.inner(x, self.mask, scale=2.0)
        z, _, _ = self.inner(y, x + 1, x.shape[0], unread=(1, [y.neg(), None]))
        out: Tensor = self.last(z, factor=y)
        return out


def regularized(in_place: bool, model: Callable[[], nn.Module] = Net, **options: Any) -> Any:
    settings: dict[str, Any] = {"hidden_dropout": 0.0, "weight_l2": 0.1, "rng": 0, "blocks": BLOCKS, **options}
    if in_place:
        return graphreg.regularize_(model(), penalties="attach", scale=1, example_inputs=X, **settings)
    return graphreg.regularize(model(), example_inputs=X, **settings)


def seen_by_hooks(model: Any, call: Callable[[Tensor], Any], paths: tuple[str, ...] = PATHS) -> list[Any]:
    """What hooks of each kind get in one call: the paths and the values."""
    seen: list[Any] = []

    def note(path: str, module: nn.Module, *values: Any) -> None:
        assert module is model.get_submodule(path)
        seen.append((path, *values))

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        for keywords in (False, True):
            handles.append(module.register_forward_pre_hook(partial(note, path), with_kwargs=keywords))
            handles.append(module.register_forward_hook(partial(note, path), with_kwargs=keywords))
    call(X)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
    else:
        assert ours == theirs


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_get_what_the_models_hooks_get(front_end: str, in_place: bool) -> None:
    torch._dynamo.reset()
    plain = Net()
    expected = seen_by_hooks(plain, plain)
    module = regularized(in_place, front_end=front_end)
    assert_same(seen_by_hooks(module, module), expected)
    (other := pickle.loads(pickle.dumps(module)))(X)
    assert_same(seen_by_hooks(other, other), expected)
    if in_place == (front_end == "export"):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        short = seen_by_hooks(plain, plain, PATHS[:3:2])
        assert_same(seen_by_hooks(module, compiled, PATHS[:3:2]), short)
    if not in_place:  # in eval mode a model in place runs its own forward
        assert_same(seen_by_hooks(module.eval(), module), expected)
    torch._dynamo.reset()


def test_layers_without_blocks() -> None:
    plain, module = Net(), regularized(False, blocks=None)
    assert_same(seen_by_hooks(module, module, PATHS[3:]), seen_by_hooks(plain, plain, PATHS[3:]))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_splice_at_the_result_is_seen(in_place: bool) -> None:
    module = regularized(in_place, hidden_dropout=None, dropout={"inner.part": 0.5})
    seen = seen_by_hooks(module, module, ("inner.part", "inner"))
    results = [each for each in seen if len(each) == 3 and not isinstance(each[2], dict)]  # of the hooks that get arguments and a result
    inner = [values for path, *values in results if path == "inner"]
    part = [values[1] for path, *values in results if path == "inner.part"]
    assert torch.equal(inner[0][1][0], part[0]) and torch.equal(inner[0][1][2]["twice"], part[0] * 2)
    assert 0.2 < float((part[0] == 0).float().mean()) < 0.9 and torch.equal(inner[1][0][0], part[0])


def halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2, *args[1:])


def shifted(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "factor": kwargs["factor"] + 1}


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 2, *output[1:])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_may_replace_values(in_place: bool, compiled: bool) -> None:
    """The output and the gradients are those of the plain model with these hooks, and so is what hooks of backward get."""
    torch._dynamo.reset()
    results = []
    for model in (Net(), regularized(in_place, weight_l2=None)):
        gradients: list[Any] = []
        model.inner.register_forward_pre_hook(halved)
        model.last.register_forward_pre_hook(shifted, with_kwargs=True)
        model.inner.register_forward_hook(doubled)
        if not compiled:
            model.inner.part.register_full_backward_hook(lambda module, inputs, outputs, into=gradients: into.append((inputs, outputs)))
            model.inner.part.register_full_backward_pre_hook(lambda module, outputs, into=gradients: into.append(outputs))
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled and results else model
        output = run(X.clone().requires_grad_())
        output = output if isinstance(output, Tensor) else output.output
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), [model.inner.part.linear.weight]), gradients))
    assert_same(results[1], results[0])
    assert compiled or len(results[0][2]) > 2
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo's, also for plain blocks
def test_a_block_that_is_compiled_runs_its_hooks() -> None:
    torch._dynamo.reset()
    results = []
    for model in (Net(), regularized(False, blocks="last"), regularized(True, blocks="last")):
        model.last.register_forward_pre_hook(shifted, with_kwargs=True)
        if results:
            model.last.compile(backend="eager", fullgraph=True)
        output = model(X)
        results.append(output if isinstance(output, Tensor) else output.output)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch._dynamo.reset()


# What is refused


class Holder:
    """An object of the model's, which no graph has."""


class Strange(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, unread=Holder())[0]
        return y


def test_an_argument_that_no_graph_has() -> None:
    """Only hooks that would get it are refused."""
    plain, module = Strange(), regularized(False, Strange, blocks="inner")
    for model in (plain, module):
        model.seen = []
        model.inner.register_forward_hook(lambda block, args, output, model=model: model.seen.append((args, output)))
        model(X)
    assert_same(module.seen, plain.seen)
    module.inner.register_forward_hook(lambda block, args, kwargs, output: None, with_kwargs=True)
    with pytest.raises(GraphRegError, match=r"'inner' would get a Holder, which the emitted code does not have there\. Register"):
        module(X)


def test_a_graph_module_has_no_calls() -> None:
    module = graphreg.regularize(torch.fx.symbolic_trace(Net()), weight_l2=0.1, blocks="last")
    module(X)
    module.last.register_forward_hook(doubled)
    with pytest.raises(GraphRegError, match="'last' would get what the model's call gets.*Regularize the model that it was made from"):
        module(X)


def test_arguments_that_a_hook_of_the_models_may_replace() -> None:
    """It is in the graph, and runs before the hooks of the block."""
    model = Net()
    model.inner.register_forward_pre_hook(halved)
    module = regularized(False, lambda: model)
    expected = module(X).output
    assert torch.equal(expected, model(X))
    module.inner.register_forward_hook(lambda block, args, output: None)
    with pytest.raises(GraphRegError, match="would get an argument that a hook of the model's own may replace"):
        module(X)


REFUSED: dict[str, tuple[Callable[..., Any], bool, str]] = {
    "the passed-on argument": (lambda module, args, output: (output[0], output[1] + 1, output[2]), False, "reads from elsewhere"),
    "the structure of the result": (lambda module, args, output: output[0], False, "another structure"),
    "a tuple for a value": (lambda module, args, output: ((output[0], 1), *output[1:]), False, "another structure"),
    "the structure of the arguments": (lambda module, args: args[0], True, "another structure"),
    "a buffer": (lambda module, args: (args[0], args[1] * 2), True, "reads from elsewhere"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_the_code_cannot_follow_is_refused(name: str) -> None:
    hook, before, message = REFUSED[name]
    module = regularized(False)
    (module.inner.register_forward_pre_hook if before else module.inner.register_forward_hook)(hook)
    with pytest.raises(GraphRegError, match=f"a hook on the block 'inner' has .*{message}"):
        module(X)
