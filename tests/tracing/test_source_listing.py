"""``names(..., source=True)``: the model's own code, with the names of the sites that each line makes."""

from __future__ import annotations

import json
import pickle
import re
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphreg
from graphreg import RegularizerError
from graphreg.ir.site import Names
from graphreg.ir.source_function import joined_names
from lined_net import Block, Net

INPUTS = (torch.zeros(2, 3, 4), torch.zeros(8))
TEXT = """\
Net: 39 sites

Net.forward, lined_net.py:53
53  def forward(
54      self,
55      x: Tensor,                                x
56      more: Tensor,                             more
57  ) -> Tensor:
58      x = self.features(x)
59      shift = lambda z: z + more  # noqa: E731  add_1
60      return self.head(twice(shift(x)))         head

Net.features, lined_net.py:47
47  def features(self, x: Tensor) -> Tensor:
48      out, (h, _) = self.rnn(                               rnn, getitem_1, rnn:h_n, rnn:c_n
49          torch.relu(self.stem(x)),                         stem, relu
50      )
51      return self.blocks(out + h[0][:, None] * self.scale)  getitem_4, getitem_5, mul, add, blocks.{0-2}, blocks

Block.forward, lined_net.py:30, of blocks.{0-2}
30  @decorated
31  def forward(self, x: Tensor) -> Tensor:
36      h = self.act(self.fc(x))  blocks.{0-2}.fc, blocks.{0-2}.act
37      return x + h              blocks.{0-2}.add

twice, lined_net.py:21
21  def twice(x: Tensor) -> Tensor:
22      return x * 2  mul_1

not shown: 15 parameters, which no line makes"""
WRAPPED = """\
Block.forward, lined_net.py:30, of blocks.{0-2}
30  @decorated
31  def forward(self, x: Tensor) -> Tensor:
36      h = self.act(self.fc(x))  blocks.{0-2}.fc,
                                  blocks.{0-2}.act
37      return x + h              blocks.{0-2}.add
"""


@pytest.fixture(scope="module")
def listing() -> Names:
    return graphreg.names(Net(), INPUTS, source=True)


def lined(listing: Names) -> set[str]:
    return {name for function in listing.source or () for line in function.lines for name in line.sites}


def test_each_function_once_in_the_order_in_which_they_run(listing: Names) -> None:
    assert listing.text() == TEXT
    assert [(f.name, f.modules) for f in listing.source or ()] == [
        ("Net.forward", ("",)), ("Net.features", ("",)), ("Block.forward", ("blocks.0", "blocks.1", "blocks.2")), ("twice", ("",)),
    ]  # fmt: skip


def test_both_front_ends_know_the_same_lines(listing: Names) -> None:
    exported = graphreg.names(Net(), INPUTS, "export", source=True)
    assert exported.source == listing.source


def test_it_iterates_over_names_as_without_the_source(listing: Names) -> None:
    plain = graphreg.names(Net(), INPUTS)
    assert list(listing) == list(plain) and listing.sites == plain.sites and plain.source is None
    data, without = json.loads(json.dumps(listing.to_dict())), plain.to_dict()
    first, second = {"number": 21, "code": "def twice(x: Tensor) -> Tensor:"}, {"number": 22, "code": "    return x * 2"}
    lines = [{**first, "sites": []}, {**second, "sites": ["mul_1"]}]
    assert data["source"][3] == {"name": "twice", "file": "lined_net.py", "modules": [""], "lines": lines}
    del data["source"]
    assert data == json.loads(json.dumps(without))


def test_every_site_that_is_no_parameter_has_its_line(listing: Names) -> None:
    assert {site.name for site in listing.sites if site.kind == "value"} <= lined(listing)
    assert lined(listing) <= set(listing)


def test_select_leaves_the_functions_that_make_what_is_selected() -> None:
    some = graphreg.names(Net(), INPUTS, select=["blocks.1.**@ReLU", "*.weight"], source=True)
    assert [function.name for function in some.source or ()] == ["Block.forward"] and lined(some) == {"blocks.1.act"}


