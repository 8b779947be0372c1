"""`gate`: methods whose parts act as much as a gate lets them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import ClassVar

from torch import nn

from mmpeft.controllers.gate import GateLevels
from mmpeft.errors import ConfigError, Refused, nearest
from mmpeft.hosting.host import original_class
from mmpeft.hosting.modules import module_at
from mmpeft.methods.base import Method, MethodInfo, Sited
from mmpeft.methods.compose import Union
from mmpeft.methods.former import place
from mmpeft.methods.placed import Placed, Tensors, Traits
from mmpeft.methods.recipe import any_tensor, fan, own_weight
from mmpeft.parts import Delta
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.branch import Branch
from mmpeft.parts.factors import like_options
from mmpeft.parts.gate import GATES, Gate, GatedKeys, GatedOutput, GatedPart, GateKind, Padding
from mmpeft.parts.prefix import Prefix
from mmpeft.parts.shared import Shared
from mmpeft.sites import Site
from mmpeft.types import AnyModule


@dataclass(frozen=True)
class Gated(Method):
    """A method with a gate of its own on each of its parts, `y + g (part(y) - y)`; what the gate sees, the part sees.

    Updates of weights, adapters and prefixes can be gated. A `pooled` gate is by the token where attention is causal:
    a mean over a text would tell earlier words of later ones. It leaves padding out where the blocks are given an
    attention mask. Parameters: those of the method, and `d + 1` a part
    (`scalar`: 1).
    """

    info: ClassVar[MethodInfo] = MethodInfo("Gated", "", "hybrid", mergeable=False, identity=True)
    method: Method
    kind: GateKind = "token"
    start: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.method, Sited):
            raise ConfigError(f"Gated takes one method that works on sites, such as LoRA(); got {self.method!r}")
        if self.kind not in GATES:
            raise ConfigError(f"unknown gate {self.kind!r}; known: {', '.join(GATES)}.{nearest(self.kind, GATES)}")

    @property
    def sited(self) -> Sited:
        assert isinstance(self.method, Sited)
        return self.method

    def check(self, model: nn.Module, available: list[Site]) -> None:
        self.method.check(model, available)

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        placed = place(self.method, model, available)
        own = iter(self.sited.chosen(available))
        masks: dict[str, Placement] = {}
        gated = [
            p if isinstance(p.part, Shared) else self._gated(model, available, next(own), p, masks) for p in placed
        ]
        gates = [p.part.gate for p in gated if isinstance(p.part, GatedPart)]
        levels = GateLevels({type(self.method).__name__.lower(): gates})
        bake = partial(self._bake, placed, gated, len(masks))
        return Placed([*gated, *masks.values()], [*placed.controllers, levels], bake)

    def _gated(
        self, model: nn.Module, available: list[Site], site: Site, p: Placement, masks: dict[str, Placement]
    ) -> Placement:
        block = _block(available, site)
        kind: GateKind = "token" if self.kind == "pooled" and _causal(model, available, block) else self.kind
        padding = _padding(model, block, masks) if kind == "pooled" else None
        part, hooks, reads = p.part, p.hooks, p.hooks[0].kind == "read"
        name = type(self.method).__name__
        if isinstance(part, Delta) and part.lookup:
            why = "an embedding sees words, no vectors, so a gate has no input"
            raise Refused(f"{name} at {site}: {why}; choose other sites, such as at='mlp.*'")
        if isinstance(part, Delta) and reads and kind == "pooled":
            raise Refused(
                f"{name} at {site}: the backbone multiplies by this weight itself, perhaps what it has flattened, so a "
                "gate cannot tell the rows of a batch to pool over; choose kind='token', or other sites"
            )
        if not isinstance(part, Delta | Branch | Prefix):
            raise Refused(f"{name} at {site}: gates act on updates of weights, adapters and prefixes alone")
        gate = Gate(kind, _width(model, available, site), self.start, **like_options(any_tensor(model, site)))
        if isinstance(part, Prefix):
            return replace(
                p, part=GatedKeys(part, gate, padding), hooks=(*([Hook(site.path, "enter")] if reads else []), *hooks)
            )
        if isinstance(part, Delta):
            channel_dim = 1 if site.kind == "conv" else -1
            hooks = hooks if reads else tuple(replace(hook, kind="exit") for hook in hooks)
        else:
            channel_dim = part.channel_dim
        return replace(p, part=GatedOutput(part, gate, padding, channel_dim), hooks=hooks)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        widths = [_width(model, available, site) for site in self.sited.chosen(available)]
        return self.method.count(model, available) + sum(Gate.count(self.kind, width) for width in widths)

    @property
    def traits(self) -> Traits:
        return replace(super().traits, identity=self.method.identity)

    def _bake(self, placed: Placed, gated: Sequence[Placement], masks: int) -> tuple[Method, Tensors] | None:
        """What the method leaves, behind the same gates; everything where it would leave out whole parts."""
        found = placed.baked()
        if found is None or len(found[1]) != len(gated):
            return None
        method, tensors = found
        for p, left in zip(gated, tensors):
            if isinstance(p.part, GatedPart):
                gate = dict(p.part.gate.named_parameters(prefix="gate"))
                left.update({f"inner.{name}": left.pop(name) for name in list(left)} | gate)
        return replace(self, method=method), [*tensors, *({} for _ in range(masks))]


def gate(*methods: Method, kind: GateKind = "token", start: float = 1.0) -> Method:
    """Unite methods, each behind gates of its own: `gate(LoRA(), Pfeiffer(), kind="pooled")`."""
    single = [m for method in methods for m in (method.methods if isinstance(method, Union) else [method])]
    gated = [Gated(method, kind, start) for method in single]
    return gated[0] if len(gated) == 1 else Union(gated)


def _width(model: nn.Module, available: list[Site], site: Site) -> int:
    """Features of what a part at a site sees: of an attention, those its queries are made of."""
    if site.kind in ("linear", "conv"):
        weight = own_weight(model, site)
        return weight.shape[1] * int(getattr(module_at(model, site.path), "groups", 1))
    if site.role != "kv":
        return site.width
    found = [s for s in available if s.role.endswith(".q") and f"{s.path}.".startswith(f"{site.path}.")]
    if not found:
        raise Refused(f"a gate at {site}: the anatomy names no projection of its queries")
    return fan(model, found[0])[1]


def _block(available: list[Site], site: Site) -> str:
    """The path of the block around a site; empty outside every block."""
    return max(
        (s.path for s in available if s.role == "block" and f"{site.path}.".startswith(f"{s.path}.")), default=""
    )


def _causal(model: nn.Module, available: list[Site], block: str) -> bool:
    """Whether an attention of a block is causal."""
    inside = [s for s in available if s.role == "kv" and block and f"{s.path}.".startswith(f"{block}.")]
    return any(getattr(module_at(model, s.path), "is_causal", False) for s in inside)


def _padding(model: nn.Module, block: str, masks: dict[str, Placement]) -> Padding | None:
    """What knows the padding in a block, placed once; None where the block takes no attention mask."""
    cls: AnyModule = original_class(module_at(model, block))
    names = list(signature(cls.forward).parameters)[1:]
    if not block or "attention_mask" not in names:
        return None
    new = Placement(Padding(names.index("attention_mask")), block, "padding", (Hook(block, "around"),), "block")
    part = masks.setdefault(block, new).part
    assert isinstance(part, Padding)
    return part
