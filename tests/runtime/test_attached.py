"""penalties="attach": a training loop that knows of a loss and nothing else trains with the penalties."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError, RegularizerError
from graphreg.passes import HiddenL1, WeightL2
from graphreg.regularizer.base import Regularizer
from graphreg.runtime.rewritten_module import RewrittenModule

# strong, so that a penalty forgotten or counted twice shows; with a splice, whose masks must agree as well
STRONG: dict[str, Any] = {"hidden_dropout": 0.2, "weight_l2": 3.0, "hidden_l1": 2.0}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.head(h), h

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)[0]


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class TupleNet(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts(x)


class DictNet(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        logits, hidden = self.parts(x)
        return {"logits": logits, "more": [hidden, {"class": logits.argmax(1), "detached": hidden.detach()}], "name": "net"}


class PairNet(Net):
    def forward(self, x: Tensor) -> Pair:
        return Pair(*self.parts(x))


class AnswerNet(Net):
    def forward(self, x: Tensor) -> Answer:
        logits, hidden = self.parts(x)
        return Answer(logits=logits, hidden=hidden)


class TwiceNet(Net):
    """One tensor in two places."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = self.parts(x)
        return logits, logits


class FormsNet(Net):
    """Another structure in each mode: two graphs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        logits, hidden = self.parts(x)
        return (logits, hidden) if self.training else logits


Loss = Callable[[Any, Tensor], Tensor]
# each model, and the loss of a loop that was written for it
FORMS: dict[str, tuple[type[Net], Loss]] = {
    "tensor": (Net, F.cross_entropy),
    "tuple": (TupleNet, lambda out, y: F.cross_entropy(out[0], y) + out[1].square().mean()),
    "first of a tuple": (TupleNet, lambda out, y: F.cross_entropy(out[0], y)),
    "last of a tuple": (TupleNet, lambda out, y: out[1].square().mean()),
    "dict": (DictNet, lambda out, y: F.cross_entropy(out["logits"], y) + out["more"][0].square().mean()),
    "named tuple": (PairNet, lambda out, y: F.cross_entropy(out.logits, y) + out.hidden.square().mean()),
    "dataclass": (AnswerNet, lambda out, y: F.cross_entropy(out.logits, y) + out.hidden.square().mean()),
    "twice": (TwiceNet, lambda out, y: F.cross_entropy(out[0], y) + out[1].square().mean()),
    "two graphs": (FormsNet, lambda out, y: F.cross_entropy(out[0], y) + out[1].square().mean()),
}


class LossPair(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclass
class LossAnswer:
    loss: Tensor
    logits: Tensor


class LossDict(Net):
    """The loss comes with the output, as in transformers."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        logits, _ = self.parts(x)
        return self.form(F.cross_entropy(logits, y), logits)

    def form(self, loss: Tensor, logits: Tensor) -> Any:
        return {"loss": loss, "logits": logits}


class LossNamedTuple(LossDict):
    def form(self, loss: Tensor, logits: Tensor) -> LossPair:
        return LossPair(loss, logits)


class LossDataclass(LossDict):
    def form(self, loss: Tensor, logits: Tensor) -> LossAnswer:
        return LossAnswer(loss=loss, logits=logits)


