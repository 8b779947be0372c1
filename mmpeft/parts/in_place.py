"""`InPlace`: learned tokens at positions that the text leaves free for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.functional.pointwise import insert_tokens, strip_tokens
from mmpeft.parts.base import Part, cast, trainable_dtype


class InPlace(Part):
    """`x[:, s : s + p] = P (+ shift)`: embeddings of placeholders, or what a former block made of them, replaced.

    The sequence keeps its length, so causal masks, positions and pooling need not know. `shift` [B, 1, d], set by
    whoever conditions the prompt on something (CoCoOp's meta-network), moves the tokens of each row.
    """

    order = 0
    unmergeable = "learned tokens take the place of a text's; no base weight can stand for them"

    def __init__(self, count: int, width: int, position: int, std: float, like: Tensor) -> None:
        super().__init__()
        self.position = position
        self.shift: Tensor | None = None
        self.tokens = nn.Parameter(
            torch.empty(count, width, device=like.device, dtype=trainable_dtype(like.dtype)).normal_(std=std)
        )

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return self.write(x)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.write(y)

    def write(self, x: Tensor) -> Tensor:
        """[B, n, d] with its tokens `position … position + p` replaced."""
        count = len(self.tokens)
        tokens = cast(self.tokens if self.shift is None else self.tokens + self.shift, x.dtype)
        front, back = x[:, : self.position], x[:, self.position + count :]
        return torch.cat([front, tokens.expand(len(x), -1, -1), back], dim=1)


class Coupled(Part):
    """`P' = W P + b` for the tokens P of another tower, inserted at a block's entry and stripped at an exit (MaPLe)."""

    order = 0
    rowwise = False
    unmergeable = "prompt tokens lengthen the sequence; no base weight can stand for them"

    def __init__(self, source: InPlace, width: int, position: int) -> None:
        super().__init__()
        self._source = (source,)  # a tuple: the source stays registered under its own host alone
        self.position = position
        tokens = source.tokens
        self.proj = nn.Linear(tokens.shape[1], width, device=tokens.device, dtype=tokens.dtype)

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        return insert_tokens(x, cast(self.proj(self._source[0].tokens), x.dtype), self.position)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return strip_tokens(y, len(self._source[0].tokens), self.position)

    def read(self, host: nn.Module, name: str, base: int) -> int:
        """The prefix count of an attention module that keeps one."""
        return base + len(self._source[0].tokens)
