"""The monitor: its numbers by hand, compiled and in eager, and that training goes on as it would have."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monitored
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import graphreg
from graphreg.errors import GraphRegError, NoMatchError, RegularizerError
from graphreg.rewriting.monitor_watches import Watch
from graphreg.runtime.rewritten_module import RewrittenModule
from pages import DOCS, run_page

OPTIONS: dict[str, Any] = {"rng": 0, "hidden_dropout": 0.25, "hidden_l1": 0.1, "weight_l2": 0.2}
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.mid, self.head, self.act = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        out: Tensor = self.head(self.act(self.mid(h)))
        return out


class Modes(Net):
    """Another structure in each mode: two graphs."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return (out, out.exp()) if self.training else out


class Overwritten(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.body(x))
        out: Tensor = self.head(self.act(self.mid(h.mul_(10))))
        return out


def made(cls: type[Net] = Net, **options: Any) -> RewrittenModule:
    torch.manual_seed(0)
    return graphreg.regularize(cls(), **(OPTIONS | options))


def watches(module: RewrittenModule) -> dict[str, Watch]:
    return {name: leaf for name, leaf in module.graphreg_rules.named_children() if isinstance(leaf, Watch)}


def by_hand(z: Tensor, near: float = 1e-3) -> dict[str, float]:
    wide = z.detach().double()
    return {
        "mean": float(wide.mean()),
        "std": float((wide - wide.mean()).square().mean().sqrt()),
        "near_zero": float((wide.abs() <= near).double().mean()),
        "norm": float(wide.square().sum().sqrt()),
    }


# ---- the numbers


