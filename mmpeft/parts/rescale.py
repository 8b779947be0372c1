"""`Rescale`: a learned vector on an activation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import Refused
from mmpeft.functional.pointwise import along
from mmpeft.functional.rows import Rows, count_rows, cut_rows, put_rows, take_rows, turned
from mmpeft.parts.base import Hook, Part, cast, trainable_dtype
from mmpeft.parts.product import Inner, WeightProduct
from mmpeft.types import Kwargs


class Rescale(Part):
    """`y ← γ ⊙ y + β` on channels `rows` of a module's output, or `x ← γ ⊙ x` on its input.

    Both vectors start at the identity (γ = 1, β = 0) unless a method draws them otherwise. Folds into the
    module's own weight and bias.
    """

    order = 2
    scalable = True

    def __init__(
        self,
        width: int,
        like: Tensor,
        *,
        side: Literal["output", "input"] = "output",
        rows: Rows | None = None,
        shift: bool = False,
        channel_dim: int = -1,
        bias_owner: str = "",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.transposed = rows, transposed
        self.side, self.channel_dim, self.bias_name = side, channel_dim, bias_owner
        size = count_rows(rows, width)
        options: Kwargs = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
        self.gamma = nn.Parameter(torch.ones(size, **options))
        self.beta = nn.Parameter(torch.zeros(size, **options)) if shift else None

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return x * along(cast(self.gamma, x.dtype), x.dim(), self.channel_dim)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        own = take_rows(y, self.rows, self.channel_dim)
        return put_rows(y, self.rescaled(own, self.channel_dim), self.rows, self.channel_dim)

    @property
    def answers(self) -> bool:
        return True

    def through(self, reading: WeightProduct, inner: Inner, x: Tensor) -> Tensor:
        """Where the backbone reads a weight directly: what goes in, or the rows of it in what comes out."""
        conv = reading.weight.dim() > 2
        channel = 1 if conv else -1
        if self.side == "input":
            assert self.rows is None
            return inner(x * along(cast(self.gamma, x.dtype), x.dim(), channel))
        y, rows, piece = inner(x), self.rows, slice(None)
        if reading.partial:
            assert rows is None or len(rows) == 2
            found = cut_rows(rows or (0, len(reading.weight)), reading.start, reading.stop)
            if found is None:
                return y
            rows, piece = found
        own = take_rows(y, rows, channel)
        return put_rows(y, own * along(cast(self.gamma, y.dtype)[piece], y.dim(), channel), rows, channel)

    def rescaled(self, own: Tensor, channel_dim: int) -> Tensor:
        """`γ ⊙ own + β`."""
        tuned = own * along(cast(self.gamma, own.dtype), own.dim(), channel_dim)
        return tuned if self.beta is None else tuned + along(cast(self.beta, own.dtype), own.dim(), channel_dim)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        """Where the backbone reads a weight directly: rows of the weight, and the bias it adds apart."""
        if name == self.bias_name:
            fused = self.rows if len(base) != len(self.gamma) else None
            return put_rows(base, self.rescaled(take_rows(base, fused), 0), fused)
        weight = turned(base) if self.transposed else base
        own = take_rows(weight, self.rows)
        if self.side == "input":
            tuned = own * cast(self.gamma, base.dtype)
        else:
            tuned = own * cast(self.gamma, base.dtype).view(-1, *[1] * (own.dim() - 1))
        whole = put_rows(weight, tuned, self.rows)
        return turned(whole) if self.transposed else whole

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        if hook.kind == "read":
            super().fold(host, hook, params)
            return
        weight, bias = params.get("weight"), params.get("bias")
        if weight is None:  # a norm without affine parameters
            weight = torch.ones_like(self.gamma)
        params["weight"] = self.read(host, "weight", weight)
        if hook.kind == "enter" or (bias is None and self.beta is None):
            return
        if bias is None and "bias" not in host._parameters:
            raise Refused(
                f"Rescale at {hook.path} cannot be merged: {type(host).__name__} reads no bias to hold the shift"
            )
        outputs = weight.shape[-1] if self.transposed else len(weight)
        bias = weight.new_zeros(outputs) if bias is None else bias
        params["bias"] = put_rows(bias, self.rescaled(take_rows(bias, self.rows), 0), self.rows)
