"""The table of docs/modes.md, of what acts in which mode, is what runs show. ``python tests/session/test_modes_page.py`` prints it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphreg

PAGE = Path(__file__).parents[2] / "docs" / "modes.md"
X = torch.linspace(-1, 1, 24).view(6, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hid, self.act, self.cell, self.out = nn.Linear(4, 8), nn.Sigmoid(), nn.GRUCell(8, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.hid(x))
        y: Tensor = self.out(self.drop(self.cell(h, h)))
        return y


@contextmanager
def in_eval(module: Any) -> Iterator[None]:
    module.eval()
    yield
    module.train()


@contextmanager
def noise_on_in_eval(module: Any) -> Iterator[None]:
    with in_eval(module), graphreg.noise_on(module):
        yield


MODES: dict[str, Callable[[Any], AbstractContextManager[None]]] = OrderedDict({
    "train": nullcontext, "eval": in_eval, "`noise_on`, in eval": noise_on_in_eval, "`noise_off`": graphreg.noise_off,
    "`penalties_off`": graphreg.penalties_off, "`frozen_noise`": graphreg.frozen_noise,
})  # fmt: skip

# what each row regularizes with: its options, and the name of its penalty, or "" for one that replaces a value
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout (`dropout`, `drop_path`, …)": ({"dropout": {"act": 0.5}}, ""),
    "noise (`noise`, `neftune`, …)": ({"noise": {"act": 0.5}}, ""),
    "dropout and noise on parameters (`drop_connect`, …)": ({"drop_connect": {"hid.weight": 0.5}}, ""),
    "a splice with a formula for eval mode (`zoneout`)": ({"zoneout": {"cell": 0.5}}, ""),
    "learned gates (`l0_gates`)": ({"l0_gates": {"strength": 0.1, "pattern": "act"}}, ""),
    "learned rates (`concrete_dropout`)": ({"concrete_dropout": {"strength": 0.1, "pattern": "act"}}, ""),
    "the penalty of learned gates and rates": ({"l0_gates": {"strength": 0.1, "pattern": "act"}}, "l0_gates"),
    "a penalty on values (`hidden_l1`, …)": ({"hidden_l1": 0.1}, "hidden_l1"),
    "a penalty on parameters (`weight_l2`, …)": ({"weight_l2": 0.1}, "weight_l2"),
    "a penalty on derivatives (`contractive`)": ({"contractive": 0.1}, "contractive"),
    "a constraint or prox (`by=\"prox\"`): `prox_`": ({"weight_l1": {"strength": 0.1, "by": "prox"}}, "prox"),
    "native dropout, `own_dropout=\"keep\"`": ({}, ""),
    "native dropout, `own_dropout=\"seeded\"`": ({"own_dropout": "seeded"}, ""),
    "the count of calls of the noise advances": ({"dropout": {"act": 0.5}}, "call"),
    "the count of steps of schedules advances": ({"noise": {"act": graphreg.schedules.linear(0.1, 0.5, 10)}}, "clock"),
    "the state of penalties (`spectral`) advances": ({"spectral": 0.1}, "state"),
}  # fmt: skip


def made(options: dict[str, Any]) -> Any:
    model = Net()
    if options and "own_dropout" not in options:
        model.drop.p = 0.0
    # noise_on refuses a module that draws nothing
    return graphreg.regularize(model, **{"noise": {"out": 0.0}, **options}, example_inputs=X, prove=False, rng=0)


def shown(module: Any, what: str, mode: Callable[[Any], AbstractContextManager[None]]) -> str:
    """What a mode does to a row, from a few calls."""
    if what == "state":
        before = states(module)
        with mode(module):
            module(X)
        return "each call" if states(module) != before else "no"
    if what in ("call", "clock"):
        count = graphreg.rng_state(module)[what]
        with mode(module):
            module(X), module(X)
        moved = graphreg.rng_state(module)[what] - count
        return {0: "no", 1: "once", 2: "each call"}[moved]
    if what == "prox":
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with mode(module):
            module(X).output.sum().backward()
            optimizer.step()
            weight = module.hid.weight.clone()
            graphreg.prox_(module, optimizer)
        return "no" if torch.equal(weight, module.hid.weight) else "acts"
    with mode(module), torch.no_grad():
        results = [module(X) for _ in range(2)]
        if what:
            return "acts" if results[0].penalties[what] != 0 else "0"
        outputs, plain = [result.output for result in results], Net().eval()(X)
        if torch.equal(outputs[0], plain) and torch.equal(outputs[1], plain):
            return "no"
        return "new draws" if not torch.equal(*outputs) else "one draw" if mode is graphreg.frozen_noise else "deterministic"


def states(module: Any) -> str:
    return str(graphreg.rng_state(module)["state"])


def table() -> str:
    head = ["", *MODES]
    rows = []
    for row, (options, what) in ROWS.items():
        module = made(options)
        rows.append([row, *(shown(module, what, mode) for mode in MODES.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def test_the_table_is_what_runs_show() -> None:
    assert table() in PAGE.read_text()


if __name__ == "__main__":
    print(table())
