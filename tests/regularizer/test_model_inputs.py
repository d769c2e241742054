"""Options that name inputs of the model: what formulas of every kind get, on every way through, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import KW_ONLY
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg import ModelInput, Noise, NoMatchError, Penalty, RegularizerError, Splice, TraceError, Vjp, regularize
from graphreg.passes import BernoulliDropout
from graphreg.testing import check_regularizer

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
LABELS = torch.tensor([2, 0, 1])


class Net(nn.Module):
    """``tanh`` is the value, [batch, time, 6]. The forward itself reads neither mask nor labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def mean_over(z: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of |z|, [batch, time, ...], over the steps where the mask is True."""
    return z.abs().mean() if mask is None else (z.abs() * mask[..., None]).sum() / (mask.sum() * z.shape[-1])


class TokenL1(Penalty, keys=("token_l1",)):
    mask: ModelInput = None

    def __call__(self, z: Tensor, mask: Tensor | None) -> Tensor:
        return mean_over(z, mask)


class MaskedDropout(Splice, keys=("masked_dropout",)):
    """Zeroes elements of real tokens alone."""

    mask: ModelInput = None

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, mask: Tensor | None) -> Tensor:
        dropped = z * noise.keep(z, weight) / (1 - weight)
        return dropped.to(z.dtype) if mask is None else torch.where(mask[..., None], dropped, z).to(z.dtype)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True, retain_graph=True)
    return dict(zip(parameters, found, strict=True))


REGULARIZERS = [TokenL1("tanh", 0.5, mask="attention_mask"), MaskedDropout("body", 0.5, mask="attention_mask")]


# --- what a formula gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("examples", [True, False])
def test_a_penalty_by_hand(front_end: Any, examples: bool) -> None:
    """In value and gradient, in train and eval mode; padding counts for nothing."""
    if front_end == "export" and not examples:
        return
    model = Net()
    inputs = (X, MASK, LABELS) if examples else None
    module = regularize(model, REGULARIZERS[0], example_inputs=inputs, front_end=front_end, verify=examples)
    for mode in (True, False):
        found = module.train(mode)(X, MASK, LABELS).penalties["token_l1"]
        expected = 0.5 * torch.tanh(model.body(X))[MASK].abs().mean()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(model, found), gradients(model, expected))
    padded = X.masked_fill(~MASK[..., None], 100.0)
    torch.testing.assert_close(module(padded, MASK, LABELS).penalties["token_l1"], found)


def test_a_splice_acts_where_the_mask_says() -> None:
    """In train mode alone: in eval mode the input may be missing."""
    model = Net()
    module = regularize(model, MaskedDropout("body", 0.9, mask="attention_mask"), rng=0)
    plain, kept = model(X, MASK, LABELS), module(X, MASK, LABELS).output
    assert torch.equal(kept[~MASK], plain[~MASK]) and not torch.isclose(kept[MASK], plain[MASK]).all()
    assert torch.equal(module.eval()(X, None, LABELS).output, plain)


def test_the_emitted_code_and_the_plan() -> None:
    module = regularize(Net(), REGULARIZERS, rng=0)
    assert "relu" not in module.code
    assert "tanh_token_l1 = self.graphreg_rules.tanh_token_l1(tanh, mask = attention_mask)" in module.code
    assert "body_masked_dropout = self.graphreg_rules.body_masked_dropout(body, key, mask = attention_mask)" in module.code
    assert "token_l1: mask is the input attention_mask" in str(graphreg.plan(graphreg.trace(Net()), REGULARIZERS))
    assert "mask is the input" in " ".join(str(graphreg.report(module)).split())
    assert "mask='attention_mask'" in str(graphreg.diff(module))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_compiled_as_in_eager(front_end: Any) -> None:
    modules = [regularize(Net(), REGULARIZERS, example_inputs=(X, MASK, LABELS), front_end=front_end, rng=0) for _ in range(2)]
    torch.compiler.reset()
    run = torch.compile(modules[1], backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        one, other = modules[0].train(mode)(X, MASK, LABELS), (modules[1].train(mode), run(X, MASK, LABELS))[1]
        torch.testing.assert_close(one.output, other.output)
        torch.testing.assert_close(one.penalties, other.penalties)
        ours, theirs = (gradients(m, r.output.sum() + r.penalties["token_l1"]) for m, r in zip(modules, (one, other), strict=True))
        torch.testing.assert_close(ours, theirs)


def test_a_recomputed_splice() -> None:
    """Behind a tanh, a compiled backward recomputes the splice; not one whose input has a gradient."""
    for mask in (MASK, torch.rand(3, 5)):
        modules = [regularize(Net(), Scaled("tanh", 0.5, by="attention_mask"), rng=0) for _ in range(2)]
        torch.compiler.reset()
        run = torch.compile(modules[1], backend="aot_eager", fullgraph=True)
        found = []
        for module, call in ((modules[0], modules[0]), (modules[1], run)):
            given = mask.clone().requires_grad_() if mask.is_floating_point() else mask
            loss = call(X, given, LABELS).output.square().sum()
            loss.backward()
            found.append([p.grad for p in module.parameters()] + ([given.grad] if given.requires_grad else []))
        torch.testing.assert_close(*found)
        assert all(bool(grad.any()) for grad in found[0])


class Scaled(Splice):
    """Scales dropout's kept elements by an input."""

    by: ModelInput = None

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise, by: Tensor | None) -> Tensor:
        assert by is not None
        return (z * noise.keep(z, weight) * by[..., None]).to(z.dtype)


