"""The doctor: what it finds under settings at which this torch's masks are wrong, and what it leaves as it was."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config as functorch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import graphreg
from graphreg import Diagnosis, GraphRegError, RegularizerError, doctor
from graphreg.compiler.settings import NAMES, changed_settings, setting, settings_snapshot
from graphreg.diagnosis.probes import Probed, measure

X = torch.linspace(-1, 1, 48).view(6, 8)
BUDGET = "torch._functorch.config.activation_memory_budget"


class Net(nn.Module):
    """One dropout of its own, and a batch norm, which writes in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


class Kinds(nn.Module):
    """Something of every kind that draws, and a recurrent layer, whose dropout no experiment tries."""

    def __init__(self) -> None:
        super().__init__()
        self.element, self.channel, self.alpha, self.never = nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1), nn.Dropout(0.0)
        self.channel_alpha, self.depth = nn.FeatureAlphaDropout(0.1), StochasticDepth(0.1, "row")
        self.heads, self.rnn = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True), nn.GRU(8, 8, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.channel_alpha(self.alpha(self.channel(self.element(self.never(x))))))
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
        x = self.rnn(self.heads(x, x, x)[0])[0]
        return x + torch.rand_like(x)


class TwoKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.element, self.channel = nn.Dropout(0.1), nn.Dropout1d(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.element(x))


