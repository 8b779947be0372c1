"""Every method × every backbone family × the invariants that any tuning must keep, a share of the cells a day.

The invariants are in `tests/support/invariants.py`, which cells run on which day in `tests/matrix/today.py`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import mmpeft
from mmpeft.methods.additive.adapter_fusion import AdapterFusion
from mmpeft.sites import sites
from tests.matrix.cells import Cell, decided
from tests.matrix.example import Example
from tests.matrix.expected import refusal, unmergeable
from tests.matrix.families import FAMILIES
from tests.matrix.families.few_bits import FAMILIES as FEW_BITS
from tests.matrix.families.timm import SHALLOW
from tests.matrix.today import TABLES, of_today
from tests.support import invariants
from tests.support.shares import ROUND


def share(invariant: str) -> pytest.MarkDecorator:
    """The cells of an invariant whose turn it is."""
    return pytest.mark.parametrize("cell", of_today(invariant), ids=str)


def tuned(example: Example, cell: Cell, by: float = 0.05) -> mmpeft.Tuning:
    """The cell's method attached and moved away from its start."""
    tuning = mmpeft.attach(example.model, decided(example, cell.method))
    invariants.perturb(tuning, by=by)
    return tuning


@share("refusal")
def test_refusal_names_the_reason_and_changes_nothing(cell: Cell) -> None:
    example = FAMILIES[cell.family]()
    model = example.model
    before, keys = example.answer(), list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    expected = refusal(cell.method, model, sites(model))
    assert expected is not None
    # without data to choose by, since the reason comes before anything is computed
    attach = partial(decided, example) if isinstance(cell.method, AdapterFusion) else partial(mmpeft.attach, model)
    with pytest.raises(type(expected), match=f"^{re.escape(str(expected))}$"):
        attach(cell.method)
    assert list(model.state_dict()) == keys
    assert torch.equal(example.answer(), before)
    assert [p.requires_grad for p in model.parameters()] == flags


@share("session")
def test_a_session(cell: Cell, tmp_path: Path) -> None:
    """Attach, train, route, save, load, detach: on one model, as a user does."""
    session = invariants.Session(FAMILIES[cell.family], cell.method)
    invariants.identity_at_init_or_declared(session)
    invariants.exact_trainable_set(session)
    invariants.alive_without_drift(session)
    session.perturb()
    invariants.mixed_batch_equals_separate_runs(session)
    invariants.saved_and_loaded(session, tmp_path)
    invariants.detached_without_a_trace(session)


@share("merge")
def test_merge(cell: Cell) -> None:
    example = FAMILIES[cell.family]()
    base = example.answer()
    tuning = tuned(example, cell, by=0.02)
    why = unmergeable(cell.label, cell.family)
    if not cell.method.mergeable:
        why = why or "cannot be merged"
    invariants.merged_and_unmerged(example, tuning, base, why)


@share("recomputation")
def test_recomputation(cell: Cell) -> None:
    example = FAMILIES[cell.family]()
    invariants.recomputed_with_the_same_gradients(example, tuned(example, cell))


@share("copies")
def test_copies_precision_and_accumulation(cell: Cell) -> None:
    example = FAMILIES[cell.family]()
    tuning = tuned(example, cell)
    invariants.copied(example, pickles=cell.family not in FEW_BITS)  # neither library's weights survive a pickle
    invariants.close_in_bfloat16(example, tuning)
    invariants.gradients_accumulate(example, tuning)


@share("compile")
def test_compile_without_graph_breaks(cell: Cell) -> None:
    example = SHALLOW[cell.family]()
    invariants.compiled_as_one_graph(example, tuned(example, cell))


@pytest.mark.parametrize("invariant", TABLES)
def test_a_round_of_seeds_covers_every_cell_and_every_seed_every_method_and_family(invariant: str) -> None:
    """Of compilation, which takes seconds a cell, every seed covers every family and the round every method."""
    cells = TABLES[invariant].cells
    days = [of_today(invariant, str(seed)) for seed in range(20_000, 20_000 + ROUND)]
    assert {cell for day in days for cell in day} == set(cells) == set(of_today(invariant, "all"))
    assert of_today(invariant, str(20_000 + ROUND)) == days[0]
    for day in days:
        assert len(day) == len(set(day)) < 0.25 * len(cells)
        assert {cell.family for cell in day} == {cell.family for cell in cells}
        if invariant != "compile":
            assert {cell.label for cell in day} == {cell.label for cell in cells}


def test_the_tables_are_of_all_cells() -> None:
    """Every cell is refused or tried by all that every working one is tried by."""
    refused, working = set(TABLES["refusal"].cells), set(TABLES["session"].cells)
    assert not refused & working
    assert len(refused) + len(working) == len(FAMILIES) * len({cell.label for cell in refused | working})
    for invariant in ("merge", "recomputation", "copies"):
        assert set(TABLES[invariant].cells) == working
