"""What a backbone was evaluated with: pixel for pixel the transform of its own library, in every task."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import image_transform
from PIL import Image
from timm.data import create_transform, resolve_data_config

import mmpeft
from mmpeft.data.contract import Preprocessing, Resizing
from mmpeft.data.transforms import evaluation
from mmpeft.embedded.store import WEIGHTS
from mmpeft.errors import ConfigError
from mmpeft.vision.backbone import create, normalisation
from mmpeft.vision.data import DigitsData, EmojiData, FolderData, VTABData
from mmpeft.vla import backbone
from mmpeft.vla.contrastive.data import CaptionData
from mmpeft.vla.export import save_pair
from mmpeft.vla.vqa.data import VQAData
from tests.tasks.tiny import SMALL, classifier, trainer

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SIDES = ((64, 64), (40, 80), (81, 33), (150, 113), (11, 190), (10, 10))
PICTURES = [
    Image.fromarray(np.random.default_rng(high).integers(0, 256, (high, wide, 3), dtype=np.uint8))
    for high, wide in SIDES
]


def same(own: Any, theirs: Any) -> bool:
    return all(torch.equal(own(picture), theirs(picture)) for picture in PICTURES)


@pytest.mark.parametrize("size", [32, (32, 48), (48, 31)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("how", ["bicubic", "bilinear"])
def test_open_clips_own_transform(size: Any, mode: Any, how: str) -> None:
    own = how if isinstance(size, int) or mode != "shortest" else "bicubic"  # open_clip leaves it out there
    transform = evaluation(size, MEAN, STD, Resizing(mode, own, fill=114))
    assert same(transform, image_transform(size, False, MEAN, STD, mode, how, 114))


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 32, 48)])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "lanczos"},
        {"crop_pct": 0.95, "crop_mode": "squash"},
        {"crop_pct": 0.9, "crop_mode": "border"},
    ],
)
def test_timms_own_transform(facts: dict[str, Any], size: Sequence[int]) -> None:
    model = timm.create_model("resnet10t")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": tuple(size), "mean": MEAN, "std": STD, **facts}
    theirs = create_transform(**resolve_data_config({}, model=model), is_training=False)
    wanted = normalisation(model)
    assert same(evaluation(*wanted, wanted.resizing), theirs)


def pictures(root: Path) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for number, picture in enumerate(PICTURES[:4]):
            picture.save(root / name / f"{number}.png")
    return root


def test_classification_evaluates_as_timm_does(tmp_path: Path) -> None:
    task = classifier(backbone="vit_tiny_patch16_224", model_args={**SMALL, "img_size": (32, 48)})
    data = FolderData(str(pictures(tmp_path / "d")), batch_size=2)
    trainer(tmp_path, limit_train_batches=1).fit(task, datamodule=data)
    config = {**resolve_data_config({}, model=task.model), "input_size": (3, 32, 48)}
    assert same(lambda picture: data.eval_transform((picture, 0))[0], create_transform(**config, is_training=False))
    assert next(iter(data.train_dataloader()))[0].shape == (2, 3, 32, 48)


def pair(**facts: Any) -> Any:
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    )
    known = {"size": (32, 32), "mode": "RGB", "mean": MEAN, "std": STD, "fill_color": 9, **facts}
    open_clip.model.set_model_preprocess_cfg(model, known)
    return model


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("how", ["bicubic", "bilinear"])
def test_every_task_on_a_pair_evaluates_as_open_clip_does(mode: str, how: str) -> None:
    wanted = backbone.preprocessing(pair(resize_mode=mode, interpolation=how))
    theirs = image_transform(32, False, MEAN, STD, mode, how, 9)
    captions = CaptionData("unused", batch_size=1)
    captions.configure(wanted)
    assert same(lambda picture: captions.eval_transform((picture, ""))[0], theirs)
    questions = VQAData.__new__(VQAData)
    questions.preprocess(wanted)
    assert same(questions.eval_transform.transform, theirs)


def test_the_users_own_word_on_resizing_wins() -> None:
    wanted = backbone.preprocessing(pair(resize_mode="shortest", interpolation="bilinear"))
    data = CaptionData("unused", resize="squash", batch_size=1)
    data.configure(wanted)
    theirs = image_transform(32, False, MEAN, STD, "squash", "bilinear")
    assert same(lambda picture: data.eval_transform((picture, ""))[0], theirs)
    with pytest.raises(ConfigError, match="resize is one of squash, shortest, longest, got 'shortes'"):
        CaptionData("unused", resize="shortes")  # type: ignore[arg-type]


def test_drawings_and_vtab_are_squashed(tmp_path: Path) -> None:
    wanted = Preprocessing((32, 32), MEAN, STD, Resizing("shortest", "bilinear", 0.875))
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti" / "test.txt").write_text("")
    vtab = VTABData(str(tmp_path), "kitti")
    for data, how in ((EmojiData(), "bicubic"), (DigitsData(), "bicubic"), (vtab, "bilinear")):
        data.configure(wanted)
        theirs = image_transform(32, False, MEAN, STD, "squash", how)
        assert same(lambda picture, own=data: own.eval_transform((picture, 0))[0], theirs)


def test_a_folder_and_an_export_keep_how_pictures_are_resized(tmp_path: Path) -> None:
    model = backbone.create("embedded:clip_emoji")
    facts = {**model.visual.preprocess_cfg, "resize_mode": "squash", "interpolation": "bilinear", "fill_color": 7}
    open_clip.model.set_model_preprocess_cfg(model, facts)
    tuning = mmpeft.attach(model, mmpeft.LoRA(rank=2))
    save_pair(tuning, str(WEIGHTS / "clip_emoji"), tmp_path / "out")
    wanted = backbone.preprocessing(backbone.create(str(tmp_path / "out")))
    assert wanted == backbone.preprocessing(model)
    assert wanted.resizing == Resizing("squash", "bilinear", fill=7)
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").visual.preprocess_cfg
    assert (theirs["resize_mode"], theirs["interpolation"], theirs["fill_color"]) == ("squash", "bilinear", 7)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_other_channels_are_refused_before_the_run(channels: int) -> None:
    model = create("resnet10t", 2, pretrained=False, in_chans=channels)
    assert normalisation(model).channels == channels
    with pytest.raises(ConfigError, match=f"takes {channels} channels; EmojiData gives RGB"):
        EmojiData().configure(normalisation(model))


def test_another_size_than_the_backbones_own_is_refused_before_the_run() -> None:
    data = EmojiData(image_size=48)
    with pytest.raises(ConfigError, match="images of 32×32 pixels alone, image_size is 48"):
        data.configure(normalisation(create("vit_tiny_patch16_224", pretrained=False, **SMALL)))
    with pytest.raises(ConfigError, match="images of 32×32 pixels alone"):
        data.configure(backbone.preprocessing(pair()))
    data.configure(normalisation(create("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True, **SMALL)))
    assert data.size == (48, 48)


def test_one_class_is_refused_before_the_run(tmp_path: Path) -> None:
    shutil.rmtree(pictures(tmp_path / "d") / "b")
    data, task = FolderData(str(tmp_path / "d")), classifier()
    with pytest.raises(ConfigError, match="FolderData has one class, a: nothing is to be told apart"):
        trainer(tmp_path).fit(task, datamodule=data)