class LossInTraining(LossDict):
    """Two graphs, one of them with a loss, as in torchvision's detection models."""

    def form(self, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
        return {"loss": loss, "logits": logits} if self.training else {"logits": logits}


class LossInEvaluation(LossDict):
    def form(self, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
        return {"logits": logits} if self.training else {"loss": loss, "logits": logits}


LOSSES: dict[str, tuple[type[LossDict], Callable[[Any], Tensor]]] = {
    "dict": (LossDict, lambda out: out["loss"]),
    "named tuple": (LossNamedTuple, lambda out: out.loss),
    "dataclass": (LossDataclass, lambda out: out.loss),
    "two graphs": (LossInTraining, lambda out: out["loss"]),
}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(3, (16,), generator=generator)


def both(cls: type[Net], scale: Any = None, **keywords: Any) -> tuple[RewrittenModule, RewrittenModule]:
    """The same model twice: penalties returned, and attached."""
    torch.manual_seed(0)
    model = cls()
    keywords = keywords or STRONG
    returned = graphreg.regularize(copy.deepcopy(model), rng=1, **keywords)
    attached = graphreg.regularize(model, rng=1, penalties="attach", scale=scale, **keywords)
    return returned, attached


def gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    """Of one backward pass; a parameter without one counts as 0."""
    for p in module.parameters():
        p.grad = None
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def close(ours: list[Tensor], theirs: list[Tensor], factor: float = 1) -> None:
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-5, atol=1e-7 * factor)


# --- elsewhere: the penalties' gradients join in backward --------------------------------------------------------


def train(model: nn.Module, criterion: Loss, steps: int = 3) -> list[float]:
    """Anybody's loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    model.train()
    for i in range(steps):
        x, y = data(i)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_returned_form_and_a_plain_loop_trains_it_unchanged(form: str) -> None:
    cls, criterion = FORMS[form]
    returned, attached = both(cls, scale=1)
    x, y = data()
    output, penalties = returned(x)
    loss = criterion(output, y)
    without = torch.autograd.grad(loss, list(returned.parameters()), retain_graph=True, materialize_grads=True, allow_unused=True)
    expected = gradients(returned, loss + sum(penalties.values()))
    close(gradients(attached, criterion(attached(x), y)), expected)
    assert sum(float((a - b).abs().sum()) for a, b in zip(expected, without, strict=True)) > 0.5  # it matters
    plain = cls()
    plain.load_state_dict(attached.state_dict())
    seen: list[Tensor] = []

    class WithPenalties(nn.Module):
        """The returned form, told to the same loop."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = returned

        def forward(self, x: Tensor) -> Any:
            output, penalties = self.inner(x)
            seen.append(sum(penalties.values()))
            return output

    ours = train(attached, criterion)
    theirs = train(WithPenalties(), lambda out, y: criterion(out, y) + seen[-1])
    for a, b in zip(attached.parameters(), returned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(b > a for a, b in zip(ours, theirs, strict=True))  # the loop's own loss stays the model's
    train(plain, criterion)
    assert not torch.allclose(plain.body.weight, attached.body.weight, atol=1e-3)


@pytest.mark.parametrize("form", [form for form in FORMS if " of a tuple" not in form])
def test_the_output_is_the_models_own_and_so_is_what_strip_gives(form: str) -> None:
    """Of the same type, part by part; bit-equal, as the strengths of the splices are 0."""
    cls, criterion = FORMS[form]
    torch.manual_seed(0)
    model, (x, y) = cls(), data()
    before = {mode: str(graph) for mode, graph in graphreg.trace(model).graphs.items()}
    module = graphreg.regularize(model, rng=1, penalties="attach", scale=1, **STRONG)
    for mode in (False, True):
        model.train(mode), module.train(mode)
        graphreg.set_strength(module, "hidden_dropout", 0.0 if mode else 0.2)  # in eval mode it does not act
        same(module(x), model(x))
        with torch.no_grad():
            same(module(x), model(x))
        hidden = torch.relu(model.body(x))
        torch.testing.assert_close(module.penalties()["hidden_l1"], 2 * hidden.abs().mean(), check_stride=False)
    stripped = graphreg.strip(module)
    assert {mode: str(graph) for mode, graph in stripped.graphs.items()} == before
    same(stripped(x), model(x))
    ours = gradients(stripped, criterion(stripped(x), y))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(model, criterion(model(x), y)), strict=True))


