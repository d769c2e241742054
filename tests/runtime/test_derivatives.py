"""Penalties on derivatives in the engine: one forward and one backward pass, the user's model and modes, what has no second derivative."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphreg
from graphreg import Penalty, RegularizerError, Vjp
from graphreg.passes import BernoulliDropout, Contractive, HiddenL1, WeightL2


class Slope(Penalty):
    """The sum of squares of what goes back from all sites at once, from ones; by an option also that of single rows."""

    wrt: str = "*"
    rows_of: str | None = None

    def __call__(self, vjp: Vjp, weight: Tensor) -> Tensor:
        if self.rows_of is not None:
            found = list(vjp.rows(self.rows_of))
        else:
            found = [vjp({name: torch.ones_like(z) for name, z in vjp.sites.items()})]
        return torch.stack([g.square().sum() for gradients in found for g in gradients.values()]).sum() * weight / weight


class Net(nn.Module):
    """h = tanh(A x) with its own dropout behind it; y = B h."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.dropout, self.b = nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.dropout(self.act(self.a(x))))


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def one(module: Any, *inputs: Tensor) -> Tensor:
    (value,) = module(*inputs).penalties.values()
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("estimator", ["projection", "exact", "mean"])
def test_an_empty_batch(estimator: str) -> None:
    class Pooled(Net):
        """The value ``a`` has elements for an empty batch, too, and ``act`` has none for any."""

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.a(x.sum(0))
            return self.b(h) + self.act(x[:0]).sum()

    empty = torch.zeros(0, 3)
    assert not one(graphreg.regularize(Net(), Contractive("act", 1.0, estimator=estimator)), empty).any()
    pooled = graphreg.regularize(Pooled(), Contractive(["a", "act"], 1.0, estimator=estimator), rng=0)
    assert not one(pooled, empty).any()
    assert torch.isfinite(one(pooled, X)) and one(pooled, X).any()


def slopes(model: Net, x: Tensor) -> Tensor:
    """By hand: dh/dx of each example, [batch, units, inputs]."""
    h = torch.tanh(model.a(x))
    return (1 - h * h).unsqueeze(-1) * model.a.weight


# --- what a regularizer is given ------------------------------------------------------------------------------------


def test_a_penalty_of_the_users_own_takes_products_and_rows() -> None:
    model = Net()
    torch.testing.assert_close(one(graphreg.regularize(model, Slope("act", 1.0)), X), slopes(model, X).sum(1).square().sum())
    torch.testing.assert_close(one(graphreg.regularize(model, Slope("act", 1.0, rows_of="act")), X), slopes(model, X).square().sum())


def test_what_a_penalty_may_not_ask_for_beside_the_vjp() -> None:
    with pytest.raises(graphreg.RegularizerError, match="Both.__call__ asks for vjp and for z; vjp.sites has the values. Leave one out."):

        class Both(Penalty):
            def __call__(self, z: Tensor, vjp: Vjp) -> Tensor:
                return z.mean()

    with pytest.raises(graphreg.RegularizerError, match="asks for vjp"):

        class OnParameters(Penalty, on="parameters"):
            def __call__(self, vjp: Vjp) -> Tensor:
                return torch.zeros(())


def test_the_names_of_0_1_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"^graphreg\.Pull is called graphreg\.Vjp now\.$") as caught:
        assert graphreg.Pull is Vjp
    with pytest.warns(DeprecationWarning, match=r"^Old\.__call__ asks for pull, which is called vjp now: rename the argument\.$") as asked:

        class Old(Penalty):
            wrt: str = "*"

            def __call__(self, pull: Vjp) -> Tensor:
                gradients = pull({name: torch.ones_like(z) for name, z in pull.sites.items()})
                return torch.stack([g.square().sum() for g in gradients.values()]).sum()

    assert {each.filename for each in (*caught, *asked)} == {__file__}
    model = Net()
    torch.testing.assert_close(one(graphreg.regularize(model, Old("act", 1.0)), X), slopes(model, X).sum(1).square().sum())
    with pytest.warns(DeprecationWarning), pytest.raises(graphreg.RegularizerError, match=r"asks for pull and for z; pull\.sites has"):

        class Both(Penalty):
            def __call__(self, z: Tensor, pull: Vjp) -> Tensor:
                return z.mean()


