"""Every method × every backbone family × the invariants of `mmpeft.testing`, a share of the cells a day.

The tests of a cell follow one another on one model; which cells run on which day is in `tests/matrix/today.py`.
"""

from __future__ import annotations

import re
from functools import partial

import pytest

import mmpeft
from mmpeft.methods.additive.adapter_fusion import AdapterFusion
from mmpeft.sites import sites
from mmpeft.testing import Invariant, NotApplicable, Session, check_refusal, invariants
from tests.matrix.cells import Cell, decided
from tests.matrix.example import Example
from tests.matrix.expected import refusal, unmergeable
from tests.matrix.families import FAMILIES
from tests.matrix.families.timm import SHALLOW
from tests.matrix.today import TABLES, of_today
from tests.support.shares import ROUND

_SESSIONS: dict[Cell, Session] = {}
"""The session of the cell whose tests run."""


def share(table: str) -> pytest.MarkDecorator:
    """The cells of a table whose turn it is; all tests of a cell follow one another."""
    return pytest.mark.parametrize("cell", of_today(table), ids=str, scope="module")


def session(cell: Cell, families: dict[str, partial[Example]] = FAMILIES) -> Session:
    """The cell's method attached to its model."""
    make = families[cell.family]
    example = make()
    built = [example.model]
    return Session(
        lambda: built.pop() if built else make().model,
        example.batch,
        cell.method,
        read=example.read,
        decide=lambda model, method: decided(example._replace(model=model), method),
        rows_apart=True,
    )


def hold(cell: Cell, invariant: Invariant, unless: str | None = None) -> None:
    """An invariant holds; where there is a reason why it says nothing, it gives that one."""
    if cell not in _SESSIONS:
        _SESSIONS.clear()
        _SESSIONS[cell] = session(cell)
    try:
        if unless is None:
            invariant(_SESSIONS[cell])
        else:
            with pytest.raises(NotApplicable, match=unless):
                invariant(_SESSIONS[cell])
    except BaseException:
        _SESSIONS.clear()  # whatever state it is in, the next test has a session of its own
        raise


@share("refusal")
def test_refusal_names_the_reason_and_changes_nothing(cell: Cell) -> None:
    example = FAMILIES[cell.family]()
    expected = refusal(cell.method, example.model, sites(example.model))
    assert expected is not None
    fuse = partial(lambda model, method: decided(example, method))  # whose adapters cannot be made
    # without data to choose by, since the reason comes before anything is computed
    attach = fuse if isinstance(cell.method, AdapterFusion) else mmpeft.attach
    why = f"^{re.escape(str(expected))}$"
    check_refusal(example.model, example.batch, cell.method, why, read=example.read, attach=attach)


@share("working")
def test_starts_as_the_base(cell: Cell) -> None:
    hold(cell, invariants.starts_as_the_base)


@share("working")
def test_trains_its_own_tensors_alone(cell: Cell) -> None:
    hold(cell, invariants.trains_its_own_tensors_alone)


@share("working")
def test_learns_and_moves_nothing_else(cell: Cell) -> None:
    hold(cell, invariants.learns_and_moves_nothing_else)


@share("working")
def test_off_is_the_base(cell: Cell) -> None:
    hold(cell, invariants.off_is_the_base)


@share("working")
def test_rows_have_their_own_route(cell: Cell) -> None:
    hold(cell, invariants.rows_have_their_own_route)


@share("working")
def test_state_dict_goes_round(cell: Cell) -> None:
    """bitsandbytes' layers do not load what they gave."""
    packed = cell.family.startswith("llama_bnb")
    hold(cell, invariants.state_dict_goes_round, "base itself does not survive" if packed else None)


@share("working")
def test_saved_and_loaded(cell: Cell) -> None:
    hold(cell, invariants.saved_and_loaded)


@share("working")
def test_copies_share_nothing(cell: Cell) -> None:
    hold(cell, invariants.copies_share_nothing)


@share("working")
def test_pickles_go_round(cell: Cell) -> None:
    """bitsandbytes' weights come back without what unpacks them."""
    packed = cell.family.startswith("llama_bnb")
    hold(cell, invariants.pickles_go_round, "comes back as" if packed else None)


@share("working")
def test_close_in_bfloat16(cell: Cell) -> None:
    hold(cell, invariants.close_in_bfloat16)


@share("working")
def test_gradients_accumulate(cell: Cell) -> None:
    hold(cell, invariants.gradients_accumulate)


@share("working")
def test_recomputes_the_same_gradients(cell: Cell) -> None:
    hold(cell, invariants.recomputes_the_same_gradients)


@share("working")
def test_merges_into_what_runs(cell: Cell) -> None:
    why = unmergeable(cell.label, cell.family)
    hold(cell, invariants.merges_into_what_runs, why or (None if cell.method.mergeable else "cannot be merged"))


@share("working")
def test_strength_lies_between(cell: Cell) -> None:
    held = _SESSIONS.get(cell) or session(cell)
    scalable = all(placement.part.scalable for placement in held.tuning.placements)
    hold(cell, invariants.strength_lies_between, None if scalable else "no strength between")


@share("working")
def test_detaches_without_a_trace(cell: Cell) -> None:
    hold(cell, invariants.detaches_without_a_trace)
    _SESSIONS.clear()


@share("compile")
def test_compiles_as_one_graph(cell: Cell) -> None:
    invariants.compiles_as_one_graph(session(cell, SHALLOW))


def test_every_invariant_has_its_test() -> None:
    assert {f"test_{name}" for name in invariants.INVARIANTS} <= set(globals())


@pytest.mark.parametrize("table", TABLES)
def test_a_round_of_seeds_covers_every_cell_and_every_seed_every_method_and_family(table: str) -> None:
    """Of compilation, which takes seconds a cell, every seed covers every family and the round every method."""
    cells = TABLES[table].cells
    days = [of_today(table, str(seed)) for seed in range(20_000, 20_000 + ROUND)]
    assert {cell for day in days for cell in day} == set(cells) == set(of_today(table, "all"))
    assert of_today(table, str(20_000 + ROUND)) == days[0]
    for day in days:
        assert len(day) == len(set(day)) < 0.25 * len(cells)
        assert {cell.family for cell in day} == {cell.family for cell in cells}
        if table != "compile":
            assert {cell.label for cell in day} == {cell.label for cell in cells}


def test_the_tables_are_of_all_cells() -> None:
    """Every cell is refused or held to every invariant."""
    refused, working = set(TABLES["refusal"].cells), set(TABLES["working"].cells)
    assert not refused & working
    assert len(refused) + len(working) == len(FAMILIES) * len({cell.label for cell in refused | working})
