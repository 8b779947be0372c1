"""Forwards that somebody puts on a module itself, before or after it hosts parts."""

from __future__ import annotations

import inspect
import threading

from torch import nn

from mmpeft.hosting.modules import SEAT
from mmpeft.types import AnyModule, Argument, Attribute, Forward, Output


class Patched:
    """`forward` of a host on which somebody has put one of their own, which runs inside the parts.

    Each sees the one before it as the module had it; what calls the class's own forward gets the base's.
    """

    def __init__(self, host: nn.Module, patch: Forward) -> None:
        self.host, self.patch = host, patch

    def __call__(self, *args: Argument, **kwargs: Argument) -> Output:
        host: AnyModule = self.host
        if SEAT not in host.__dict__ or is_inside(host):
            return self.run(*args, **kwargs)
        return type(host).forward(host, *args, **kwargs)

    def run(self, *args: Argument, **kwargs: Argument) -> Output:
        """The patch itself."""
        patches = _inside.__dict__.setdefault("patches", [])
        patches.append(self.host)
        try:
            return self.patch(*args, **kwargs)
        finally:
            patches.pop()

    def __getattr__(self, name: str) -> Attribute:
        """What the patch has: its function, which others wrap to make the next one, or what it wraps itself."""
        if "patch" not in self.__dict__:  # being copied
            raise AttributeError(name)
        return getattr(self.patch, name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.patch)


_inside = threading.local()
"""The hosts whose patched forward this thread is in."""


def is_inside(host: nn.Module) -> bool:
    """Whether this thread is in a forward that somebody has put on a host."""
    return any(inside is host for inside in getattr(_inside, "patches", ()))