# --- one forward, one vjp -------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_forward() -> None:
    """Behind dropout of the model's own, and behind graphreg's, the Jacobian carries the mask that the output shows."""
    torch.manual_seed(3)
    model, x = Net(p=0.5).double(), X.double()
    seen: list[Tensor] = []

    class See(Penalty):
        def __call__(self, values: dict[str, Tensor]) -> Tensor:
            seen.append(values["dropout"])
            return torch.zeros(())

    for dropout in ({}, {"dropout": {"act": 0.25}}):
        module = graphreg.regularize(model, Contractive("dropout", 1.0, estimator="exact"), See("dropout", 1.0), rng=0, **dropout)
        for _ in range(3):
            found = module(x).penalties["contractive"]
            factor = seen[-1] / torch.tanh(model.a(x))  # of each unit: 0, or the inverse of what is kept
            expected = (factor.unsqueeze(-1) * slopes(model, x)).square().sum() / 5
            torch.testing.assert_close(found, expected)
            assert 0 < (factor == 0).sum() < 20


def test_several_sites_share_one_vjp(monkeypatch: pytest.MonkeyPatch) -> None:
    module = graphreg.regularize(Net(), Contractive(("act", "b"), 1.0, n=3), rng=0)
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: calls.append(len(args[0])) or grad(*args, **options))
    forwards: list[int] = []
    module.a.register_forward_hook(lambda *_: forwards.append(1))
    module(X)
    assert calls == [2, 2, 2] and forwards == [1]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_batch_statistics_are_updated_once() -> None:
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, model = Normed(), Normed()
    module = graphreg.regularize(model, Contractive("relu", 1.0, estimator="exact"))
    expected, found = plain(x), module(x).output
    assert torch.equal(found, expected)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.norm.num_batches_tracked == 1
    assert list(module.state_dict()) == list(plain.state_dict())


def test_no_path_is_zero_and_the_report_says_so() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    model = Two()
    message = re.escape("Contractive: no derivative with respect to x reaches its sites (b), so the penalty would change nothing.")
    with pytest.raises(RegularizerError, match=message):
        graphreg.regularize(model, Contractive("b", 1.0, wrt="x"))
    with pytest.raises(RegularizerError, match=message):
        graphreg.plan(graphreg.trace(model), Contractive("b", 1.0, wrt="x"))
    both = graphreg.regularize(model, Contractive(("a", "b"), 1.0, wrt="x", estimator="exact"))
    assert graphreg.report(both).regularizers[0].notes[0].startswith("with respect to x; 0 at b, because no path leads there")
    torch.testing.assert_close(one(both, X, X), model.a.weight.square().sum() / 2)
    all_of_it = graphreg.regularize(model, Contractive("add", 1.0, estimator="exact"))
    torch.testing.assert_close(one(all_of_it, X, X), model.a.weight.square().sum() + model.b.weight.square().sum())
    assert "with respect to x, y" in str(graphreg.plan(graphreg.trace(model), Contractive("add", 1.0)))


def test_no_derivative_passes_a_block_without_gradients_and_what_has_only_options_of_a_tensor() -> None:
    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.mid, self.gate = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.encoder(x)
            return self.mid(h).tanh() * (torch.zeros_like(self.gate(x)) + 1) + self.gate(x).clone().detach_()

    with pytest.raises(RegularizerError, match=r"no derivative with respect to x reaches its sites \(tanh\)"):
        graphreg.regularize(Off(), Contractive("tanh", 1.0), example_inputs=X)
    model = Off()
    module = graphreg.regularize(model, HiddenL1("add_1", 1.0), example_inputs=X)
    one(module, X).backward()
    told = graphreg.report(module).regularizers[0].trains
    assert told == tuple(name for name, p in model.named_parameters() if p.grad is not None) == ("mid.weight", "mid.bias")