def test_a_gradient_reaches_the_input() -> None:
    """And a floating-point input has the dtype in which the formula computes: float32 for a penalty, the value's for a splice."""
    seen: list[torch.dtype] = []

    class Towards(Penalty):
        goal: ModelInput = None

        def __call__(self, z: Tensor, goal: Tensor) -> Tensor:
            seen.append(goal.dtype)
            return (z - goal[..., None]).square().mean()

    model, goal = Net(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    module = regularize(model, [Towards("tanh", 1.0, goal="attention_mask"), Scaled("body", 0.1, by="attention_mask")], rng=0)
    seen.clear()  # the formula was tried on small tensors
    found = torch.autograd.grad(module.eval()(X, goal, LABELS).penalties["towards"], goal)[0]
    expected = torch.autograd.grad((torch.tanh(model.body(X)) - goal.float()[..., None]).square().mean(), goal)[0]
    torch.testing.assert_close(found, expected)
    assert module.train()(X, goal, LABELS).output.dtype == torch.float32 and set(seen) == {torch.float32}
    half = module.bfloat16()
    assert half(X.bfloat16(), goal, LABELS).output.dtype == torch.bfloat16 and seen[-1] == torch.float32


class Units(Penalty):
    labels: ModelInput = None

    def __call__(self, units: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(units, labels.repeat_interleave(5))


class Steps(Penalty):
    lengths: ModelInput = None
    labels: ModelInput = None

    def __call__(self, steps: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        assert steps.shape[1] == len(labels) and lengths.dtype == torch.int64
        return (steps.sum((0, 2)) * labels).sum() / lengths.sum()


class Together(Penalty):
    labels: ModelInput = None

    def __call__(self, values: dict[str, Tensor], labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.stack(list(values.values())).mean((0, 2)), labels)


class Derived(Penalty):
    labels: ModelInput = None

    def __call__(self, vjp: Vjp, labels: Tensor) -> Tensor:
        chosen = {name: F.one_hot(labels, z.shape[-1])[:, None].expand(z.shape).to(z.dtype) for name, z in vjp.sites.items()}
        return sum(g.square().sum() for g in vjp(chosen).values())  # type: ignore[return-value]


class OfWeights(Penalty, on="parameters"):
    labels: ModelInput = None

    def __call__(self, w: Tensor, labels: Tensor) -> Tensor:
        return w[labels].square().mean()


class Anchored(Penalty, on="parameters"):
    labels: ModelInput = None

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"start": torch.zeros_like(like)}

    def __call__(self, w: Tensor, state: dict[str, Tensor], labels: Tensor) -> Tensor:
        return (w - state["start"])[labels].square().mean()


def derived(model: nn.Module, x: Tensor) -> Tensor:
    chosen = model(x, MASK, LABELS).gather(2, LABELS[:, None, None].expand(3, 5, 1))
    return torch.autograd.grad(chosen.sum(), x, create_graph=True)[0].square().sum()


KINDS: list[tuple[Penalty, Any]] = [
    (Units("head", 1.0, labels="labels"), lambda m: F.cross_entropy(m(X, MASK, LABELS).flatten(0, 1), LABELS.repeat_interleave(5))),
    (Steps("tanh", 1.0, labels="labels", lengths="attention_mask"),
     lambda m: ((torch.tanh(m.body(X)) * MASK[..., None]).sum((1, 2)) * LABELS).sum() / MASK.sum()),
    (Together("head", 1.0, labels="labels"), lambda m: F.cross_entropy(m(X, MASK, LABELS).mean(1), LABELS)),
    (Derived("head", 1.0, labels="labels"), lambda m: derived(m, X.clone().requires_grad_())),
    (OfWeights("head.weight", 1.0, labels="labels"), lambda m: m.head.weight[LABELS].square().mean()),
    (Anchored("head.weight", 1.0, labels="labels"), lambda m: m.head.weight[LABELS].square().mean()),
]  # fmt: skip


def test_formulas_of_all_kinds() -> None:
    """Of units, sequences, all values at once, derivatives, parameters, and parameters with a state; eager and compiled."""
    model = Net()
    module = regularize(model, [penalty for penalty, _ in KINDS], rng=0)
    torch.compiler.reset()
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        for found, (_, by_hand) in zip(run(X, MASK, LABELS).penalties.values(), KINDS, strict=True):
            expected = by_hand(model)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(gradients(model, found), gradients(model, expected))


class RowNoise(Splice, on="parameters"):
    """Adds noise to the rows of a weight that the labels name."""

    rows: ModelInput = None

    def __call__(self, w: Tensor, weight: Tensor, noise: Noise, rows: Tensor) -> Tensor:
        chosen = torch.zeros(len(w), 1, device=w.device).index_fill(0, rows, 1.0)
        return w + (noise.normal(w) * weight * chosen).to(w.dtype)


def test_a_splice_on_a_parameter() -> None:
    model = Net()
    module = regularize(model, RowNoise("head.weight", 0.5, rows="labels"), rng=0)
    labels = torch.tensor([2, 2, 0])
    plain = model(X, MASK, labels)
    torch.compiler.reset()
    state = graphreg.rng_state(module)
    outputs = []
    for run in (module, torch.compile(module, backend="eager", fullgraph=True)):
        graphreg.set_rng_state(module, state)
        outputs.append(run(X, MASK, labels).output)
    torch.testing.assert_close(*outputs)
    changed = ~torch.isclose(outputs[0], plain).flatten(0, 1).all(0)
    assert changed.tolist() == [True, False, True]
    with pytest.raises(RegularizerError, match=r"RowNoise at head\.weight: rows='labels' is None in this call; it must be a tensor"):
        module(X, MASK, None)


def test_a_form_for_eval_mode() -> None:
    class Expected(Splice):
        mask: ModelInput = None

        def __call__(self, z: Tensor, weight: Tensor, noise: Noise, mask: Tensor) -> Tensor:
            return z * noise.keep(z, weight)

        def in_eval(self, z: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask[..., None], z * (1 - weight), z).to(z.dtype)

    model = Net().eval()
    found = regularize(model, Expected("head", 0.25, mask="attention_mask")).eval()(X, MASK, LABELS).output
    torch.testing.assert_close(found, model(X, MASK, LABELS) * (1 - 0.25 * MASK[..., None]))


def test_none_is_given_where_no_input_is_named() -> None:
    model = Net()
    module = regularize(model, TokenL1("tanh", 1.0))
    assert "attention_mask)" not in module.code.replace("def forward(self, x, attention_mask, labels)", "")
    torch.testing.assert_close(module(X, None, None).penalties["token_l1"], torch.tanh(model.body(X)).abs().mean())


def test_the_input_as_it_is_passed() -> None:
    """Not what a splice makes of it for the model."""

    class Reads(Net):
        def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x * attention_mask[..., None], attention_mask, labels)

    weights = torch.rand(3, 5)
    module = regularize(Reads(), [BernoulliDropout("attention_mask", 0.5), Kept("tanh", 1.0, weights="attention_mask")], rng=0)
    assert float(module(X, weights, LABELS).penalties["kept"].detach()) == float(weights.sum())


class Kept(Penalty):
    weights: ModelInput = None

    def __call__(self, z: Tensor, weights: Tensor) -> Tensor:
        return weights.sum() + 0 * z.sum()


# --- other ways through ----------------------------------------------------------------------------------------------


def test_copies_recipes_and_strip() -> None:
    model = Net()
    module = regularize(model, REGULARIZERS, rng=0)
    saved = graphreg.recipe(module)
    assert [entry["mask"] for entry in saved["regularizers"]] == ["attention_mask", "attention_mask"]
    again = regularize(model, recipe=saved)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again]
    expected = module(X, MASK, LABELS)
    for twin in twins:
        found = twin(X, MASK, LABELS)
        assert torch.equal(found.output, expected.output) and torch.equal(found.penalties["token_l1"], expected.penalties["token_l1"])
    assert torch.equal(graphreg.strip(module)(X, MASK, LABELS), model(X, MASK, LABELS))


