"""Decoders from patch features and class names to masks: CLIPSeg's by a prompt each, and SAN's by mask queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError, Refused
from mmpeft.tasks.decoders import check_heads, resized, token_blocks, upsampler
from mmpeft.tasks.taps import Taps, grid_of
from mmpeft.vla.backbone import towers_of
from mmpeft.vla.segmentation.losses import IGNORED, matched
from mmpeft.vla.segmentation.tower import heads, through
from mmpeft.vla.taps import projection


class Decoder(nn.Module):
    """Scores in [0, 1] of each class at each pixel; open vocabulary: classes are their text features, as many as given.

    Shapes: images [B, 3, H, W], unit text features [C, e], scores [B, C, H, W]; target [B, H, W] holds class numbers,
    a number ≥ C for background and 255 for what does not count.
    """

    @abstractmethod
    def start(self, taps: Taps, text_width: int, patch: int) -> None:
        """Build what trains for a tower."""

    @abstractmethod
    def forward(self, taps: Taps, images: Tensor, text: Tensor) -> Tensor:
        """Scores."""

    @abstractmethod
    def loss(self, taps: Taps, images: Tensor, text: Tensor, target: Tensor) -> Tensor:
        """The training loss, a scalar."""


class CLIPSegDecoder(Decoder):
    """`a ← T_i(W_i f_i + a)` from the deepest tap up, `a ← γ(t) ⊙ a + β(t)` at the first, then transposed convolutions.

    A small transformer over patches whose first features are modulated by the text of one class (FiLM); one binary
    map a class. Lüddecke and Ecker, arXiv:2112.10003. Where the tower has a projection P for single tokens, the map
    begins with what the pair itself says of a patch, `s (cos(P f, t) − mean_u cos(P f, u))` over the classes asked for,
    s from the pair's own scale: a class not seen in training starts where the pair leaves it (as the cost of CAT-Seg,
    arXiv:2303.11797), and the decoder says where things are.
    """

    def __init__(
        self, layers: Sequence[int] | None = None, width: int = 64, heads: int = 4, prompts: int | None = 8
    ) -> None:
        """
        Args:
            layers: depths of the blocks to decode from; None for three spread over the tower.
            width: of the decoder's tokens.
            heads: of its attention.
            prompts: classes each training image is asked for: those it shows, and others drawn by chance; None for all.

        Raises:
            ConfigError: heads do not divide the width, or there are no prompts.
        """
        super().__init__()
        check_heads(width, heads)
        if prompts is not None and prompts < 1:
            raise ConfigError(f"prompts is a number of classes >= 1, got {prompts}; None for all")
        self.wanted, self.width, self.heads, self.prompts = layers, width, heads, prompts

    def start(self, taps: Taps, text_width: int, patch: int) -> None:
        self.depths = taps.layers(self.wanted)[::-1]
        width = self.width
        self.reduce = nn.ModuleList(nn.Linear(taps.width, width) for _ in self.depths)
        self.scale, self.shift = nn.Linear(text_width, width), nn.Linear(text_width, width)
        self.last = len(taps.paths) - 1
        try:
            projection(taps.model)
            self.pull = nn.Parameter(towers_of(taps.model).logit_scale.detach().exp().clamp(max=100.0).clone())
        except Refused:  # pooled by attention
            self.register_parameter("pull", None)
        self.blocks = token_blocks(width, self.heads, len(self.depths))
        self.up = upsampler(width, 1, patch)

    def film(self, x: Tensor, text: Tensor) -> Tensor:
        """`γ(√e t) ⊙ x + β(√e t)` for images and classes: x [B, n, w], text [C, e] or [B, C, e] to [B, C, n, w]."""
        text = text * text.shape[-1] ** 0.5  # unit vectors would hardly modulate: entries of unit variance do
        said: Tensor = self.scale(text).unsqueeze(-2) * x[:, None] + self.shift(text).unsqueeze(-2)
        return said

    def similarity(self, taps: Taps, features: Tensor, text: Tensor) -> Tensor:
        """`cos(P f, t) − mean_u cos(P f, u)` of patches [B, n, d] and classes, [B, C, n]."""
        patches = F.normalize(projection(taps.model)(features).float(), dim=-1)
        found = text.float().expand(len(patches), -1, -1) @ patches.transpose(1, 2)
        return found - found.mean(1, keepdim=True)

    def logits(self, taps: Taps, images: Tensor, text: Tensor) -> Tensor:
        """Logit maps [B, C, H, W] of text [C, e], or [B, C, e] where each image has prompts of its own."""
        features = taps(images, [*self.depths, self.last])
        x: Tensor | None = None
        kind = next(self.reduce.parameters()).dtype
        for number, (depth, reduce, block) in enumerate(zip(self.depths, self.reduce, self.blocks)):
            own = reduce(taps.patches(features[depth]).to(kind))
            if number == 0:
                x = self.film(own, text).flatten(0, 1)
            else:
                assert x is not None
                x = x + own.repeat_interleave(text.shape[-2], 0)
            x = block(x)
        assert x is not None
        rows, columns = grid_of(x.shape[1], images.shape[-2:])
        maps = resized(self.up(x.transpose(1, 2).unflatten(2, (rows, columns))), images)
        maps = maps[:, 0].unflatten(0, (len(images), text.shape[-2]))
        if self.pull is None:
            return maps
        said = self.similarity(taps, taps.patches(features[self.last]), text).unflatten(2, (rows, columns))
        pulled: Tensor = maps + self.pull * resized(said, images)
        return pulled

    def forward(self, taps: Taps, images: Tensor, text: Tensor) -> Tensor:
        return self.logits(taps, images, text).sigmoid()

    def loss(self, taps: Taps, images: Tensor, text: Tensor, target: Tensor) -> Tensor:
        """Binary cross entropy of the prompted maps, plus half a dice loss of the classes that are there."""
        chosen = prompted(target, len(text), self.prompts)
        logits = self.logits(taps, images, text[chosen]).float()
        truth = (target[:, None] == chosen[..., None, None]).float()
        counts = (target != IGNORED)[:, None].float()
        errors = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * counts
        present = truth.flatten(2).any(2)
        shares = logits.sigmoid() * counts
        inside, both = (shares * truth).flatten(2).sum(2), (shares + truth).flatten(2).sum(2)
        dice = (1 - 2 * inside / both.clamp(min=1e-6))[present]
        return errors.sum() / counts.expand_as(errors).sum().clamp(min=1) + 0.5 * dice.sum() / max(len(dice), 1)


class SANDecoder(Decoder):
    """Mask queries of a small side network say where, copies of the class token in the last CLIP blocks say what.

    A side ViT with `queries` tokens takes in CLIP features; `masks = MLP(q) · MLP(x)`, and per-head biases
    `b = MLP_h(q) · MLP_h(x)` steer what each copy attends to in CLIP's blocks from depth `start_at` on. Class
    probabilities are `softmax(s c tᵀ, no object)` of what the copies c become. Xu et al., arXiv:2302.12242. A tower
    that pools the mean of its patches, and has no class token to copy, does the same under each mask instead:
    `c = P(Σ_p σ(m_p) f_p / Σ_p σ(m_p))`.
    """

    def __init__(
        self, width: int = 96, depth: int = 4, heads: int = 4, queries: int = 16, patch: int = 8, last: int = 2
    ) -> None:
        """
        Args:
            width: of the side network.
            depth: its blocks.
            heads: of its attention.
            queries: masks an image is explained by.
            patch: pixels of a side patch.
            last: blocks of the tower that the copies run through; where patches are pooled, those the side network does
                not see.

        Raises:
            ConfigError: heads do not divide the width.
        """
        super().__init__()
        check_heads(width, heads)
        self.width, self.depth, self.heads = width, depth, heads
        self.queries, self.patch, self.last = queries, patch, last

    def start(self, taps: Taps, text_width: int, patch: int) -> None:
        w = self.width
        if not 0 < self.last < len(taps.paths):
            raise ConfigError(f"last is a number of blocks in 1 … {len(taps.paths) - 1}, got {self.last}")
        projection(taps.model)  # refused here rather than in the first step
        self.enter = len(taps.paths) - self.last  # the copies' first block
        self.lent = sorted(set(taps.layers(None, min(self.depth, max(1, self.enter)))))
        self.lent = [d for d in self.lent if d < self.enter] or [self.enter - 1]
        self.embed = nn.Conv2d(3, w, self.patch, stride=self.patch)
        self.query = nn.Parameter(torch.randn(self.queries, w) * 0.02)
        self.place = nn.Conv2d(w, w, 5, padding=2, groups=w)  # positions by a convolution: any image size
        self.lend = nn.ModuleList(nn.Sequential(nn.LayerNorm(taps.width), nn.Linear(taps.width, w)) for _ in self.lent)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(w, self.heads, 4 * w, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(self.depth)
        )
        self.norm = nn.LayerNorm(w)
        self.clip_heads = heads(taps.model)
        self.mask_query, self.mask_pixel = mlp(w, w), mlp(w, w)
        if taps.prefix:
            self.bias_query, self.bias_pixel = mlp(w, self.clip_heads * 16), mlp(w, self.clip_heads * 16)
        self.nothing = nn.Parameter(torch.randn(1, text_width) * 0.02)

    def forward(self, taps: Taps, images: Tensor, text: Tensor) -> Tensor:
        """`Σ_q p(class | q) · p(pixel | q)`, at most 1."""
        classes, masks = self.explain(taps, images, text)
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid()).clamp(max=1)

    def loss(self, taps: Taps, images: Tensor, text: Tensor, target: Tensor) -> Tensor:
        """Losses of classes and masks, each query with the segment it fits best (`losses.matched`)."""
        return matched(*self.explain(taps, images, text), target)

    def explain(self, taps: Taps, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [B, Q, C + 1], the last one for no object, and mask logits [B, Q, H, W]."""
        last = len(taps.paths) - 1
        features = taps(images, [*self.lent, self.enter - 1, last])
        x = self.embed(images)
        rows, columns = x.shape[-2:]
        x = (x + self.place(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.query.expand(len(x), -1, -1), x], 1)
        for number, block in enumerate(self.blocks):
            if number < len(self.lent):
                own = taps.patches(features[self.lent[number]])
                size = grid_of(own.shape[1], images.shape[-2:])
                lent = self.lend[number](own.float()).transpose(1, 2).unflatten(2, size)
                lent = F.interpolate(lent, (rows, columns), mode="bilinear", align_corners=False)
                x = torch.cat([x[:, : self.queries], x[:, self.queries :] + lent.flatten(2).transpose(1, 2)], 1)
            x = block(x)
        x = self.norm(x)
        query, pixel = x[:, : self.queries], x[:, self.queries :]
        masks = self.mask_query(query) @ self.mask_pixel(pixel).transpose(1, 2) * self.width**-0.5
        maps = masks.unflatten(2, (rows, columns))
        masks = F.interpolate(maps, images.shape[-2:], mode="bilinear")
        clip = grid_of(taps.patches(features[last]).shape[1], images.shape[-2:])
        if taps.prefix:
            bias = self._bias(query, pixel, (rows, columns), clip)
            copies = self.recognise(taps, features[self.enter - 1], bias)
        else:
            copies = pooled(features[last], F.adaptive_avg_pool2d(maps.sigmoid(), clip).flatten(2))
        scale = towers_of(taps.model).logit_scale.exp()
        known = F.normalize(projection(taps.model)(copies).float(), dim=-1)
        scores = scale * known @ torch.cat([text, F.normalize(self.nothing, dim=-1)]).t()
        return scores, masks

    def _bias(self, query: Tensor, pixel: Tensor, side: tuple[int, int], clip: tuple[int, int]) -> Tensor:
        """Attention biases [B, heads, Q, n] of queries to the tower's patches."""
        q, p = (
            net(x).unflatten(2, (self.clip_heads, 16)).transpose(1, 2)
            for net, x in ((self.bias_query, query), (self.bias_pixel, pixel))
        )
        bias = (q @ p.transpose(2, 3) / 4).flatten(1, 2).unflatten(2, side)
        fitted: Tensor = F.adaptive_avg_pool2d(bias, clip).flatten(2).unflatten(1, (self.clip_heads, self.queries))
        return fitted

    def recognise(self, taps: Taps, base: Tensor, bias: Tensor) -> Tensor:
        """What copies of the class token become in the last blocks, [B, Q, d].

        Each sees itself and, by its bias, the patches; nobody sees it, so the patches stay what they were.

        Args:
            taps: the tower.
            base: tokens [B, prefix + n, d] in front of those blocks.
            bias: [B, heads, Q, n], added to the copies' attention logits.
        """
        start, n, count = base[:, :1], base.shape[1], bias.shape[2]
        mask = bias.new_zeros(len(base), self.clip_heads, n + count, n + count)
        mask[..., n:] = float("-inf")
        mask[..., n:, n:].diagonal(dim1=-2, dim2=-1).zero_()
        mask[..., n:, : taps.prefix] = float("-inf")  # the class token knows all of the image: copies must not ask it
        mask[..., n:, taps.prefix : n] = bias
        x = torch.cat([base, start.expand(-1, count, -1)], 1)
        return through(taps.blocks[self.enter :], x, mask)[:, n:]


def pooled(features: Tensor, weights: Tensor) -> Tensor:
    """Means [B, Q, d] of patches [B, n, d] under weights [B, Q, n]."""
    shares = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return shares.to(features.dtype) @ features


def prompted(target: Tensor, classes: int, prompts: int | None) -> Tensor:
    """Class numbers to ask each image for, int64 [B, K]: those it shows first, then others by chance.

    Args:
        target: class numbers [B, H, W]; others than 0 … classes − 1 are no class.
        classes: how many there are.
        prompts: K; None, or more than there are, for all in order.
    """
    every = torch.arange(classes, device=target.device)
    if prompts is None or prompts >= classes:
        return every.expand(len(target), -1)
    present = torch.stack([(target == number).flatten(1).any(1) for number in every], 1)
    return (present + torch.rand(present.shape, device=target.device)).topk(prompts, dim=1).indices


def mlp(width: int, out: int) -> nn.Sequential:
    """Three linear layers with ReLU between them."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))
