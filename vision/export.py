"""What a classifier's run is written as: timm's own folder, and ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.models._hub import save_for_hf

from mmpeft.embedded.store import WEIGHTS, read_card
from mmpeft.errors import AdapterFileError, ConfigError
from mmpeft.files import put_files, scratch_folder
from mmpeft.formats.merged import merged_copy
from mmpeft.formats.onnx_out import plain_or_tuned, save_onnx
from mmpeft.run.exports import task_of
from mmpeft.types import AnyModule, Kwargs, Untyped
from mmpeft.vision.classification.task import ImageClassifier

ANY_VIT = "vit_base_patch16_224"
"""A name of timm under which its VisionTransformer takes any size of its parts."""


def to_timm(options: argparse.Namespace) -> None:
    """A folder for `timm.create_model("local-dir:<folder>", pretrained=True)`."""
    task = task_of(options)
    if not isinstance(task, ImageClassifier):
        raise ConfigError(f"{options.source} is a run of {type(task).__name__}; timm's folder is of an ImageClassifier")
    difference = save_timm(task, options.out)
    print(f"{options.out}: read back by timm, scores differ by {difference:.1e}")
    print(f"timm.create_model('local-dir:{options.out}', pretrained=True); {len(task.classes)} classes in config.json")


def save_timm(task: ImageClassifier, folder: Path) -> float:
    """Write the merged classifier in timm's layout, with its classes; timm reads it back before it is put into place.

    Returned is the largest difference between scores of the tuned model and of what was read.

    Raises:
        Refused: a part of the tuning is no change of weights.
        AdapterFileError: timm reads something else.
    """
    tuning = task.prepare()
    plain: AnyModule = merged_copy(tuning).eval()
    arguments: Kwargs = dict(task.model_args)
    if task.backbone.startswith("embedded:"):
        card = read_card(WEIGHTS / f"{task.backbone.removeprefix('embedded:')}.json")
        arguments = {**card["architecture"], **arguments}
        plain.pretrained_cfg = {**plain.pretrained_cfg, "architecture": ANY_VIT}
    size = task.preprocessing.size
    with scratch_folder(folder) as scratch:
        save_for_hf(
            plain, str(scratch), {"label_names": task.classes}, model_args=arguments or None, safe_serialization=True
        )
        try:
            back: AnyModule = timm.create_model(f"local-dir:{scratch}", pretrained=True).eval()
        except (RuntimeError, ValueError, TypeError) as error:
            raise AdapterFileError(
                f"timm does not read what would be in {folder}: {str(error).splitlines()[0]}"
            ) from error
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = task.to("cpu").eval()(images)
            difference = float((back(images) - wanted).abs().max() / wanted.abs().max())
        if not difference < 1e-4:
            raise AdapterFileError(
                f"timm reads another model than would be in {folder}: scores differ by {difference:.1e}"
            )
        put_files(scratch, folder, last="config.json")
    return difference


def to_onnx(options: argparse.Namespace) -> None:
    """A classifier for onnxruntime, or a depth estimator with its decoder."""
    task: Untyped = task_of(options)
    size = task.preprocessing.size
    example = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    model = plain_or_tuned(task.prepare()) if isinstance(task, ImageClassifier) else task.eval()
    path = options.out if options.out.suffix == ".onnx" else options.out / "model.onnx"
    difference = save_onnx(model, example, path)
    print(f"{path}: input images [B, 3, {size[0]}, {size[1]}]; read by onnxruntime, outputs differ by {difference:.1e}")
