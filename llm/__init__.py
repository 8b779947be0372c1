"""Language models (and transformers' own ViT, CLIP and SigLIP) through transformers.

Importing this package loads nothing: names load when first used. There is no `create`: transformers' own
`from_pretrained` gives what `mmpeft.attach` takes.
"""

from mmpeft import _lazy

TASKS: dict[str, str] = {}
DATA: dict[str, str] = {}
COMMANDS: dict[str, tuple[str, str]] = {}


def register() -> None:
    """Tell the core where models of transformers can be tuned, what is refused, and by what names they are known."""
    from mmpeft.llm import anatomy, resizing  # noqa: F401 - register the anatomies, and what is refused
    from mmpeft.sites.named import Library, add_library

    add_library(Library("transformers", "mmpeft.llm.named", domain="llm"))


__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "build": "named",
        "example_inputs": "inputs",
    },
)
