"""How adapters are written in the formats other tools read: names, bytes, proof, place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, Refused, nearest
from mmpeft.files import only_writer, write_atomic
from mmpeft.formats import diffusers, hub_out, kohya, lycoris_out, mlx_out, original, peft_out
from mmpeft.formats.based import FOR_COMFY
from mmpeft.formats.content import Content
from mmpeft.formats.forms import FOLDERS, FORMATS, Form
from mmpeft.formats.inspection import read
from mmpeft.formats.names import DOTTED, resolved
from mmpeft.formats.verify import Check, compare, expected
from mmpeft.types import Json

OTHER_DORA = (
    "of such files LyCORIS and SD.Next read DoRA as it trained; ComfyUI, Forge, A1111 and InvokeAI have other formulas,"
    " sd-scripts and diffusers leave it out (docs/readers.md): write dora='comfy' or dora='difference'"
)


NAMED = {
    "comfy": "the names of the original repository",
    "mlx": "names and blocks of mlx_lm's models",
    "adapterhub": "the places of adapters' bottlenecks and its options",
}
"""Formats that need a model, and what for."""


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


def known_format(format: str, *prefixes: str) -> None:
    """Raise ConfigError for a format or a prefix that no file has."""
    names = tuple(dict.fromkeys((*DOTTED.values(), "")))
    for what, value, known in (("format", format, FORMATS), *(("prefix", prefix, names) for prefix in prefixes)):
        if value not in known:
            listed = ", ".join(filter(None, known))
            raise ConfigError(f"unknown {what} {value!r}; known: {listed}.{nearest(value, known)}")


def written_as(content: Content, format: str) -> list[str]:
    """What is to be said of layers that the format has not in the form in which they trained."""
    kept = format == "kohya" or (format == "peft" and all(layer.tensors for layer in content.layers))
    wide = [layer for layer in content.layers if layer.factor and not (kept and layer.tensors)]
    notes = []
    if format in ("kohya", "comfy") and any(layer.magnitude is not None for layer in content.layers):
        notes.append(OTHER_DORA)
    if not wide:
        return notes
    kinds = " and ".join(sorted({layer.factor for layer in wide}))
    return [
        *notes,
        f"{len(wide)} of {len(content.layers)} layers are {kinds}, written as the LoRA that each equals but for "
        f"rounding, of a rank up to {max(layer.rank for layer in wide)}",
    ]


def files_of(
    content: Content,
    models: Mapping[str, nn.Module | None],
    prefix: str,
    modules: Sequence[str],
    base: Json | None,
    encoders: int = 0,
    dora: Form = "",
) -> dict[str, bytes]:
    """Names and bytes of what a format writes; the file that makes the rest valid comes last."""
    if content.format == "peft":
        if content.layers and all(layer.tensors for layer in content.layers):
            return lycoris_out.folder_files(content, modules, base)
        plain = replace(content, layers=[replace(layer, tensors={}) for layer in content.layers])
        return peft_out.folder_files(plain, modules, base)
    marks = {FOR_COMFY: "ComfyUI"} if dora == "comfy" else {}
    if content.format in NAMED:
        model = models.get(prefix)
        if model is None:
            raise Refused(f"{NAMED[content.format]} are known for a model only; give it")
        if content.format == "mlx":
            return mlx_out.folder_files(content, model)
        if content.format == "adapterhub":
            return hub_out.folder_files(content, model)
        return {diffusers.WEIGHTS: original.comfy_bytes(content.layers, model, content.shifts, marks)}
    if content.format == "diffusers":
        return {diffusers.WEIGHTS: diffusers.diffusers_bytes(content.layers, prefix, modules)}
    return {diffusers.WEIGHTS: kohya.kohya_bytes(content.layers, prefix, models, content.shifts, encoders, marks)}


def by_own_reader(model: nn.Module | None, copy: Path, content: Content, prefix: str) -> Check:
    """Read a written file back by names alone where no model is given, by the model's modules where one is."""
    back = read(copy)
    if model is None:
        names = {x.path.replace(".", "_"): x.path for x in content.named}
        back = replace(
            back,
            layers=[replace(x, path=names.get(x.path, x.path), flat=False) if x.flat else x for x in back.layers],
            shifts=[replace(x, path=names.get(x.path, x.path), flat=False) if x.flat else x for x in back.shifts],
        )
    back = resolved(back, model, copy)
    if content.format not in (*FOLDERS, "comfy") and model is None:
        content = replace(content, layers=[replace(x, component=x.component or prefix) for x in content.layers])
    else:
        content, back = (replace(c, layers=[replace(x, component="") for x in c.layers]) for c in (content, back))
    return compare("mmpeft", acting(content), acting(back))


def acting(content: Content) -> dict[str, Tensor]:
    """What a reader must have; rows of zeros in a fused module are no layer of their own."""
    found = expected(content)
    return {name: t for name, t in found.items() if t.any()} or found


def put_proven(
    files: Mapping[str, bytes],
    path: Path,
    content: Content,
    prove: Callable[[Path], tuple[Check, ...]] | None,
    notes: Sequence[str],
) -> Exported:
    """Prove the bytes in a temporary folder, then put them into place."""
    if content.format not in FOLDERS:
        path = path if path.suffix == ".safetensors" else path / diffusers.WEIGHTS
        if os.path.isdir(path):  # unlike those of Path, these say no to every name that cannot be
            raise AdapterFileError(f"expected a file name, {path} is a folder")
    elif os.path.isfile(path) or path.suffix == ".safetensors":
        raise AdapterFileError(
            f"an adapter of the format {content.format} is a folder of two files; {path} is the name of one file"
        )
    checks: tuple[Check, ...] = ()
    if prove:
        with tempfile.TemporaryDirectory(prefix="mmpeft-") as scratch:
            for name, data in files.items():
                write_atomic(Path(scratch) / name, data)
            checks = prove(Path(scratch) if content.format in FOLDERS else Path(scratch) / next(iter(files)))
    with only_writer(path) if content.format in FOLDERS else nullcontext():  # of two writers one, file and config
        for name, data in files.items():
            write_atomic(path / name if content.format in FOLDERS else path, data)
    count = len(content.layers) + len(content.scalings) + (content.learned is not None)
    return Exported(path, content.format, count, sum(map(len, files.values())), checks, tuple(notes))