def test_arithmetic_on_tensors_is_a_path() -> None:
    """Python's operators on what a layer returns are no arithmetic of sizes."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.a(x).chunk(2, -1)
            return one * two * x.shape[0]

    plan = graphreg.plan(graphreg.trace(Parts()), Contractive("mul_1", 1.0))
    assert plan.slices["contractive"].apart == ()


# --- the user's model, modes, precisions ----------------------------------------------------------------------------


def test_the_model_and_its_input_stay_as_they_are() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = graphreg.regularize(model, Contractive("act", 1.0), rng=0)
    x = X.clone()
    output = module(x).output
    assert torch.equal(output, model(x))
    assert not x.requires_grad and x.grad_fn is None and x.grad is None
    assert torch.equal(x, X)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == {name: v.tolist() for name, v in before.items()}
    assert all(submodule.training for submodule in model.modules())
    stripped = graphreg.strip(module)
    assert torch.equal(stripped(x), output)
    assert list(dict(stripped.named_modules())) == ["", "a", "act", "dropout", "b"]


def test_it_acts_in_train_mode_and_where_asked_in_eval_mode() -> None:
    model = Net()
    usual = graphreg.regularize(model, Contractive("act", 1.0, estimator="exact"))
    always = graphreg.regularize(model, Contractive("act", 1.0, estimator="exact", always=True))
    exact = slopes(model, X).square().sum() / 5
    torch.testing.assert_close(one(usual, X), exact)
    model.eval()
    with torch.no_grad():
        assert one(usual, X).item() == 0
        value = one(always, X)
        torch.testing.assert_close(value, exact.detach())
        assert not value.requires_grad and not always(X).output.requires_grad
    with torch.inference_mode():
        assert one(usual, X).item() == 0
        with pytest.raises(graphreg.GraphRegError, match="needs derivatives, but autograd does not record this call"):
            one(always, X)
    model.train()
    with torch.no_grad():  # a pass to look at the values, as in validation by hand
        torch.testing.assert_close(one(usual, X), exact.detach())


def test_directions_are_resumed_and_do_not_move_in_eval_mode() -> None:
    for always in (False, True):
        module = graphreg.regularize(Net(), Contractive("b", 1.0, always=always), rng=4)
        one(module, X)
        state = graphreg.rng_state(module)
        drawn = [one(module, X).item() for _ in range(3)]
        assert len(set(drawn)) == 3
        graphreg.set_rng_state(module, state)
        assert [one(module, X).item() for _ in range(3)] == drawn
        module.eval()
        before = graphreg.rng_state(module)["call"]
        one(module, X)
        assert graphreg.rng_state(module)["call"] == before + always


def test_strengths_change() -> None:
    module = graphreg.regularize(Net(), Contractive("act", 0.5, estimator="exact"))
    half = one(module, X).item()
    graphreg.set_strength(module, "contractive", 2.0)
    assert one(module, X).item() == pytest.approx(4 * half)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_copies_differentiate_themselves(twin_of: Callable[[Any], Any]) -> None:
    module = graphreg.regularize(Net(), Contractive("act", 1.0), rng=0)
    twin = twin_of(module)
    assert one(twin, X).item() == one(module, X).item()
    twin.eval()
    assert one(twin, X).item() == 0 and one(module, X).item() > 0
    with torch.no_grad():
        module.a.weight.zero_()
        twin.train()
    assert one(module, X).item() == 0 and one(twin, X).item() > 0


def test_in_low_precision_it_adds_up_in_float32() -> None:
    model = Net()
    exact = number = (slopes(model, X).square().sum() / 5).item()
    under = graphreg.regularize(model, Contractive("act", 1.0, estimator="exact"))
    with torch.autocast("cpu", torch.bfloat16):
        found = one(under, X)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact, rel=0.03)
    half = graphreg.regularize(Net().bfloat16(), Contractive("act", 1.0, estimator="exact"))
    found = one(half, X.bfloat16())
    assert found.dtype == torch.float32 and found.item() == pytest.approx(number, rel=0.03)
    found.backward()


def test_two_graphs() -> None:
    """Another structure in each mode; a site that eval mode does not have is 0 there."""

    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.sigmoid(h)) if self.training else self.b(h)

    model = Forms()
    module = graphreg.regularize(model, Contractive("sigmoid", 1.0, estimator="exact", always=True))
    h = torch.sigmoid(model.a(X))
    torch.testing.assert_close(one(module, X), ((h * (1 - h)).square() * model.a.weight.square().sum(1)).sum() / 5)
    assert set(module.graphs) == {"train", "eval"}
    module.eval()
    assert one(module, X).item() == 0


def test_attached_it_has_the_same_gradients() -> None:
    gradients = []
    for penalties in ("return", "attach"):
        model = Net()
        scale = 1.0 if penalties == "attach" else None
        module = graphreg.regularize(model, Contractive("act", 0.5), penalties=penalties, scale=scale, rng=0)
        out = module(X)
        loss = out.square().mean() if penalties == "attach" else out.output.square().mean() + out.penalties["contractive"]
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for attached, returned in zip(*gradients, strict=True):
        torch.testing.assert_close(attached, returned)


def test_as_a_pass() -> None:
    model = Net().double()
    given = fx.symbolic_trace(model)
    found = graphreg.as_pass(Contractive("act", 1.0, estimator="exact"))(given).graph_module
    torch.testing.assert_close(one(found, X.double()), slopes(model, X.double()).square().sum() / 5)
    again = fx.GraphModule(found, found.graph)  # what a pass of torch.fx makes of it
    torch.testing.assert_close(one(again, X.double()), slopes(model, X.double()).square().sum() / 5)
    with torch.no_grad(), pytest.raises(graphreg.GraphRegError, match="needs derivatives, but autograd does not record this call"):
        one(again, X.double())


# --- what is written into -------------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Writes into its input, into the value that is differentiated by, and into that which is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        x.mul_(2)
        h = self.act(self.a(x))
        y = self.b(h)
        y += 1
        return y


def test_values_that_are_overwritten() -> None:
    model = Writes().double()
    x = X.double()
    h = model.a(2 * x)
    slope = model.b.weight * (h > 0).unsqueeze(1)  # dy/da, [batch, 2, 4]
    by_input = 2 * slope @ model.a.weight
    early = (2 * model.a.weight).expand(5, 4, 3)
    cases = [("b", "a", slope), ("b", "x", by_input), ("b", "mul", by_input), ("a", "x", early)]
    for chosen in (cases[2:3], cases):  # alone, and all of them
        module = graphreg.regularize(model, [Contractive(site, 1.0, wrt=wrt, estimator="exact") for site, wrt, _ in chosen])
        output, penalties = module(x)
        torch.testing.assert_close(output, model(x))
        for penalty, (_, _, expected) in zip(penalties.values(), chosen, strict=True):
            torch.testing.assert_close(penalty, expected.square().sum() / 5)
        assert torch.equal(x, X.double())
        sum(penalties.values()).backward()
        assert torch.equal(graphreg.strip(module)(x), model(x))


def test_a_write_under_another_name_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            view = h.view(-1, 4)
            h.mul_(2)
            return self.b(view)

    with pytest.raises(graphreg.TraceError, match="contractive cannot replace the value view"):
        graphreg.regularize(Aside(), Contractive("b", 1.0, wrt="view"))


# --- what cannot be differentiated twice ----------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * x.cos()


@torch.library.custom_op("graphreg_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("graphreg_tests::cosine_times", mutates_args=())
def cosine_times(g: Tensor, x: Tensor) -> Tensor:
    return g * x.cos()


def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


sine.register_fake(torch.empty_like)
cosine_times.register_fake(lambda g, x: torch.empty_like(g))
sine.register_autograd(lambda ctx, g: cosine_times(g, *ctx.saved_tensors), setup_context=keep)


class Operation(nn.Module):
    """An opaque module: a trace cannot see into it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if bool(torch.isfinite(x).all()) else x