def keeping(kind: type[nn.Module] = Net, **options: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(kind(), rng=3, **options)


def seeded() -> Any:
    return keeping(own_dropout="seeded")


def only(diagnosis: Diagnosis) -> graphreg.Finding:
    (finding,) = diagnosis.findings
    return finding


# ---- settings


def test_nothing_is_wrong_at_the_defaults() -> None:
    diagnosis = doctor(keeping(hidden_dropout=0.1), backend="aot_eager")
    assert diagnosis.ok and diagnosis and not diagnosis.findings
    assert str(diagnosis) == (
        f"Net: torch {torch.__version__}, aot_eager, cpu\n"
        "right: drop: in backward as in the forward, compiled as in eager\n"
        "right: graphreg's streams: in backward as in the forward, compiled as in eager"
    )


def test_inductor_draws_other_masks_than_eager_which_is_a_note() -> None:
    module = keeping(hidden_dropout=0.1)
    diagnosis = doctor(module)
    finding = only(diagnosis)
    assert diagnosis.ok and finding.kind == "differs" and finding.sites == ("drop",)
    assert finding.cause == "torch._inductor.config.fallback_random = False (the default)"
    assert re.search(r"different masks: \d\d% of elements \(element\)", finding.observed)
    assert finding.cure == "regularize(..., own_dropout='seeded'), or torch._inductor.config.fallback_random = True (slower)"
    assert finding.upstream.endswith("/118735")
    assert diagnosis.right == (
        "drop: in backward as in the forward",
        "graphreg's streams: in backward as in the forward, compiled as in eager",
    )
    with inductor.patch(fallback_random=True):
        assert not doctor(module).findings


@pytest.mark.parametrize(("backend", "budget"), [("aot_eager", 0.9), ("aot_eager", 0.0), ("inductor", 0.5)])
def test_a_memory_budget(backend: str, budget: float) -> None:
    """A gradient with other masks: found for the model's own dropout, and not for the same dropout on graphreg's streams."""
    with functorch.patch(activation_memory_budget=budget), inductor.patch(fallback_random=True):
        diagnosis = doctor(keeping(), backend=backend)
        moved = doctor(seeded(), backend=backend)
    finding = only(diagnosis)
    assert not diagnosis.ok and finding.kind == "wrong" and finding.sites == ("drop",)
    assert finding.cause == f"{BUDGET} = {budget} (default 1.0)"
    assert finding.cure == f"regularize(..., own_dropout='seeded'), or {BUDGET} = 1.0"
    assert finding.upstream == "https://github.com/pytorch/pytorch/issues/190758"
    share = re.fullmatch(r"backward has other masks than the forward: (\d+)% of elements \(element\)", finding.observed)
    assert share and 10 < int(share[1]) < 60
    assert moved.ok and moved.right == ("graphreg's streams: in backward as in the forward, compiled as in eager",)


def test_what_is_found_is_what_this_torch_does() -> None:
    """By hand, without any of the doctor's code: the gradient of a dropout is taken with the mask of another."""
    with functorch.patch(activation_memory_budget=0.0):
        x = torch.ones(4096, requires_grad=True)
        y = torch.compile(lambda x: F.dropout(x * 2, 0.5), backend="aot_eager")(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert 0.4 < float(((y != 0) != (gradient != 0)).double().mean()) < 0.6


def test_aggressive_recomputation_under_inductor() -> None:
    with functorch.patch(aggressive_recomputation=True):
        diagnosis = doctor(keeping())
        assert doctor(seeded()).ok
    wrong, differs = diagnosis.findings
    assert (wrong.kind, differs.kind) == ("wrong", "differs")
    assert wrong.cause == "torch._functorch.config.aggressive_recomputation = True (default False)"
    assert wrong.upstream == "no upstream issue found"


def test_a_finding_concerns_the_kinds_that_it_was_seen_for() -> None:
    """By aot_eager an aggressive partitioner draws Bernoulli masks again, and keeps those of dropout as one operator."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.element, self.channel = nn.Dropout(0.5), nn.Dropout1d(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.channel(self.element(x))

    with functorch.patch(aggressive_recomputation=True):
        diagnosis = doctor(keeping(Two), backend="aot_eager")
    assert only(diagnosis).sites == ("channel",)
    assert diagnosis.right == ("element: in backward as in the forward, compiled as in eager",)


def test_every_kind() -> None:
    module = keeping(Kinds)
    with functorch.patch(activation_memory_budget=0.0):
        finding = only(doctor(module, backend="aot_eager"))
    functions = {"depth.stochastic_depth", "scaled_dot_product_attention", "rand_like"}
    assert set(finding.sites) == {"element", "channel", "alpha", "channel_alpha", "heads"} | functions  # and neither never nor rnn
    for kind in ("element", "channel", "alpha", "channel alpha", "depth", "attention", "layer"):
        assert f"({kind})" in finding.observed
    assert doctor(module, backend="aot_eager").right[0].startswith("element, channel, alpha")


def test_only_the_settings_that_are_to_blame_are_named() -> None:
    """Three are changed: one does nothing, and with inductor each of the other two makes masks wrong by itself."""
    with functorch.patch(activation_memory_budget=0.5, cse=False):
        assert only(doctor(keeping(), backend="aot_eager")).cause == f"{BUDGET} = 0.5 (default 1.0)"
        with functorch.patch(aggressive_recomputation=True), inductor.patch(fallback_random=False):
            wrong = doctor(keeping()).findings[0]
    assert wrong.cause == f"{BUDGET} = 0.5 (default 1.0) and torch._functorch.config.aggressive_recomputation = True (default False)"
    assert wrong.cure.endswith(f"or {BUDGET} = 1.0 and torch._functorch.config.aggressive_recomputation = False")


def test_of_five_settings_that_are_off_the_one_to_blame_is_named() -> None:
    names = [each for each in NAMES["torch._functorch.config"] if each.startswith("ban_recompute_")]
    assert len(names) == 5
    with functorch.patch(**dict.fromkeys(names, False)), inductor.patch(fallback_random=True):
        module = keeping(TwoKinds)
        wrong = doctor(module, backend="aot_eager").findings[0]
    assert wrong.cause == "torch._functorch.config.ban_recompute_not_in_allowlist = False (default True)"
    assert "channel" in wrong.sites and "element" not in wrong.sites


def test_what_cannot_be_moved_has_no_cure_by_moving() -> None:
    class Drawn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rand_like(x)

    with functorch.patch(activation_memory_budget=0.0):
        assert only(doctor(keeping(Drawn), backend="aot_eager")).cure == f"{BUDGET} = 1.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the setting works")
def test_a_setting_that_does_not_compile_here() -> None:
    with functorch.patch(functionalize_rng_ops=True):
        diagnosis = doctor(keeping(), backend="aot_eager")
    finding = only(diagnosis)
    assert not diagnosis.ok and finding.kind == "refused"
    assert finding.cause == "torch._functorch.config.functionalize_rng_ops = True (default False)"
    assert finding.observed == "RuntimeError: CUDA not available"


# ---- backends


def test_a_backend_that_refuses_at_the_defaults() -> None:
    def broken(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise ValueError("not today")

    diagnosis = doctor(keeping(hidden_dropout=0.1), backend=broken)
    assert [finding.kind for finding in diagnosis.findings] == ["refused", "refused"] and not diagnosis.right
    for finding in diagnosis.findings:
        assert finding.observed == "ValueError: not today"
        assert finding.cause == "none of the settings known to graphreg: at torch's defaults it is the same"


def test_a_backend_that_draws_in_another_order() -> None:
    def last_first(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        drops = [node for node in graph.graph.nodes if node.target is F.dropout]
        if len(drops) == 2 and drops[1].args[0].op == "placeholder":
            drops[0].prepend(drops[1])
            graph.recompile()
        return graph.forward

    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.drop(x))

    assert not doctor(keeping(), backend=last_first).findings  # one dropout has no order
    diagnosis = doctor(keeping(Two), backend=last_first)
    finding = only(diagnosis)
    assert diagnosis.ok and finding.sites == ("drop", "drop_1") and finding.upstream.endswith("/192635")
    assert finding.cause == "the compiler draws in another order than eager"


def test_a_backend_that_spoils_graphregs_streams() -> None:
    """The counter of graphreg's noise is in the graph: one that starts elsewhere gives other masks than eager."""

    def elsewhere(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            return graph(*(arg + 1 if isinstance(arg, Tensor) and arg.dtype == torch.int32 else arg for arg in args))

        return run

    finding = only(doctor(seeded(), backend=elsewhere))
    assert finding.kind == "wrong" and finding.sites == ("drop",)
    assert re.fullmatch(r"graphreg's masks differ for 0% of elements in backward, \d\d% compiled", finding.observed)


def test_measured_once_for_the_same_settings() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = keeping()
    first = doctor(module, backend=counter)
    compiled = counter.frame_count
    assert compiled > 0 and doctor(module, backend=counter) == first and counter.frame_count == compiled
    with functorch.patch(activation_memory_budget=0.0):
        assert not doctor(module, backend=counter).ok
    assert counter.frame_count > compiled and doctor(module, backend=counter) == first


# ---- what stays as it is


def everything(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters())]
    held = [None if t is None else t.detach().clone() for t in tensors]
    modes = [m.training for m in module.modules()]
    return [held, modes, graphreg.rng_state(module), torch.get_rng_state(), random.getstate(), settings_snapshot()]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip([*one[0], one[3]], [*other[0], other[3]], strict=True))
    equal = all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    return equal and one[1:3] == other[1:3] and one[4:] == other[4:]


@pytest.mark.parametrize("where", ["plain", "no_grad", "inference_mode", "autocast"])
def test_nothing_is_changed(where: str) -> None:
    """Nor is anything found that is not there, whatever surrounds the call; and no code of the user's is compiled again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = keeping(hidden_dropout=0.1)
    module.norm.eval()
    run = torch.compile(module, fullgraph=True, backend=counter)
    run(X).output.sum().backward()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    grads = [p.grad for p in module.parameters()]

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            random.random()
            torch.rand(1)
            module.norm.train()
            run(X).output.sum().backward()
        optimizer.step()
        module.norm.eval()

    step()
    module.norm.eval()
    for p, grad in zip(module.parameters(), grads, strict=True):
        p.grad = grad
    tensors, compiled, before = [*module.parameters(), *module.buffers()], counter.frame_count, everything(module)
    surrounding: dict[str, Callable[[], Any]] = {
        "plain": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu"),
    }  # fmt: skip
    with surrounding[where]():
        diagnosis = doctor(run, step if where != "inference_mode" else None, backend="aot_eager")
        assert same(before, everything(module))
    assert not diagnosis.findings
    assert all(a is b for a, b in zip(tensors, [*module.parameters(), *module.buffers()], strict=True))
    assert all(p.grad is grad for p, grad in zip(module.parameters(), grads, strict=True))
    run(X)
    assert counter.frame_count == compiled


def test_a_step_that_raises_leaves_everything_too() -> None:
    """In eager, checkpointing around the whole module raises by itself, and goes on doing so."""
    module = keeping(hidden_dropout=0.1)
    before, engine = everything(module), torch.autograd._engine_run_backward

    def step() -> None:
        checkpoint(lambda x: module(x).output, X.clone().requires_grad_(), use_reentrant=False).sum().backward()

    with pytest.raises(GraphRegError, match="frozen_noise"):
        doctor(module, step, backend="eager")
    assert same(before, everything(module)) and torch.autograd._engine_run_backward is engine


# ---- the step


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_checkpoint_around_a_compiled_function(backend: str) -> None:
    module = seeded()
    run = torch.compile(lambda x: module(x).output, fullgraph=True, backend=backend)

    def step() -> None:
        for _ in range(2):
            checkpoint(run, X.clone().requires_grad_(), use_reentrant=True).sum().backward()

    diagnosis = doctor(module, step, backend="aot_eager")
    finding = only(diagnosis)
    assert not diagnosis.ok and finding.kind == "wrong" and finding.sites == ("drop",)
    assert finding.observed == "calls that drew masks: 2 in the forward, 2 in backward, each with masks of its own"
    assert "with graphreg.frozen_noise(module):" in finding.cure and not finding.upstream

    def cured() -> None:
        with graphreg.frozen_noise(module):
            step()

    assert doctor(module, cured, backend="aot_eager").right[-1] == "your step: backward drew nothing anew"
    assert doctor(torch.compile(module, backend=backend), lambda: run(X).sum().backward(), backend="aot_eager").ok


@pytest.mark.parametrize("preserve", [True, False])
def test_a_checkpoint_that_does_not_preserve_torchs_generator(preserve: bool) -> None:
    module = keeping()

    def step() -> None:
        x = X.clone().requires_grad_()
        checkpoint(lambda x: module(x).output, x, use_reentrant=False, preserve_rng_state=preserve).sum().backward()

    diagnosis = doctor(module, step, backend="aot_eager")
    assert diagnosis.ok == preserve
    if not preserve:
        finding = only(diagnosis)
        assert finding.cause == "your step draws from torch's generator in backward" and finding.sites == ("drop",)
        assert finding.observed == "a generator had moved after 1 of 1 backward pass"
        assert "preserve_rng_state=True" in finding.cure


def test_a_step_shows_what_a_budget_does_to_the_module_itself() -> None:
    with functorch.patch(activation_memory_budget=0.0):
        for module, right in ((keeping(), False), (seeded(), True)):
            run = torch.compile(module, fullgraph=True, backend="aot_eager")
            x = X.clone().requires_grad_()
            diagnosis = doctor(run, lambda run=run, x=x: run(x).output.sum().backward(), backend="aot_eager")
            assert diagnosis.ok == right
            assert any("your step draws" in finding.cause for finding in diagnosis.findings) != right


def test_a_gradient_penalty_draws_nothing_anew() -> None:
    """Two runs of the engine in a step, one of them in the forward."""
    module = seeded()

    def step() -> None:
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).output.sum(), x, create_graph=True)
        gradient.square().sum().backward()

    assert doctor(module, step, backend="eager").ok


# ---- arguments


def test_arguments_that_are_not_allowed() -> None:
    module = keeping()
    with pytest.raises(GraphRegError, match="Net is not a module that graphreg rewrote"):
        doctor(Net())
    with pytest.raises(RegularizerError, match=r"step=3 is not allowed; give a callable without arguments that runs one forward"):
        doctor(module, 3)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match=r"backend='indctor' is unknown to torch.compile; .* Near names: inductor"):
        doctor(module, backend="indctor")
    with pytest.raises(RegularizerError, match="backend=None is not allowed; give a name or a callable"):
        doctor(module, backend=None)  # type: ignore[arg-type]
    with pytest.raises(RegularizerError, match="progress='yes' is not allowed; give True, False, or None"):
        doctor(module, progress="yes")  # type: ignore[arg-type]
    with pytest.raises(GraphRegError, match="the step ran no backward pass, so there was nothing to watch"):
        doctor(module, lambda: module(X), backend="eager")


def test_a_module_that_draws_nothing() -> None:
    told = "right: nothing random: no splice of graphreg's, and no random operation of the model's own that acts"
    assert str(doctor(keeping(own_dropout="off"), backend="eager")) == f"Net: torch {torch.__version__}, eager, cpu\n{told}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = keeping(hidden_dropout=0.1)
    for stream, progress, shown in (
        (Terminal(), None, True),
        (Terminal(), False, False),
        (io.StringIO(), None, False),
        (io.StringIO(), True, True),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        doctor(module, backend="eager", progress=progress)
        text = stream.getvalue()
        assert ("graphreg.doctor: native dropout (element)" in text) == shown
        assert text.endswith("\r\x1b[K") if shown else not text


# ---- the report, and the settings themselves


@contextlib.contextmanager
def budget() -> Iterator[None]:
    with functorch.patch(activation_memory_budget=0.5):
        yield


def test_the_report_names_settings_where_the_model_draws_by_itself() -> None:
    module = keeping(hidden_dropout=0.1)
    plain = graphreg.report(module)
    assert not any("settings" in note for note in plain.notes)
    with budget():
        told = f"settings: {BUDGET} = 0.5 (default 1.0): the masks of drop depend on these; graphreg.doctor(module) tests them"
        assert graphreg.report(module).notes == (*plain.notes, told)
        assert not any("settings" in note for other in (seeded(), keeping(own_dropout="off")) for note in graphreg.report(other).notes)


def test_settings() -> None:
    assert not changed_settings() and setting("torch._inductor.config", "not_in_this_torch") is None
    with budget():
        pass  # what torch's patch sets back counts as set from then on, as the default that it is
    before = settings_snapshot()
    with budget():
        assert [str(each) for each in changed_settings()] == [f"{BUDGET} = 0.5 (default 1.0)"] and settings_snapshot() != before
    assert settings_snapshot() == before


def test_an_experiment_has_code_of_its_own() -> None:
    """More settings than Dynamo compiles one code for: it would go over to eager, where nothing is wrong."""
    limit, seen = 1, []
    for i in range(limit + 2):
        with functorch.patch(activation_memory_budget=i / 1000), torch._dynamo.config.patch(recompile_limit=limit):
            seen.append(measure("element", "aot_eager", torch.device("cpu")))
    assert all(isinstance(each, Probed) and each.backward > 0 for each in seen)


def test_a_copy_of_a_module_is_diagnosed_alike() -> None:
    module = keeping()
    assert doctor(copy.deepcopy(module), backend="aot_eager") == doctor(module, backend="aot_eager")
