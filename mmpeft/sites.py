"""Sites say *where* a backbone can be tuned: one vocabulary of roles, a selector, a registry of anatomies.

An *anatomy* is a function `(model) -> list[Site]`, registered for model classes by qualified name in the
domain that owns the backbone. It is the only code that knows a backbone's attribute names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Literal

from torch import nn

from mmpeft.errors import ConfigError, SiteError, nearest
from mmpeft.functional.rows import Rows

Kind = Literal["linear", "conv", "embedding", "norm", "module", "param"]
Via = Literal["call", "weight"]

ROLES: dict[str, str] = {
    "attn.q": "query projection of self-attention",
    "attn.k": "key projection of self-attention",
    "attn.v": "value projection of self-attention",
    "attn.out": "output projection of self-attention",
    "cross.q": "query projection of cross-attention",
    "cross.k": "key projection of cross-attention",
    "cross.v": "value projection of cross-attention",
    "cross.out": "output projection of cross-attention",
    "mlp.up": "first projection of the feed-forward network",
    "mlp.gate": "gate projection of a gated feed-forward network",
    "mlp.down": "last projection of the feed-forward network",
    "conv": "convolution inside a block",
    "proj": "any other projection: downsampling, pooling, relative position",
    "embed": "patch or token embedding",
    "time": "time-step embedding",
    "norm": "normalisation layer",
    "head": "task head",
    "attn": "self-attention sub-layer",
    "cross": "cross-attention sub-layer",
    "mlp": "feed-forward sub-layer",
    "block": "one residual block",
    "tokens": "the token sequence a block sees",
    "kv": "keys and values inside attention",
    "param": "any named tensor",
    "stack": "the ordered blocks",
}


@dataclass(frozen=True)
class Connect:
    """How keys and values are reached inside an attention module: through what it reads from its own `attribute`.

    `view(module, value, part)` answers in place of the attribute's value and has the part extend keys and values.
    """

    attribute: str
    view: Callable[..., Any]


@dataclass(frozen=True)
class Site:
    """One place where a backbone can be tuned.

    `path` names the module (or, for role `param`, the tensor). `rows` is the slice of output rows this site
    owns in a fused projection. `via="weight"` marks a linear whose weight (`tensor`) the backbone reads
    directly, so that the effective weight is adapted rather than the call; `transposed` one stored [i, o].
    `width` is the number of channels that flow through a sub-layer and `channel_dim` says where they are.
    `stream` names the module whose input is the residual stream a sub-layer branches from, `out` the module
    whose output is added back to it, `entry` the module that reads the sub-layer's input where `path` does not.
    `bias` names the tensor added to this site's output when it is not the module's own bias. `prefix` counts
    the tokens before the patches; `prefix_reader` names a module that keeps that count itself. A `kv` site has
    `heads` of `width` features in its keys and values, and `connect` says how a part gets at them. A non-empty
    `refuse` is the reason why the site exists in the architecture and cannot be tuned.
    """

    path: str
    role: str
    depth: int = -1
    tower: str = ""
    kind: Kind = "module"
    rows: Rows | None = None
    via: Via = "call"
    tensor: str = "weight"
    transposed: bool = False
    bias: str = ""
    width: int = 0
    channel_dim: int = -1
    stream: str = ""
    out: str = ""
    entry: str = ""
    prefix: int = 0
    prefix_reader: str = ""
    heads: int = 0
    connect: Connect | None = None
    refuse: str = ""

    @property
    def label(self) -> str:
        """Short name of the role in a state-dict key: `attn.q` is `q`, `mlp` is `mlp`.

        Slices of one module that share a role are told apart by their tensor and first row.
        """
        if "." in self.role or (self.rows is None and self.tensor == "weight"):
            return self.role.rsplit(".", 1)[-1]
        return "_".join([self.role, self.tensor, *(str(row) for row in (self.rows or ())[:1])])

    def __str__(self) -> str:
        tower = f"{self.tower}:" if self.tower else ""
        return f"{tower}{self.role}@{self.path}"


Anatomy = Callable[[nn.Module], list[Site]]
Predicate = Callable[[Site], bool]
Selector = str | Predicate

_ANATOMIES: dict[str, Anatomy] = {}
_LOADED_DOMAINS: set[str] = set()


def anatomy(*class_names: str) -> Callable[[Anatomy], Anatomy]:
    """Register an anatomy for model classes by qualified name, e.g. `"timm.models.vit.VisionTransformer"`."""

    def register(function: Anatomy) -> Anatomy:
        _ANATOMIES.update(dict.fromkeys(class_names, function))
        return function

    return register


def load_domains() -> list[str]:
    """Import every installed domain (entry-point group `mmpeft.domains`); return their names.

    A domain whose own library is not installed is skipped: its backbones cannot exist in this process.
    """
    for entry in entry_points(group="mmpeft.domains"):
        if entry.name not in _LOADED_DOMAINS:
            try:
                entry.load()
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("mmpeft"):
                    raise
                continue
            _LOADED_DOMAINS.add(entry.name)
    return sorted(_LOADED_DOMAINS)


def qualified_name(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_anatomy(model: nn.Module) -> Anatomy:
    """Return the anatomy of a model, looking along its class hierarchy.

    Raises:
        SiteError: no anatomy is registered for the model's class.
    """
    names = [qualified_name(cls) for cls in type(model).__mro__]
    for attempt in range(2):
        for name in names:
            if name in _ANATOMIES:
                return _ANATOMIES[name]
        if attempt == 0:
            load_domains()
    known = sorted({name.rsplit(".", 1)[-1] for name in _ANATOMIES})
    raise SiteError(
        f"no anatomy is registered for {names[0]}; known model classes: {', '.join(known) or 'none'}."
        f"{nearest(names[0].rsplit('.', 1)[-1], known)} Install the domain that owns the backbone "
        "(pip install 'mmpeft[vision]' for timm) or register one with @mmpeft.sites.anatomy(...)."
    )


def sites(model: nn.Module) -> list[Site]:
    """Every site of a model, named tensors (role `param`) included."""
    structural = find_anatomy(model)(model)
    return structural + param_sites(model, structural)


def param_sites(model: nn.Module, structural: Iterable[Site]) -> list[Site]:
    """One site for each name of a tensor of the backbone, with the depth and tower of the block around it.

    A tensor that two modules share (a head tied to the embedding) has two names.
    """
    blocks = {site.path: site for site in structural if site.role == "block"}
    towers = {site.tower for site in structural}
    outside = Site("", "param", tower=towers.pop() if len(towers) == 1 else "")

    def around(path: str) -> Site:
        while path and path not in blocks:
            path = path.rpartition(".")[0]
        return blocks.get(path, outside)

    found = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if ".mmpeft." not in f".{name}":
            block = around(name)
            found.append(Site(name, "param", block.depth, block.tower, "param"))
    return found


# -- the at= selector ---------------------------------------------------------------------------------------

_OPERATORS = {">=": ge, "<=": le, "==": eq, "!=": ne, ">": gt, "<": lt, "=": eq}
_CONDITION = re.compile(r"^(\w+)\s*(>=|<=|==|!=|=|>|<)\s*(.+)$")
_FIELDS = ("depth", "tower", "path", "kind")


def _split(text: str, separators: str) -> list[str]:
    """Split at separators outside braces."""
    parts, level, start = [], 0, 0
    for i, char in enumerate(text):
        level += (char == "{") - (char == "}")
        if char in separators and level == 0:
            parts.append(text[start:i])
            start = i + 1
    if level:
        raise ConfigError(f"selector {text!r}: unbalanced braces")
    return [part.strip() for part in (*parts, text[start:])]


def _expand(pattern: str) -> list[str]:
    """Expand braces: `attn.{q,v}` gives `attn.q` and `attn.v`."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for option in match[1].split(",") for full in _expand(head + option.strip() + tail)]


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
    return lambda site: fnmatchcase(getattr(site, field), value) == (operator != "!=")


