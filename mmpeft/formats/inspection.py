"""What is in an adapter file, and whether it fits a model; nothing is attached."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, MMPEFTError, MMPEFTWarning
from mmpeft.formats import hub, lycoris, mlx, native, peft, single_file
from mmpeft.formats.content import PICKLED, Content, read_json, read_tensors
from mmpeft.formats.low_rank import tunable_sites
from mmpeft.formats.names import resolved


@dataclass(frozen=True)
class FileInfo:
    """What `inspect` finds in an adapter file."""

    path: Path
    format: str
    method: str
    layers: int
    bytes: int
    ranks: Mapping[int, int] = field(default_factory=dict)
    """Rank → layers that have it."""
    scales: Mapping[float, int] = field(default_factory=dict)
    """Effective scale s of `s · up · down` → layers that have it."""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    components: Mapping[str, int] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    """Modules and tensors that are saved whole beside the layers, and tables of which rows are."""
    notes: tuple[str, ...] = ()
    refused: str = ""
    """Why the file cannot be loaded; empty when it can."""
    matched: tuple[str, ...] | None = None
    unmatched: tuple[str, ...] | None = None
    """Layers with and without a place in the model; None when no model was given."""


def read(path: str | Path) -> Content:
    """The content of a PEFT folder or a single LoRA file, whichever is there.

    Raises:
        AdapterFileError: nothing readable, or values that no adapter has; the message says what is there instead.
    """
    path = Path(path)
    try:
        content = _read(path)
    except MMPEFTError:
        raise
    except Exception as error:  # whatever a damaged config or a strange shape leads to: the file is at fault
        raise AdapterFileError(f"{path} is no adapter as its format has it: {error!r}") from error
    content.check(path)
    return content


def _read(path: Path) -> Content:
    if path.is_file():
        beside = path.name in (peft.WEIGHTS, mlx.WEIGHTS, hub.WEIGHTS) and (path.parent / peft.CONFIG).exists()
        return _read_folder(path.parent) if beside or path.name == peft.CONFIG else single_file.read_file(path)
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist")
    if (path / peft.CONFIG).exists():
        return _read_folder(path)
    if (path / native.MANIFEST).exists():
        raise AdapterFileError(
            f"{path} is this suite's own folder; attach it with mmpeft.load(), or write it anew with `mmpeft export`"
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = sorted(p.name for p in path.iterdir())[:5]
        pickled = any(name.endswith(PICKLED) for name in names)
        why = "; pickled files are never read, because unpickling runs code" if pickled else ""
        raise AdapterFileError(f"expected {peft.CONFIG} or one .safetensors file in {path}; it holds {names}{why}")
    return single_file.read_file(files[0])


def _read_folder(folder: Path) -> Content:
    config = read_json(folder / peft.CONFIG)
    if mlx.is_config(config):
        return mlx.read_folder(folder)
    if hub.is_config(config):
        return hub.read_folder(folder)
    return lycoris.read_folder(folder) if config.get("peft_type") in lycoris.TYPES else peft.read_folder(folder)


def inspect(path: str | Path, model: nn.Module | None = None) -> FileInfo:
    """Describe an adapter file: format, method, layers, ranks, effective scales and, given a model, what fits it.

    Raises:
        AdapterFileError: it is not an adapter file, or only a part of one.
    """
    path = Path(path)
    if (path / native.MANIFEST).exists():
        return _inspect_native(path)
    content = read(path)
    info = FileInfo(
        path,
        content.format,
        content.method,
        sum(content.components.values())
        + len(content.scalings)
        + len(content.others)
        + (content.learned is not None)
        + len(hub.branches(content)),
        _size(path),
        dict(sorted(Counter(layer.rank for layer in content.layers).items())),
        dict(sorted(Counter(round(layer.scale, 6) for layer in content.layers).items())),
        _dtypes(_tensors(content)),
        content.components,
        (*content.whole, *content.base, *content.words),
        content.notes,
        refusal(content),
    )
    if model is None:
        return info
    content = resolved(content, model, path)
    names = [*(layer.path for layer in content.layers), *(s.path for s in content.scalings), *content.others]
    known = {*tunable_sites(model, ("linear", "conv"))}
    flat = {name.replace(".", "_") for name in known} if content.others else set()
    fits = {name: name in known or name in flat for name in names}
    own = {name for name, _ in model.named_parameters()}
    fits |= {f"{x.path}.{x.tensor}": f"{x.path}.{x.tensor}" in own for x in content.shifts}
    matched = tuple(name for name, fit in fits.items() if fit)
    return replace(info, matched=matched, unmatched=tuple(name for name, fit in fits.items() if not fit))


def refusal(content: Content) -> str:
    """Why content that can be described cannot be loaded; empty when it can."""
    idle = next((layer.path for layer in content.layers if layer.scale == 0), "")
    if idle:
        return f"{idle} has alpha 0, which some readers take as no effect and others as alpha = r; set it"
    if not content.others:
        return ""
    kinds = ", ".join(f"{kind} ×{n}" for kind, n in Counter(content.others.values()).items())
    return f"it holds layers of {kinds}, a factor that is not read here"


def _inspect_native(folder: Path) -> FileInfo:
    manifest = native.read_manifest(folder)
    tensors, _ = read_tensors(native.tensors_path(folder, manifest["tensors"], native.MANIFEST))
    return FileInfo(
        folder,
        "mmpeft",
        str(manifest["method"]["name"]),
        len(manifest["sites"]),
        _size(folder),
        dtypes=_dtypes(tensors.values()),
        notes=(f"made for {manifest['base']['class']} {manifest['base']['fingerprint']}",),
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.iterdir() if p.is_file())


def _tensors(content: Content) -> list[Tensor]:
    found = [tensor for layer in content.layers for tensor in (layer.down, layer.up)]
    found += [scaling.gamma for scaling in content.scalings]
    found += [shift.value for shift in content.shifts]
    found += [tensor for item in content.based for tensor in item.tensors.values()]
    found += [content.learned.tensor] if content.learned else []
    found += hub.of_branches(content).values()
    return found + [tensor for own in content.whole.values() for tensor in own.values()]


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """How many tensors are of each type."""
    return dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))


def readable(path: Path, strict: bool) -> Content:
    """A file's content, if it can be loaded; keys that are left out are said.

    Raises:
        AdapterFileError: it cannot, or with `strict` a key is left out.
    """
    content = read(path)
    refused = refusal(content)
    if refused:
        raise AdapterFileError(f"{path}: {refused}")
    if content.unread:
        said = f"{path}: {len(content.unread)} keys are of no known kind, first {content.unread[0]!r}"
        if strict:
            raise AdapterFileError(f"{said}; with strict=False the rest is loaded")
        warnings.warn(f"{said}; they are left out", MMPEFTWarning, stacklevel=3)
    for doubt in content.doubts:
        warnings.warn(f"{path}: {doubt}", MMPEFTWarning, stacklevel=3)
    return content
