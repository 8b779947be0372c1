"""Adapters in the formats other tools read: describe, load, export with proof, convert."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mmpeft.errors import AdapterFileError, ConfigError, MMPEFTWarning, Refused, nearest
from mmpeft.files import only_writer, write_atomic
from mmpeft.formats import diffusers, kohya, lycoris_out, native, original, peft_out
from mmpeft.formats.based import FOR_COMFY
from mmpeft.formats.bridge import attach_content, content_of
from mmpeft.formats.content import Content
from mmpeft.formats.dora_out import Form, written
from mmpeft.formats.inspection import FileInfo, inspect, read, refusal
from mmpeft.formats.names import DOTTED, aliases_of, assigned, component_for, is_original, resolved
from mmpeft.formats.verify import Check, by_peft, by_peft_answers, compare, expected
from mmpeft.formats.verify_diffusers import by_diffusers, unread_by_diffusers
from mmpeft.hosting.modules import CHILD
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.transaction import unchanged_on_error
from mmpeft.types import Json

__all__ = ["FORMATS", "Exported", "FileInfo", "convert", "export", "inspect", "load_foreign", "read"]

Format = Literal["peft", "diffusers", "kohya", "comfy"]
FORMATS: tuple[Format, ...] = ("peft", "diffusers", "kohya", "comfy")


OTHER_DORA = (
    "of such files LyCORIS and SD.Next read DoRA as it trained; ComfyUI, Forge, A1111 and InvokeAI have other formulas,"
    " sd-scripts and diffusers leave it out (docs/readers.md): write dora='comfy' or dora='difference'"
)


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


def load_foreign(
    model: nn.Module, path: str | Path, name: str = "default", component: str = "", *, strict: bool = False
) -> Attached:
    """Attach an adapter of any known format; `mmpeft.load_foreign` says more, and gives the whole handle."""
    path = Path(path)
    if (path / native.MANIFEST).exists():
        return native.load(model, path, name)
    content = _readable(path, strict)
    if component:
        if component not in content.components:
            raise AdapterFileError(
                f"{path} has no layers of {component!r}; it has those of {content.components}."
                f"{nearest(component, content.components)}"
            )
        content = content.of([component])
    elif len(content.components) > 1:
        raise AdapterFileError(f"{path} holds layers of {content.components}; choose one with component=")
    return attach_content(model, resolved(content, model, path), name, path, strict=strict)


def load_parts(
    models: Mapping[str, nn.Module],
    path: str | Path,
    name: str = "default",
    *,
    aliases: Mapping[str, str] | None = None,
    absent: Collection[str] = (),
    strict: bool = False,
) -> dict[str, Attached]:
    """Attach a file's layers to the models of a pipeline, by component name, each layer to one of them.

    Layers of the `absent`, which the pipeline has a place for and was opened without, are left out with a warning.

    Raises:
        AdapterFileError: unreadable, or with layers that are for none of the models. All are left as they were.
    """
    path = Path(path)
    content = _readable(path, strict)
    missing = {component for component in content.components if (aliases or {}).get(component, component) in absent}
    if missing and not strict:
        count = len(content.of(missing).named)
        warnings.warn(
            f"{path}: {count} layers of {' and '.join(sorted(missing))} are left out: the pipeline was opened without",
            MMPEFTWarning,
            stacklevel=2,
        )
        content = content.of(set(content.components) - missing)
    owners = assigned(content, models, aliases or {}, path)
    parts = {owner: content.of([c for c in owners if owners[c] == owner]) for owner in models}
    fitting = {owner: resolved(part, models[owner], path) for owner, part in parts.items() if part.components}
    if not owners:  # (IA)³, learned tokens and whole modules are of one model
        fitting = {next(iter(models)): resolved(content, next(iter(models.values())), path)}
    with ExitStack() as stack:
        for owner in fitting:
            stack.enter_context(unchanged_on_error(models[owner]))
        return {owner: attach_content(models[owner], part, name, path) for owner, part in fitting.items()}


def _readable(path: Path, strict: bool) -> Content:
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
    return content


def export(
    tuning: Attached,
    path: str | Path,
    format: Format = "peft",
    *,
    verify: bool = True,
    prefix: str = "",
    encoders: int = 0,
    dora: Form = "",
    rank: int = 0,
) -> Exported:
    """Write a tuning as a PEFT folder, or as one file of the diffusers, kohya or comfy style; then prove it.

    What is written is first reloaded from a temporary folder, by its consumer where that is installed and by this
    suite's own reader, and compared layer by layer; only then it takes its place, atomically. `prefix` is the model's
    name in a pipeline (`unet`, `transformer`), by default that of its class; `encoders` is how many text encoders that
    pipeline has, which decides what kohya's files call a text encoder (`lora_te_` the only one). `dora` writes DoRA in
    another form for readers that take it otherwise (`comfy`, `difference`, `low_rank` of `rank`; see `dora_out`).

    Raises:
        Refused: the tuning has parts that the format cannot hold. AdapterFileError: a reader finds other layers or
            values; nothing is written then.
    """
    _known(format, prefix)
    model = tuning.model
    prefix = prefix or component_for(model)
    if format in ("diffusers", "kohya"):
        return export_pipeline({prefix: tuning}, path, format, verify=verify, encoders=encoders, dora=dora, rank=rank)
    own = replace(content_of(tuning, format), format=format)
    layers, said = written(own.layers, model, dora, format, rank)
    content = replace(own, layers=layers)
    own = own if dora == "comfy" else content
    modules = [n for n, _ in model.named_modules() if CHILD not in n.split(".")]
    base = peft_out.base_fields(model)
    files = _files(content, {prefix: model}, prefix, modules, base, dora=dora)
    notes = [said] if said else _written_as(content, format)
    if format == "peft":
        notes += peft_out.limits(content, model)
    if format == "comfy":
        notes.append("the names are those of diffusers' converters; docs/readers.md says what ComfyUI makes of them")

    def prove(copy: Path) -> tuple[Check, ...]:
        checks = [_by_own_reader(model, copy, own, prefix)]
        if format == "peft":
            checks += (
                by_peft(model, copy, content) if content.learned is None else by_peft_answers(tuning, copy, content)
            )
        return tuple(checks)

    return _write(files, Path(path), content, prove if verify else None, notes)


def export_pipeline(
    tunings: Mapping[str, Attached],
    path: str | Path,
    format: Literal["diffusers", "kohya"] = "diffusers",
    *,
    verify: bool = True,
    encoders: int = 0,
    dora: Form = "",
    rank: int = 0,
) -> Exported:
    """Write tunings of several models of one pipeline as one file: `{"unet": …, "text_encoder": …}`.

    Each model's layers are read back as `export` does; `encoders`, `dora` and `rank` as there.

    Raises:
        Refused: a tuning has parts that the format cannot hold. AdapterFileError: a reader finds other layers.
    """
    _known(format, *tunings)
    models = {name: tuning.model for name, tuning in tunings.items()}
    contents = {name: replace(content_of(tuning, format), format=format) for name, tuning in tunings.items()}
    said: list[str] = []
    outs: dict[str, Content] = {}
    for name, own in contents.items():
        layers, note = written(own.layers, models[name], dora, format, rank)
        outs[name] = replace(own, layers=layers)
        said += [note] if note else []
    contents = contents if dora == "comfy" else outs
    parts = [diffusers.in_files(own, name, models[name]) for name, own in outs.items()]
    whole = Content(
        format,
        [layer for part in parts for layer in part.layers],
        shifts=[shift for part in parts for shift in part.shifts],
    )
    modules = [n for n, _ in next(iter(models.values())).named_modules() if CHILD not in n.split(".")]
    files = _files(whole, models, next(iter(tunings)), modules if len(tunings) == 1 else [], None, encoders, dora)
    limits = unread_by_diffusers(whole, models)
    notes = [*(said or _written_as(whole, format)), *([limits] if limits else [])]

    def prove(copy: Path) -> tuple[Check, ...]:
        checks: list[Check] = []
        back = read(copy)
        owners = assigned(back, tunings, aliases_of(models), copy)
        for name, tuning in tunings.items():
            own = resolved(back.of([c for c in owners if owners[c] == name]), tuning.model, copy)
            own = replace(own, layers=[replace(x, component="") for x in own.layers])
            checks.append(compare("mmpeft", _acting(contents[name]), _acting(own)))
            if not limits:
                checks += by_diffusers(tuning.model, copy, name, contents[name], models)
        return tuple(checks)

    return _write(files, Path(path), whole, prove if verify else None, notes)


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
    _known(format, prefix)
    src, dst = Path(src), Path(dst)
    content = resolved(_readable(src, strict=False), model, src)
    layers = content.layers
    if any(layer.flat for layer in layers):
        raise AdapterFileError(f"{src}: {next(x.path for x in layers if x.flat)!r} names no module of the model given")
    strange = next((x.path for x in layers if is_original(x.path)), "")
    if strange:
        raise AdapterFileError(
            f"{src}: {strange} is a name of an original repository, which readers of {format} files would not find; "
            "give the model that the file is for"
        )
    if format != "peft" and content.learned is not None:
        raise Refused(f"{src} holds learned tokens ({content.learned.kind}); {format} has no key for them")
    if format != "peft" and content.beside:
        raise Refused(f"{src} holds {content.beside}; {format} has no key for them")
    if content.shifts and format in ("peft", "diffusers"):
        first = content.shifts[0]
        raise Refused(f"{src} holds a difference of {first.path}.{first.tensor}; {format} files have no key for it")
    if content.stacks:
        raise Refused(f"{src} holds updates of experts, whose tensors only a model tells: load it and export() that")
    if format in ("peft", "comfy") and len(content.components) > 1:
        raise Refused(f"{src} holds layers of {content.components}; a {format} adapter is for one model")
    if prefix and len(content.components) == 1:
        layers = [replace(layer, component=prefix) for layer in layers]
        content = replace(content, shifts=[replace(x, component=prefix) for x in content.shifts])
    prefix = prefix or ("unet" if model is None else component_for(model))
    content = replace(content, format=format, layers=[layer.baked() for layer in layers])
    modules = [n for n, _ in model.named_modules()] if model is not None else []
    models = {prefix: model} if model is not None else dict.fromkeys(content.components, None)
    files = _files(content, models, prefix, modules, None, encoders)
    return _write(
        files, dst, content, lambda copy: (_by_own_reader(model, copy, content, prefix),), _written_as(content, format)
    )


# -- shared -------------------------------------------------------------------------------------------------


def _known(format: str, *prefixes: str) -> None:
    names = tuple(dict.fromkeys((*DOTTED.values(), "")))
    for what, value, known in (("format", format, FORMATS), *(("prefix", prefix, names) for prefix in prefixes)):
        if value not in known:
            listed = ", ".join(filter(None, known))
            raise ConfigError(f"unknown {what} {value!r}; known: {listed}.{nearest(value, known)}")


def _written_as(content: Content, format: str) -> list[str]:
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


def _files(
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
    if content.format == "comfy":
        model = models.get(prefix)
        if model is None:
            raise Refused("the names of the original repository are known for a model only; give it")
        return {diffusers.WEIGHTS: original.comfy_bytes(content.layers, model, content.shifts, marks)}
    if content.format == "diffusers":
        return {diffusers.WEIGHTS: diffusers.diffusers_bytes(content.layers, prefix, modules)}
    return {diffusers.WEIGHTS: kohya.kohya_bytes(content.layers, prefix, models, content.shifts, encoders, marks)}


def _by_own_reader(model: nn.Module | None, copy: Path, content: Content, prefix: str) -> Check:
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
    if content.format not in ("peft", "comfy") and model is None:
        content = replace(content, layers=[replace(x, component=x.component or prefix) for x in content.layers])
    else:
        content, back = (replace(c, layers=[replace(x, component="") for x in c.layers]) for c in (content, back))
    return compare("mmpeft", _acting(content), _acting(back))


def _acting(content: Content) -> dict[str, Tensor]:
    """What a reader must have; rows of zeros in a fused module are no layer of their own."""
    found = expected(content)
    return {name: t for name, t in found.items() if t.any()} or found


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
        if os.path.isdir(path):  # unlike those of Path, these say no to every name that cannot be
            raise AdapterFileError(f"expected a file name, {path} is a folder")
    elif os.path.isfile(path) or path.suffix == ".safetensors":
        raise AdapterFileError(f"a PEFT adapter is a folder of two files; {path} is the name of one file")
    checks: tuple[Check, ...] = ()
    if prove:
        with tempfile.TemporaryDirectory(prefix="mmpeft-") as scratch:
            for name, data in files.items():
                write_atomic(Path(scratch) / name, data)
            checks = prove(Path(scratch) if content.format == "peft" else Path(scratch) / next(iter(files)))
    with only_writer(path) if content.format == "peft" else nullcontext():  # of two writers one, file and config
        for name, data in files.items():
            write_atomic(path / name if content.format == "peft" else path, data)
    count = len(content.layers) + len(content.scalings) + (content.learned is not None)
    return Exported(path, content.format, count, sum(map(len, files.values())), checks, tuple(notes))
