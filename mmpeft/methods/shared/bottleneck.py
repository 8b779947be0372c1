"""What all bottleneck adapters share: a size, an activation, an initialisation, and a place in the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused, nearest
from mmpeft.functional.pointwise import ACTIVATIONS
from mmpeft.methods.base import SiteMethod
from mmpeft.methods.recipe import any_tensor, home_of, positive, rate
from mmpeft.parts import Branch
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.branch import Init, Scale, Source
from mmpeft.sites import Kind, Selector, Site

Linears = Callable[[Site, Tensor], tuple[nn.Module, nn.Module]]
"""Down and up of a site, already initialised."""


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
    elsewhere: ClassVar[tuple[str, ...]] = ("mixer",)
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

    def build(self, model: nn.Module, site: Site, linears: Linears | None = None) -> Placement:
        """The branch of one site; `linears` makes its down and up, plain ones by default."""
        if not site.width:
            raise Refused(f"{type(self).__name__} at {site}: the anatomy gives no width for this sub-layer")
        hooks, like = self.hooks(model, site), any_tensor(model, site)
        part = Branch(
            site.width,
            self.size(site),
            like,
            source="tap" if len(hooks) > 1 else self.source,
            activation=self.activation,
            init=self.init,
            scale=self.learned_scale(),
            dropout=self.dropout,
            drop_path=self.drop_path_rate(),
            channel_dim=site.channel_dim,
            linears=linears(site, like) if linears else None,
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
        return parallel_hooks(site)


def parallel_hooks(site: Site) -> tuple[Hook, ...]:
    """Where a part enters that reads what a sub-layer reads: at its entry, if that is another module, and its exit.

    Raises:
        Refused: what enters is wider or narrower than what leaves.
    """
    if site.inputs not in (0, site.width):
        raise Refused(
            f"{site} takes {site.inputs} channels and gives {site.width}: what reads the one cannot be added to the "
            "other. Put a serial adapter there (Pfeiffer, Houlsby), or choose other sites"
        )
    return (*([Hook(site.entry, "enter")] if site.entry else []), Hook(site.path, "exit"))