def same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
    elif isinstance(theirs, (Answer, LossAnswer)):
        same(vars(ours), vars(theirs))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        same(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    else:
        assert ours == theirs


def scaler(**options: Any) -> torch.amp.GradScaler:
    made = torch.amp.GradScaler("cpu", **options)
    made.scale(torch.ones(()))  # as at its first use; before, its scale is not made
    return made


SCALES: dict[str, Callable[[], Any]] = {
    "int": lambda: 1024, "float": lambda: 1024.0, "tensor": lambda: torch.tensor(1024.0),
    "GradScaler": lambda: scaler(init_scale=1024.0), "fresh GradScaler": lambda: torch.amp.GradScaler("cpu", init_scale=1024.0),
    "function": lambda: lambda: 1024.0, "function of a tensor": lambda: lambda: torch.tensor(1024.0, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize(("scale", "form"), [*((scale, "tensor") for scale in SCALES), ("float", "dict")])
def test_under_loss_scaling_the_scale_is_told(scale: str, form: str) -> None:
    """By a power of two, so that scaling is exact."""
    cls, criterion = FORMS[form]
    returned, attached = both(cls, scale=SCALES[scale]())
    x, y = data()
    output, penalties = returned(x)
    expected = gradients(returned, (criterion(output, y) + sum(penalties.values())) * 1024)
    close(gradients(attached, criterion(attached(x), y) * 1024), expected, 1)


def test_a_scale_that_changes_is_followed() -> None:
    """By a GradScaler that doubles its scale at each step, a tensor filled anew, and a function."""
    growing = scaler(init_scale=8.0, growth_factor=2.0, growth_interval=1)
    tensor = torch.tensor(8.0)
    for scale in (growing, tensor, growing.get_scale):
        growing.load_state_dict(growing.state_dict() | {"scale": 8.0})
        tensor.fill_(8.0)
        returned, attached = both(Net, scale=scale)
        optimizer = torch.optim.SGD(attached.parameters(), lr=0.0)
        for step in range(3):
            x, y = data(step)
            output, penalties = returned(x)
            expected = gradients(returned, F.cross_entropy(output, y) + sum(penalties.values()))
            assert growing.get_scale() == float(tensor) == 8 * 2**step
            close(gradients(attached, growing.scale(F.cross_entropy(attached(x), y))), expected, 8 * 2**step)
            growing.step(optimizer)
            growing.update()
            tensor.mul_(2)


def test_a_loop_with_a_grad_scaler() -> None:
    made = scaler(init_scale=256.0)
    returned, attached = both(Net, scale=made)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (attached, returned))
    for i in range(4):
        x, y = data(i)
        ours.zero_grad()
        made.scale(F.cross_entropy(attached(x), y)).backward()
        made.step(ours)
        made.update()
        theirs.zero_grad()
        output, penalties = returned(x)
        (F.cross_entropy(output, y) + sum(penalties.values())).backward()
        theirs.step()
    for a, b in zip(attached.parameters(), returned.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), lambda: 1 / 4])
def test_gradient_accumulation(scale: Any) -> None:
    """Four micro-batches, each loss divided by 4: scale=1/4."""
    returned, attached = both(Net, scale=scale)
    ours, theirs = torch.zeros(()), torch.zeros(())
    for i in range(4):
        x, y = data(i)
        ours = ours + F.cross_entropy(attached(x), y) / 4
        output, penalties = returned(x)
        theirs = theirs + (F.cross_entropy(output, y) + sum(penalties.values())) / 4
    expected = gradients(returned, theirs)
    close(gradients(attached, ours), expected)
    accumulated = accumulate(copy.deepcopy(both(Net, scale=scale)[1]))
    close(accumulated, expected)


def accumulate(module: nn.Module) -> list[Tensor]:
    for i in range(4):
        x, y = data(i)
        (F.cross_entropy(module(x), y) / 4).backward()
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "1", torch.ones(2), [1.0]])
def test_what_is_no_scale_is_refused(scale: Any) -> None:
    with pytest.raises(RegularizerError, match="scale="):
        graphreg.regularize(Net(), weight_l2=0.1, penalties="attach", scale=scale)


def test_a_scale_for_returned_penalties_is_refused() -> None:
    with pytest.raises(RegularizerError, match="attach"):
        graphreg.regularize(Net(), weight_l2=0.1, scale=1)
    with pytest.raises(RegularizerError, match="'return' or 'attach'"):
        graphreg.regularize(Net(), weight_l2=0.1, penalties="attached")  # type: ignore[arg-type]


