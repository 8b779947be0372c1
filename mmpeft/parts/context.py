"""`Context`: learned tokens in the sequence that blocks see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.functional.pointwise import insert_tokens, strip_tokens
from mmpeft.parts.base import Part, cast, trainable_dtype
from mmpeft.types import Kwargs


class Context(Part):
    """`p` learned tokens inserted after the prefix tokens at a block's entry and stripped at an exit.

    A module that counts prefix tokens itself (rotary attention) reads a count raised by `p`.
    """

    order = 0
    rowwise = False
    unmergeable = "prompt tokens lengthen the sequence; no base weight can stand for them"

    def __init__(self, count: int, width: int, position: int, bound: float, like: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.position, self.dropout = position, dropout
        options: Kwargs = {"device": like.device, "dtype": trainable_dtype(like.dtype)}
        self.tokens = nn.Parameter(torch.empty(count, width, **options).uniform_(-bound, bound))

    def enter(self, host: nn.Module, x: Tensor) -> Tensor:
        tokens = cast(self.tokens, x.dtype)
        if self.dropout and self.training:
            tokens = F.dropout(tokens, self.dropout)
        return insert_tokens(x, tokens, self.position)

    def exit(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return strip_tokens(y, len(self.tokens), self.position)

    def read(self, host: nn.Module, name: str, base: int) -> int:
        """The prefix count of an attention module that keeps one."""
        return base + len(self.tokens)
