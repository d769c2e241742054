"""docs/randomness.md: what it promises has a test, and what it says of graphreg and F.dropout is measured."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import graphreg
import stateless
from graphreg import Noise
from rivals import of_torch, ours
from rivals.rows import PAGE, found, said

TEXT = PAGE.read_text()


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 20
    for file, test in named:
        assert f"\ndef {test}(" in (PAGE.parents[1] / file).read_text(), f"{file}::{test}"


def test_every_promise_names_one() -> None:
    rows = TEXT.split("| promise | test |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    assert all(re.search(r"\| `tests/", row) for row in rows)


@pytest.mark.parametrize(("column", "module"), [("graphreg", ours), ("`F.dropout`", of_torch)])
def test_the_table_says_what_is_measured(column: str, module: object) -> None:
    assert found(module.PROBES) == said(TEXT)[column]  # type: ignore[attr-defined]


def test_torchs_own_keys_keep_what_the_page_says() -> None:
    """graphreg's column has the promises above; torch's is measured if torch has kernels for the CPU, and 2.13 has none."""
    rows = dict(re.findall(r"^\| ([^|]+) \| yes \| (yes|no)\b", TEXT, re.MULTILINE))
    assert rows.keys() >= stateless.PROMISES.keys()
    if stateless.is_here():
        found = stateless.verdicts(stateless.their_dropout, stateless.their_key(1))
        assert found == {said: rows[said] for said in found}
    assert not (stateless.is_here() and torch.__version__.startswith(("2.10.", "2.11.", "2.12.", "2.13.")))


def test_links_are_defined() -> None:
    assert set(re.findall(r"\]\[(\d+)\]", TEXT)) == set(re.findall(r"^\[(\d+)\]: https://", TEXT, re.MULTILINE))


def test_neighbouring_keys_give_a_mask_moved() -> None:
    n, d = 1 << 20, 1000
    one, other, apart = (torch.tensor([5 + k0, 7 + k1], dtype=torch.int32) for k0, k1 in ((0, 0), (d, 0), (d, 1)))
    z = torch.empty(n)
    masks = [Noise(key).keep(z, 0.5) for key in (one, other, apart)]
    assert float((masks[0][d:] == masks[1][:-d]).float().mean()) > 1 - 1e-5
    for a, b in ((masks[0], masks[1]), (masks[0][d:], masks[2][:-d])):
        assert abs(float((a == b).float().mean()) - 0.5) < 4 * 0.5 / n**0.5


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def kept(x: Tensor) -> Tensor:
    output: Tensor = graphreg.regularize(Sine(), dropout={"sin": 0.3}, rng=0)(x).output
    return output != 0


def test_batch_sizes_and_dtypes() -> None:
    """0.3 is another number in bfloat16; the mask is that of 0.3."""
    x = torch.ones(500, 300)
    mask = kept(x)
    assert torch.equal(kept(torch.ones(1500, 300))[:500], mask)
    assert all(torch.equal(kept(x.to(dtype)), mask) for dtype in (torch.float64, torch.float16, torch.bfloat16))
    assert not torch.equal(kept(torch.ones(500, 600))[:, :300], mask)  # along other dims the index is another


@pytest.mark.parametrize(("backend", "exact"), [("aot_eager", True), ("inductor", False)])
def test_gaussian_noise_is_the_same_to_rounding(backend: str, exact: bool) -> None:
    module = graphreg.regularize(Sine(), noise={"sin": 0.3}, rng=0)
    run = torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)
    ours, theirs = module(torch.ones(256, 256)).output, run(torch.ones(256, 256)).output
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else 1e-6)
