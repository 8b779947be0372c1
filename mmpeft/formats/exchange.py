"""Adapters in the formats other tools read: describe, load, export with proof, convert."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from mmpeft.errors import AdapterFileError, MMPEFTWarning, nearest
from mmpeft.formats import diffusers, native, peft_out
from mmpeft.formats.bridge import attach_content, content_of
from mmpeft.formats.content import Content
from mmpeft.formats.dora_out import written
from mmpeft.formats.forms import FORMATS, Form, Format
from mmpeft.formats.inspection import FileInfo, inspect, read, readable
from mmpeft.formats.names import aliases_of, assigned, component_for, resolved
from mmpeft.formats.rewriting import convert, mix_files, needs_model
from mmpeft.formats.verify import Check, by_peft, by_peft_answers, compare
from mmpeft.formats.verify_diffusers import by_diffusers, unread_by_diffusers
from mmpeft.formats.writing import (
    Exported,
    acting,
    by_own_reader,
    files_of,
    known_format,
    put_proven,
    written_as,
)
from mmpeft.hosting.modules import CHILD
from mmpeft.surgery.attached import Attached
from mmpeft.surgery.transaction import unchanged_on_error

__all__ = ["FORMATS", "Exported", "FileInfo", "Format"]
__all__ += ["convert", "export", "inspect", "load_foreign", "mix_files", "needs_model", "read"]


def load_foreign(
    model: nn.Module, path: str | Path, name: str = "default", component: str = "", *, strict: bool = False
) -> Attached:
    """Attach an adapter of any known format; `mmpeft.load_foreign` says more, and gives the whole handle."""
    path = Path(path)
    if (path / native.MANIFEST).exists():
        return native.load(model, path, name)
    content = readable(path, strict)
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
    content = readable(path, strict)
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
        return {
            owner: attach_content(models[owner], part, name, path, strict=strict) for owner, part in fitting.items()
        }


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
    known_format(format, prefix)
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
    files = files_of(content, {prefix: model}, prefix, modules, base, dora=dora)
    notes = [said] if said else written_as(content, format)
    if format == "peft":
        notes += peft_out.limits(content, model)
    if format == "comfy":
        notes.append("the names are those of diffusers' converters; docs/readers.md says what ComfyUI makes of them")

    def prove(copy: Path) -> tuple[Check, ...]:
        checks = [by_own_reader(model, copy, own, prefix)]
        if format == "peft":
            checks += (
                by_peft(model, copy, content) if content.learned is None else by_peft_answers(tuning, copy, content)
            )
        return tuple(checks)

    return put_proven(files, Path(path), content, prove if verify else None, notes)


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
    known_format(format, *tunings)
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
    files = files_of(whole, models, next(iter(tunings)), modules if len(tunings) == 1 else [], None, encoders, dora)
    limits = unread_by_diffusers(whole, models)
    notes = [*(said or written_as(whole, format)), *([limits] if limits else [])]

    def prove(copy: Path) -> tuple[Check, ...]:
        checks: list[Check] = []
        back = read(copy)
        owners = assigned(back, tunings, aliases_of(models), copy)
        for name, tuning in tunings.items():
            own = resolved(back.of([c for c in owners if owners[c] == name]), tuning.model, copy)
            own = replace(own, layers=[replace(x, component="") for x in own.layers])
            checks.append(compare("mmpeft", acting(contents[name]), acting(own)))
            if not limits:
                checks += by_diffusers(tuning.model, copy, name, contents[name], models)
        return tuple(checks)

    return put_proven(files, Path(path), whole, prove if verify else None, notes)
