"""Data modules of image tasks."""

from mmpeft import _lazy

__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "EmojiData": "emoji",
        "DigitsData": "digits",
        "FolderData": "folder",
        "HubData": "hub",
        "VTABData": "vtab",
    },
)
