"""Folders as people have them: what is a split, what is a class, what is left out, and what counts once."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpeft.data.folders import role_of
from mmpeft.errors import ConfigError, DataError
from mmpeft.vision.data import FolderData


def pictures(root: Path, counts: Mapping[str, int], suffix: str = ".png") -> Path:
    """`{"train/cat": 3}`: three different pictures in root/train/cat."""
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = np.random.default_rng(100 * number + i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}{suffix}")
    return root


def opened(root: Path, **options: object) -> FolderData:
    data = FolderData(str(root), **options)
    data.setup()
    return data


def counted(data: FolderData) -> tuple[int, ...]:
    return tuple(0 if found is None else len(found) for found in (data.train_set, data.val_set, data.test_set))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", "Validation", "Testing"),
        ("Train", "Valid", "Test"),
        ("TRAIN", "EVAL", "TEST"),
        ("seg_train/seg_train", "dev", "seg_test/seg_test"),
        ("train/train", "val/val", "test/Test"),
        ("train_set", "val_set", "test_set"),
        ("images_train", "images_val", "images_test"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_splits_by_their_usual_names(train: str, val: str, test: str, tmp_path: Path) -> None:
    parts = {f"{split}/{kind}": count for split, count in ((train, 3), (val, 2), (test, 1)) for kind in ("cat", "dog")}
    data = opened(pictures(tmp_path, parts))
    assert data.classes == ["cat", "dog"]
    assert counted(data) == (6, 4, 2)


def test_names_that_are_no_splits() -> None:
    assert [role_of(name) for name in ("trainer", "seg_pred", "testament", "unlabeled", "cat", "", "2017")] == [
        None
    ] * 7


def test_a_class_that_is_called_like_a_split(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"bus": 10, "car": 10, "train": 10})
    assert opened(root).classes == ["bus", "car", "train"]
    shutil.move(root / "train", root / "old")
    pictures(root, {"train/steam": 10, "train/electric": 10})
    shutil.rmtree(root / "old")
    with pytest.raises(
        DataError, match=r"'train', which may be splits or classes, beside bus; car; say .*splits: \{\}"
    ):
        FolderData(str(root))
    assert opened(root, splits={}).classes == ["bus", "car", "train"]
    assert counted(opened(root, splits={})) == (32, 4, 4)
    assert opened(root, splits={"train": "train"}).classes == ["electric", "steam"]


def test_splits_of_ones_own_names(tmp_path: Path) -> None:
    root = pictures(tmp_path, {f"{split}/{kind}": 2 for split in ("Lab A", "Lab B", "rest") for kind in ("x", "y")})
    assert counted(opened(root, splits={"train": "Lab A", "val": "Lab B", "test": "rest"})) == (4, 4, 4)
    with pytest.raises(ConfigError, match=r"no folder 'Lab C' for test\. Did you mean 'Lab"):
        FolderData(str(root), splits={"train": "Lab A", "test": "Lab C"})
    with pytest.raises(ConfigError, match="train, val and test, got 'trian'"):
        FolderData(str(root), splits={"trian": "Lab A"})
    with pytest.raises(DataError, match="but no folder `train`"):
        FolderData(str(root), splits={"val": "Lab A"})


def test_what_may_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, {"a/train/x": 1, "a/training/x": 1, "b/valid/x": 1, "b/eval/x": 1, "b/train/x": 1})
    with pytest.raises(DataError, match="'train' and 'training', and each may be train; name one"):
        FolderData(str(tmp_path / "a"))
    with pytest.raises(DataError, match="'eval' and 'valid', and each may be val"):
        FolderData(str(tmp_path / "b"))
    pictures(tmp_path, {"c/archive/train/x": 1, "c/archive/test/x": 1})
    with pytest.raises(DataError, match="holds 'archive' alone, which has the splits: give that folder as root"):
        FolderData(str(tmp_path / "c"))
    pictures(tmp_path, {"d/train": 1, "d/test": 1})
    with pytest.raises(DataError, match=r"train has no class folders.*splits: \{\} says that train is a class"):
        FolderData(str(tmp_path / "d"))


@pytest.mark.parametrize(
    "names", [("asl_train", "asl_test"), ("train-256", "val-256"), ("stage1_train", "stage1_test"), ("fold1", "fold2")]
)
def test_splits_by_other_names_do_not_become_classes(names: tuple[str, str], tmp_path: Path) -> None:
    root = pictures(tmp_path, {f"{name}/{kind}": 4 for name in names for kind in ("cat", "dog")})
    with pytest.raises(
        DataError, match=r"and cat; dog in each of them: .* say which: splits: \{\} if they are classes"
    ):
        FolderData(str(root))
    assert opened(root, splits={}).classes == sorted(names)
    assert opened(root, splits={"train": names[0], "val": names[1]}).classes == ["cat", "dog"]
    other = pictures(tmp_path / "kinds", {"cat/young": 4, "cat/old": 4, "dog/old": 4})
    assert opened(other).classes == ["cat", "dog"]  # folders inside classes


def test_folders_beside_the_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path, {"seg_train/x": 2, "seg_train/y": 2, "seg_test/x": 1, "seg_pred": 3})
    assert counted(opened(root, val_fraction=0)) == (4, 0, 1)
    assert "left out: the folders seg_pred" in caplog.text


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path, {"train/x": 3, "train/y": 3})
    for i in range(10):
        (root / "train/x" / f"{i}.txt").write_text("a note")
    for name in ("train/x/a.HEIC", "train/y/b.heic", "train/y/data", "train/y/c.NEF"):
        (root / name).write_bytes(b"something")
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini"):
        (root / "train/x" / name).write_bytes(b"something")
    os.mkfifo(root / "train/x/pipe.png")
    (root / "train/x/gone.png").symlink_to(root / "nothing.png")
    shutil.copy(root / "train/x/0.png", root / "train/stray.png")
    pictures(root, {"__MACOSX/train/x": 2, "train/__MACOSX": 2, "train/x/@eaDir": 1, "train/x/.cache": 1})
    with caplog.at_level(logging.WARNING):
        data = opened(root, val_fraction=0)
    assert data.classes == ["x", "y"]
    assert counted(data) == (6, 0, 0)
    (line,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    start, _, reasons = line.partition(": ")
    assert start == f"17 files left out of {root / 'train'}"
    assert reasons.startswith("10 .txt, 2 .heic (needs pillow-heif), ")
    assert set(reasons.split(", ")[2:]) == {
        *("1 pipe", "1 link to nothing", "1 .nef", "1 without a suffix", "1 beside the class folders")
    }


def test_each_file_counts_once_and_links_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = pictures(tmp_path / "outside", {"pool": 2})
    root = pictures(tmp_path / "root", {"cat/deep": 4, "dog": 4})
    (root / "cat/loop").symlink_to(root / "cat")
    (root / "cat/up").symlink_to(root)
    (root / "cat/twice").symlink_to(root / "cat/deep")
    (root / "cat/again.png").symlink_to(root / "cat/deep/0.png")
    os.link(root / "cat/deep/1.png", root / "cat/hard.png")
    (root / "dog/linked").symlink_to(outside / "pool")
    data = opened(root, val_fraction=0, test_fraction=0)
    assert counted(data) == (10, 0, 0)
    assert sum("dog" in path for path in data.train_set.paths) == 6
    assert "2 reached twice" in caplog.text
    (root / "dog/other.png").symlink_to(root / "cat/deep/2.png")
    with pytest.raises(DataError, match="are one file in two classes"):
        opened(root)


def test_files_in_two_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pictures(tmp_path, {"train/x": 2, "train/y": 2, "test/x": 1})
    (root / "test/x/same.png").symlink_to(root / "train/x/0.png")
    opened(root, val_fraction=0)
    assert "1 files of validation and test are also trained on" in caplog.text


def test_a_class_that_fractions_leave_nothing_of_is_named(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"many": 20, "two": 2})
    with pytest.raises(DataError, match="class 'two' has 2 images, all of which go to validation and test"):
        opened(root, val_fraction=0.4, test_fraction=0.5)
    assert counted(opened(root, val_fraction=0.1, test_fraction=0.1)) == (18, 2, 2)


def test_every_suffix_that_pillow_reads(tmp_path: Path) -> None:
    root = tmp_path
    for number, suffix in enumerate((".avif", ".jfif", ".jpe", ".jp2", ".tga", ".JPG", ".Png", ".tiff")):
        pictures(root, {f"class{number}": 4}, suffix)
    assert sum(counted(opened(root))) == 32


def test_accents_however_they_are_encoded(tmp_path: Path) -> None:
    root = pictures(tmp_path, {"train/café": 2, "train/the": 2, "val/cafe\u0301": 1})
    assert counted(opened(root)) == (4, 1, 0)
