"""A site is the value that the next layer reads: after writes whose result is not assigned, and in a tuple that is read as a whole."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphreg
from graphreg.runtime.containers import with_item

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
WAYS = ["bare", "symbolic", "export", "compiled", "in place", "backend"]


class Net(nn.Module):
    """``change`` returns what the last layer reads; None: the value that it has changed."""

    def __init__(self, change: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.change, self.first, self.last = change, nn.Linear(4, 6), nn.Linear(6, 2)
        self.elu, self.drop = nn.ELU(inplace=True), nn.AlphaDropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        other = self.change(self, h)
        return self.last(h if other is None else other)


def no_result(write: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    """Let a write's result go, as code does that does not assign it."""

    def change(self: Any, h: Tensor) -> None:
        write(self, h)

    return change


def fill(self: Any, h: Tensor) -> None:
    h[h > 0.1] = 0.5


def subtract(self: Any, h: Tensor) -> None:
    h[:, 1] -= 3


def add_up(self: Any, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.index_add_(0, torch.arange(6) // 2, h)
    return out


def by_parts(self: Any, h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out[:3] = h[:3].tanh()
    out[3:] = h[3:].sigmoid()
    return out


def in_turn(self: Any, h: Tensor) -> None:
    h.mul_(2)
    middle = h.sum(1, keepdim=True)
    h.add_(middle)


def by_older_view(self: Any, h: Tensor) -> Tensor:
    older = h.t()
    h.mul_(3)
    return older.t()


def parts_in_turn(self: Any, h: Tensor) -> None:
    left, right = h[:, :3], h[:, 3:]
    left.add_(1)
    right.sub_(20)


def older_after_newer(self: Any, h: Tensor) -> None:
    view = h[:, :3]
    h.mul_(2)
    view.add_(10)


def by_attribute(self: Any, h: Tensor) -> None:
    h.T.sub_(1)


def read_between(self: Any, h: Tensor) -> Tensor:
    h[0] = 1.0
    read = h.tanh()
    h[1] = 2.0
    return read + h


# what changes the value, and the site that the last layer then reads
CHANGES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "method": (no_result(lambda self, h: h.masked_fill_(h > 0.1, 2.0)), "masked_fill_"),
    "layer": (no_result(lambda self, h: self.elu(h)), "elu"),
    "function": (no_result(lambda self, h: F.elu_(h)), "elu_"),
    "inplace=True": (no_result(lambda self, h: F.hardtanh(h, inplace=True)), "hardtanh"),
    "items": (fill, "written"),
    "a part": (subtract, "written"),
    "a view": (no_result(lambda self, h: h.view(-1)[::2].mul_(3)), "written"),
    "an older view": (by_older_view, "written"),
    "a filled result": (add_up, "index_add_"),
    "a result by parts": (by_parts, "written"),
    "two writes": (in_turn, "add_"),
    "reads between": (read_between, "add"),
    "two parts": (parts_in_turn, "written"),
    "an older view after a newer write": (older_after_newer, "written"),
    "an attribute": (by_attribute, "written"),
}


def seen_by_last(model: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = model.last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    model(X)
    handle.remove()
    return seen[0]


def penalty(model: nn.Module, way: str, **asked: Any) -> Any:
    """Return the penalties of one call of the model that is regularized in one of the ways."""
    if way == "in place":
        return graphreg.regularize_(model, penalties="return", **asked)(X).penalties
    if way == "backend":
        torch.compiler.reset()
        backend = graphreg.backend(inner="eager", penalties="return", **asked)
        torch.compile(model, backend=backend)(X)
        return backend.penalties()
    front_end: Any = way if way in ("symbolic", "export") else "auto"
    module = graphreg.regularize(model, example_inputs=None if way == "bare" else X, front_end=front_end, **asked)
    if way == "compiled":
        torch.compiler.reset()
        return torch.compile(module, backend="aot_eager", fullgraph=True)(X).penalties
    return module(X).penalties


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_penalty_measures_what_the_next_layer_reads(change: str, way: str) -> None:
    plain = Net(CHANGES[change][0])
    expected = seen_by_last(plain).square().mean()
    expected.backward()
    model = copy.deepcopy(plain)
    model.zero_grad()
    found = penalty(model, way, hidden_l2=1.0)["hidden_l2"]
    found.backward()
    assert torch.allclose(found, expected)
    assert torch.allclose(model.first.weight.grad, plain.first.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", CHANGES)
def test_dropout_acts_on_what_the_next_layer_reads_and_nothing_else_changes(change: str) -> None:
    plain, site = Net(CHANGES[change][0]), CHANGES[change][1]
    (dropped,) = (each.name for each in graphreg.report(graphreg.regularize(plain, hidden_dropout=0.5)).sites)
    assert dropped.rpartition("_")[0] == site or dropped == site or dropped.startswith(f"{site}_")
    module = graphreg.regularize(copy.deepcopy(plain), hidden_dropout=0.999, rng=0)
    assert (seen_by_last(module) == 0).float().mean() > 0.8
    for model in (module.eval(), graphreg.strip(module), graphreg.regularize(plain, hidden_dropout=0.0)):
        output = model(X)
        assert torch.equal(getattr(output, "output", output), plain(X))


def emitted(module: Any) -> list[str]:
    """Return the lines of the emitted code, without those that free variables."""
    return [line.partition(";")[0].strip() for line in module.code.strip().splitlines()[1:]]


def test_the_code_of_a_write() -> None:
    assert emitted(graphreg.regularize(Net(subtract), hidden_dropout=0.5)) == [
        "key = self.graphreg_rules.key()",
        "first = self.first(x)",
        "getitem = first[(slice(None, None, None), 1)]",
        "getitem -= 3",
        "first[(slice(None, None, None), 1)] = isub",
        "written = graphreg_tracing_settled_reads_written(first)",
        "written_hidden_dropout = self.graphreg_rules.written_hidden_dropout(written, key)",
        "last = self.last(written_hidden_dropout)",
        "return graphreg_Regularized(last, {})",
    ]


def test_the_code_of_a_whole_tuple() -> None:
    assert emitted(graphreg.regularize(Seq2Seq(early=False), dropout={"encoder:h_n": 0.5})) == [
        "key = self.graphreg_rules.key()",
        "encoder = self.encoder(x)",
        "getitem = encoder[0]",
        "getitem_1 = encoder[1]",
        "getitem_4 = getitem_1[0]",
        "encoder_h_n_dropout = self.graphreg_rules.encoder_h_n_dropout(getitem_4, key)",
        "getitem_1_whole = graphreg_runtime_containers_with_item(getitem_1, 0, encoder_h_n_dropout)",
        "decoder = self.decoder(x, getitem_1_whole)",
        "getitem_2 = decoder[0]",
        "getitem_3 = decoder[1]",
        "tanh = encoder_h_n_dropout.tanh()",
        "return graphreg_Regularized((getitem_2, tanh), {})",
    ]


def test_a_module_names_what_it_returns_after_its_writes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.inner(x)
            h.clamp_(min=0)
            return h

    model = nn.Sequential(Block(), nn.Linear(4, 2))
    expected = F.linear(X, model[0].inner.weight, model[0].inner.bias).clamp(min=0)  # type: ignore[union-attr, arg-type]
    for example in (None, X):
        found = graphreg.regularize(model, hidden_l2={"0": 1.0}, example_inputs=example)(X).penalties["hidden_l2"]
        assert torch.allclose(found, expected.square().mean())


class Twice(nn.Module):
    """Ends with a write, and begins with one: its name stays with what it returns, whatever comes next, also a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.inner = nn.ELU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.act(x)
        h: Tensor = self.inner(x)
        h[:, 0] = 7.0
        return h


@pytest.mark.parametrize("example", [None, X])
def test_the_name_of_a_call_stays_within_the_call(example: Any) -> None:
    block, first = Twice(), nn.Linear(4, 4)
    model = nn.Sequential(first, block, block, nn.Linear(4, 2))
    returned: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: returned.append(output.clone()))
    model(X)
    handle.remove()
    for name, expected in (("1", returned[0]), ("1_1", returned[1])):
        found = graphreg.regularize(model, hidden_l2={name: 1.0}, example_inputs=example)(X).penalties["hidden_l2"]
        assert torch.allclose(found, expected.square().mean())


class Makes(nn.Module):
    """A list, in code that no trace sees into."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x] if x.sum() > 1e9 else [self.linear(x), self.linear(x * 2)]


class Updates(nn.Module):
    """Writes into a list, in code that no trace sees into."""

    def forward(self, states: list[Tensor]) -> Tensor:
        if states[0].sum() > 1e9:
            return states[0]
        states[0] = states[0] * 2
        return states[0] + states[1]


def test_an_item_is_not_taken_out_before_an_opaque_module_writes_into_the_list() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.makes, self.updates = Makes(), Updates()

        def forward(self, x: Tensor) -> Tensor:
            states = self.makes(x)
            y: Tensor = self.updates(states)
            return y + states[0]

    model = Cell()
    for prove in (True, False):
        assert torch.equal(graphreg.regularize(model, weight_l2=0.1, example_inputs=X, prove=prove)(X).output, model(X))


def test_a_write_into_an_item_reaches_who_reads_the_whole_tuple() -> None:
    class Written(Seq2Seq):
        def forward(self, x: Tensor) -> Any:
            _, state = self.encoder(x)
            h = state[0].mul_(0.5)
            return self.decoder(x, state)[0], h.tanh()

    torch.manual_seed(0)
    model, x = Written(early=True), torch.randn(2, 4, 3)
    module = graphreg.regularize(copy.deepcopy(model), dropout={"mul_": 0.999}, rng=0)
    y, kept = module(x).output
    _, (h, c) = model.encoder(x)
    assert torch.equal(kept, torch.zeros_like(h)) and torch.allclose(y, model.decoder(x, (torch.zeros_like(h), c))[0])


def test_alpha_dropout_ignores_inplace() -> None:
    """Its forward does not pass ``inplace`` on, so what is not assigned does nothing."""
    model = Net(no_result(lambda self, h: self.drop(h)))
    module = graphreg.regularize(copy.deepcopy(model), hidden_l2=1.0)
    assert torch.allclose(module(X).penalties["hidden_l2"], seen_by_last(model).square().mean())


class Seq2Seq(nn.Module):
    """Reads the state of the encoder as a whole, and an item of it before or after that."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early, self.encoder, self.decoder = early, nn.LSTM(3, 5, batch_first=True), nn.LSTM(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        _, state = self.encoder(x)
        kept = state[0].tanh() if self.early else None
        y, _ = self.decoder(x, state)
        return y, state[0].tanh() if kept is None else kept


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("how", ["bare", "export", "in place", "compiled"])
def test_who_reads_a_whole_tuple_reads_the_splice_at_its_item(how: str, early: bool) -> None:
    plain, x = Seq2Seq(early), torch.randn(2, 4, 3)
    model: Any = copy.deepcopy(plain)
    _, (h, c) = plain.encoder(x)
    if how == "in place":
        graphreg.regularize_(model, dropout={"encoder:h_n": 0.999}, rng=0)
        y, kept = model(x)
    else:
        model = graphreg.regularize(model, dropout={"encoder:h_n": 0.999}, rng=0, example_inputs=x if how == "export" else None,
                                    front_end="export" if how == "export" else "auto")  # fmt: skip
        y, kept = (torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model)(x).output
    assert torch.equal(kept, torch.zeros_like(h))  # all are dropped
    assert torch.allclose(y, plain.decoder(x, (torch.zeros_like(h), c))[0])
    y, kept = model.eval()(x) if how == "in place" else model.eval()(x).output
    assert torch.equal(y, plain(x)[0]) and torch.equal(kept, plain(x)[1])
    if how == "bare":
        stripped = graphreg.strip(model.train())
        assert torch.equal(stripped(x)[0], plain(x)[0]) and not any("whole" in node.name for node in stripped.graph.nodes)


def test_items_of_several_tuples() -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.first(x).chunk(3, 1)
            more = parts[0].sum() + parts[2].sum()
            return self.last(torch.cat(parts, 1)) + more

    module = graphreg.regularize(Chunks(), dropout={"chunk:0": 0.999, "chunk:2": 0.999}, rng=0)
    assert (seen_by_last(module) == 0).float().mean(0).tolist() == [1, 1, 0, 0, 1, 1]


def test_with_item() -> None:
    pair = namedtuple("pair", "a b")
    assert with_item((1, 2), 1, 3) == (1, 3) and with_item([1, 2], -1, 3) == [1, 3] and with_item(pair(1, 2), 0, 3) == pair(3, 2)


    class Own(tuple):
        def __new__(cls, first: Any, second: Any, name: str) -> Any:
            made = super().__new__(cls, (first, second))
            made.name = name
            return made

    own = with_item(Own(1, 2, "a"), 1, 3)
    assert type(own) is Own and own == (1, 3) and own.name == "a"
    returned = torch.randn(2, 3).max(1)
    changed = with_item(returned, 0, torch.zeros(2))
    assert type(changed) is type(returned) and torch.equal(changed.values, torch.zeros(2)) and changed.indices is returned.indices
