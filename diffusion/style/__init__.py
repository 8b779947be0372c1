"""Tuning of text-to-image pipelines to a style, a subject or a property: tasks, evaluators, and commands that draw."""

from mmpeft._lazy import exports

__getattr__, __dir__ = exports(
    __name__,
    {
        "StyleTuner": "task",
        "WordTuner": "words",
        "SliderTuner": "slider",
    },
)
