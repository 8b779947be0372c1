"""Adapters in the formats other tools read: describe, load, export with proof, convert."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused, nearest
from mmpeft.files import write_atomic
from mmpeft.formats import diffusers, lycoris_out, native, original, peft
from mmpeft.formats.bridge import attach_content, content_of
from mmpeft.formats.content import Content
from mmpeft.formats.inspection import FileInfo, inspect, read, refusal
from mmpeft.formats.verify import Check, by_diffusers, by_peft, by_peft_answers, compare, expected
from mmpeft.hosting.modules import CHILD
from mmpeft.surgery.attached import Attached

__all__ = ["FORMATS", "Exported", "FileInfo", "convert", "export", "inspect", "load_foreign", "read"]

Format = Literal["peft", "diffusers", "kohya", "comfy"]
FORMATS: tuple[Format, ...] = ("peft", "diffusers", "kohya", "comfy")


@dataclass(frozen=True)
class Exported:
    """A written file and who has read it back."""

    path: Path
    format: str
    layers: int
    bytes: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def verified_by(self) -> tuple[str, ...]:
        return tuple(check.reader for check in self.checks)

    @property
    def difference(self) -> float:
        """Largest relative difference of any tensor, over all readers."""
        return max((check.difference for check in self.checks), default=float("nan"))


def load_foreign(model: nn.Module, path: str | Path, name: str = "default", component: str = "") -> Attached:
    """Attach an adapter of any known format; `mmpeft.load_foreign` says more, and gives the whole handle."""
    path = Path(path)
    if (path / native.MANIFEST).exists():
        return native.load(model, path, name)
    content = read(path)
    refused = refusal(content)
    if refused:
        raise AdapterFileError(f"{path}: {refused}")
    if component:
        if component not in content.components:
            raise AdapterFileError(
                f"{path} has no layers of {component!r}; it has those of {content.components}."
                f"{nearest(component, content.components)}"
            )
        content = replace(content, layers=[x for x in content.layers if x.component == component])
    elif len(content.components) > 1:
        raise AdapterFileError(f"{path} holds layers of {content.components}; choose one with component=")
    content = replace(content, layers=diffusers.resolve(content.layers, model, path))
    return attach_content(model, content, name, path)


def export(
    tuning: Attached, path: str | Path, format: Format = "peft", *, verify: bool = True, prefix: str = ""
) -> Exported:
    """Write a tuning as a PEFT folder, or as one file of the diffusers, kohya or comfy style; then prove it.

    What is written is first reloaded from a temporary folder, by its consumer where that is installed and by this
    suite's own reader, and compared layer by layer; only then it takes its place, atomically. `prefix` is the model's
    name in a pipeline (`unet`, `transformer`), by default that of its class.

    Raises:
        Refused: the tuning has parts that the format cannot hold. AdapterFileError: a reader finds other layers or
            values; nothing is written then.
    """
    _known(format, prefix)
    model = tuning.model
    content = replace(content_of(tuning, format), format=format)
    prefix = prefix or diffusers.component_for(model)
    if format in ("diffusers", "kohya") and prefix.startswith("text_encoder"):  # files have other names for its modules
        return export_pipeline({prefix: tuning}, path, format, verify=verify)
    modules = [n for n, _ in model.named_modules() if CHILD not in n.split(".")]
    base = getattr(getattr(model, "config", None), "name_or_path", None) or None
    files = _files(content, model, prefix, modules, base)
    notes: list[str] = []
    wide = [layer.rank for layer in content.layers if layer.tensors]
    if wide and format in ("diffusers", "comfy"):
        notes.append(f"{content.method} is written as the LoRA that it equals, of a rank up to {max(wide)}")

    def prove(copy: Path) -> tuple[Check, ...]:
        checks = [_by_own_reader(model, copy, content, prefix)]
        if format == "peft":
            checks += (
                by_peft(model, copy, content) if content.learned is None else by_peft_answers(tuning, copy, content)
            )
        elif format == "kohya" and (limits := _kohya_limits(content, prefix)):
            notes.append(limits)
        elif format == "comfy":
            notes.append("no reader of these names is a library; they are those of diffusers' converters")
        else:
            checks += by_diffusers(model, copy, prefix, content)
        return tuple(checks)

    return _write(files, Path(path), content, prove if verify else None, notes)


def export_pipeline(
    tunings: Mapping[str, Attached],
    path: str | Path,
    format: Literal["diffusers", "kohya"] = "diffusers",
    *,
    verify: bool = True,
) -> Exported:
    """Write tunings of several models of one pipeline as one file: `{"unet": …, "text_encoder": …}`.

    Each model's layers are read back as `export` does.

    Raises:
        Refused: a tuning has parts that the format cannot hold. AdapterFileError: a reader finds other layers.
    """
    _known(format, *tunings)
    contents = {name: replace(content_of(tuning, format), format=format) for name, tuning in tunings.items()}
    layers = [layer for name, own in contents.items() for layer in diffusers.in_files(own.layers, name)]
    whole = Content(format, layers)
    files = _files(whole, None, "", [], None)

    def prove(copy: Path) -> tuple[Check, ...]:
        checks: list[Check] = []
        for name, tuning in tunings.items():
            back = read(copy)
            back = replace(back, layers=[x for x in back.layers if x.component == name])
            resolved = [replace(x, component="") for x in diffusers.resolve(back.layers, tuning.model, copy)]
            checks.append(compare("mmpeft", expected(contents[name]), expected(replace(back, layers=resolved))))
            if not (format == "kohya" and _kohya_limits(contents[name], name)):
                checks += by_diffusers(tuning.model, copy, name, contents[name])
        return tuple(checks)

    return _write(files, Path(path), whole, prove if verify else None, [])


def convert(
    src: str | Path, dst: str | Path, format: Format, *, model: nn.Module | None = None, prefix: str = ""
) -> Exported:
    """Rewrite an adapter file in another format, scale baked in; read back and compared.

    A model is needed only where names are ambiguous: from kohya files, whose names have lost their dots. `prefix`
    renames the model of a file that holds one; by default the file's own name for it is kept.

    Raises:
        AdapterFileError, Refused: unreadable, inexpressible, or a model is needed.
    """
    _known(format, prefix)
    src, dst = Path(src), Path(dst)
    content = read(src)
    refused = refusal(content)
    if refused:
        raise AdapterFileError(f"{src}: {refused}")
    layers = diffusers.resolve(content.layers, model, src)
    if any(layer.flat for layer in layers):
        raise AdapterFileError(f"{src}: {next(x.path for x in layers if x.flat)!r} names no module of the model given")
    if format != "peft" and content.learned is not None:
        raise Refused(f"{src} holds learned tokens ({content.learned.kind}); {format} has no key for them")
    if format != "peft" and (content.scalings or content.whole):
        raise Refused(
            f"{src} holds {'(IA)³ vectors' if content.scalings else 'whole modules'}; {format} has no key for them"
        )
    if content.stacks:
        raise Refused(f"{src} holds updates of experts, whose tensors only a model tells: load it and export() that")
    if format in ("peft", "comfy") and len(content.components) > 1:
        raise Refused(f"{src} holds layers of {content.components}; a {format} adapter is for one model")
    if prefix and len(content.components) == 1:
        layers = [replace(layer, component=prefix) for layer in layers]
    prefix = prefix or ("unet" if model is None else diffusers.component_for(model))
    content = replace(content, format=format, layers=[layer.baked() for layer in layers])
    modules = [n for n, _ in model.named_modules()] if model is not None else []
    files = _files(content, model, prefix, modules, None)
    return _write(files, dst, content, lambda copy: (_by_own_reader(model, copy, content, prefix),), [])


# -- shared -------------------------------------------------------------------------------------------------


def _known(format: str, *prefixes: str) -> None:
    names = (*diffusers.FLAT_OUT, "")
    for what, value, known in (("format", format, FORMATS), *(("prefix", prefix, names) for prefix in prefixes)):
        if value not in known:
            listed = ", ".join(filter(None, known))
            raise ConfigError(f"unknown {what} {value!r}; known: {listed}.{nearest(value, known)}")


def _files(
    content: Content, model: nn.Module | None, prefix: str, modules: Sequence[str], base: str | None
) -> dict[str, bytes]:
    """Names and bytes of what a format writes; the file that makes the rest valid comes last."""
    if content.format == "peft":
        write = lycoris_out.folder_files if any(layer.tensors for layer in content.layers) else peft.folder_files
        return write(content, modules, base)
    if content.format == "comfy":
        if model is None:
            raise Refused("the names of the original repository are known for a model only; give it")
        return {diffusers.WEIGHTS: original.comfy_bytes(content.layers, model)}
    if content.format == "diffusers":
        return {diffusers.WEIGHTS: diffusers.diffusers_bytes(content.layers, prefix, modules)}
    return {diffusers.WEIGHTS: diffusers.kohya_bytes(content.layers, prefix)}


def _by_own_reader(model: nn.Module | None, copy: Path, content: Content, prefix: str) -> Check:
    """Read a written file back by names alone where no model is given, by the model's modules where one is."""
    back = read(copy)
    layers = back.layers
    if model is None:
        names = {layer.path.replace(".", "_"): layer.path for layer in content.layers}
        layers = [replace(x, path=names.get(x.path, x.path), flat=False) if x.flat else x for x in layers]
    back = replace(back, layers=diffusers.resolve(layers, model, copy))
    if content.format not in ("peft", "comfy"):
        content = replace(content, layers=[replace(x, component=x.component or prefix) for x in content.layers])
    else:
        content = replace(content, layers=[replace(x, component="") for x in content.layers])
    wanted, got = expected(content), expected(back)
    if content.format == "comfy":  # rows of zeros in a fused module are no layer of their own
        wanted, got = ({name: t for name, t in side.items() if t.any()} for side in (wanted, got))
    return compare("mmpeft", wanted, got)


