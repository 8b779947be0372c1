"""Contrastive tuning of an image-text pair, measured by retrieval: `task`, and `data` of images with texts."""

from mmpeft._lazy import exports

__getattr__, __dir__ = exports(
    __name__,
    {
        "ContrastiveTuner": "task",
        "recall": "task",
        "CaptionData": "data",
    },
)
