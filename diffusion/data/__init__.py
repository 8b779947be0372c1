"""Data modules of text-to-image tuning."""

from mmpeft import _lazy

__getattr__, __dir__ = _lazy.exports(__name__, {"CaptionedImages": "images", "EmojiStyle": "emoji"})
