"""Recognition of tones: a domain of somebody else's, which mmpeft finds by its entry point."""

TASKS = {"ToneClassifier": "tones.task:ToneClassifier"}
DATA = {"ToneData": "tones.data:ToneData"}
COMMANDS = {"hear": ("tones.command:main", "name the tones of a trained run's test set")}


def register() -> None:
    """Tell mmpeft what models there are by name."""
    from mmpeft.sites.named import Library, add_library

    add_library(Library("tones", "tones.names"))
