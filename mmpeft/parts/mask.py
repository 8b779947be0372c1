"""`Mask`: some entries of a named tensor trained in place of the frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.functional.rows import Rows, put_rows, take_rows
from mmpeft.parts.base import Part, cast, trainable_dtype


class Mask(Part):
    """`θ = θ0` outside the mask and a trained value inside it; only the values are parameters.

    `rows` limits the mask to a slice of dimension `dim`. Where the base has no tensor at
    all (`shape` given), one of zeros is created. Values start at θ0, so the model is unchanged bit for bit,
    and weight decay acts on them as it does in ordinary fine-tuning.
    """

    order = 4
    scalable = True
    rowwise = False

    def __init__(
        self,
        base: Tensor | None,
        *,
        rows: Rows | None = None,
        dim: int = 0,
        shape: tuple[int, ...] = (),
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.dim = rows, dim
        if base is None:
            assert like is not None
            base = torch.zeros(shape, dtype=like.dtype, device=like.device)
        own = take_rows(base.detach(), rows, dim)
        self.value = nn.Parameter(own.to(trainable_dtype(base.dtype), copy=True))

    def read(self, host: nn.Module, name: str, base: Tensor | None) -> Tensor:
        if base is None:
            return self.value
        return put_rows(base, cast(self.value, base.dtype), self.rows, self.dim)
