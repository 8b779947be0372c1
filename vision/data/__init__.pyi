"""Types of the names of mmpeft.vision.data; written by `python -m tests.support.stubs`."""

from mmpeft.vision.data.digits import DigitsData as DigitsData
from mmpeft.vision.data.emoji import EmojiData as EmojiData
from mmpeft.vision.data.folder import FolderData as FolderData
from mmpeft.vision.data.hub import HubData as HubData
from mmpeft.vision.data.vtab import VTABData as VTABData
