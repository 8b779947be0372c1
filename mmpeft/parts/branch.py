"""`Branch`: a bottleneck beside or behind a sub-layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.functional.pointwise import ACTIVATIONS, along, bottleneck, stochastic_depth
from mmpeft.parts.base import Part, cast
from mmpeft.parts.factors import Kron, like_options
from mmpeft.parts.passing import Passed
from mmpeft.types import Args

Source = Literal["output", "input", "tap"]
Init = Literal["houlsby", "lora", "bert"]
Scale = float | Literal["scalar", "channel"]


class Branch(Part):
    """`h ← h + s U σ(D src + b_d) + s b_u`.

    `source`: the host's `output` (serial), its `input` (parallel), or a `tap`: the tensor seen by another
    module earlier in the same block. `scale`: a constant, a learned `scalar` or a learned `channel` vector,
    both starting at 1. `init`: `houlsby` N(0, .01²) truncated at 2σ with zero biases; `lora` Kaiming-uniform
    down and zero up (identity); `bert` N(0, .02²). `linears` are D and U themselves, already initialised: anything
    with a `weight` and a `bias`.
    """

    order = 1
    scalable = True
    unmergeable = "a bottleneck with a non-linearity is no linear map of the base weights"

    def __init__(
        self,
        width: int,
        bottleneck: int,
        like: Tensor,
        *,
        source: Source,
        activation: str = "relu",
        init: Init = "lora",
        scale: Scale = 1.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        channel_dim: int = -1,
        linears: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.source, self.activation = source, activation
        self.dropout, self.drop_path, self.channel_dim = dropout, drop_path, channel_dim
        options = like_options(like)
        if linears is None:
            linears = _plain(nn.Linear(width, bottleneck, **options), nn.Linear(bottleneck, width, **options), init)
        self.down, self.up = linears
        self.scale: float | nn.Parameter = 1.0
        if isinstance(scale, str):
            self.scale = nn.Parameter(torch.ones(width if scale == "channel" else 1, **options))
        else:
            self.scale = scale
        self._tapped: Passed[Tensor] = Passed()

    def apply_to(self, source: Tensor) -> Tensor:
        """What the branch makes of its source, channels last."""
        tensors: Args = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        down, down_bias, up, up_bias = (cast(tensor, source.dtype) for tensor in tensors)
        rate = self.dropout if self.training else 0.0
        return bottleneck(source, down, down_bias, up, up_bias, ACTIVATIONS[self.activation], rate)

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        """At the tapped module: keep what it sees for the host that the branch adds to."""
        self._tapped.set(x)
        return x

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z = self.shift(x, y)
        if isinstance(self.scale, Tensor):
            return y + z * along(cast(self.scale, z.dtype), z.dim(), self.channel_dim)
        return torch.add(y, z, alpha=self.scale)

    def shift(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the sub-layer's output, before the scale."""
        if self.source == "output":
            source = y
        elif self.source == "input":
            source = x
        else:
            tapped = self._tapped.set(None)
            assert tapped is not None, "the tapped module did not run before the sub-layer ended"
            source = tapped
        if self.channel_dim != -1:
            source = source.movedim(self.channel_dim, -1)
        z = self.apply_to(source)
        if self.channel_dim != -1:
            z = z.movedim(-1, self.channel_dim)
        if self.drop_path and self.training:
            z = stochastic_depth(z, self.drop_path)
        return z


def _plain(down: nn.Linear, up: nn.Linear, init: Init) -> tuple[nn.Linear, nn.Linear]:
    for linear in (down, up):
        nn.init.zeros_(linear.bias)
        if init == "houlsby":
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        elif init == "bert":
            nn.init.normal_(linear.weight, std=0.02)
    if init == "lora":
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(up.weight)
    return down, up


class KronBranch(Branch):
    """`h ← h + s (L ⊗ R) src + t src`: no bottleneck and no σ; `t` is one learned scalar from 0, or absent."""

    unmergeable = "a linear beside a whole sub-layer is no change of the sub-layer's own weights"

    def __init__(
        self, factor: Kron, like: Tensor, source: Source, scale: float, residual: bool, channel_dim: int = -1
    ) -> None:
        Part.__init__(self)
        self.source, self.scale, self.factor, self.channel_dim = source, scale, factor, channel_dim
        self.dropout = self.drop_path = 0.0
        self.residual = nn.Parameter(torch.zeros(1, **like_options(like))) if residual else None
        self._tapped = Passed()

    def apply_to(self, source: Tensor) -> Tensor:
        z: Tensor = self.factor(source)
        return z if self.residual is None else z + source * cast(self.residual / self.scale, source.dtype)
