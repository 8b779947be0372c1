"""mmpeft: parameter-efficient fine-tuning for every kind of large model.

Names are loaded when first used: `import mmpeft` imports neither torch nor any domain library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
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
}
_MODULES = {"sites", "parts", "controllers", "methods", "bank", "functional", "formats", "errors"}
_MODULES |= {"testing", "training", "bench", "combine", "embedded", "vision", "vla", "diffusion", "llm"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mmpeft.{name}")
    if name in _HOME:
        return getattr(import_module(f"mmpeft.{_HOME[name]}"), name)
    if name.startswith("_"):
        raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")
    methods = import_module("mmpeft.methods")
    if hasattr(methods, name):
        import_module("mmpeft.tuning")  # with the reader of adapter folders, for methods made of saved adapters
        return getattr(methods, name)
    from mmpeft.errors import nearest

    known = [*methods.METHODS, *_HOME, *_MODULES]
    raise AttributeError(f"module 'mmpeft' has no attribute {name!r}.{nearest(name, known)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES, *import_module("mmpeft.methods").METHODS})