def _kohya_limits(content: Content, prefix: str) -> str:
    """Why diffusers is no judge of a kohya file; empty when it is."""
    if any(layer.tensors for layer in content.layers):
        return "diffusers reads no LoHa and LoKr; LyCORIS, ComfyUI and A1111 do"
    if any(layer.magnitude is not None for layer in content.layers):
        return "diffusers drops dora_scale; other readers of kohya files take it"
    if prefix != "unet":
        return "diffusers reads kohya names of UNets only"
    return ""


def _write(
    files: Mapping[str, bytes],
    path: Path,
    content: Content,
    prove: Callable[[Path], tuple[Check, ...]] | None,
    notes: Sequence[str],
) -> Exported:
    """Prove the bytes in a temporary folder, then put them into place."""
    if content.format != "peft":
        path = path if path.suffix == ".safetensors" else path / diffusers.WEIGHTS
        if path.is_dir():
            raise AdapterFileError(f"expected a file name, {path} is a folder")
    elif path.is_file() or path.suffix == ".safetensors":
        raise AdapterFileError(f"a PEFT adapter is a folder of two files; {path} is the name of one file")
    checks: tuple[Check, ...] = ()
    if prove:
        with tempfile.TemporaryDirectory(prefix="mmpeft-") as scratch:
            for name, data in files.items():
                write_atomic(Path(scratch) / name, data)
            checks = prove(Path(scratch) if content.format == "peft" else Path(scratch) / next(iter(files)))
    for name, data in files.items():
        write_atomic(path / name if content.format == "peft" else path, data)
    count = len(content.layers) + len(content.scalings) + (content.learned is not None)
    return Exported(path, content.format, count, sum(map(len, files.values())), checks, tuple(notes))
