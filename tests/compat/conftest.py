"""Of the tier's tests each day a share: of every test function at least one, so that no row of the table is left out.

What a function is tried with changes from day to day; `--share-seed all` (`make test-all`) runs everything.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import shares

HERE = Path(__file__).parent
WHOLE = {"test_former.py"}
"""Of these nothing is left out: each case is another thing that was written once."""


def function_of(nodeid: str) -> tuple[str]:
    """The test function of an item, whatever it is tried with."""
    return (nodeid.partition("[")[0],)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what has its turn on another day."""
    shared = {item.nodeid for item in items if HERE in item.path.parents and item.path.name not in WHOLE}
    today = set(shares.of_today([item.nodeid for item in items if item.nodeid in shared], function_of))
    left = [item for item in items if item.nodeid in today or item.nodeid not in shared]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
    items[:] = left


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    """What is imported by now is left out of garbage collections: a Trainer asks for one at every turn, and with half
    a dozen libraries loaded they take longer than its steps.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its settings for the process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
