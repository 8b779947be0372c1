"""What a run, or an adapter with a model, is written as."""

from __future__ import annotations

import argparse

from mmpeft.formats import native
from mmpeft.formats.commands import model_of, say
from mmpeft.formats.exchange import export, load_foreign
from mmpeft.formats.merged import Merged, save_merged
from mmpeft.run.place import BEST, LAST
from mmpeft.run.reload import load_run
from mmpeft.tasks.module import TuningModule


def task_of(options: argparse.Namespace) -> TuningModule:
    """The trained task of the run that is to be written."""
    return load_run(options.source, BEST if options.best else LAST)[0]


def peft(options: argparse.Namespace) -> None:
    """A folder for Hugging Face PEFT."""
    say(export(task_of(options).prepare(), options.out, "peft"))


def merged(options: argparse.Namespace) -> None:
    """The whole model as its own library reads it."""
    _say_merged(save_merged(task_of(options).prepare(), options.out))


def of_model(options: argparse.Namespace) -> None:
    """An adapter of this suite in a format that other programs read."""
    model = model_of(options.model)
    forms = {"encoders": options.encoders, "dora": options.dora, "rank": options.rank}
    say(export(native.load(model, options.source), options.out, options.to, prefix=options.prefix, **forms))


def merged_model(options: argparse.Namespace) -> None:
    """A model with an adapter of any known format merged in."""
    tuning = load_foreign(model_of(options.model), options.source, component=options.component)
    _say_merged(save_merged(tuning, options.out))


def _say_merged(written: Merged) -> None:
    print(f"{written.path}: {written.bytes:,} bytes; {written.library} read back {written.tensors} tensors, all equal")
    for name in written.untied:
        print(f"note: {name} is a tensor of its own now")
