"""`Sparse`: chosen entries of a named tensor, and nothing else of it, train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.functional.sparse import compressed, scatter_add, sparse_apply
from mmpeft.parts.base import Hook, Part, cast, trainable_dtype


class Sparse(Part):
    """`θ = θ0 + M ⊙ δ` with δ kept at flat `indices` of the tensor alone, starting at 0.

    On a linear that the backbone calls (`exit` hook, `called`) the output gets `Δ x`, so the weight is never copied;
    anywhere else (`read` hook) the backbone reads `θ0 + M ⊙ δ`. Weight decay pulls δ, that is θ towards θ0.
    """

    order = 2
    scalable = True
    indices: Tensor
    pointers: Tensor
    columns: Tensor
    position: Tensor | None

    def __init__(self, base: Tensor, indices: Tensor, called: bool = False, transposed: bool = False) -> None:
        super().__init__()
        dtype, indices = trainable_dtype(base.dtype), indices.to(base.device)
        self.delta = nn.Parameter(torch.zeros(len(indices), dtype=dtype, device=base.device))
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("position", None, persistent=False)
        if called:
            rows, columns = base.shape
            if transposed:  # the product needs the values row by row of [o, i]
                indices, self.position = ((indices % columns) * rows + indices // columns).sort()
                rows, columns = columns, rows
            pointers, own = compressed(indices, columns, rows)
            self.register_buffer("pointers", pointers, persistent=False)
            self.register_buffer("columns", own, persistent=False)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        values = self.delta if self.position is None else self.delta[self.position]
        return y + cast(sparse_apply(x, values, self.pointers, self.columns), y.dtype)

    def read(self, host: nn.Module, name: str, base: Tensor) -> Tensor:
        return scatter_add(base, self.indices, self.delta)

    def fold(self, host: nn.Module, hook: Hook, params: dict[str, Tensor | None]) -> None:
        name = hook.name or "weight"
        weight = params[name]
        assert weight is not None
        params[name] = self.read(host, name, weight)
