"""`Rescale`: a learned vector on an activation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.functional.pointwise import along
from mmpeft.parts.base import Hook, Part, cast, trainable_dtype


class Rescale(Part):
    """`y ← γ ⊙ y + β` on channels `rows` of a module's output, or `x ← γ ⊙ x` on its input.

    Both vectors start at the identity (γ = 1, β = 0) unless a method draws them otherwise. Folds into the
    module's own weight and bias.
    """

    order = 2

    def __init__(
        self,
        width: int,
        like: Tensor,
        *,
        side: Literal["output", "input"] = "output",
        rows: tuple[int, int] | None = None,
        shift: bool = False,
        channel_dim: int = -1,
        bias_owner: str = "",
    ) -> None:
        super().__init__()
        self.start, self.stop = rows or (0, width)
        self.side, self.channel_dim, self.bias_name = side, channel_dim, bias_owner
        size = self.stop - self.start
        options: dict[str, Any] = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
        self.gamma = nn.Parameter(torch.ones(size, **options))
        self.beta = nn.Parameter(torch.zeros(size, **options)) if shift else None

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return x * along(cast(self.gamma, x.dtype), x.dim(), self.channel_dim)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        own = y.narrow(self.channel_dim, self.start, self.stop - self.start)
        tuned = own * along(cast(self.gamma, y.dtype), y.dim(), self.channel_dim)
        if self.beta is not None:
            tuned = tuned + along(cast(self.beta, y.dtype), y.dim(), self.channel_dim)
        if own.shape == y.shape:
            return tuned
        return y.slice_scatter(tuned, self.channel_dim, self.start, self.stop)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        """Where the backbone reads a weight directly: rows of the weight, and the bias it adds apart."""
        if name == self.bias_name:
            tuned = base * cast(self.gamma, base.dtype)
            return tuned if self.beta is None else tuned + cast(self.beta, base.dtype)
        own = base[self.start : self.stop] * cast(self.gamma, base.dtype)[:, None]
        return own if len(own) == len(base) else base.slice_scatter(own, 0, self.start, self.stop)

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        if hook.kind == "read":
            super().fold(host, hook, params)
            return
        weight, bias = params.get("weight"), params.get("bias")
        if hook.kind == "enter":
            assert weight is not None
            params["weight"] = weight * cast(self.gamma, weight.dtype)
            return
        rows = slice(self.start, self.stop)
        if weight is None:  # a norm without affine parameters
            weight = torch.ones(self.stop - self.start, dtype=self.gamma.dtype, device=self.gamma.device)
        tuned = weight.clone()
        tuned[rows] *= cast(self.gamma, weight.dtype).view(-1, *[1] * (weight.dim() - 1))
        params["weight"] = tuned
        if bias is None and self.beta is None:
            return
        if bias is None and "bias" not in host._parameters:
            raise Refused(
                f"Rescale at {hook.path} cannot be merged: {type(host).__name__} reads no bias to hold the shift"
            )
        bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
        bias[rows] *= cast(self.gamma, bias.dtype)
        if self.beta is not None:
            bias[rows] += cast(self.beta, bias.dtype)
        params["bias"] = bias