def test_narrow_and_in_a_notebook(listing: Names) -> None:
    assert WRAPPED in f"{listing.text(60)}\n" and max(map(len, listing.text(60).split("Block.forward")[1].splitlines())) <= 60
    page = listing._repr_html_()
    assert "blocks.{0-2}.fc, blocks.{0-2}.act</td>" in page and "def twice(x: Tensor) -&gt; Tensor:</td>" in page


@pytest.mark.parametrize("rich", [True, False])
def test_colours_in_a_terminal(listing: Names, rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    shown = str(listing)
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == TEXT
    assert "\x1b[36mblocks.{0-2}.add\x1b[0m" in shown and (re.search(r"\x1b\[\d+;49mdef\x1b", shown) is not None) == rich
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(listing) == TEXT


def test_rewritten_models(listing: Names) -> None:
    """A module without its additions, with and without blocks; a model in place, after ``strip_``; what torch.compile captured."""
    for blocks in (None, "blocks.*"):
        module = graphreg.regularize(Net(), example_inputs=INPUTS, rng=0, dropout={"**.act": 0.1}, blocks=blocks)
        of = graphreg.names(graphreg.strip(module), source=True).source or ()
        assert [(f.name, f.lines) for f in of] == [(f.name, f.lines) for f in listing.source or ()]
    model = graphreg.regularize_(Net(), rng=0, dropout={"**.act": 0.1})
    model(*INPUTS)
    graphreg.strip_(model)
    assert graphreg.names(model, INPUTS, source=True).source == listing.source


def test_what_torch_compile_captured() -> None:
    model = nn.Sequential(Block(), Block())
    captured = graphreg.names(model, torch.zeros(2, 8), backend=graphreg.backend(), source=True)
    (block,) = captured.source or ()
    assert block.name == "Block.forward" and block.lines[-1].sites == ("0.add", "0", "1.add", "1")


def test_code_that_is_not_known() -> None:
    """torch's own forward, and graphs that record no lines: after pickling, the file may have changed."""
    module = graphreg.regularize(Net(), example_inputs=INPUTS, rng=0, dropout={"**.act": 0.1})
    read = graphreg.strip(pickle.loads(pickle.dumps(module)))
    for model in (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), fx.symbolic_trace(Block()), read):
        listing = graphreg.names(model, source=True)
        assert listing.source == () and "\nmade by no line of the model's own code that is known: " in str(listing)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cell(x)
        return torch.tanh(self.cell(x)) if self.training else self.cell(x)


def test_a_module_called_again_and_both_modes() -> None:
    cells, block = graphreg.names(Cells(), torch.zeros(2, 8), source=True).source or ()
    assert [line.sites for line in cells.lines] == [("x",), ("cell",), ("cell_1", "tanh")]
    assert block.lines[-1].sites == ("cell.add", "cell.add_1") and block.modules == ("cell",)


def test_source_is_a_flag() -> None:
    wrong: Any = "yes"
    with pytest.raises(RegularizerError, match=r"^source='yes' is not allowed; give True or False\.$"):
        graphreg.names(Net(), INPUTS, source=wrong)


# Names that differ in a number


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b", "a.0.c", "d"], ["a.{0-2,5}.b", "a.0.c", "d"]),
        (["1.0", "1.1", "3.0", "3.1", "4.0"], ["{1,3}.{0-1}", "4.0"]),
        (["a", "a.0", "a.1", "relu_1"], ["a", "a.{0-1}", "relu_1"]),
    ],
)
def test_together(names: list[str], expected: list[str]) -> None:
    assert list(joined_names(names)) == expected


def expanded(name: str) -> list[str]:
    """The names that a name with numbers in braces stands for."""
    match = re.search(r"\{([^}]*)\}", name)
    if match is None:
        return [name]
    ends = [tuple(map(int, (part.split("-") * 2)[:2])) for part in match[1].split(",")]
    numbers = [number for first, last in ends for number in range(first, last + 1)]
    return [each for number in numbers for each in expanded(name.replace(match[0], str(number), 1))]


PARTS = st.sampled_from(["a", "b", "0", "1", "2", "7"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), unique=True))
def test_together_loses_and_invents_no_name(names: list[str]) -> None:
    assert sorted(each for name in joined_names(names) for each in expanded(name)) == sorted(names)