class Twice(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.operation, self.b = nn.Linear(3, 4), Operation(function), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self.a(x)))


def test_an_operation_without_a_second_derivative_is_named() -> None:
    for function, culprit in ((Once.apply, "the operation whose derivative MmBackward0 reads"), (sine, "graphreg_tests::cosine_times")):
        module = graphreg.regularize(Twice(function), Contractive("b", 1.0))
        sentence = (
            rf"^Contractive contractive: {culprit} cannot be differentiated twice, so the penalty would have no gradient\. "
            r"Among operation\. Select sites before that operation, or a wrt after it\.$"
        )
        with pytest.raises(graphreg.GraphRegError, match=sentence):
            module(X)
        for cure in (Contractive("a", 1.0), Contractive("b", 1.0, wrt="operation")):
            assert one(graphreg.regularize(Twice(function), cure), X).item() > 0


# --- compiled -------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def sites(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.a(x))
        k = torch.tanh(self.b(h))
        return h, k, self.c(k)

    def forward(self, x: Tensor) -> Tensor:
        return self.sites(x)[-1]


class Conv(nn.Module):
    """Strides that do not reach the last column, so that a weight's gradient is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.again, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def sites(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.norm(self.a(x)))
        k = torch.relu(self.again(self.b(h)))
        return h, k, self.head(k.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.sites(x)[-1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.again, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def sites(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            context = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(context.transpose(1, 2).flatten(2))
        up = F.gelu(self.up(self.again(x)))
        return context, up, x + self.down(up)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.again(x))))


COMPILED: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], tuple[int, ...]]] = {
    "mlp": (Mlp, ("relu", "tanh"), (12, 6)), "batch-norm conv net": (Conv, ("relu", "relu_1"), (4, 2, 8, 8)),
    "transformer block": (Block, ("scaled_dot_product_attention", "gelu"), (3, 5, 8)),
}  # fmt: skip


def by_hand(model: Any, x: Tensor, signs: tuple[Tensor, Tensor]) -> Tensor:
    x = x.clone().requires_grad_()
    *values, _ = model.sites(x)
    (g,) = torch.autograd.grad(values, x, signs, create_graph=True)
    return g.square().sum() / len(x) / 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_double_backward_by_hand(name: str, backend: str) -> None:
    """Fullgraph, the penalty and all gradients, with the directions that the key gives, twice."""
    make, sites, shape = COMPILED[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    module = graphreg.regularize(model, Contractive(sites, 0.1), rng=0, compile={"backend": backend, "fullgraph": True})
    key: Any = module.graphreg_rules.key
    for _ in range(2):
        twin: Any = copy.deepcopy(model)
        values = copy.deepcopy(twin).sites(x)
        signs = [2.0 * graphreg.Noise(row).keep(z.detach(), 0.5) - 1 for row, z in zip(key.keys.clone(), values, strict=False)]
        output, penalties = module(x)
        (output.square().mean() + penalties["contractive"]).backward()
        expected = 0.1 * by_hand(copy.deepcopy(twin), x, (signs[0], signs[1]))
        torch.testing.assert_close(penalties["contractive"], expected, rtol=1e-5, atol=0)
        (twin(x).square().mean() + 0.1 * by_hand(_same(twin), x, (signs[0], signs[1]))).backward()
        scale = max(p.grad.abs().max() for p in twin.parameters())
        for (path, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            difference = (ours.grad - theirs.grad).abs().max()
            assert difference <= 1e-5 * max(scale * 0.1, theirs.grad.abs().max()), path
        for (path, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, path=path: f"{path}: {text}")
        model.zero_grad()


def _same(model: nn.Module) -> nn.Module:
    """The model with the same parameters, and buffers that may be written."""
    twin = copy.deepcopy(model)
    for ours, other in zip(twin.modules(), model.modules(), strict=True):
        ours._parameters = other._parameters
    return twin


def test_compiled_among_all_the_others() -> None:
    """With dropout that is recomputed, penalties on values and weights, in both modes; strengths change without a compilation."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3)
    regularizers = [BernoulliDropout("act", 0.3), HiddenL1("act", 0.1), WeightL2("*", 0.1), Contractive(("act", "b"), 0.5, always=True)]
    eager, compiled = (graphreg.regularize(model, regularizers, rng=0, compile=how) for how in (False, {"backend": "aot_eager"}))
    with torch._dynamo.config.patch(error_on_recompile=False):
        for step in range(4):
            gradients = []
            for module in (eager, compiled):
                graphreg.set_strength(module, "contractive", 0.5 + step)
                model.train(step != 2)
                model.zero_grad()
                output, penalties = module(x)
                (output.square().mean() + sum(penalties.values())).backward()
                gradients.append([output, *penalties.values(), *(p.grad for p in model.parameters())])
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class OnlyAbsolute(nn.Module):
    """Nothing but the absolute value reads a view of the first input, so its second derivative is torch's zero without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return s.view(-1).abs(), self.fc(z)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_zeros_without_memory_reach_an_input(backend: str) -> None:
    """Found by ``make fuzz``: compiled, the backward pass ended with an error of torch."""
    torch.manual_seed(0)
    module = graphreg.regularize(OnlyAbsolute(), Contractive(("abs", "fc"), 0.17, clean=True, estimator="exact"), rng=1)
    s, z = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    run = module if backend == "eager" else torch.compile(module, fullgraph=True, backend=backend)
    penalty = run(s, z).penalties["contractive"]
    expected = 0.17 * (torch.tensor(12 / 3) + module.fc.weight.square().sum()) / 2  # type: ignore[operator,union-attr]
    torch.testing.assert_close(penalty, expected)
    penalty.backward()
    assert s.grad is not None and torch.equal(s.grad, torch.zeros(3, 4))
    torch.testing.assert_close(module.fc.weight.grad, 0.17 * module.fc.weight.detach())  # type: ignore[union-attr]


def test_compiled_the_limits_are_told() -> None:
    """A recurrent layer in the slice is one operator that has no second derivative; an exact Jacobian of many rows is refused."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    module = graphreg.regularize(Recurrent(), Contractive("head", 1.0), compile=True)
    with pytest.raises(Exception, match="a compiled recurrent layer cannot be differentiated twice. Call the module without compiling it"):
        module(torch.randn(2, 3, 3))
    module = graphreg.regularize(Mlp(), Contractive("tanh", 1.0, estimator="exact"), compile=True)
    with pytest.raises(Exception, match="has 272 rows, each a backward pass that is kept for the gradient; 256 are the most when compiled"):
        module(torch.randn(17, 6))
