"""What a penalty keeps from call to call: where it is kept, when it moves on, how it is saved and made anew."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphreg
from graphreg import GraphRegError, NoMatchError, Penalty, RegularizerError
from graphreg.passes import L2SP, BernoulliDropout, SpectralPenalty

X = torch.ones(2, 3)


class Counts(Penalty, keys=("counts_calls",), on="parameters"):
    """The number of calls before this one; + 0 w, so that a gradient goes through it."""

    def init_state(self, like: Tensor) -> dict[str, Tensor]:
        return {"count": torch.zeros((), dtype=like.dtype)}

    def __call__(self, w: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return state["count"] + w.sum() * 0, {"count": state["count"] + 1}


def made(*regularizers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return graphreg.regularize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), *regularizers or (Counts("*", 1.0),), rng=0, **options)


def number(value: Tensor) -> float:
    return float(value.detach())


def counted(module: Any) -> float:
    return number(module(X).penalties["counts_calls"])


def test_it_moves_on_in_train_mode_alone() -> None:
    module = made()
    assert [counted(module) for _ in range(3)] == [0, 1, 2]
    module.eval()
    assert [counted(module) for _ in range(2)] == [3, 3]
    module.train()
    with torch.inference_mode():
        assert counted(module) == 3
    with torch.no_grad():
        assert counted(module) == 3
    torch.func.grad(lambda x: module(x).output.sum())(X)
    assert counted(module) == 4


def test_compiled_it_moves_on_too() -> None:
    torch._dynamo.reset()
    module = made(Counts("*", 1.0), SpectralPenalty("*", 0.1), BernoulliDropout("0", 0.5))
    start, results = graphreg.rng_state(module), list[Any]()
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        graphreg.set_rng_state(module, start)
        calls = [run(X) for _ in range(3)]
        sum(value.sum() for call in calls for value in (call.output, *call.penalties.values())).backward()
        results.append([[*call.penalties.values(), call.output] for call in calls])
        results[-1].append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        module.zero_grad()
    torch.testing.assert_close(results[0], results[1])
    assert [number(call[0]) for call in results[1][:3]] == [0, 1, 2]


def test_no_key_of_it_is_in_a_state_dict() -> None:
    module, plain = made(L2SP("*", 1.0)), made(L2SP("*", 1.0))
    assert list(module.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    module.load_state_dict(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).state_dict())  # strictly
    assert number(module(X).penalties["l2_sp"]) > 0 == number(plain(X).penalties["l2_sp"])


def test_reset_state() -> None:
    module = made(L2SP("*", 1.0), Counts("*", 1.0))
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1.0)
    assert number(module(X).penalties["l2_sp"]) == pytest.approx(0.5)
    graphreg.reset_state(module, "l2_sp")
    assert number(module(X).penalties["l2_sp"]) == 0 and counted(module) == 2
    graphreg.reset_state(module)
    assert counted(module) == 0
    with pytest.raises(NoMatchError, match=r"no regularizer that keeps a state is named 'dropout'\. Names: l2_sp, counts_calls"):
        graphreg.reset_state(module, "dropout")


def test_a_saved_state_goes_on() -> None:
    module = made(Counts("*", 1.0), L2SP("0.weight", 1.0), BernoulliDropout("0", 0.5))
    counted(module)
    buffer = io.BytesIO()
    torch.save(graphreg.rng_state(module), buffer)
    buffer.seek(0)
    state, other = torch.load(buffer), made(Counts("*", 1.0), L2SP("0.weight", 1.0), BernoulliDropout("0", 0.5))
    assert state["version"] == 2
    graphreg.set_rng_state(other, state)
    assert counted(other) == counted(module) == 1 and torch.equal(other(X).output, module(X).output)


def test_copies_go_on_apart() -> None:
    module = made()
    counted(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert [counted(twin) for _ in range(2)] == [1, 2]
    assert counted(module) == 1


def test_in_place() -> None:
    """One state for all structures of arguments; taken when the model is regularized, not when it is first traced."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.fc(x) if y is None else self.fc(x + y)  # type: ignore[no-any-return]

    model = graphreg.regularize_(Net(), L2SP("*", 1.0, reduction="sum"), Counts("*", 1.0), rng=0, penalties="return")
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    values = [{name: number(value) for name, value in call().penalties.items()} for call in (lambda: model(X), lambda: model(X, X))]
    assert values == [{"l2_sp": pytest.approx(6.0), "counts_calls": 0}, {"l2_sp": pytest.approx(6.0), "counts_calls": 1}]
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(graphreg.regularize_(nn.Sequential(nn.Linear(3, 2)), counts_calls=1.0, rng=0))),
    ):
        assert graphreg.rng_state(twin)["version"] == 2
    assert counted(copy.deepcopy(model)) == 2
    graphreg.reset_state(model)
    assert number(model(X).penalties["l2_sp"]) == 0


def test_half_precision_and_devices() -> None:
    module = made(L2SP("*", 1.0), Counts("*", 1.0)).to(torch.bfloat16)
    assert module(X.to(torch.bfloat16)).penalties["l2_sp"].dtype == torch.float32
    assert number(module(X.to(torch.bfloat16)).penalties["l2_sp"]) < 1e-4 and counted(module.float()) == 2


# What is refused


def test_a_forward_that_backward_repeats_is_refused() -> None:
    module = made()
    x = X.clone().requires_grad_()
    value = checkpoint(lambda x: sum(module(x).penalties.values()) + module(x).output.sum(), x, use_reentrant=False)
    with pytest.raises(GraphRegError, match=r"a backward pass runs the forward again, but the first run has replaced the state"):
        value.backward()


def test_other_states_are_refused() -> None:
    module = made(L2SP("0.weight", 1.0))
    state = graphreg.rng_state(module)
    cases = [
        (graphreg.rng_state(made(BernoulliDropout("0", 0.5))), r"other streams|only the state or only the module has tensors of l2_sp"),
        (
            graphreg.rng_state(made(L2SP("1.weight", 1.0))),
            r"the state of l2_sp is that of other sites: only one of the two has 0\.weight",
        ),
        (
            {**state, "state": {"l2_sp": {"0.weight": {"start": torch.ones(1)}}}},
            r"has the shapes \{'start': \(1,\)\}, and the module needs",
        ),
        ({**state, "state": {"l2_sp": 3}}, r"the state is damaged: it has something under 'state' that is not a dict of tensors"),
    ]
    for other, said in cases:
        with pytest.raises(RegularizerError, match=said):
            graphreg.set_rng_state(module, other)


def test_meta_backend_and_protocol() -> None:
    with pytest.raises(GraphRegError, match=r"l2_sp keeps a state for 0\.weight, which has no values yet \(device meta\)"):
        graphreg.regularize(nn.Sequential(nn.Linear(3, 2, device="meta")), L2SP("*", 1.0))
    with pytest.raises(RegularizerError, match=r"L2SP keeps a state from call to call, and a backend's graphs keep none"):
        graphreg.backend(L2SP("*", 1.0))
    with pytest.raises(RegularizerError, match=r"NoInit: __call__ takes state if and only if the class has init_state"):

        class NoInit(Penalty, on="parameters"):
            def __call__(self, w: Tensor, state: dict[str, Tensor]) -> Tensor:
                return w.sum()

    class Shrinks(Counts, on="parameters"):
        def __call__(self, w: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return w.sum(), {}

    with pytest.raises(RegularizerError, match=r"the formula returned a state with other names or shapes than init_state"):
        made(Shrinks("*", 1.0))(X)
