"""Sites say *where* a backbone can be tuned: one vocabulary of roles, and anatomies that somebody wrote.

Sites are found by watching a pass of the model. An *anatomy* is a function `(model) -> list[Site]` that is asked in
place of that, registered for model classes by qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from mmpeft._domains import domain_entries
from mmpeft.functional.rows import Rows
from mmpeft.hosting.modules import own_parameters
from mmpeft.types import AnyFunc

Kind = Literal["linear", "conv", "embedding", "experts", "norm", "module", "param"]
Via = Literal["call", "weight"]

DISCARDED = "its output is discarded"
"""How a site's `refuse` begins where a module runs and nothing reads what it gives."""

ROLES: dict[str, str] = {
    "attn.q": "query projection of self-attention",
    "attn.k": "key projection of self-attention",
    "attn.v": "value projection of self-attention",
    "attn.out": "output projection of self-attention",
    "attn.gate": "gate on the output of self-attention",
    "cross.q": "query projection of cross-attention",
    "cross.k": "key projection of cross-attention",
    "cross.v": "value projection of cross-attention",
    "cross.out": "output projection of cross-attention",
    "mlp.up": "first projection of the feed-forward network",
    "mlp.gate": "gate projection of a gated feed-forward network",
    "mlp.down": "last projection of the feed-forward network",
    "expert.up": "first projection of the experts in a mixture",
    "expert.gate": "gate projection of the experts in a mixture",
    "expert.down": "last projection of the experts in a mixture",
    "router": "projection that chooses experts for each word, or weighs them",
    "mixer.in": "first projection of a sub-layer that mixes positions by other means",
    "mixer.out": "last projection of such a sub-layer",
    "conv": "convolution inside a block",
    "proj": "any other projection: downsampling, pooling, relative position",
    "embed": "patch or token embedding",
    "time": "time-step embedding",
    "norm": "normalisation layer",
    "head": "task head",
    "attn": "self-attention sub-layer",
    "cross": "cross-attention sub-layer",
    "mlp": "feed-forward sub-layer",
    "mixer": "sub-layer that mixes positions without attention: by convolution, scan or pooling",
    "block": "one residual block",
    "tokens": "the token sequence a block sees",
    "kv": "keys and values inside attention",
    "param": "any named tensor",
    "stack": "the ordered blocks",
}


@dataclass(frozen=True)
class Connect:
    """How learned keys and values, or a prompt, enter a backbone.

    At a `kv` site, through what the attention reads from its own `attribute`: `view(module, value, part)` answers in
    place of its value and has the part extend keys and values; with an empty `attribute`,
    `view(module, run, parts, args, kwargs)` runs the module with the keys and values of all parts.
    `shift(model, site, keys, by)` turns keys given for a text at its own positions into those for a text moved by so
    many positions, as other tools have it.

    At an input embedding, `attribute` is the path of the module that takes the text and `view` runs it with the
    prompt in front; `beside` are other modules that must know of the prompt, and what runs each. With `layers`, the
    prompt's keys and values are the same for every text and each attention keeps them.
    """

    attribute: str
    view: AnyFunc
    beside: tuple[tuple[str, AnyFunc], ...] = ()
    layers: bool = False
    shift: AnyFunc | None = None


@dataclass(frozen=True)
class Site:
    """One place where a backbone can be tuned.

    `path` names the module (or, for role `param`, the tensor). `rows` is the slice of output rows this site
    owns in a fused projection. `via="weight"` marks a linear whose weight (`tensor`) the backbone reads
    directly, so that the effective weight is adapted rather than the call; `transposed` one stored [i, o]. A site of
    kind `experts` is a stack of weights [experts, o, i] in one tensor, of which `rows` and `transposed` hold each.
    `width` is the number of channels that flow through a sub-layer, `inputs` that of what enters a block where it is
    another one, and `channel_dim` says where they are.
    `stream` names the module whose input is the residual stream a sub-layer branches from, `out` the module
    whose output is added back to it, `entry` the module that reads the sub-layer's input where `path` does not.
    `bias` names the tensor added to this site's output when it is not the module's own bias. `prefix` counts
    the tokens before the patches; `prefix_reader` names a module that keeps that count itself. A `kv` site has
    `heads` of `width` features in its keys and values, and `connect` says how a part gets at them. Nothing reads
    the output of a `dead` module, so that its tensors are no sites either. A block is `below` others if
    what its tower gives goes into another tower, or nowhere. A non-empty `refuse` is the reason why
    the site exists in the architecture and cannot be tuned.
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
    inputs: int = 0
    channel_dim: int = -1
    stream: str = ""
    out: str = ""
    entry: str = ""
    prefix: int = 0
    prefix_reader: str = ""
    heads: int = 0
    connect: Connect | None = None
    dead: bool = False
    below: bool = False
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
    """Register every installed domain (entry-point group `mmpeft.domains`); return their names.

    A domain registers when it is imported, or in a function `register` of its own, where importing it is to load
    nothing. A domain whose own library is not installed is skipped: its backbones cannot exist in this process.
    """
    for entry in domain_entries():
        if entry.name not in _LOADED_DOMAINS:
            try:
                getattr(entry.load(), "register", _nothing)()
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("mmpeft"):
                    raise
                continue
            _LOADED_DOMAINS.add(entry.name)
    return sorted(_LOADED_DOMAINS)


def _nothing() -> None:
    """What is left to do for a domain that registers when it is imported."""


def qualified_name(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def find_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy that was written for a model's class (or one it derives from), if any."""
    load_domains()
    names = [qualified_name(cls) for cls in type(model).__mro__]
    return next((_ANATOMIES[name] for name in names if name in _ANATOMIES), None)


def param_sites(model: nn.Module, structural: Iterable[Site]) -> list[Site]:
    """One site for each name of a tensor of the backbone, with the depth and tower of the block around it.

    A tensor that two modules share (a head tied to the embedding) has two names.
    """
    structural = list(structural)
    dead = {site.path for site in structural if site.dead}
    blocks = {site.path: site for site in structural if site.role == "block"}
    towers = {site.tower for site in structural}
    outside = Site("", "param", tower=towers.pop() if len(towers) == 1 else "")

    def around(path: str) -> Site:
        while path and path not in blocks:
            path = path.rpartition(".")[0]
        return blocks.get(path, outside)

    found = []
    for name, _ in own_parameters(model):
        if name.rpartition(".")[0] not in dead:
            block = around(name)
            found.append(Site(name, "param", block.depth, block.tower, "param"))
    return found
