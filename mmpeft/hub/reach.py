"""Whether the hub can be reached: asked once, so that a name fails in seconds where there is no network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from mmpeft.types import Untyped

PATIENCE = 4.0
"""Seconds that the hub has to answer."""


@cache
def reachable() -> bool:
    """Whether the hub answers; asked once a process. True where its library is not installed: others will say."""
    if not find_spec("huggingface_hub"):
        return True
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        session: Untyped = get_session()
        session.head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever a network, a proxy or a firewall answers with
        return False
    return True


@contextmanager
def from_hub() -> Iterator[None]:
    """Load by a name inside: where the hub does not answer, from the local cache alone, without retries."""
    if reachable():
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def why_not() -> str:
    """What is said behind a name that could not be loaded, where the hub is the reason; empty elsewhere."""
    if reachable():
        return ""
    from huggingface_hub import constants

    return f" ({constants.ENDPOINT} does not answer, and the local cache has no such model)"
