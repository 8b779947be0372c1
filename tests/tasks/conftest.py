"""Fixtures that several modules of tasks share."""

from tests.tasks.fewshot_pair import pair  # noqa: F401 - a fixture
