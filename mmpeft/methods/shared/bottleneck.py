"""What all bottleneck adapters share: a size, an activation, an initialisation, and a place in the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.errors import ConfigError, Refused, nearest
from mmpeft.functional.pointwise import ACTIVATIONS
from mmpeft.methods.base import SiteMethod, any_tensor, home_of, positive, rate
from mmpeft.parts import Branch
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.branch import Init, Scale, Source
from mmpeft.sites import Kind, Selector, Site


@dataclass(frozen=True)
class Bottleneck(SiteMethod):
    """`h ← h + s U σ(D src)`; subclasses say where `src` comes from and where the sum happens.

    The size is `bottleneck` when given, else `width // reduction`. Parameters: `2 d r + r + d` a site, and
    1 or `d` more with a learned scale.
    """

    at: Selector = "{attn,mlp}"
    bottleneck: int | None = None
    reduction: int = 16
    activation: str = "relu"
    dropout: float = 0.0

    takes: ClassVar[tuple[Kind, ...]] = ("module",)
    source: ClassVar[Source] = "output"
    init: ClassVar[Init] = "lora"

    def __post_init__(self) -> None:
        positive(self, bottleneck=self.bottleneck, reduction=self.reduction)
        rate(self, dropout=self.dropout)
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(
                f"{type(self).__name__}: unknown activation {self.activation!r}; known: {known}."
                f"{nearest(self.activation, ACTIVATIONS)}"
            )

    def size(self, site: Site) -> int:
        return self.bottleneck or max(1, site.width // self.reduction)

    def learned_scale(self) -> Scale:
        return 1.0

    def drop_path_rate(self) -> float:
        return 0.0

    def hooks(self, model: nn.Module, site: Site) -> tuple[Hook, ...]:
        """Where the branch enters: by default behind the sub-layer, just before the residual sum."""
        return (Hook(site.out or site.path, "exit"),)

    def build(self, model: nn.Module, site: Site) -> Placement:
        if not site.width:
            raise Refused(f"{type(self).__name__} at {site}: the anatomy gives no width for this sub-layer")
        hooks = self.hooks(model, site)
        part = Branch(
            site.width,
            self.size(site),
            any_tensor(model, site),
            source="tap" if len(hooks) > 1 else self.source,
            activation=self.activation,
            init=self.init,
            scale=self.learned_scale(),
            dropout=self.dropout,
            drop_path=self.drop_path_rate(),
            channel_dim=site.channel_dim,
        )
        home = home_of(model, hooks[-1].path)
        return Placement(part, home, f"{type(self).__name__.lower()}_{site.label}", hooks, site.role)

    def count_at(self, model: nn.Module, site: Site) -> int:
        size, scale = self.size(site), self.learned_scale()
        learned = {"scalar": 1, "channel": site.width}[scale] if isinstance(scale, str) else 0
        return 2 * site.width * size + size + site.width + learned


@dataclass(frozen=True)
class Parallel(Bottleneck):
    """A bottleneck beside a sub-layer: reads what the sub-layer reads, adds to what it adds."""

    at: Selector = "mlp"
    source: ClassVar[Source] = "input"

    def hooks(self, model: nn.Module, site: Site) -> tuple[Hook, ...]:
        if site.entry:
            return (Hook(site.entry, "enter"), Hook(site.path, "exit"))
        return (Hook(site.path, "exit"),)