def test_two_by_two_on_paper() -> None:
    """relu of [[1, -1], [3, 0.01]] is [[1, 0], [3, 0.01]]: mean 1.0025, norm √10.0001, one of four, or with near=0.1 two, near zero."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Linear(2, 1))
    module = graphreg.regularize(model, weight_l2=1.0)
    for near, share in ((1e-3, 0.25), (0.1, 0.5)):
        with graphreg.monitor(module, "1", near=near) as watched:
            penalties = module(torch.tensor([[1.0, -1.0], [3.0, 0.01]])).penalties
        assert watched.sites == ("1",)
        expected = {"1/mean": 1.0025, "1/std": (10.0001 / 4 - 1.0025**2) ** 0.5, "1/near_zero": share, "1/norm": 10.0001**0.5}
        assert watched.values() == pytest.approx(expected | {"penalty/weight_l2": float(penalties["weight_l2"].detach())}, rel=1e-6)


@pytest.mark.parametrize("penalties", ["return", "attach"])
def test_a_value_is_measured_before_its_splices_and_the_kept_share_after(penalties: Any) -> None:
    module, twin = (made(penalties=penalties, scale=None if penalties == "return" else 1) for _ in range(2))
    z = torch.relu(module.body(X))
    y = twin.graphreg_rules.relu_hidden_dropout(z, twin.graphreg_rules.key())
    with graphreg.monitor(module) as watched:
        given = module(X)
        found = watched.values()
    for name, value in by_hand(z).items():
        assert found[f"relu/{name}"] == pytest.approx(value, rel=1e-5)
    assert found["relu/kept/hidden_dropout"] == pytest.approx(float((y != 0).sum() / (z != 0).sum())) != 0.75
    assert 0.65 < found["relu/kept/hidden_dropout"] < 0.85
    expected = given.penalties if penalties == "return" else module.penalties()
    assert {name: found[f"penalty/{name}"] for name in expected} == {name: float(value.detach()) for name, value in expected.items()}
    assert watched.sites == ("relu", "act") and len(found) == 2 * 5 + 2


def test_a_value_that_is_overwritten_later() -> None:
    for options in ({}, {"hidden_dropout": 0}):
        module = made(Overwritten, **options)
        with graphreg.monitor(module, "gelu") as watched:
            module(X)
        assert watched.values()["gelu/norm"] == pytest.approx(by_hand(nn.functional.gelu(module.body(X)))["norm"], rel=1e-5)


def test_inputs_parts_of_tuples_and_half_precision() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.rnn(x)[0])
            return out

    module = graphreg.regularize(Reader(), input_dropout=0.5, rng=0).bfloat16()
    x = X.view(8, 8, 4).bfloat16()
    with graphreg.monitor(module, ["x", "rnn"]) as watched:
        module(x)
    assert watched.values()["x/mean"] == pytest.approx(by_hand(x)["mean"], rel=1e-5)  # accumulated in float32
    assert 0.3 < watched.values()["x/kept/input_dropout"] < 0.7
    assert 0 < watched.values()["rnn/norm"] < 192**0.5


# ---- when


def test_every_so_many_calls_in_train_mode() -> None:
    module, told = made(), list[tuple[str, float, int]]()
    with graphreg.monitor(module, "relu", every=3, log=lambda *given: told.append(given)) as watched:
        assert watched.values() == {}
        module(X)
        first, leaf = watched.values(), watches(module)["relu_watch"]
        measured = leaf.last
        module.eval()(10 * X)
        module.train()
        for _ in range(2):
            module(10 * X)
            assert watched.values() == first and leaf.last is measured  # in eager nothing is worked out meanwhile
        module(10 * X)
        assert watched.values()["relu/norm"] > 5 * first["relu/norm"]
    assert watched.calls == 4 and sorted({step for *_, step in told}) == [0, 3]
    assert {name: value for name, value, step in told if step == 0} == first
    assert {name: value for name, value, step in told if step == 3} == watched.values()  # they stay when the block has ended
    module(X)
    assert watched.calls == 4


def test_activation_checkpointing_around_it_counts_once() -> None:
    module = made()
    with graphreg.monitor(module) as watched, graphreg.frozen_noise(module):
        torch.utils.checkpoint.checkpoint(lambda x: module(x).output, X.clone().requires_grad_(), use_reentrant=True).sum().backward()
    assert watched.calls == 1


# ---- training goes on as it would have


def trained(run: Callable[[Tensor], Any], module: nn.Module) -> list[Tensor]:
    optimizer, seen = torch.optim.SGD(module.parameters(), 0.5), list[Tensor]()
    for i in range(3):
        output, penalties = run(X + i)
        output = output[0] if isinstance(output, tuple) else output
        loss = output.square().mean() + sum(penalties.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
    return seen


@pytest.mark.parametrize(
    ("cls", "backend"), [(Net, "eager"), (Modes, "eager"), (Overwritten, "eager"), (Overwritten, "aot_eager")]
)
def test_training_is_bit_equal(cls: type[Net], backend: str) -> None:
    found, states = [], []
    for watching in (False, True):
        module = made(cls)
        module.body.eval()
        run = torch.compile(module, backend=backend, fullgraph=True) if backend != "eager" else module
        if watching:
            with graphreg.monitor(module):
                found.append(trained(run, module))
        else:
            found.append(trained(run, module))
        states.append(graphreg.rng_state(module))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and states[0] == states[1]


def test_where_all_that_draws_is_in_eval_mode_the_noise_stays() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.part(x))
            return out

    module = graphreg.regularize(Parts(), rng=0, dropout={"part.1": 0.5})
    module.part.eval()
    with graphreg.monitor(module, "part.1") as watched:
        module(X)
    assert graphreg.rng_state(module)["call"] == 0 and watched.values()["part.1/kept/dropout"] == 1


def test_what_was_there_is_there_again() -> None:
    model = Net()
    module = graphreg.regularize(model, **OPTIONS)
    code, keys, report = module.code, list(module.state_dict()), graphreg.report(module)
    leaves, strength = list(module.graphreg_rules._modules), graphreg.strengths(module)
    watched = graphreg.monitor(module, "**")
    assert module.code != code and list(module.state_dict()) == keys == list(model.state_dict())
    assert graphreg.report(module) == report and graphreg.strengths(module) == strength
    assert torch.equal(graphreg.strip(module).eval()(X), model.eval()(X))
    watched.close()
    watched.close()
    assert module.code == code and list(module.graphreg_rules._modules) == leaves
    with pytest.raises(ZeroDivisionError), graphreg.monitor(module, log=lambda *given: 1 // 0):  # what log raises is raised
        module.train()(X)
    assert module.code == code


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_watched(copied: Callable[[RewrittenModule], RewrittenModule]) -> None:
    module = made()
    with graphreg.monitor(module, log=lambda *given: None) as watched:
        twin = copied(module)
        assert torch.equal(twin(X).output, module(X).output)
        assert watched.calls == 1 and all(leaf.last is None for leaf in watches(twin).values())
        assert torch.equal(graphreg.strip(twin).eval()(X), graphreg.strip(module).eval()(X))


# ---- compiled


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_with_the_numbers_of_eager(backend: str) -> None:
    module, twin, told = made(), made(), list[tuple[str, float, int]]()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    run = torch.compile(module, fullgraph=True, backend=counter)
    with graphreg.monitor(module, every=2, log=lambda *given: told.append(given)) as watched, graphreg.monitor(twin, every=2) as expected:
        for i in range(4):
            x = X + i
            run(x)
            twin(x)
            assert watched.values() == pytest.approx(expected.values(), rel=1e-5)
        assert counter.frame_count == 1 and watched.calls == 4 and {step for *_, step in told} == {0, 2}
    run(X)
    assert counter.frame_count == 2 and watched.calls == 4  # the graph without


def test_a_module_that_compiles_itself() -> None:
    module = made(compile={"backend": "aot_eager"})
    with graphreg.monitor(module) as watched:
        module(X)
    assert watched.calls == 1 and watched.values()["relu/mean"] == pytest.approx(by_hand(torch.relu(module.body(X)))["mean"], rel=1e-5)


def test_inside_a_function_that_is_compiled() -> None:
    module, told = made(), list[tuple[str, float, int]]()
    run = torch.compile(lambda x: module(x).output.sum(), fullgraph=True, backend="aot_eager")
    with graphreg.monitor(module, "relu", log=lambda *given: told.append(given)) as watched:
        run(10 * X), run(X)
        assert watched.calls == 0 and told == []
        watched.tell(7)
    assert watched.values()["relu/mean"] == pytest.approx(by_hand(torch.relu(module.body(X)))["mean"], rel=1e-5)
    assert told == [(name, value, 7) for name, value in watched.values().items()]


# ---- to whom


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

    module = made()
    with SummaryWriter(str(tmp_path)) as writer, graphreg.monitor(module, every=2, log=writer.add_scalar) as watched:
        for _ in range(3):
            module(X)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(watched.values())
    steps = [(event.step, event.value) for event in events.Scalars("relu/kept/hidden_dropout")]
    assert [step for step, _ in steps] == [0, 2] and steps[1][1] == pytest.approx(watched.values()["relu/kept/hidden_dropout"])


# ---- bad input


def test_no_such_site() -> None:
    with pytest.raises(NoMatchError, match=re.escape("'rely' matches no value of Net. Near names: relu")):
        graphreg.monitor(made(), "rely")
    with pytest.raises(NoMatchError, match="has none of the default sites of monitor"):
        graphreg.monitor(graphreg.regularize(nn.Sequential(nn.Linear(2, 2)), weight_l2=1.0))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"every": 0}, "every=0 is not allowed; give a whole number, 1 or more"), ({"every": 2.0}, "every=2.0"),
     ({"every": True}, "every=True"), ({"log": "scalar"}, "log='scalar' is not allowed; give a function log(name, value, step)"),
     ({"near": -1}, "near=-1"), ({"near": float("nan")}, "near=nan is not allowed; give a number of 0 or more"),
     ({"pattern": 3}, "a selector is a string")],
)  # fmt: skip
def test_options_of_a_wrong_kind(options: dict[str, Any], sentence: str) -> None:
    module = made()
    code = module.code
    with pytest.raises(RegularizerError, match=re.escape(sentence)):
        graphreg.monitor(module, **options)
    assert module.code == code


def test_what_cannot_be_watched() -> None:
    module = made()
    for foreign in (Net(), graphreg.strip(module)):
        with pytest.raises(GraphRegError, match="is not a module that graphreg rewrote. Give what graphreg.regularize returned"):
            graphreg.monitor(foreign)
    with pytest.raises(GraphRegError, match="a backend makes its graphs while the model runs"):
        graphreg.monitor(graphreg.backend(hidden_dropout=0.1))
    with pytest.raises(GraphRegError, match="a later pass rebuilt this module"):
        graphreg.monitor(torch.fx.GraphModule(module, module.graph))
    with graphreg.monitor(module) as watched, pytest.raises(GraphRegError, match=r"is monitored already.*close\(\) what graphreg\.monitor"):
        graphreg.monitor(module)
    with pytest.raises(GraphRegError, match="this monitor has no log function"):
        watched.tell(0)
    graphreg.monitor(module)  # and nobody holds it
    module.graphreg_rules.watching.close()
    graphreg.monitor(module).close()


def test_a_copy_of_a_watched_module_is_watched_once() -> None:
    module = made()
    with graphreg.monitor(module):
        copied, own = copy.deepcopy(module), module.code
    assert copied.code == own
    with graphreg.monitor(copied):
        assert copied.code.count("_watch(") == own.count("_watch(") > 0
    assert "watch" not in copied.code


# ---- the page


def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code runs, and its table is what the example prints, but for the rounding of another processor."""
    assert run_page("monitor.md")["watched"].calls == 3
    monitored.main()
    printed, shown = capsys.readouterr().out, (DOCS / "monitor.md").read_text().split("```text\n")[2].split("```")[0]
    ours, theirs = ([line.split() for line in text.splitlines()] for text in (printed, shown))
    assert [row[0] for row in ours] == [row[0] for row in theirs] and ours[0] == theirs[0]
    for row, other in zip(ours[1:], theirs[1:], strict=True):
        assert [float(value) for value in row[1:]] == pytest.approx([float(value) for value in other[1:]], rel=0.05, abs=0.01)


def test_a_file_gets_a_line_for_each_call_that_is_read(tmp_path: Path) -> None:
    module, file = made(), tmp_path / "values.jsonl"
    file.write_text("older")
    with graphreg.monitor(module, "relu", every=2, file=file) as watched:
        for _ in range(3):
            module(X)
        lines = [json.loads(line) for line in file.read_text().splitlines()]  # before the monitor is closed
        assert [line["step"] for line in lines] == [0, 2] and lines[-1]["values"] == watched.values()
        module(X * math.nan)
        module(X * math.nan)
    assert json.loads(file.read_text().splitlines()[-1])["values"]["relu/mean"] == "nan"
    assert "relu/mean" in watched._repr_html_() and "monitor of 1 site, 5 calls so far" in str(watched)


@pytest.mark.parametrize(("file", "words"), [(3, "give a path"), ("no/folder/here.jsonl", "cannot be written")])
def test_no_such_file(file: Any, words: str) -> None:
    with pytest.raises(GraphRegError, match=words):
        graphreg.monitor(made(), file=file)
