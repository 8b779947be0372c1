"""From the tokens of both towers to the scores of answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.tasks.taps import Taps
from mmpeft.types import Kwargs


class SharedSpace(NamedTuple):
    """Patches [B, n, e] and whole questions [Q, e] in the space that a pair has for both, of unit length."""

    patches: Tensor
    questions: Tensor


class Looking(nn.TransformerDecoderLayer):
    """A decoder's block for several questions about each image, whose keys and values are computed once for all.

    To the logits of its attention to patches each head h adds `β_h s`, s the likeness of the patches to the question.
    """

    def __init__(self, width: int, heads: int, dropout: float, likeness: bool) -> None:
        super().__init__(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        if likeness:
            self.beta = nn.Parameter(torch.linspace(0, 2, heads))  # from heads that look freely to some that follow

    def forward(  # type: ignore[override]  # another layer's arguments
        self, x: Tensor, padding: Tensor, patches: Tensor, owner: Tensor, likeness: Tensor | None
    ) -> Tensor:
        """
        Args:
                x: tokens of the questions [Q, m, w].
                padding: bool [Q, m], true where there is no token.
                patches: of the images [B, n, w].
                owner: int64 [Q], the image of each question.
                likeness: s of each question and patch of its image [Q, n].

        Returns:
            [Q, m, w].
        """
        y = self.norm1(x)
        x = x + self.dropout1(self.self_attn(y, y, y, key_padding_mask=padding, need_weights=False)[0])
        y = self.norm2(x)
        slot = F.one_hot(owner, len(patches)).cumsum(0).gather(1, owner[:, None])[:, 0] - 1  # among its image's own
        asked = y.new_zeros(len(patches), int(slot.max()) + 1, *y.shape[1:])
        asked[owner, slot] = y
        bias = None
        if likeness is not None:
            bias = y.new_zeros(len(patches), len(self.beta), asked.shape[1], patches.shape[1])
            bias[owner, :, slot] = self.beta[:, None] * likeness[:, None]
            bias = bias.repeat_interleave(y.shape[1], 2).flatten(0, 1)
        found = self.multihead_attn(asked.flatten(1, 2), patches, patches, attn_mask=bias, need_weights=False)[0]
        x = x + self.dropout2(found.view_as(asked)[owner, slot])
        y = self.linear2(self.dropout(self.activation(self.linear1(self.norm3(x)))))
        out: Tensor = x + self.dropout3(y)
        return out


class Fusion(nn.Module):
    """`z = W D([a; P_t g] | C(P_i f) + p)₀`: blocks of an answer token and the question's that look at the patches.

    Each block has self-attention of these tokens, attention to the patches, and a feed-forward part (a decoder: patches
    do not look at each other again, which the tower has done, and cost a question little). C adds two 3×3 convolutions,
    so that a patch knows its neighbours. Places p start as sines and train: the tower's own need not survive its last
    block. Attention starts from what the pair was trained for, the likeness `s = P f · (t + A t)` of patches and the
    whole question in the joint space, A from zero, over the patches of mean 0 and variance 1; where a tower has no
    such space for single patches, without. `blind` leaves the patches out: what the question alone gives away.
    """

    def __init__(
        self, width: int = 192, depth: int = 3, heads: int = 4, dropout: float = 0.1, blind: bool = False
    ) -> None:
        """
        Args:
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

    def start(self, image: Taps, text: Taps, grid: tuple[int, int], answers: int, joint: int | None = None) -> None:
        """Build what trains for two towers, a grid of patches, a number of answers and a joint space, if there is."""
        w = self.width
        self.answer = nn.Parameter(torch.randn(w) * 0.02)
        self.of_text = nn.Sequential(nn.LayerNorm(text.width), nn.Linear(text.width, w))
        if self.blind:
            options: Kwargs = {"activation": "gelu", "batch_first": True, "norm_first": True}
            alone = nn.TransformerEncoderLayer(w, self.heads, 4 * w, self.dropout, **options)
            self.reading = nn.TransformerEncoder(alone, self.depth, enable_nested_tensor=False)
        else:
            self.grid = grid
            self.of_image = nn.Sequential(nn.LayerNorm(image.width), nn.Linear(image.width, w))
            self.near = nn.Sequential(nn.Conv2d(w, w, 3, padding=1), nn.GELU(), nn.Conv2d(w, w, 3, padding=1))
            self.places = nn.Parameter(build_sincos2d_pos_embed(list(grid), w))
            self.blocks = nn.ModuleList(Looking(w, self.heads, self.dropout, bool(joint)) for _ in range(self.depth))
            if joint:
                self.turn = nn.Linear(joint, joint)
                nn.init.zeros_(self.turn.weight)
                nn.init.zeros_(self.turn.bias)
        self.head = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, answers))

    def forward(
        self, patches: Tensor | None, question: Tensor, padding: Tensor, owner: Tensor, joint: SharedSpace | None = None
    ) -> Tensor:
        """
        Args:
                patches: of the images [B, n, d_i]; None for a blind model.
                question: tokens of the questions [Q, m, d_t].
                padding: bool [Q, m], true where there is no token.
                owner: int64 [Q], the image of each question.
                joint: both once more in the joint space.

        Returns:
            scores [Q, A] before the softmax.
        """
        x = torch.cat([self.answer.expand(len(question), 1, -1), self.of_text(question.float())], 1)
        padding = F.pad(padding, (1, 0))
        if self.blind:
            x = self.reading(x, src_key_padding_mask=padding)
        else:
            assert patches is not None
            seen = self.of_image(patches.float())
            seen = seen + self.near(seen.mT.unflatten(2, self.grid)).flatten(2).mT + self.places
            likeness = self.likeness(joint, owner) if joint else None
            for block in self.blocks:
                x = block(x, padding, seen, owner, likeness)
        scores: Tensor = self.head(x[:, 0])
        return scores

    def likeness(self, joint: SharedSpace, owner: Tensor) -> Tensor:
        """`s` [Q, n] of each question and the patches of its image, of mean 0 and variance 1."""
        questions = joint.questions.float()
        s = torch.einsum("qne,qe->qn", joint.patches.float()[owner], questions + self.turn(questions))
        return F.layer_norm(s, s.shape[1:], eps=1e-8)
