"""What the error says about a model that cannot be traced: the likely cure comes first, and no cure is named that cannot help."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, TraceError


class Checkpoints(nn.Module):
    """A model that checkpoints more than its modules in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda value, block=block: block(value).relu(), x, use_reentrant=False)
        return x


def message(model: nn.Module, **options: Any) -> str:
    with pytest.raises(TraceError) as caught:
        graphreg.regularize(model, weight_l2=0.1, **options)
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"example_inputs": torch.ones(2, 4)}, {"example_inputs": torch.ones(2, 4), "front_end": "export"}])
def test_of_a_model_that_checkpoints_its_blocks(options: dict[str, Any]) -> None:
    says = message(Checkpoints(), **options)
    assert re.search(r"[Ii]f the model checkpoints its blocks, turn that off \(timm: model\.set_grad_checkpointing\(False\)\)", says)
    assert "blocks=, and put checkpoint_wrapper around the blocks of the result" in says
    for useless in ("torch.fx.wrap", "branch on a constant", "backend instead", "Give example_inputs"):
        assert useless not in says, useless


def test_in_place_of_a_model_that_checkpoints_its_blocks() -> None:
    with pytest.raises(TraceError, match=r"name the blocks in blocks=, and put checkpoint_wrapper around"):
        graphreg.regularize_(Checkpoints(), weight_l2=0.1)(torch.ones(2, 4))


def test_of_forgotten_example_inputs() -> None:
    """They come first, because transformers models, LSTMs and branches on shapes all need them."""

    class Keywords(nn.Module):
        def forward(self, x: Tensor, *more: Any) -> Tensor:
            return x.sin() if list(more) else x

    for model, arguments in ((Keywords(), "x, *more"), (nn.LSTM(3, 4), "input, hx=None")):
        says = message(model)
        order = ["cannot be traced symbolically", "Give example_inputs, a tensor, a tuple or a dict", f"forward({arguments})"]
        order += ["torch.export", "If this does not help, move that step into a submodule", "torch.fx.wrap", "branch on a constant"]
        places = [says.index(text) for text in order]
        assert places == sorted(places)
        assert says.count("example_inputs") == 2 and "torch.fx docs" not in says and "Proxy docstring" not in says


class DrawsFrom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hid = nn.Linear(4, 4)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        y: Tensor = self.hid(x) + torch.rand(4, generator=generator)
        return y


@pytest.mark.parametrize("prove", [True, False])
def test_of_draws_from_an_argument(prove: bool) -> None:
    """The argument has its state from before, and an unproved graph is refused, too: it would keep the draws."""
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    says = message(DrawsFrom(), example_inputs=(torch.ones(2, 4), generator), prove=prove)
    assert says.startswith("the forward of DrawsFrom draws from its argument generator, a random generator")
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(TraceError, match="draws from its argument generator"):
        graphreg.regularize_(DrawsFrom(), weight_l2=0.1, prove=prove)(torch.ones(2, 4), generator=generator)
    assert torch.equal(generator.get_state(), before)


SEEDINGS: dict[str, Callable[[], Any]] = {
    "torch.seed": torch.seed,
    "torch.manual_seed": lambda: torch.manual_seed(7),
    "a seed, then a draw": lambda: (torch.manual_seed(7), torch.rand(4)),
}