# --- the warning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "dict", "dataclass"])
def test_an_unknown_scale_is_warned_of_where_the_caller_stands(form: str) -> None:
    with pytest.warns(UserWarning, match="scale=1") as caught:
        graphreg.regularize(FORMS[form][0](), weight_l2=0.1, penalties="attach")
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("cls", [LossInTraining, LossInEvaluation])
def test_a_loss_in_training_is_what_counts(cls: type[LossDict]) -> None:
    """A loss in eval mode alone is of no help: training is what scales."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graphreg.regularize(cls(), weight_l2=0.1, penalties="attach")
    assert len(caught) == (cls is LossInEvaluation)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Net, {"scale": 1, "weight_l2": 0.1}), (LossDict, {"weight_l2": 0.1}), (LossNamedTuple, {"weight_l2": 0.1}),
     (LossDataclass, {"weight_l2": 0.1}), (LossInTraining, {"weight_l2": 0.1}), (Net, {"hidden_dropout": 0.1})],
)  # fmt: skip
def test_a_known_scale_is_not_warned_of(cls: type[Net], options: dict[str, Any]) -> None:
    """Nor a module without penalties."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphreg.regularize(cls(), penalties="attach", **options)


# --- a loss in the output: the penalties are in it ---------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("form", LOSSES)
def test_penalties_are_added_to_the_loss_of_the_output(form: str, mode: bool) -> None:
    cls, loss_of = LOSSES[form]
    mode = mode or cls is LossInTraining
    returned, attached = (module.train(mode) for module in both(cls))
    x, y = data()
    output, penalties = returned(x, y)
    ours = attached(x, y)
    assert type(ours) is type(output)
    expected = loss_of(output) + torch.stack(list(penalties.values())).sum()
    torch.testing.assert_close(loss_of(ours), expected, rtol=1e-6, atol=0)
    assert loss_of(ours) > loss_of(output) + 0.1 and loss_of(ours).dim() == 0
    close(gradients(attached, loss_of(ours)), gradients(returned, expected))


def test_a_loss_in_eval_mode_alone() -> None:
    """In train mode the penalties join in backward; in eval mode they are in the loss."""
    returned, attached = both(LossInEvaluation, scale=8)
    x, y = data()
    output, penalties = returned(x, y)
    expected = gradients(returned, F.cross_entropy(output["logits"], y) + sum(penalties.values()))
    close(gradients(attached, 8 * F.cross_entropy(attached(x, y)["logits"], y)), expected, 8)
    output, penalties = returned.eval()(x, y)
    torch.testing.assert_close(attached.eval()(x, y)["loss"], output["loss"] + sum(penalties.values()))


@pytest.mark.parametrize("form", LOSSES)
def test_loss_scaling_is_exact(form: str) -> None:
    cls, loss_of = LOSSES[form]
    attached = both(cls)[1]
    twin = copy.deepcopy(attached)
    x, y = data()
    made = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = gradients(twin, loss_of(twin(x, y)))
    ours = gradients(attached, made.scale(loss_of(attached(x, y))))
    assert all(torch.equal(a, 1024 * b) for a, b in zip(ours, expected, strict=True))
    optimizer = torch.optim.SGD(attached.parameters(), lr=0.5)
    made.step(optimizer)
    made.update()
    for a, b, grad in zip(attached.parameters(), twin.parameters(), expected, strict=True):
        torch.testing.assert_close(a, b - 0.5 * grad)


@pytest.mark.parametrize("form", LOSSES)
def test_gradient_accumulation_is_exact(form: str) -> None:
    cls, loss_of = LOSSES[form]
    returned, attached = both(cls)
    for i in range(4):
        x, y = data(i)
        (loss_of(attached(x, y)) / 4).backward()
        output, penalties = returned(x, y)
        ((loss_of(output) + sum(penalties.values())) / 4).backward()
    close([p.grad for p in attached.parameters()], [p.grad for p in returned.parameters()])


