"""Values that one forward pass hands from one place in a model to another."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Passed(Generic[T]):
    """A value of the forward pass under way; threads that run one model at once have each its own.

    While dynamo traces, which cannot see threads apart, it is a plain attribute. Copies and pickles hold none.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._traced: T | None = None

    def get(self) -> T | None:
        """The value, or None where no pass has set one."""
        if torch.compiler.is_compiling():
            return self._traced
        return getattr(self._own, "value", None)

    def set(self, value: T | None) -> T | None:
        """Put another value in its place; return the one before."""
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, value
            return before
        before = getattr(self._own, "value", None)
        self._own.value = value
        return before

    def __deepcopy__(self, memo: object) -> Passed[T]:
        return type(self)()

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ()
