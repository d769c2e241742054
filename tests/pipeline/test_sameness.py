"""Eager, aot_eager and Inductor draw the same masks and give the right gradients: six axes, pairwise here, whole in the sweep."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import sameness_cells
from graphreg import Noise, Splice
from graphreg.passes import BernoulliDropout
from sameness_axes import AXES, RECOMPUTATION, Cell, exists, pairwise, product
from sameness_cells import batch, check, regularized, runner
from sameness_page import PAGE, RECORDS, ROWS, Row, name_of, page, record

PAIRWISE = pairwise(product())


def test_the_product_is_whole() -> None:
    sizes = {axis: len(values) for axis, values in AXES.items()}
    assert sizes == {"dtype": 4, "layout": 4, "backend": 3, "recomputation": 4, "checkpointing": 6, "batch": 2}
    assert len(set(product())) == 4 * 4 * 6 * 2 * (4 + 4 + 1)  # eager has the default setting alone


def test_every_pair_of_values_is_in_a_cell() -> None:
    for first, second in itertools.combinations(AXES, 2):
        seen = {(getattr(cell, first), getattr(cell, second)) for cell in PAIRWISE}
        for a, b in itertools.product(AXES[first], AXES[second]):
            impossible = (first, second) == ("backend", "recomputation") and a == "eager" and b != "default"
            assert ((a, b) in seen) != impossible, (a, b)
    assert len(set(PAIRWISE)) == len(PAIRWISE) and all(exists(cell) for cell in PAIRWISE)


def test_few_cells_suffice_and_fewer_of_inductor() -> None:
    """24 is the least that two axes of 6 and 4 values allow; Inductor meets 6 values of an axis, so 6 of its cells."""
    assert 24 <= len(PAIRWISE) <= 40
    assert 6 <= sum(cell.backend == "inductor" for cell in PAIRWISE) <= 8
    assert pairwise(product()) == PAIRWISE


@pytest.mark.parametrize("cell", PAIRWISE, ids=str)
def test_cell(cell: Cell) -> None:
    check(cell)


@pytest.fixture(scope="module")
def own_cache() -> Iterator[None]:
    """Many cells of the product compile the same graphs: each is compiled once, by this graphreg."""
    with fresh_cache():
        yield


@pytest.mark.sweep
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_row(row: Row, own_cache: None) -> None:
    """All cells of a row of docs/sameness.md; leaves its record, whether they pass or not."""
    outcomes = {}
    for cell in (cell for cell in product() if (cell.backend, cell.recomputation, cell.checkpointing) == row):
        try:
            check(cell, cached=True)
        except Exception as error:  # whatever the cell raises is its outcome
            outcomes[cell] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            outcomes[cell] = ""
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name_of(row)}.json").write_text(json.dumps(record(row, outcomes)))
    assert not any(outcomes.values()), {str(cell): why for cell, why in outcomes.items() if why}


# ---- what a cell catches

EAGER = Cell("float32", "strided", "eager", "default", "none", "one size")


class OtherBackward(Splice, keys=("test_sameness_other_backward",)):
    """The right mask in the forward, another in backward: what a mask drawn anew does."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        right, wrong = (Noise(noise.key + shift).keep(z, weight) / (1 - weight) for shift in (0, 1))
        return (z * right).detach() + z * wrong - (z * wrong).detach()


class OtherDraws(Splice, keys=("test_sameness_other_draws",)):
    """Dropout all right, by the draws of another key."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z * (Noise(noise.key + 1).keep(z, weight) / (1 - weight))


class Coarse(Splice, keys=("test_sameness_coarse",)):
    """The right normals to three digits."""

    def __call__(self, z: Tensor, weight: Tensor, noise: Noise) -> Tensor:
        return z + (weight * noise.normal(z)).to(torch.bfloat16).to(z.dtype)


@pytest.mark.parametrize(
    ("forged", "said"),
    [
        (BernoulliDropout("heads.0", 0.41, name="sigmoid"), "sigmoid: the mask of the forward"),
        (OtherDraws("heads.0", 0.4, name="sigmoid"), "sigmoid: the mask of the forward"),
        (OtherBackward("heads.0", 0.4, name="sigmoid"), "sigmoid: the mask that backward multiplied by"),
        (Coarse("heads.1", 0.0625, name="noise"), "noise: the output"),
    ],
)
def test_a_cell_fails_where_it_should(forged: Splice, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [splice for splice in sameness_cells.SPLICES if splice.name != forged.name]
    monkeypatch.setattr(sameness_cells, "SPLICES", [forged, *others])
    with pytest.raises(AssertionError, match=said):
        check(EAGER)


def test_the_settings_have_the_masks_drawn_again_in_backward() -> None:
    """By default the masks are kept, one byte an element; by aggressive_recomputation and the budget the keys of the call are."""

    def saved(how: str) -> list[Tensor]:
        torch._dynamo.reset()
        cell = Cell("float32", "transposed", "aot_eager", how, "none", "one size")
        given, kept = batch(cell, 3, 0), list[Tensor]()
        with functorch.patch(**RECOMPUTATION[how]) if RECOMPUTATION[how] else contextlib.nullcontext():
            run = runner(cell, regularized(cell))
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
                run(given.x, given.u, given.v)
        return kept

    kinds = {how: {t.dtype for t in saved(how)} for how in ("default", "aggressive_recomputation", "activation_memory_budget=0.3")}
    assert torch.int8 in kinds["default"] and torch.int32 not in kinds["default"]
    for how in ("aggressive_recomputation", "activation_memory_budget=0.3"):
        assert torch.int32 in kinds[how] and torch.int8 not in kinds[how]


# ---- the page


def records(failing: Cell | None = None) -> list[dict[str, object]]:
    made = []
    for row in ROWS:
        cells = [cell for cell in product() if (cell.backend, cell.recomputation, cell.checkpointing) == row]
        made.append(json.loads(json.dumps(record(row, {cell: "AssertionError: because" if cell == failing else "" for cell in cells}))))
    return made


def test_a_cell_that_fails_is_told_of() -> None:
    whole, hurt = page(records()), page(records(EAGER))
    assert "1728 cells, 1728 run, 1728 pass." in whole and "## Cells that fail\n\nNone." in whole
    assert "1728 cells, 1728 run, 1727 pass." in hurt and f"- {EAGER}: AssertionError: because" in hurt
    assert "| eager | default | none | 7/8 | 8/8 | 8/8 | 8/8 |" in hurt


def test_a_row_that_did_not_run_is_told_of() -> None:
    told = page(records()[1:])
    assert "1728 cells, 1696 run, 1696 pass." in told
    assert "| eager | default | none | not run | not run | not run | not run |" in told


def test_the_page_in_docs_is_of_this_matrix() -> None:
    """All but what a sweep finds: the numbers of cells that ran and pass, the list of those that fail, torch and the day."""
    found = r"\d/8|not run|\d+ run, \d+ pass\. torch .*, on a CPU|## Cells that fail.*?##"
    told, made = (re.sub(found, "", text, flags=re.S) for text in (PAGE.read_text(), page(records())))
    assert told == made