@pytest.mark.parametrize("form", LOSSES)
def test_a_model_with_a_loss_stripped(form: str) -> None:
    cls, _ = LOSSES[form]
    torch.manual_seed(0)
    model = cls()
    x, y = data()
    for mode in (True, False):
        same(graphreg.strip(graphreg.regularize(model.train(mode), penalties="attach", **STRONG))(x, y), model(x, y))


class Labels(Net):
    """The loss is there when labels are."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits, _ = self.parts(x)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def test_a_loss_that_depends_on_the_labels() -> None:
    x, y = data()
    torch.manual_seed(0)
    model = Labels()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached = graphreg.regularize(model, penalties="attach", weight_l2=3.0, example_inputs={"x": x, "labels": y})
    plain = model(x, y)["loss"]
    torch.testing.assert_close(attached(x, labels=y)["loss"], plain + attached.penalties()["weight_l2"])
    with pytest.warns(UserWarning, match="scale"):
        without = graphreg.regularize(model, penalties="attach", weight_l2=3.0)
    answer = without(x)
    assert answer["loss"] is None and torch.equal(answer["logits"], model(x)["logits"])


def test_a_loss_for_each_example_is_refused() -> None:
    class Each(LossDict):
        def form(self, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
            return {"loss": logits.square().mean(1), "logits": logits}

    with pytest.raises(RegularizerError, match="scalar"):
        graphreg.regularize(Each(), penalties="attach", weight_l2=0.1)(*data())


# --- values, strengths, copies -----------------------------------------------------------------------------------


def test_the_last_values() -> None:
    returned, attached = both(Net, scale=1)
    assert attached.penalties() == {}
    for i in range(2):
        x, _ = data(i)
        attached(x)
        expected = returned(x).penalties
        found = attached.penalties()
        assert list(found) == list(expected) == ["weight_l2", "hidden_l1"]
        assert all(torch.equal(found[name], value) and not found[name].requires_grad for name, value in expected.items())
    found["weight_l2"] = torch.zeros(())  # the caller's own dict
    assert attached.penalties()["weight_l2"] != 0
    with pytest.raises(GraphRegError, match="attach"):
        returned.penalties()


def test_strengths_are_set_as_in_the_returned_form() -> None:
    returned, attached = both(Net, scale=1)
    for each in (returned, attached):
        graphreg.set_strength(each, "weight_l2", 0.5)
    x, y = data()
    output, penalties = returned(x)
    close(gradients(attached, F.cross_entropy(attached(x), y)), gradients(returned, F.cross_entropy(output, y) + sum(penalties.values())))
    for name in graphreg.strengths(attached):
        graphreg.set_strength(attached, name, 0)
    plain = Net()
    plain.load_state_dict(attached.state_dict())
    ours = gradients(attached, F.cross_entropy(attached(x), y))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(plain, F.cross_entropy(plain(x), y)), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_attached_too(copied: Callable[[RewrittenModule], RewrittenModule]) -> None:
    attached = both(Net, scale=2.0)[1]
    x, y = data()
    F.cross_entropy(attached(x), y).backward()
    twin = copied(attached)
    assert twin.penalties() == attached.penalties()
    close(gradients(twin, F.cross_entropy(twin(x), y)), gradients(attached, F.cross_entropy(attached(x), y)))
    twin(data(1)[0])
    assert twin.penalties() != attached.penalties()


def test_without_penalties_nothing_is_attached() -> None:
    torch.manual_seed(0)
    model = Net()
    module = graphreg.regularize(model, rng=1, penalties="attach", hidden_dropout=0.3)
    other = graphreg.regularize(model, rng=1, hidden_dropout=0.3)
    x, _ = data()
    assert torch.equal(module(x), other(x).output)
    assert "attach" not in module.code and module.penalties() == {}
    with pytest.raises(GraphRegError, match="this module returns its penalties with its output"):
        other.penalties()


def test_a_penalty_of_frozen_outputs_still_joins() -> None:
    """The head is frozen and the penalty acts on it not at all: the gradient comes through the output's graph."""
    torch.manual_seed(0)
    model = Net()
    model.head.requires_grad_(False)
    module = graphreg.regularize(model, [WeightL2("body.weight", 3.0)], penalties="attach", scale=1)
    x, y = data()
    weight = model.body.weight
    F.cross_entropy(module(x), y).backward()
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), weight)[0] + 6 * weight / weight.numel()
    torch.testing.assert_close(weight.grad, expected)


