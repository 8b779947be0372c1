"""Types of the names of mmpeft.diffusion.data; written by `python -m tests.support.stubs`."""

from mmpeft.diffusion.data.emoji import EmojiStyle as EmojiStyle
from mmpeft.diffusion.data.images import CaptionedImages as CaptionedImages
