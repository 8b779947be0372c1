"""Each task's own way to one picture file: what its network is shown, as float [3, H, W] in [0, 1]."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmpeft.data.pictures import read
from mmpeft.diffusion.data.images import CaptionedImages
from mmpeft.vision.data import FolderData, HubData
from mmpeft.vla.contrastive.data import CaptionData
from mmpeft.vla.segmentation.masks import FolderSegmentationData
from mmpeft.vla.vqa.data import VQAData

HEIGHT, WIDTH = 32, 48
BLACK, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def classification(root: Path, data: bytes, suffix: str) -> Tensor:
    for name in "ab":
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / f"x{suffix}").write_bytes(data)
    found = FolderData(str(root), val_fraction=0, augment="none")
    found.setup("fit")
    return pixels(found.train_set[0][0])


def hub(root: Path, data: bytes, suffix: str) -> Tensor:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cell = {"bytes": data, "path": f"x{suffix}"}
    datasets.Dataset.from_dict({"image": [cell, cell], "label": [0, 1]}, features=features).save_to_disk(root / "d")
    found = HubData(str(root / "d"), val_fraction=0)
    found.setup("fit")
    return pixels(found.train_set[0][0])


def captions(root: Path, data: bytes, suffix: str) -> Tensor:
    (root / f"x{suffix}").write_bytes(data)
    (root / "x.txt").write_text("a picture")
    found = CaptionData(str(root))
    found.setup("fit")
    return pixels(found.train_set[0][0])


def questions(root: Path, data: bytes, suffix: str) -> Tensor:
    (root / "train").mkdir()
    (root / "train" / f"1{suffix}").write_bytes(data)
    asked = [{"question_id": i, "image_id": 1, "question": "which"} for i in range(2)]
    said = [{"question_id": i, "answers": [{"answer": name}]} for i, name in enumerate("ab")]
    (root / "train" / "questions.json").write_text(json.dumps({"questions": asked}))
    (root / "train" / "annotations.json").write_text(json.dumps({"annotations": said}))
    found = VQAData(str(root), image_name="{split}/{image_id}" + suffix)
    found.setup("fit")
    return pixels(found.train_set[0].images)


def segmentation(root: Path, data: bytes, suffix: str) -> Tensor:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:16] = 1
    for name in ("images", "masks"):
        (root / "train" / name).mkdir(parents=True)
    (root / "classes.txt").write_text("one\ntwo\n")
    (root / "train" / "images" / f"x{suffix}").write_bytes(data)
    Image.fromarray(mask).save(root / "train" / "masks" / "x.png")
    found = FolderSegmentationData(str(root))
    found.setup("fit")
    return found.train_set[0][0] / 255


def style(root: Path, data: bytes, suffix: str) -> Tensor:
    (root / f"x{suffix}").write_bytes(data)
    found = CaptionedImages(str(root), prompt="a picture", background="white")
    found.setup("fit")
    return pixels(found.albums["train"].image(0))


def command(root: Path, data: bytes, suffix: str) -> Tensor:
    """`mmpeft classify`, `segment` and `ask`."""
    (root / f"x{suffix}").write_bytes(data)
    return pixels(read(root / f"x{suffix}"))


def pixels(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


READERS: dict[str, Callable[[Path, bytes, str], Tensor]] = {
    own.__name__: own for own in (classification, hub, captions, questions, segmentation, style, command)
}
