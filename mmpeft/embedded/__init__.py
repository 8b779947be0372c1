"""The small world that runs offline: 1906 emoji in three drawing styles, and backbones pretrained on two of them."""

from mmpeft.embedded.emoji import SPLITS, STYLES, EmojiSet, emoji, spoken

__all__ = ["SPLITS", "STYLES", "EmojiSet", "emoji", "spoken"]
