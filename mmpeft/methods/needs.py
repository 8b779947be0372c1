"""What a method needs of a model, and what it refuses: data beside each method, read here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft.errors import Refused, SiteError
from mmpeft.sites import Kind, Selector, Site
from mmpeft.sites.selector import roles_of, select


@dataclass(frozen=True)
class Need:
    """Something a method needs of a model, in words, and the sites that are it: those that `at` names.

    Of one `kind` alone, and with `tensors` only those that hold a tensor of their own.
    """

    what: str
    at: Selector
    kind: Kind | None = None
    tensors: bool = False

    def check(self, name: str, available: Sequence[Site]) -> None:
        """Raise SiteError where the model has no such site."""
        if not any(self._is(site, available) for site in self._named(available)):
            kind = f" of kind {self.kind!r}" if self.kind else ""
            tensors = " with a tensor of its own" if self.tensors else ""
            raise lacking(name, self.what, f"no site {self.at!r}{kind}{tensors}; roles here: {roles_of(available)}")

    def _named(self, available: Sequence[Site]) -> list[Site]:
        try:
            return select(list(available), self.at, every=False)
        except SiteError:
            return []

    def _is(self, site: Site, available: Sequence[Site]) -> bool:
        inside = (own.path.startswith(f"{site.path}.") for own in available if own.role == "param")
        return self.kind in (None, site.kind) and (not self.tensors or any(inside))


def lacking(name: str, what: str, why: object) -> SiteError:
    """The one sentence about a model without what a method needs."""
    return SiteError(f"{name} needs {what}, and this model has none: {why}")


@dataclass(frozen=True)
class Refusal:
    """A fact of the chosen sites under which a method cannot work, and why.

    `when(method, chosen, available)` gives the first such site, or None; `why` may name its fields: `{site.tower}`.
    """

    when: Callable[[Any, Sequence[Site], Sequence[Site]], Site | None]
    why: str

    def check(self, method: Any, chosen: Sequence[Site], available: Sequence[Site]) -> None:
        """Raise Refused where the fact holds."""
        site = self.when(method, chosen, available)
        if site is not None:
            raise Refused(f"{type(method).__name__} at {site}: {self.why.format(site=site)}")


def at_site(fact: Callable[[Site], object], why: str) -> Refusal:
    """A refusal by a fact of one site alone."""
    return Refusal(lambda method, chosen, available: next((site for site in chosen if fact(site)), None), why)
