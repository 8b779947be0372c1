"""`mmpeft segment`: find things of any names in a picture of one's own, by a trained segmentation run."""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmpeft.data.pictures import read
from mmpeft.data.pixels import pixels
from mmpeft.errors import ConfigError
from mmpeft.files import write_atomic
from mmpeft.run.reload import load_run
from mmpeft.vla.backbone import preprocessing
from mmpeft.vla.segmentation.data import Prepared
from mmpeft.vla.segmentation.draw import index_png, overlays
from mmpeft.vla.segmentation.task import Segmenter


def run(options: argparse.Namespace) -> int:
    """Write the picture with its segments, and class numbers as a PNG beside it; print how much each name covers."""
    picture = read(options.image)
    task, _ = load_run(options.checkpoint)
    if not isinstance(task, Segmenter):
        raise ConfigError(f"{options.checkpoint} is a run of {type(task).__name__}, segment wants one of Segmenter")
    names = [n.strip() for n in options.classes.split(",") if n.strip()] if options.classes else task.classes
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--classes takes different names with commas between, got {options.classes!r}")
    numbers = segments(task, picture, names)
    image = pixels(picture)[None] / 255
    write_atomic(options.out, overlays(image, [numbers[None]], names))
    mask = options.out.with_name(f"{options.out.stem}_classes.png")
    write_atomic(mask, index_png(numbers, len(names)))
    table = Table("number", "class", "share of the picture")
    for number, name in enumerate(names):
        table.add_row(str(number), name, f"{float((numbers == number).float().mean()):.1%}")
    Console().print(table)
    print(f"picture: {options.out}\nnumbers: {mask} ({len(names)}: none of them)")
    return 0


@torch.no_grad()
def segments(task: Segmenter, picture: Image.Image, names: list[str]) -> torch.Tensor:
    """Class numbers [height, width] of a picture; len(names) for none."""
    image, *_ = Prepared(preprocessing(task.model)).alone((pixels(picture), ""))  # as the run's data prepare theirs
    scores = task(image[None].to(task.device), task.encode(names)).cpu()
    whole = torch.nn.functional.interpolate(scores, (picture.height, picture.width), mode="bilinear")
    return task.segment(whole)[0]
