"""MaPLe: prompts of the image tower are made from those of the text tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mmpeft.methods.base import register
from mmpeft.methods.needs import Need, Refusal
from mmpeft.methods.placed import Placed
from mmpeft.methods.shared.in_place import InPlacePrompt
from mmpeft.parts.base import Hook, Placement
from mmpeft.parts.in_place import Coupled, InPlace
from mmpeft.sites import Site


def _images(method: MaPLe, available: Sequence[Site]) -> list[Site]:
    """The image tower's token sites up to `depth`."""
    return [s for s in available if (s.role, s.tower) == ("tokens", "image") and s.depth < method.depth]


def _closed(method: MaPLe, chosen: Sequence[Site], available: Sequence[Site]) -> Site | None:
    return next((site for site in _images(method, available) if site.refuse), None)


@register("https://arxiv.org/abs/2210.03117", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class MaPLe(InPlacePrompt):
    """Text prompts `P_i` as in `CoOp` and image prompts `P'_i = W_i P_i + b_i`, for the first `depth` blocks.

    Image prompts stand behind the class token, enter after the position embedding, and are taken out behind the last
    block. Parameters: `Σ_i p d_t + d_t d_v + d_v` over `min(J, blocks)` levels of both towers.
    """

    tokens: int = 2
    depth: int = 9

    refuses: ClassVar[tuple[Refusal, ...]] = (*InPlacePrompt.refuses, Refusal(_closed, "{site.refuse}"))

    @property
    def needs(self) -> tuple[Need, ...]:
        return (*super().needs, Need("tokens of an image tower to stand beside", "image:tokens"))

    def pairs(self, available: list[Site]) -> list[Site]:
        """The image tower's token sites up to `depth`, as many as there are text levels."""
        return _images(self, available)[: len(self.levels(available))]

    def place(self, model: nn.Module, available: list[Site]) -> Placed:
        texts = self.texts(model, available)
        images = self.pairs(available)
        every = [site for site in available if site.role == "tokens" and site.tower == "image"]
        for number, (text, site) in enumerate(zip(texts, images)):
            assert isinstance(text.part, InPlace)
            last = number == min(len(texts), len(images)) - 1
            spans = [s for s in every if s.depth >= site.depth] if last else [site]
            part = Coupled(text.part, site.width, site.prefix).to(text.part.tokens.device)
            readers = tuple(Hook(s.prefix_reader, "read", "num_prefix_tokens") for s in spans if s.prefix_reader)
            start = Hook(site.entry or site.path, "enter")
            hooks = (start, Hook(spans[-1].path, "exit"), *readers)
            texts.append(Placement(part, site.path, "maple", hooks, site.role))
        return Placed(texts)

    def count(self, model: nn.Module, available: list[Site]) -> int:
        levels, images = self.levels(available), self.pairs(available)
        couplings = sum((text.width + 1) * image.width for text, image in zip(levels, images))
        return super().count(model, available) + couplings
