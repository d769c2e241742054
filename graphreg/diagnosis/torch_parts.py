"""Tries each part of graphreg with the installed torch. ``torch_check.py`` runs this file in a separate process.

A trial is a tiny example from end to end.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphreg.diagnosis.probes import measure_streams
from graphreg.errors import GraphRegError, first_line
from graphreg.pipeline import regularize
from graphreg.session.hosts import backend_host

MARK = "graphreg: "  # begins each line of the report, because torch may print other lines
CPU = torch.device("cpu")


class _Net(nn.Module):
    """A model of two layers that both front ends can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.hid, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.hid(x)))
        return y


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x)[0])
        return y


def _x() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4)


def _step(call: Callable[[Tensor], Any], x: Tensor, module: nn.Module) -> None:
    """Run one training step; raise GraphRegError if a parameter has no finite gradient."""
    output, penalties = call(x)
    (output.sum() + sum(penalties.values())).backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if missing:
        raise GraphRegError(f"no finite gradient reaches {', '.join(missing)}")


def _traced(front_end: Any) -> None:
    module = regularize(_Net(), example_inputs=_x(), front_end=front_end, hidden_dropout=0.5, hidden_l1=0.1, weight_l2=0.1, rng=0)
    _step(module, _x(), module)


def _streams(backend: str) -> None:
    seen = measure_streams(backend, CPU)
    if seen.error:
        raise GraphRegError(seen.error)
    if seen.wrong or seen.eager:
        raise GraphRegError(f"masks differ for {seen.backward:.0%} of elements in backward, for {seen.eager:.0%} from eager")


def _compiled(module: Any, x: Tensor) -> None:
    _step(torch.compile(module, fullgraph=True, backend="aot_eager"), x, module)


def _penalties() -> None:
    module = regularize(_Net(), hidden_dropout=0.5, hidden_l1=0.1, weight_l2=0.1, rng=0)
    _compiled(module, _x())


def _recurrent() -> None:
    module = regularize(_Recurrent(), recurrent_state={"weight": 0.1, "pattern": "rnn"}, rng=0)
    _compiled(module, torch.linspace(-1, 1, 60).view(3, 5, 4))


def _attached() -> None:
    for wrap in (lambda module: module, lambda module: torch.compile(module, fullgraph=True, backend="aot_eager")):
        module = regularize(_Net(), weight_l2={"weight": 1.0, "pattern": "hid.weight"}, penalties="attach", scale=1.0)
        # The loss is 0, so each gradient is that of the penalty: of the mean of the squares.
        (0 * wrap(module)(_x()).sum()).backward()
        expected = module.hid.weight * 2 / module.hid.weight.numel()
        if not torch.allclose(module.hid.weight.grad, expected, atol=1e-6):
            raise GraphRegError("the gradient of an attached penalty is wrong")


def _derivatives() -> None:
    module = regularize(_Net(), contractive=0.1, rng=0)
    _step(module, _x(), module)
    _compiled(regularize(_Net(), contractive=0.1, rng=0), _x())


def _vmapped() -> None:
    module = regularize(_Net(), input_dropout=0.5, rng=0)
    rows = torch.vmap(lambda x: module(x).output, randomness="different")(torch.ones(64, 4))
    if (rows == rows[0]).all():
        raise GraphRegError("rows that should differ have the same mask")


def _through_backend(penalties: str) -> None:
    model = _Net()
    options: Any = {
        "inner": "aot_eager", "hidden_dropout": 0.5, "weight_l2": {"weight": 1.0, "pattern": "hid.weight"}, "rng": 0,
        "penalties": penalties, "scale": 1.0 if penalties == "attach" else None,
    }  # fmt: skip
    run = torch.compile(model, backend="graphreg", options=options)
    # As in ``_attached``: every gradient is that of the penalty.
    loss = 0 * run(_x()).sum()
    handle: Any = backend_host(run)
    for value in handle.penalties().values() if penalties == "return" else ():
        loss = loss + value
    loss.backward()
    weight: Any = model.hid.weight
    if not torch.allclose(weight.grad, weight * 2 / weight.numel(), atol=1e-6):
        raise GraphRegError("the gradient of a penalty through the backend is wrong")


# The trial of each part, by the name that the part has in a diagnosis.
PARTS: dict[str, Callable[[], None]] = {
    "the symbolic front end": lambda: _traced("symbolic"),
    "the export front end": lambda: _traced("export"),
    "attached penalties": _attached,
    "penalties in compiled code": _penalties,
    "the noise in code compiled by aot_eager": lambda: _streams("aot_eager"),
    "recurrent layers in compiled code": _recurrent,
    "penalties with a vector-Jacobian product": _derivatives,
    "the noise under torch.vmap": _vmapped,
    "the backend": lambda: _through_backend("return"),
    "attached penalties of the backend": lambda: _through_backend("attach"),
    "the noise in code compiled by Inductor": lambda: _streams("inductor"),
}


def outcomes() -> Iterator[tuple[str, str | None]]:
    """Try each part. Yield a pair before the trial, (name of the part, None), and a pair after the trial, (name of the part, error).

    The error is a text. If the part works, the text is ``""``.
    """
    for name, trial in PARTS.items():
        # Named before the trial, so that it is known which part a crash belongs to.
        yield name, None
        try:
            trial()
        except Exception as error:  # whatever a new torch raises
            yield name, first_line(getattr(error, "inner_exception", error))
        else:
            yield name, ""


def main() -> None:
    """Print the report, one JSON object a line: ``{"trying": …}``, ``{"part": …, "error": …}``, at last ``{"done": true}``."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, error in outcomes():
            _print({"trying": part} if error is None else {"part": part, "error": error})
    _print({"done": True})


def _print(line: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(line)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
