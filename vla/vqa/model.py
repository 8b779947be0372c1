"""From the tokens of both towers to the scores of answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.vla.taps import Taps, grid_of


class Fusion(nn.Module):
    """`z = W T([a; P_t g; P_i f + r + c])₀`: a transformer over an answer token, question tokens and patches.

    Rows r and columns c of the patches are learned anew: the tower's own places need not survive its last block.
    `blind` leaves the patches out: what the question alone gives away.
    """

    def __init__(
        self, width: int = 192, depth: int = 2, heads: int = 4, dropout: float = 0.1, blind: bool = False
    ) -> None:
        """Args:
        width: of the tokens inside.
        depth: number of blocks.
        heads: of each attention.
        dropout: of attention and feed-forward.
        blind: see no image.

        Raises:
            ConfigError: the width is no multiple of the heads, or there is no block.
        """
        super().__init__()
        if min(width, depth, heads) < 1 or width % heads:
            raise ConfigError(
                f"a fusion of width {width}, depth {depth} and {heads} heads: heads must divide the width"
            )
        self.width, self.depth, self.heads, self.dropout, self.blind = width, depth, heads, dropout, blind

    def start(self, image: Taps, text: Taps, grid: tuple[int, int], answers: int) -> None:
        """Build what trains for two towers, a grid of patches and a number of answers."""
        w = self.width
        self.answer = nn.Parameter(torch.randn(w) * 0.02)
        self.of_text = nn.Sequential(nn.LayerNorm(text.width), nn.Linear(text.width, w))
        if not self.blind:
            self.of_image = nn.Sequential(nn.LayerNorm(image.width), nn.Linear(image.width, w))
            self.rows = nn.Parameter(torch.randn(grid[0], 1, w) * 0.02)
            self.columns = nn.Parameter(torch.randn(1, grid[1], w) * 0.02)
        layer = nn.TransformerEncoderLayer(
            w, self.heads, 4 * w, self.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, self.depth, enable_nested_tensor=False)
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
        tokens = [self.answer.expand(len(question), 1, -1), self.of_text(question.float())]
        hidden = [padding.new_zeros(len(question), 1), padding]
        if not self.blind:
            assert patches is not None
            seen = self.of_image(patches.float()) + (self.rows + self.columns).flatten(0, 1)
            tokens.append(seen[owner])
            hidden.append(padding.new_zeros(len(question), seen.shape[1]))
        x = self.blocks(torch.cat(tokens, 1), src_key_padding_mask=torch.cat(hidden, 1))
        scores: Tensor = self.head(x[:, 0])
        return scores


def patch_grid(taps: Taps, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches an image tower makes of images of a size."""
    last = len(taps.paths) - 1
    with torch.no_grad():
        found = taps(torch.zeros(1, 3, *size), [last])[last]
    return grid_of(found.shape[1] - taps.prefix, size)
