"""Keys and masks drawn ahead are those that are drawn at each call, whatever happens between the calls."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg.errors import GraphRegError
from graphreg.rng import ahead as drawing_ahead

X = torch.linspace(-1, 1, 48).view(6, 8)


class Checkpointed(nn.Module):
    """A block whose forward backward repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Checkpointed(), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def module() -> Any:
    return graphreg.regularize(net(), hidden_dropout=0.3, hidden_l1=0.1, weight_l2=0.1, own_dropout="seeded", rng=7)


def results(module: Any, x: Tensor = X, run: Any = None) -> list[Tensor]:
    """What a step computes: output, penalties, gradients. ``run``: the module, compiled."""
    module.zero_grad()
    output, penalties = (module if run is None else run)(x)
    (output.square().sum() + sum(penalties.values())).backward()
    return [output.detach(), *(each.detach() for each in penalties.values()), *(p.grad.clone() for p in module.parameters())]


@pytest.fixture
def at_each_call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Switches drawing ahead off and on."""
    after = drawing_ahead.CallsAhead.after

    def switch(off: bool) -> None:
        monkeypatch.setattr(drawing_ahead.CallsAhead, "after", (lambda *args: None) if off else after)

    yield switch
    monkeypatch.undo()


def rows(module: Any) -> int:
    """How many masks the module's splices have drawn ahead."""
    drawn = [child.ahead.drawn for child in module.graphreg_rules.children() if hasattr(child, "slot")]
    return sum(len(each.rows) for each in drawn if each is not None)


def steps(module: Any, event: Callable[[Any, int], Any]) -> list[list[Tensor]]:
    """The results of calls, around each of which something happens; ``event`` may return another module to go on with."""
    taken = []
    for call in range(6 + drawing_ahead.CALLS if event is nothing else 18):
        changed = event(module, call)
        x = X
        if isinstance(changed, Tensor):
            x = changed
        elif changed is not None:
            module = changed
        taken.append(results(module, x))
    return taken


def nothing(module: Any, call: int) -> None:
    pass


def frozen(module: Any, call: int) -> None:
    if call % 3 == 0:
        with graphreg.frozen_noise(module):
            first, again = results(module), results(module)
        assert all(map(torch.equal, first, again))


def saved(module: Any, call: int) -> None:
    if call == 7:
        module.state = graphreg.rng_state(module)
    if call == 15:
        graphreg.set_rng_state(module, module.state)


def rates(module: Any, call: int) -> None:
    graphreg.set_strength(module, "hidden_dropout", 0.1 if 5 < call < 12 else 0.4)


def dtypes(module: Any, call: int) -> Tensor:
    dtype = torch.float64 if call % 9 > 5 else torch.float32
    module.to(dtype)
    return X.to(dtype)


def ranks(module: Any, call: int) -> None:
    module.graphreg_rules.key.position = 3 if 5 < call < 12 else None


def pickled(module: Any, call: int) -> Any:
    return pickle.loads(pickle.dumps(module)) if call % 5 == 4 else None


def stored(module: Any, call: int) -> Any:
    if call % 5 != 4:
        return None
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(module: Any, call: int) -> Any:
    if call == 0:
        module.average = (torch.optim.swa_utils.AveragedModel(copy.deepcopy(module), use_buffers=True),)
    (average,) = module.average
    if call % 4 == 3:
        average.update_parameters(module)
    results(average.module)
    return None


def with_inference(module: Any, call: int) -> None:
    if call % 3 == 0:
        with torch.inference_mode():
            module(X)


def with_fakes(module: Any, call: int) -> None:
    if call % 3 == 0:
        with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            module(torch.empty(6, 8))


EVENTS: dict[str, Callable[[Any, int], Any]] = {
    "nothing": nothing,
    "shapes in turn": lambda module, call: X[: 3 + call % 2],
    "another shape from a call on": lambda module, call: X[:3] if call > 9 else None,
    "another dtype": dtypes,
    "rates": rates,
    "frozen noise": frozen,
    "a state saved and loaded": saved,
    "eval": lambda module, call: module.train(call % 4 != 3) and None,
    "deepcopy": lambda module, call: copy.deepcopy(module) if call % 5 == 4 else None,
    "copy": lambda module, call: copy.copy(module) if call % 5 == 4 else None,
    "pickle": pickled,
    "torch.save": stored,
    "ranks": ranks,
    "a model that is averaged": averaged,
    "inference mode": with_inference,
    "fake tensors": with_fakes,
}  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
def test_a_run_is_that_of_draws_at_each_call(event: str, at_each_call: Callable[[bool], None]) -> None:
    at_each_call(True)
    expected = steps(module(), EVENTS[event])
    at_each_call(False)
    ours, ahead = module(), list[int]()
    taken = steps(ours, lambda each, call: (ahead.append(rows(each)), EVENTS[event](each, call))[1])  # type: ignore[func-returns-value]
    assert max(ahead) > 0 or event == "shapes in turn"
    for one, other in zip(expected, taken, strict=False):
        assert all(map(torch.equal, one, other))
    assert len(taken[0]) > 8


