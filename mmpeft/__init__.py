"""mmpeft: parameter-efficient fine-tuning for every kind of large model.

Names are loaded when first used: `import mmpeft` imports neither torch nor any domain library.
"""

from mmpeft import _lazy, _moved

__version__ = "0.1.0"

_moved.install()


def _methods() -> dict[str, str]:
    """Every method, which are found by looking, and what they are made of."""
    import mmpeft.tuning  # noqa: F401 - with the reader of adapter folders, for methods made of saved adapters
    from mmpeft import methods

    return dict.fromkeys(methods.__all__, "methods")


__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "attach": "tuning",
        "use": "surgery.choice",
        "Together": "surgery.together",
        "Mixture": "surgery.mixture",
        "Bank": "bank",
        "detach": "surgery.attaching",
        "Tuning": "tuning",
        "tunings": "tuning",
        "load": "tuning",
        "load_foreign": "tuning",
        "Site": "sites",
        "select": "sites.selector",
        "list_methods": "methods",
        "gate": "methods.gated",
        "soup": "combine.soup",
        "interpolate": "combine.interpolate",
        "strength": "combine.strength",
        "zip_lora": "combine.zip",
        "at_rank": "methods.reparameterized.dylora",
        "allocate": "methods.selective.spt",
    },
    modules=(
        *("sites", "parts", "controllers", "methods", "bank", "functional", "formats", "errors", "combine"),
        *("testing", "data", "tasks", "run", "bench", "embedded", "vision", "vla", "diffusion", "llm"),
    ),
    more=_methods,
)
