"""What adapters of a pipeline are written as: files of other programs, or a whole pipeline with them merged in."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmpeft.diffusion.backbone import create
from mmpeft.diffusion.families import family_of
from mmpeft.diffusion.family import Family
from mmpeft.diffusion.style.command import base_of, open_adapters
from mmpeft.errors import ConfigError
from mmpeft.files import put_files, scratch_folder
from mmpeft.formats.commands import say
from mmpeft.formats.exchange import export, export_pipeline
from mmpeft.formats.merged import merged_copy
from mmpeft.run.exports import task_of
from mmpeft.run.place import find_run
from mmpeft.tuning import Tuning
from mmpeft.types import Untyped


def of_run(options: argparse.Namespace) -> None:
    """The adapter of a run, or with --best what its best checkpoint holds."""
    source: Path = options.source
    if options.best:
        task: Untyped = task_of(options)
        write(task.family, task.all_tunings(), options)
        return
    if source.name != "adapter":
        source = find_run(source).folder / "adapter"
    of_adapter(argparse.Namespace(**{**vars(options), "source": source}))


def of_adapter(options: argparse.Namespace) -> None:
    """An adapter of any known format, for the pipeline that is named or that its run was tuned on."""
    family = family_of(create(base_of(options.pipeline, [options.source]).pipeline))
    write(family, open_adapters(family, [options.source])[0], options)


def write(family: Family, tunings: Sequence[Tuning], options: argparse.Namespace) -> None:
    """Write the tunings of a pipeline: of its denoiser first, then of text encoders.

    Raises:
        ConfigError: the format is of one model, and several are tuned.
    """
    if options.to == "merged":
        save_pipeline(family, tunings, options.out)
        print(f"{options.out}: the pipeline with {tunings[0].method} merged in")
        return
    parts = {name: tuning for tuning in tunings for name in _names(family, tuning)}
    forms = {"dora": options.dora, "rank": options.rank}
    if options.to in ("diffusers", "kohya"):
        say(export_pipeline(parts, options.out, options.to, encoders=len(family.places), **forms))
    elif len(parts) > 1:
        raise ConfigError(f"the text encoders are tuned as well, and a {options.to} file is for one model")
    else:
        say(export(tunings[0], options.out, options.to, prefix=next(iter(parts)), **forms))


def _names(family: Family, tuning: Tuning) -> list[str]:
    """What the pipeline calls the model of a tuning."""
    return [name for name, part in family.pipeline.components.items() if part is tuning.model]


def save_pipeline(family: Family, tunings: Sequence[Tuning], folder: Path) -> None:
    """Write the pipeline with its tunings merged in, as diffusers reads it.

    Raises:
        Refused: a part is no change of weights.
    """
    pipeline = family.pipeline
    parts = {id(part): name for name, part in pipeline.components.items()}
    merged = {parts[id(tuning.model)]: merged_copy(tuning) for tuning in tunings}
    with scratch_folder(folder) as scratch:
        type(pipeline)(**{**pipeline.components, **merged}).save_pretrained(scratch)
        put_files(scratch, folder, last="model_index.json")