def _alternatives(selector: str, depths: int) -> list[tuple[str, Predicate]]:
    """Parse a selector into `(text, predicate)` pairs, one for each alternative after brace expansion."""
    alternatives: list[tuple[str, Predicate]] = []
    for alternative in _split(selector, "|,"):
        terms = [term for term in _split(alternative, "&") if term]
        if not terms:
            raise ConfigError(f"selector {selector!r} has an empty alternative")
        conditions = [_condition(t, selector, depths) for t in terms if _CONDITION.match(t)]
        roles = [t for t in terms if not _CONDITION.match(t)]
        if len(roles) > 1:
            raise ConfigError(
                f"selector {selector!r}: {roles[0]!r} & {roles[1]!r} never both hold; unite roles with '|'"
            )
        for role in _expand(roles[0]) if roles else ["*"]:
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
            raise SiteError(f"the predicate {at!r} selects no site; roles here: {_roles(available)}")
        return chosen
    depths = 1 + max((site.depth for site in available), default=-1)
    alternatives = _alternatives(at, depths)
    hits = [[site for site in available if predicate(site)] for _, predicate in alternatives]
    for (text, _), matched in zip(alternatives, hits):
        if not matched and (every or not any(hits)):
            role = text.split(" & ")[0].rpartition(":")[2]
            existing = sorted({site.role for site in available})
            raise SiteError(
                f"{text!r} in at={at!r} matches no site; roles here: {_roles(available)}.{nearest(role, existing)}"
            )
    wanted = {id(site) for matched in hits for site in matched}
    return [site for site in available if id(site) in wanted]


def _roles(available: list[Site]) -> str:
    counts: dict[str, int] = {}
    for site in available:
        name = f"{site.tower}:{site.role}" if site.tower else site.role
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{role} ×{count}" for role, count in sorted(counts.items())) or "none"
