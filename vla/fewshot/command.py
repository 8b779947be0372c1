"""`mmpeft classify`: name what is in pictures of one's own, by class names alone or by a trained few-shot run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpeft.data.images import AugmentedImages
from mmpeft.data.pictures import read
from mmpeft.data.transforms import OfImage, evaluation
from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.run.reload import load_run
from mmpeft.types import AnyFunc
from mmpeft.vla.backbone import preprocessing
from mmpeft.vla.fewshot.draw import labelled
from mmpeft.vla.fewshot.task import FewShot


def run(options: argparse.Namespace) -> int:
    """Print the best classes of each picture; write the pictures with their scores."""
    pictures = [read(path) for path in options.image]
    if options.checkpoint:
        task, data = load_run(options.checkpoint)
        if not isinstance(task, FewShot):
            raise ConfigError(f"{options.checkpoint} is a run of {type(task).__name__}, classify wants one of FewShot")
    else:
        task, data = zero_shot(options.backbone, options.classes, options.template), None
    probabilities = classify(task, pictures, data)
    count = min(options.top, len(task.classes))
    table = Table("picture", *(f"{rank + 1}." for rank in range(count)))
    rows = []
    for path, row in zip(options.image, probabilities):
        values, best = row.topk(count)
        rows.append([(task.classes[i], float(v)) for v, i in zip(values, best.tolist())])
        table.add_row(path.name, *(f"{name} {value:.2f}" for name, value in rows[-1]))
    Console().print(table)
    write_atomic(options.out, labelled(pictures, rows))
    print(f"picture: {options.out}")
    return 0


def zero_shot(backbone: str, classes: str, template: str) -> FewShot:
    """A pair and class names, nothing trained."""
    names = [name.strip() for name in classes.split(",") if name.strip()]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"--classes takes two or more different names with commas between, got {classes!r}")
    task = FewShot(backbone, templates=[template])
    task.classes = names
    task.prepare()
    return task.eval()


@torch.no_grad()
def classify(task: FewShot, pictures: Sequence[Image.Image], data: object = None) -> Tensor:
    """Class probabilities of pictures, [B, C]; prepared as the run's data prepare theirs, or as the pair wants them."""
    wanted = preprocessing(task.model)
    prepare: AnyFunc = OfImage(evaluation(*wanted, wanted.resizing))
    if isinstance(data, AugmentedImages) and data.eval_transform is not None:
        prepare = data.eval_transform
    scores: Tensor = task(torch.stack([prepare((picture, 0))[0] for picture in pictures]).to(task.device))
    return scores.softmax(-1).cpu()