class Seeds(nn.Module):
    """Seeds torch's generator, by one of ``SEEDINGS``; within, none of its lines needs another refusal."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hid = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        SEEDINGS[self.how]()
        y: Tensor = self.hid(x).relu()
        return y


class Holds(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.inner(x))
        return y


SAYS = "seeds torch's generator (torch.manual_seed, torch.seed) or sets its state, which a graph cannot do"


@pytest.mark.parametrize("how", SEEDINGS)
@pytest.mark.parametrize("options", [{}, {"example_inputs": torch.ones(2, 4)}], ids=["no inputs", "inputs"])
def test_of_a_model_that_seeds(how: str, options: dict[str, Any]) -> None:
    """It draws nothing, so the error names no draw. The generator has its state from before."""
    model, before = Seeds(how), torch.get_rng_state()
    says = message(model, front_end="symbolic", **options)
    assert says == (
        f"Seeds.forward {SAYS}. Seed before you call the module, or move that step into a submodule, which then becomes an opaque module."
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("how", SEEDINGS)
def test_a_submodule_that_seeds_is_opaque(how: str) -> None:
    """The cure helps: the module seeds at each call, as the model does."""
    model = Holds(Seeds(how))
    before = torch.get_rng_state()
    module = graphreg.regularize(model, weight_l2=0.1, front_end="symbolic")
    assert graphreg.trace(model).opaque_modules == {"inner": f"AttributeError: its forward {SAYS}"}
    assert torch.equal(torch.get_rng_state(), before)
    if how != "torch.seed":  # which takes another seed each time
        x, states = torch.ones(2, 4), list[Tensor]()
        for call in (model, module):
            torch.manual_seed(1)
            call(x)
            states.append(torch.get_rng_state())
        assert torch.equal(*states) and torch.equal(model(x), module(x).output)


def test_a_draw_and_a_fork_are_not_called_a_seeding() -> None:
    """``fork_rng`` sets the state back to one that was read: that takes its seedings back."""

    class Draws(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + torch.rand(4)

    class Forks(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(3)
            return super().forward(input)

    assert message(Draws(4, 4), front_end="symbolic").startswith("Draws.forward draws random numbers itself (random, torch.rand)")
    assert not graphreg.trace(Forks(4, 4), front_end="symbolic").opaque_modules


def _in_fake_mode(work: Callable[[Tensor], Any], x: Tensor) -> None:
    with FakeTensorMode():
        work(torch.ones(2, 4))


WITHIN: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "FakeTensorMode": _in_fake_mode,
    "a trace of torch.fx": lambda work, x: make_fx(work)(x),
    "torch.jit.trace": torch.jit.trace,
    "a transform of torch.func": lambda work, x: torch.func.vmap(work)(x),
    "torch.export": lambda work, x: torch.export.export(_Calls(work), (x,)),
}


class _Calls(nn.Module):
    def __init__(self, work: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Any:
        return self.work(x)


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_within_another_tracer(within: str) -> None:
    """Each raised an error of torch's, and the model in place had a graph from within the tracer afterwards."""
    model, placed, x = nn.Linear(4, 4), graphreg.regularize_(nn.Linear(4, 4), weight_l2=0.1, scale=1), torch.ones(2, 4)
    for work in (
        lambda x: graphreg.regularize(model, weight_l2=0.1, example_inputs=x).graph and x,
        lambda x: graphreg.regularize_(model, weight_l2=0.1, scale=1) and x,
    ):
        with pytest.raises(TraceError, match=f"cannot trace Linear within {within}.*regularize before, outside of it"):
            WITHIN[within](work, x)
    with pytest.raises(GraphRegError):
        WITHIN[within](placed, x)
    assert type(model) is nn.Linear and type(placed(x)) is Tensor and graphreg.strengths(placed) == {"weight_l2": 0.1}


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x) if bool(x.sum() > 0) else x


class CallsScripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scripted(x.relu())  # type: ignore[no-any-return]


class HooksValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        h.register_hook(lambda grad: grad * 2)
        return h


class DrawsByNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


class OldConstructor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.FloatTensor(x.size(0), 1).fill_(0.5)


class OldConversion(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.FloatTensor(x)


CAUSES = {
    "Write torch.empty(n, 4) for torch.FloatTensor(n, 4)": OldConstructor,
    "and x.long() for torch.LongTensor(x)": OldConversion,
    "a function that torch.jit.script has compiled asks for it": CallsScripted,
    "it puts a hook on a traced value (by register_hook)": HooksValue,
    "Draw by torch's functions, or move that step into a submodule": DrawsByNumpy,
}


@pytest.mark.parametrize("cause", CAUSES)
def test_the_cause_is_named(cause: str) -> None:
    assert cause in message(CAUSES[cause]())
    module = graphreg.regularize(nn.Sequential(nn.Linear(4, 4), CAUSES[cause](), nn.Tanh()), weight_l2=0.1)
    assert any(note.startswith("opaque module: 1") for note in graphreg.report(module).notes)
    assert module(torch.ones(3, 4)).output.shape == (3, 4)


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.distributions.Normal(0, 1).sample((4,))
        self.prior = noise.sum()
        return x + noise


class ReadsPrior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Draws()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x), self.inner.prior


def test_of_a_value_that_an_opaque_module_keeps() -> None:
    with pytest.raises(TraceError, match=r"reads self\.inner\.prior, which the opaque module inner \(.*\) assigns when it runs"):
        graphreg.regularize(ReadsPrior(), hidden_noise=0.1)


class Expands(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.arange(4.0).expand(x.shape[0], -1)


class ExpandsByTuple(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.arange(4.0).expand((x.shape[0], -1))


def test_of_sizes_that_torch_wants_as_one_tuple() -> None:
    with pytest.raises(TraceError, match=re.escape("as one tuple: t.expand((n, -1))")):
        graphreg.regularize(Expands(), hidden_noise=0.1)
    module = graphreg.regularize(ExpandsByTuple(), noise={"relu": 0})
    for rows in (2, 3):
        assert torch.equal(module(x := torch.randn(rows, 4)).output, ExpandsByTuple()(x))


class MakesByClass(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + torch.Tensor([1e10]).expand(x[..., :1].shape)


def test_the_line_of_a_failed_export_is_the_users() -> None:
    with pytest.raises(TraceError, match=r"cannot be exported at \S*test_refusals.py"):
        graphreg.trace(MakesByClass(), torch.ones(2, 4), front_end="export")
