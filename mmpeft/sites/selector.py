"""The `at=` selector: which sites a short text names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from operator import eq, ge, gt, le, lt, ne

from mmpeft.errors import ConfigError, SiteError, nearest
from mmpeft.sites.site import Predicate, Selector, Site

_OPERATORS = {">=": ge, "<=": le, "==": eq, "!=": ne, ">": gt, "<": lt, "=": eq}
_BRACES = re.compile(r"\{([^{}]*)\}")
_CONDITION = re.compile(r"^(\w+)\s*(>=|<=|==|!=|=|>|<)\s*(.+)$")
_FIELDS = ("depth", "tower", "path", "module", "kind", "role")
_MOST, _DEEPEST = 10_000, 20
"""Alternatives of a selector, and braces inside braces: they multiply, and a selector may come from a file."""


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside braces."""
    parts, level, start = [], 0, 0
    for i, char in enumerate(text):
        level += (char == "{") - (char == "}")
        if level > _DEEPEST:
            raise ConfigError(f"selector {_cut(text)!r} has braces {level} deep; expected at most {_DEEPEST}")
        if char in separators and level == 0:
            parts.append(text[start:i])
            start = i + 1
    if level:
        raise ConfigError(f"selector {text!r}: unbalanced braces")
    return [part.strip() for part in (*parts, text[start:])]


def _cut(selector: str) -> str:
    return selector if len(selector) <= 80 else f"{selector[:80]}…"


def _expand(pattern: str, selector: str) -> list[str]:
    """Expand braces, one inside another too: `attn.{q,v}` gives `attn.q` and `attn.v`."""
    waiting, whole = [pattern], list[str]()
    while waiting:
        one = waiting.pop()
        match = _BRACES.search(one)
        if match is None:
            whole.append(one)
        else:
            head, tail = one[: match.start()], one[match.end() :]
            waiting += [head + option.strip() + tail for option in reversed(match[1].split(","))]
        if len(waiting) + len(whole) > _MOST:
            raise ConfigError(
                f"selector {_cut(selector)!r} has more than {_MOST:,} alternatives; name roles or a pattern"
            )
    return whole


def _condition(text: str, selector: str, depths: int) -> Predicate:
    match = _CONDITION.match(text)
    assert match is not None
    field, operator, value = match[1], match[2], match[3].strip()
    if field not in _FIELDS:
        raise ConfigError(
            f"selector {selector!r}: unknown field {field!r}; fields are {', '.join(_FIELDS)}.{nearest(field, _FIELDS)}"
        )
    if field == "depth":
        try:
            bound = int(value)
        except ValueError:
            raise ConfigError(f"selector {selector!r}: depth is compared with an integer, got {value!r}") from None
        bound = bound + depths if bound < 0 else bound
        return lambda site: site.depth >= 0 and bool(_OPERATORS[operator](site.depth, bound))
    if operator not in ("=", "==", "!="):
        raise ConfigError(f"selector {selector!r}: {field} takes = or !=, got {operator!r}")
    if field == "module":  # the end of a path, whole names, as PEFT's target_modules has it
        return lambda site: f".{site.path}".endswith(f".{value}") == (operator != "!=")
    return lambda site: fnmatchcase(getattr(site, field), value) == (operator != "!=")


def _alternatives(selector: str, depths: int, most: int) -> list[tuple[str, Predicate]]:
    """Parse a selector into `(text, predicate)` pairs, one for each alternative after brace expansion."""
    alternatives: list[tuple[str, Predicate]] = []
    written = dict.fromkeys(_split(selector, "|,"))
    if len(written) > most:
        raise ConfigError(f"selector {_cut(selector)!r} has {len(written):,} alternatives; expected at most {most:,}")
    for alternative in written:
        terms = [term for term in _split(alternative, "&") if term]
        if not terms:
            raise ConfigError(f"selector {selector!r} has an empty alternative")
        conditions = [_condition(t, selector, depths) for t in terms if _CONDITION.match(t)]
        roles = [t for t in terms if not _CONDITION.match(t)]
        if len(roles) > 1:
            raise ConfigError(
                f"selector {selector!r}: {roles[0]!r} & {roles[1]!r} never both hold; unite roles with '|'"
            )
        for role in _expand(roles[0], selector) if roles else ["*"]:
            tower, _, pattern = role.rpartition(":")
            text = " & ".join([role, *[t for t in terms if t not in roles]])

            def matches(
                site: Site,
                tower: str = tower,
                pattern: str = pattern,
                conditions: list[Predicate] = conditions,
            ) -> bool:
                return (
                    fnmatchcase(site.role, pattern)
                    and (not tower or fnmatchcase(site.tower, tower))
                    and all(condition(site) for condition in conditions)
                )

            alternatives.append((text, matches))
    return alternatives


def select(available: list[Site], at: Selector, *, every: bool = True) -> list[Site]:
    """Sites that a selector names, in the model's order.

    Grammar: alternatives are joined by `|` or `,`; each is a role pattern (`attn.{q,v}`, `mlp.*`, optionally
    `tower:` before it) and conditions joined by `&` (`depth>=6`, `depth<-2` counts from the end,
    `path=blocks.0.*`, `tower=image`, `kind=conv`). A predicate `Site -> bool` works as well.

    With `every=True` (what a user typed) each alternative must match; a method's own default passes
    `every=False` and only the whole must.

    Raises:
        SiteError: nothing matched; the message lists what exists and the nearest role.
    """
    if callable(at):
        chosen = [site for site in available if at(site)]
        if not chosen:
            raise SiteError(f"the predicate {at!r} selects no site; roles here: {roles_of(available)}")
        return chosen
    depths = 1 + max((site.depth for site in available), default=-1)
    alternatives = _alternatives(at, depths, max(_MOST, 2 * len(available)))
    hits = [[site for site in available if predicate(site)] for _, predicate in alternatives]
    for (text, _), matched in zip(alternatives, hits):
        if not matched and (every or not any(hits)):
            role = text.split(" & ")[0].rpartition(":")[2]
            existing = sorted({site.role for site in available})
            raise SiteError(
                f"{text!r} in at={at!r} matches no site; roles here: {roles_of(available)}.{nearest(role, existing)}"
            )
    wanted = {id(site) for matched in hits for site in matched}
    return [site for site in available if id(site) in wanted]


def roles_of(available: Iterable[Site]) -> str:
    """How many sites there are of each role, for people."""
    counts: dict[str, int] = {}
    for site in available:
        name = f"{site.tower}:{site.role}" if site.tower else site.role
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{role} ×{count}" for role, count in sorted(counts.items())) or "none"
