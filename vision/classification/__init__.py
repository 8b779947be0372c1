"""Image classification: `task` is the model and its loss, `draw` what a run shows."""

from mmpeft._lazy import exports

__getattr__, __dir__ = exports(
    __name__,
    {
        "ImageClassifier": "task",
        "metrics": "task",
    },
)