def test_shapes_that_change_at_each_call_are_not_drawn_ahead() -> None:
    ours = module()
    for call in range(10):
        ours(X[: 3 + call % 2])
    assert rows(ours) == 0


def test_values_without_elements() -> None:
    ours = module()
    for _ in range(4):
        assert ours(X[:0])[0].shape == (0, 2)


def test_recomputation_draws_what_the_forward_drew(at_each_call: Callable[[bool], None]) -> None:
    def taken() -> list[list[Tensor]]:
        ours, found = module(), []
        whole = ours.get_submodule("0")
        for _ in range(8):
            with graphreg.frozen_noise(ours):
                ours.zero_grad()
                output, penalties = checkpoint(ours, X.clone().requires_grad_(), use_reentrant=False)
                (output.square().sum() + sum(penalties.values())).backward()
                found.append([output.detach(), *(p.grad.clone() for p in whole.parameters())])
        return found

    at_each_call(True)
    expected = taken()
    at_each_call(False)
    for one, other in zip(expected, taken(), strict=True):
        assert all(map(torch.equal, one, other))


def test_two_threads_draw_the_masks_of_one(at_each_call: Callable[[bool], None]) -> None:
    count = 40
    at_each_call(True)
    alone = module()
    expected = sorted(alone(X)[0].sum().item() for _ in range(2 * count))
    at_each_call(False)
    ours, found = module(), list[float]()

    def run() -> None:
        for _ in range(count):
            found.append(ours(X)[0].sum().item())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == expected and rows(ours)


def test_compiled_and_eager_calls_in_turn_compile_once(at_each_call: Callable[[bool], None]) -> None:
    def taken(compiled: bool) -> list[list[Tensor]]:
        torch.compiler.reset()
        graphs, ours = list[Any](), module()

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        run = torch.compile(ours, backend=backend, fullgraph=True)
        found = []
        for call in range(16):
            found.append(results(ours, run=run if compiled and call % 6 >= 4 else None))
        assert len(graphs) == compiled
        return found

    at_each_call(True)
    expected = taken(False)
    at_each_call(False)
    for one, other in zip(expected, taken(True), strict=True):
        torch.testing.assert_close(other, one)


def test_a_functional_call_with_the_counter_is_refused_also_when_it_is_lent_to_itself() -> None:
    ours = module()
    for _ in range(4):
        ours(X)
    lent = dict(ours.named_buffers())
    with pytest.raises(GraphRegError, match="functional_call was given the counter"):
        functional_call(ours, lent, (X,))
    with pytest.raises(GraphRegError, match="functional_call was given the counter"):
        functional_call(ours, {name: buffer.clone() for name, buffer in lent.items()}, (X,))
    without = {name: buffer for name, buffer in lent.items() if "graphreg_rules." not in name}
    functional_call(ours, without, (X,))


def test_a_mask_may_be_written_into() -> None:
    """The formula scales its mask in place, and several calls are recorded before one backward pass runs."""
    ours, twin = module(), module()
    totals = [ours(X)[0].sum() for _ in range(6)]
    sum(totals).backward()  # type: ignore[union-attr]
    expected = [twin(X)[0].sum() for _ in range(6)]
    for each in expected:
        each.backward()
    for one, other in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_strength_that_is_written_in_place_is_read_anew() -> None:
    ours = module()
    before = ours(X)[1]["hidden_l1"].item()
    with graphreg.frozen_noise(ours):
        first = ours(X)[1]["hidden_l1"]
        ours.graphreg_rules.strengths["hidden_l1"].mul_(2)
        second = ours(X)[1]["hidden_l1"]
    assert before and torch.equal(second, 2 * first)


def test_all_splices_together_have_a_bounded_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing_ahead, "_TOTAL", 1 << 16)
    layers = [layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.ReLU())]
    ours = graphreg.regularize(nn.Sequential(*layers, nn.Linear(8, 2)), hidden_dropout=0.3, rng=7)
    x = torch.randn(64, 8)
    for _ in range(5):
        at_once = copy.deepcopy(ours)  # a copy has drawn nothing ahead
        assert torch.equal(ours(x).output, at_once(x).output)
    drawn = [rule.ahead.drawn for rule in ours.modules() if hasattr(rule, "ahead") and hasattr(rule.ahead, "drawn")]
    held = sum(row.numel() for masks in drawn if masks is not None for row in masks.rows)
    assert len(drawn) == 20 and 0 < held <= 1 << 16


def test_a_number_that_is_written_into_at_each_call_is_not_counted_on_from() -> None:
    """As DistributedDataParallel writes the buffers of the first rank into those of the others."""
    ours, twin = module(), module()
    for _ in range(6):
        for name, buffer in ours.named_buffers():
            if name.endswith((".step", ".keys")):
                buffer.copy_(buffer.clone())
        for one, other in zip(results(ours), results(twin), strict=True):
            assert torch.equal(one, other)
    assert ours.graphreg_rules.key.ahead.known is None and twin.graphreg_rules.key.ahead.known is not None