# --- compiled ----------------------------------------------------------------------------------------------------


# Dynamo makes an instance of every autograd.Function that it meets, of which torch itself then warns
dynamos_own = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def compiled(module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


@dynamos_own
@pytest.mark.parametrize("form", ["dict", "dataclass", "two graphs"])
def test_compiled_gradients(form: str) -> None:
    cls, criterion = FORMS[form]
    returned, attached = both(cls, scale=1)
    call = compiled(attached)
    for i in range(2):
        x, y = data(i)
        output, penalties = returned(x)
        expected = gradients(returned, criterion(output, y) + sum(penalties.values()))
        close(gradients(attached, criterion(call(x), y)), expected)
        found = attached.penalties()
        torch.testing.assert_close(found, {name: value.detach() for name, value in penalties.items()})


@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_compiled_with_a_loss_in_the_output(form: str) -> None:
    cls, loss_of = LOSSES[form]
    returned, attached = both(cls)
    x, y = data()
    output, penalties = returned(x, y)
    expected = gradients(returned, (loss_of(output) + sum(penalties.values())) * 1024)
    ours = gradients(attached, torch.amp.GradScaler("cpu", init_scale=1024.0).scale(loss_of(compiled(attached)(x, y))))
    close(ours, expected, 1)


@dynamos_own
@pytest.mark.parametrize("kind", ["tensor", "GradScaler", "function"])
def test_compiled_with_a_scale_that_changes(kind: str) -> None:
    made, tensor = scaler(init_scale=8.0, growth_factor=2.0, growth_interval=1), torch.tensor(8.0)
    returned, attached = both(Net, scale={"tensor": tensor, "GradScaler": made, "function": lambda: tensor}[kind])
    optimizer, call = torch.optim.SGD(attached.parameters(), lr=0.0), compiled(attached)
    for step in range(3):
        x, y = data(step)
        output, penalties = returned(x)
        expected = gradients(returned, F.cross_entropy(output, y) + sum(penalties.values()))
        close(gradients(attached, made.scale(F.cross_entropy(call(x), y))), expected, 8 * 2**step)
        torch.testing.assert_close(attached.penalties(), {name: value.detach() for name, value in penalties.items()})
        made.step(optimizer)
        made.update()
        tensor.mul_(2)


@dynamos_own
def test_compiled_by_regularize_itself() -> None:
    returned, _ = both(Net, scale=1)
    model = Net()
    model.load_state_dict(returned.state_dict())
    regularizers: list[Regularizer] = [WeightL2("*", 3.0), HiddenL1("*", 2.0)]
    module = graphreg.regularize(model, regularizers, penalties="attach", scale=1, compile={"backend": "eager"})
    x, y = data()
    graphreg.set_strength(returned, "hidden_dropout", 0)
    output, penalties = returned(x)
    expected = gradients(returned, F.cross_entropy(output, y) + sum(penalties.values()))
    close(gradients(module, F.cross_entropy(module(x), y)), expected)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda y: y.sum(0).argmax(), "torch.int64"),
        (lambda y: (y > 0).all(), "torch.bool"),
        (lambda y: y.sum().detach(), "detached"),
    ],
)
def test_what_is_called_loss_and_cannot_be_one_is_refused(made: Callable[[Tensor], Tensor], told: str) -> None:
    """A penalty that is added to an integer is truncated; one added to a detached value reaches no optimizer."""

    class Other(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"loss": made(y), "logits": y}

    module = graphreg.regularize(Other(), weight_l2=0.1, penalties="attach")
    with pytest.raises(RegularizerError, match=told):
        module(torch.ones(3, 5))
    if told == "detached":
        with torch.no_grad():
            module(torch.ones(3, 5))