def test_in_place_and_attached() -> None:
    model, twin = Net(), Net()
    graphreg.regularize_(model, REGULARIZERS, rng=0, scale=1.0)
    module = regularize(twin, REGULARIZERS, rng=0)
    for mask in (MASK, MASK.flip(0)):
        result = module(X, mask, LABELS)
        loss = model(X, attention_mask=mask, labels=LABELS).sum()
        torch.testing.assert_close(gradients(model, loss), gradients(twin, result.output.sum() + result.penalties["token_l1"]))
    with pytest.raises(NoMatchError, match="specialized to None.*If the model is regularized in place, call it with a tensor for it"):
        model(X, None, LABELS)
    assert model.eval()(X, None, LABELS).shape == (3, 5, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks() -> None:
    """The input crosses the border of the block; flat and in blocks are equal bit for bit, compiled too."""
    regularizers = [TokenL1("**.tanh", 0.5, mask="attention_mask"), MaskedDropout("**.layer", 0.5, mask="attention_mask")]
    flat = regularize(Stack(), regularizers, rng=0)
    torch.compiler.reset()
    outlined = [regularize(Stack(), regularizers, rng=0, blocks="blocks.*") for _ in range(2)]
    expected = flat(X, MASK)
    for module, run in ((outlined[0], outlined[0]), (outlined[1], torch.compile(outlined[1], backend="aot_eager", fullgraph=True))):
        found = run(X, MASK)
        torch.testing.assert_close(found.output, expected.output, rtol=0, atol=0)
        losses = [(m, r.output.sum() + r.penalties["token_l1"]) for m, r in ((flat, expected), (module, found))]
        torch.testing.assert_close(*[list(gradients(m, loss).values()) for m, loss in losses])


def test_autocast_and_torch_func() -> None:
    model = Net()
    module = regularize(model, TokenL1("tanh", 1.0, mask="attention_mask"))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(X, MASK, LABELS).penalties["token_l1"].dtype == torch.float32
    each = torch.vmap(lambda x, mask, label: module(x[None], mask[None], label[None]).penalties["token_l1"])(X, MASK, LABELS)
    torch.testing.assert_close(each, torch.stack([mean_over(torch.tanh(model.body(x)), k) for x, k in zip(X, MASK, strict=True)]))


def test_check_regularizer() -> None:
    check_regularizer(TokenL1, "tanh", mask="mask", wrong={"mask": [3, ""]})
    check_regularizer(MaskedDropout, "tanh", mask="mask")
    sentence = r"Towards: without goal=, its formula gets None for goal and raises TypeError.*goal: ModelInput = graphreg\.required\(\)"

    class Towards(Penalty):
        goal: ModelInput = None

        def __call__(self, z: Tensor, goal: Tensor) -> Tensor:
            return (z.mean(-1) * goal).mean()

    with pytest.raises(AssertionError, match=sentence):
        check_regularizer(Towards, "tanh", goal="mask")

    class Needed(Towards):
        goal: ModelInput = graphreg.required()

    check_regularizer(Needed, "tanh", goal="mask")


def test_an_impure_formula_is_found() -> None:
    class Impure(Penalty):
        labels: ModelInput = None

        def __call__(self, z: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(z.mean(1) * torch.rand(()), labels)

    with pytest.raises(RegularizerError, match="Impure"):
        regularize(Net(), Impure("head", 1.0, labels="labels"), example_inputs=(X, MASK, LABELS))


# --- declarations ----------------------------------------------------------------------------------------------------


def test_annotations() -> None:
    """As an object, as a string, within a union, by another name, and inherited; a subclass may make it an option of its own."""

    class Several(Penalty):
        one: ModelInput = None
        two: graphreg.ModelInput = None
        three: Optional[ModelInput] = None  # noqa: UP045
        four: ModelInput | None = None
        other: str | None = None

        def __call__(self, z: Tensor, one: Any, two: Any, three: Any, four: Any) -> Tensor:
            return z.mean()

    class Fewer(Several):
        two: str | None = None

        def __call__(self, z: Tensor, one: Any, three: Any, four: Any) -> Tensor:
            return z.mean()

    assert Several.input_options == ("one", "two", "three", "four") and Fewer.input_options == ("one", "three", "four")
    assert Several("*", 1.0, one="x", other="y").model_inputs == {"one": "x"}
    made = type("Made", (Penalty,), {"__annotations__": {"one": ModelInput}, "one": None, "__call__": lambda self, z, one: z.mean()})
    assert made.input_options == ("one",)


def test_an_option_that_must_be_given() -> None:
    class Needed(Penalty):
        _: KW_ONLY
        mask: ModelInput

        def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
            return mean_over(z, mask)

    class Marked(Penalty, keys=("marked",)):
        mask: ModelInput = graphreg.required()

        def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
            return mean_over(z, mask)

    with pytest.raises(TypeError, match="mask"):
        Needed("tanh", 1.0)  # type: ignore[call-arg]
    sentence = "Marked: mask was not given; it must be the name of an input of the model. Write Marked(..., mask='...'), or marked={"
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        Marked("tanh", 1.0)


@pytest.mark.parametrize("name", ["z", "noise", "clock", "steps", "places"])
def test_names_that_mean_something_else(name: str) -> None:
    sentence = f"Wrong: the option {name} is a ModelInput, and a formula's argument {name} already means something else."
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        formula = eval(f"lambda self, w, {name}: w")
        type("Wrong", (Penalty,), {"__annotations__": {name: ModelInput}, name: None, "__call__": formula, "on": "parameters"})


def test_an_option_that_would_do_nothing() -> None:
    sentence = "Idle has the option mask, a ModelInput, but its __call__ does not take mask: the option would do nothing."
    with pytest.raises(RegularizerError, match=re.escape(sentence)):

        class Idle(Penalty):
            mask: ModelInput = None

            def __call__(self, z: Tensor) -> Tensor:
                return z.mean()


def test_an_argument_that_is_no_option() -> None:
    sentence = "Lacks.__call__ asks for mask; the engine supplies z, values, weight, steps, lengths, units, counted, vjp, state on values."
    cure = r" For an input of the model, declare an option of this name: mask: ModelInput = None"
    with pytest.raises(RegularizerError, match=re.escape(sentence) + cure):

        class Lacks(Penalty):
            def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
                return z.mean()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [(3, "3"), ("", "''"), (MASK, "Tensor of shape (3, 5)"), (["a"], "['a']")])
def test_what_is_no_name(value: Any, text: str) -> None:
    sentence = f"TokenL1: mask={text} is not allowed; give the name of an input of the model, an argument of its forward: mask='...'."
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        TokenL1("tanh", 1.0, mask=value)


@pytest.mark.parametrize("kind", [TokenL1, MaskedDropout])
def test_a_misspelt_name(kind: Any) -> None:
    sentence = rf"{kind.__name__}: mask='attention_mas': no input of the model has that name\. Near names: attention_mask\. Inputs: x, att"
    with pytest.raises(NoMatchError, match=sentence):
        regularize(Net(), kind("tanh", 0.5, mask="attention_mas"))


def test_an_argument_that_was_no_tensor_in_the_trace() -> None:
    class Defaults(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            return self.head(torch.tanh(self.body(x)))

    sentence = r"mask='attention_mask': 'attention_mask' is an argument that is specialized to None: give example_inputs that carry"
    with pytest.raises(NoMatchError, match=sentence):
        regularize(Defaults(), REGULARIZERS[0])
    module = regularize(Defaults(), REGULARIZERS[0], example_inputs={"x": X, "attention_mask": MASK})
    assert module(X, MASK).penalties["token_l1"].item() > 0
    with pytest.raises(graphreg.GraphRegError, match="mask='attention_mask' is None in this call; it must be a tensor"):
        module(X)


@pytest.mark.parametrize("kind", [TokenL1, MaskedDropout])
@pytest.mark.parametrize(("value", "text"), [(None, "None"), (5, "5"), ([1, 2], "[1, 2]")])
def test_what_is_no_tensor_in_a_call(kind: Any, value: Any, text: str) -> None:
    sentence = (
        f"{kind.__name__} at tanh: mask='attention_mask' is {text} in this call; it must be a tensor. Call the model with a tensor for "
        "attention_mask, or leave mask= out."
    )
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        regularize(Net(), kind("tanh", 0.5, mask="attention_mask"))(X, value, LABELS)


def test_an_input_with_several_values() -> None:
    class Listed(Net):
        def forward(self, x: Tensor, masks: list[Tensor]) -> Tensor:  # type: ignore[override]
            return self.head(torch.tanh(self.body(x)) * masks[0][..., None])

    for examples in ((X, [MASK, MASK]), None):
        with pytest.raises(RegularizerError, match="mask='masks'.*(holds several values|is .* in this call)"):
            regularize(Listed(), TokenL1("tanh", 0.5, mask="masks"), example_inputs=examples)(X, [MASK, MASK])


def test_an_input_that_the_model_overwrites() -> None:
    class Spoils(Net):
        def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            attention_mask.logical_not_()
            return super().forward(x, attention_mask, labels)

    for regularizer in REGULARIZERS:
        with pytest.raises(TraceError, match="the model writes into its input 'attention_mask', which mask= names. Clone it before"):
            regularize(Spoils(), regularizer)
