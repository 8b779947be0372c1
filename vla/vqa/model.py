"""From the tokens of both towers to the scores of answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.vla.taps import Taps, grid_of


class Fusion(nn.Module):
    """`z = W D([a; P_t g] | P_i f + p)₀`: blocks of an answer token and the question's that look at the patches.

    Each block has self-attention of these tokens, attention to the patches, and a feed-forward part (a decoder: patches
    do not look at each other again, which the tower has done, and cost a question little). Places p of the patches
    start as sines and train: the tower's own need not survive its last block. `blind` leaves the patches out: what the
    question alone gives away.
    """

    def __init__(
        self, width: int = 192, depth: int = 3, heads: int = 4, dropout: float = 0.1, blind: bool = False
    ) -> None:
        """Args:
        width: of the tokens inside, a multiple of 4.
        depth: number of blocks.
        heads: of each attention.
        dropout: of attention and feed-forward.
        blind: see no image.

        Raises:
            ConfigError: the width is no multiple of 4 and of the heads, or there is no block.
        """
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads or width % 4:
            raise ConfigError(
                f"a fusion of width {width}, depth {depth} and {heads} heads: 4 and heads must divide the width"
            )
        self.width, self.depth, self.heads, self.dropout, self.blind = width, depth, heads, dropout, blind

    def start(self, image: Taps, text: Taps, grid: tuple[int, int], answers: int) -> None:
        """Build what trains for two towers, a grid of patches and a number of answers."""
        w = self.width
        self.answer = nn.Parameter(torch.randn(w) * 0.02)
        self.of_text = nn.Sequential(nn.LayerNorm(text.width), nn.Linear(text.width, w))
        if not self.blind:
            self.of_image = nn.Sequential(nn.LayerNorm(image.width), nn.Linear(image.width, w))
            self.places = nn.Parameter(build_sincos2d_pos_embed(list(grid), w))
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        if self.blind:
            alone = nn.TransformerEncoderLayer(w, self.heads, 4 * w, self.dropout, **options)
            self.blocks: nn.Module = nn.TransformerEncoder(alone, self.depth, enable_nested_tensor=False)
        else:
            looking = nn.TransformerDecoderLayer(w, self.heads, 4 * w, self.dropout, **options)
            self.blocks = nn.TransformerDecoder(looking, self.depth)
        self.head = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, answers))

    def forward(self, patches: Tensor | None, question: Tensor, padding: Tensor, owner: Tensor) -> Tensor:
        """Args:
            patches: of the images [B, n, d_i]; None for a blind model.
            question: tokens of the questions [Q, m, d_t].
            padding: bool [Q, m], true where there is no token.
            owner: int64 [Q], the image of each question.

        Returns:
            scores [Q, A] before the softmax.
        """
        x = torch.cat([self.answer.expand(len(question), 1, -1), self.of_text(question.float())], 1)
        hidden = F.pad(padding, (1, 0))
        if self.blind:
            x = self.blocks(x, src_key_padding_mask=hidden)
        else:
            assert patches is not None
            seen = self.of_image(patches.float()) + self.places
            x = self.blocks(x, seen[owner], tgt_key_padding_mask=hidden)
        scores: Tensor = self.head(x[:, 0])
        return scores


def patch_grid(taps: Taps, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches an image tower makes of images of a size."""
    last = len(taps.paths) - 1
    with torch.no_grad():
        found = taps(torch.zeros(1, 3, *size), [last])[last]
    return grid_of(found.shape[1] - taps.prefix, size)
