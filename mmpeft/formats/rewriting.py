"""Adapter files as other adapter files: another format, or several as one; a model only where names need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused
from mmpeft.formats import native
from mmpeft.formats.content import Content
from mmpeft.formats.forms import FOLDERS, Format
from mmpeft.formats.hub import branches
from mmpeft.formats.inspection import read, readable
from mmpeft.formats.names import component_for, is_original, is_unets, resolved
from mmpeft.formats.summed import weighted_sum
from mmpeft.formats.writing import Exported, by_own_reader, files_of, known_format, put_proven, written_as


def convert(
    src: str | Path,
    dst: str | Path,
    format: Format,
    *,
    model: nn.Module | None = None,
    prefix: str = "",
    encoders: int = 0,
) -> Exported:
    """Rewrite an adapter file in another format, scale baked in; read back and compared.

    A model is needed only where names or values are ambiguous: from kohya files, whose names have lost their dots, and
    from those with the names of original repositories. `prefix` renames the model of a file that holds one; by default
    the file's own name for it is kept. `encoders` as for `export`.

    Raises:
        AdapterFileError, Refused: unreadable, inexpressible, or a model is needed.
    """
    known_format(format, prefix)
    src = Path(src)
    content = resolved(readable(src, strict=False), model, src)
    return _rewritten(content, src, Path(dst), format, model, prefix, encoders)


def mix_files(
    files: Sequence[str | Path],
    dst: str | Path,
    format: Format = "diffusers",
    *,
    weights: Sequence[float] | None = None,
    model: nn.Module | None = None,
    prefix: str = "",
) -> Exported:
    """Write the weighted sum `Σ_k w_k ΔW_k` of several LoRA files as one LoRA, of the sum of their ranks.

    `model` and `prefix` as for `convert`; weights are 1 by default.

    Raises:
        ConfigError: fewer than two files, or not a weight for each.
        AdapterFileError, Refused: a file is unreadable, holds more than low-rank updates, or a model is needed.
    """
    known_format(format, prefix)
    factors = [1.0] * len(files) if weights is None else list(weights)
    if len(files) < 2 or len(factors) != len(files):
        raise ConfigError(f"expected two files or more and a weight each, got {len(files)} and {len(factors)}")
    contents = {Path(file): resolved(readable(Path(file), strict=False), model, Path(file)) for file in files}
    if len(contents) < len(files):
        raise ConfigError(f"a file is named twice in {[str(file) for file in files]}")
    summed = weighted_sum(contents, factors)
    return _rewritten(summed, Path(files[0]), Path(dst), format, model, prefix, 0)


def needs_model(path: str | Path) -> bool:
    """Whether an adapter is read with its model only: this suite's folders, kohya's names, updates of base values."""
    path = Path(path)
    if (path / native.MANIFEST).exists():
        return True
    content = read(path)
    return (
        content.format in ("mlx", "adapterhub")
        or bool(content.based)
        or any(item.flat or is_original(item.path) for item in content.named)
    )


def _rewritten(
    content: Content, src: Path, dst: Path, format: Format, model: nn.Module | None, prefix: str, encoders: int
) -> Exported:
    """Content of a file as a file of another format; raises what `convert` says."""
    layers = content.layers
    if any(layer.flat for layer in layers):
        raise AdapterFileError(f"{src}: {next(x.path for x in layers if x.flat)!r} names no module of the model given")
    strange = next((x.path for x in layers if is_original(x.path)), "")
    if strange:
        raise AdapterFileError(
            f"{src}: {strange} is a name of an original repository, which readers of {format} files would not find; "
            "give the model that the file is for"
        )
    unsaid = next((x.path for x in layers if not x.component and not is_unets(x.path)), "")
    if unsaid and model is None and not prefix and format in ("diffusers", "kohya"):
        raise AdapterFileError(
            f"{src}: {unsaid} is of no named model of a pipeline, and no name in a UNet of diffusers, so that readers "
            f"of {format} files may not find it; give the model, or prefix= if the names are diffusers' own"
        )
    if format != "peft" and content.learned is not None:
        raise Refused(f"{src} holds learned tokens ({content.learned.kind}); {format} has no key for them")
    if format not in FOLDERS and content.beside:
        raise Refused(f"{src} holds {content.beside}; {format} has no key for them")
    if content.shifts and format in (*FOLDERS, "diffusers"):
        first = content.shifts[0]
        raise Refused(f"{src} holds a difference of {first.path}.{first.tensor}; {format} files have no key for it")
    if branches(content) and format != "adapterhub":
        raise Refused(f"{src} holds bottlenecks; {format} has no key for them")
    if content.stacks:
        raise Refused(f"{src} holds updates of experts, whose tensors only a model tells: load it and export() that")
    if format in (*FOLDERS, "comfy") and len(content.components) > 1:
        raise Refused(f"{src} holds layers of {content.components}; a {format} adapter is for one model")
    if prefix and len(content.components) == 1:
        layers = [replace(layer, component=prefix) for layer in layers]
        content = replace(content, shifts=[replace(x, component=prefix) for x in content.shifts])
    prefix = prefix or ("unet" if model is None else component_for(model))
    content = replace(content, format=format, layers=[layer.baked() for layer in layers])
    modules = [n for n, _ in model.named_modules()] if model is not None else []
    models = {prefix: model} if model is not None else dict.fromkeys(content.components, None)
    files = files_of(content, models, prefix, modules, None, encoders)
    return put_proven(
        files, dst, content, lambda copy: (by_own_reader(model, copy, content, prefix),), written_as(content, format)
    )
