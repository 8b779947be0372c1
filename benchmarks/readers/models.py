"""The models of a job as trees of modules, by the names that a program has for them, and back to diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.readers import flux_names
from benchmarks.readers.job import Job, Tensors
from benchmarks.readers.tree import tree


def own(base: Tensors, part: str) -> Tensors:
    """One component's tensors."""
    return {name.removeprefix(f"{part}."): t for name, t in base.items() if name.startswith(f"{part}.")}


def parts(base: Tensors) -> list[str]:
    """The components of a job."""
    return sorted({name.partition(".")[0] for name in base})


def is_t5(tensors: Tensors) -> bool:
    return any("SelfAttention" in name for name in tensors)


def text_tree(tensors: Tensors, classes: dict[str, str] | None = None) -> Any:
    """A text encoder as programs know it: CLIP's layers under `text_model`."""
    if not is_t5(tensors):
        tensors = {n if n.startswith("text") else f"text_model.{n}": t for n, t in tensors.items()}
    return tree(tensors, classes)


def text_back(part: str, root: Any, base: Tensors) -> Tensors:
    """The tensors of such a tree by the job's names."""
    found = {}
    for name, tensor in root.named_parameters():
        bare = f"{part}.{name.removeprefix('text_model.')}"
        found[bare if bare in base else f"{part}.{name}"] = tensor
    return found


def all_back(back: Callable[[], Tensors], texts: dict[str, Any], base: Tensors) -> Tensors:
    """The tensors of a denoiser's tree and of those of text encoders by the job's names."""
    changed = back()
    for part, text in texts.items():
        changed |= text_back(part, text, base)
    return changed


def denoiser_tree(
    job: Job, base: Tensors, name: Callable[[str], str] | None = None
) -> tuple[Any, Callable[[], Tensors]]:
    """The denoiser as a tree, by own names where it is a transformer, and what gives its tensors back."""
    if "transformer" in parts(base):
        root = tree(flux_names.native(job, base))
        return root, lambda: flux_names.back(job, base, dict(root.named_parameters()))
    tensors = own(base, "unet")
    named = {(name or str)(key): key for key in tensors}
    root = tree({new: tensors[key] for new, key in named.items()})
    return root, lambda: {f"unet.{named[new]}": t for new, t in root.named_parameters()}
