"""CoOp: the context of a class's name is learned instead of written."""

from __future__ import annotations

from dataclasses import dataclass

from mmpeft.methods.base import register
from mmpeft.methods.shared.in_place import InPlacePrompt


@register("https://arxiv.org/abs/2109.01134", "additive", mergeable=False, identity=False)
@dataclass(frozen=True)
class CoOp(InPlacePrompt):
    """`[start][V]₁ … [V]ₚ [class name][end]` with learned `V` [p, d]. Parameters: `p d`, with `depth` J `p d J`.

    Wants texts with `tokens` placeholders behind the start token (`position=0` where a tokenizer has none). With
    `depth` above one prompts are learned for further blocks too (the text half of PromptSRC's independent prompts).
    """
