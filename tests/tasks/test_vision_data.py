"""Image data modules: splits, labels and pixels on miniature data, and what each refuses."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data.images import ImageData
from mmpeft.data.pictures import read
from mmpeft.data.transforms import training
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError
from mmpeft.vision.data import DigitsData, EmojiData, FolderData, HubData, VTABData
from mmpeft.vision.data.vtab import TASKS, vtab_averages, vtab_task
from tests.tasks.tiny import SMALL, classifier, trainer

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def picture(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Path:
    """Write noise that is different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def folder(root: Path, counts: dict[str, int]) -> Path:
    """Write `{"train/cat": 3}`: three images in root/train/cat."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            picture(root / name / f"{i}.png", 100 * number + i)
    return root


def ready(data: ImageData, stage: str | None = None, size: int = 32) -> ImageData:
    data.configure((3, size, size), *IMAGENET)
    data.setup(stage)
    return data


def first(data: ImageData, split: str = "train"):
    return next(iter(getattr(data, f"{split}_dataloader")()))


def counted(data: ImageData) -> tuple[int, ...]:
    return tuple(0 if found is None else len(found) for found in (data.train_set, data.val_set, data.test_set))


# -- what all share -----------------------------------------------------------------------------------------


def test_the_users_normalisation_wins_over_the_backbones():
    data = DigitsData(image_size=16, mean=(0, 0, 0), augment="none", batch_size=4)
    ready(data)
    assert (data.image_size, data.mean, data.std) == (16, (0, 0, 0), IMAGENET[1])
    assert first(data)[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("late", [False, True])
def test_configuring_before_or_after_setup_is_the_same(late):
    data = EmojiData(augment="none", batch_size=4)
    if late:
        data.setup("fit")
    data.configure(32, *IMAGENET)
    if not late:
        data.setup("fit")
    reference = ready(EmojiData(augment="none", batch_size=4), "fit")
    assert torch.equal(first(data)[0], first(reference)[0])


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
@pytest.mark.parametrize("kind", [EmojiData, DigitsData])
def test_batches_have_the_promised_form(kind, augment):
    data = ready(kind(augment=augment, batch_size=6))
    for split in ("train", "val", "test"):
        images, labels = first(data, split)
        assert images.dtype == torch.float32
        assert type(images) is torch.Tensor
        assert images.shape[1:] == (3, 32, 32)
        assert labels.dtype == torch.int64
        assert labels.min() >= 0
        assert labels.max() < data.num_classes
    images, names = first(data, "predict")
    assert len(images) == len(names)
    assert all(isinstance(name, str) for name in names)


def test_augmentation_changes_with_the_epoch_and_not_with_the_workers():
    def epochs(workers: int) -> list[torch.Tensor]:
        data = ready(EmojiData(shots=2, batch_size=18, num_workers=workers, augment="strong"), "fit")
        loader = data.train_dataloader()
        out = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            out += [images for images, _ in loader]
        return out

    alone, two = epochs(0), epochs(2)
    assert not torch.equal(alone[0], alone[1])
    assert all(torch.equal(a, b) for a, b in zip(alone, two))


def test_moving_a_drawing_leaves_no_frame():
    """White paper stays white: torchvision's bilinear fill would draw the old border as a grey line."""
    transform = training("light", 32, (0, 0, 0), (1, 1, 1), paper=255)
    for _ in range(20):
        assert transform(torch.full((3, 32, 32), 255, dtype=torch.uint8)).min() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "lite"}, "light"),
        ({"mean": [0.5]}, "three"),
        ({"std": [0.5, 0.0, 0.5]}, "positive"),
        ({"image_size": 0}, "image_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"shots": 0}, "shots"),
        ({"style": "openmojo"}, "openmoji"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        EmojiData(**options)


# -- emoji and digits ---------------------------------------------------------------------------------------


def test_emoji_pixels_are_those_of_the_drawings():
    data = ready(EmojiData(augment="none", image_size=64))
    images, labels = first(data, "val")
    found = emoji("openmoji", "val")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    torch.testing.assert_close(images, ((found.rgb().float() / 255) - mean) / std)
    assert torch.equal(labels, found.labels)
    assert data.classes == found.classes


def test_shots_are_balanced_nested_and_seeded():
    few, more = ready(EmojiData(shots=2)), ready(EmojiData(shots=4))
    assert torch.bincount(few.train_set.second).tolist() == [2] * 9
    assert torch.bincount(more.train_set.second).tolist() == [4] * 9
    assert set(few.rows) <= set(more.rows)
    assert EmojiData(shots=2, seed=1).rows != few.rows
    with pytest.raises(DataError, match="61 training images"):
        EmojiData(shots=62)


def test_reading_never_changes_the_data():
    data = ready(EmojiData(batch_size=64))
    before = data.train_set.images.clone()
    image, _ = data.train_set[0]
    image.zero_()
    for _ in data.train_dataloader():
        pass
    assert torch.equal(data.train_set.images, before)


def test_digits_splits_are_stratified_disjoint_and_fixed():
    data = ready(DigitsData(seed=0))
    assert counted(data) == (1258, 180, 359)
    other = ready(DigitsData(seed=5))
    assert torch.equal(data.test_set.images, other.test_set.images)
    shares = torch.bincount(data.test_set.second) / len(data.test_set)
    assert (shares - 0.1).abs().max() < 0.01
    assert data.classes == list("0123456789")


# -- folders ------------------------------------------------------------------------------------------------


def test_folder_with_splits(tmp_path):
    folder(tmp_path, {"train/cat": 3, "train/dog": 4, "valid/dog": 2, "test/cat": 1, "train/.cache": 1})
    data = ready(FolderData(str(tmp_path), batch_size=7))
    assert data.classes == ["cat", "dog"]
    assert counted(data) == (7, 2, 1)
    assert first(data)[1].sort().values.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert first(data, "val")[1].tolist() == [1, 1]
    assert first(data, "predict")[1] == (str(tmp_path / "test/cat/0.png"),)


def test_folder_of_classes_is_split_in_each_class_and_does_not_depend_on_the_seed(tmp_path):
    folder(tmp_path, {"cat": 10, "dog": 20})
    data = ready(FolderData(str(tmp_path), seed=0))
    assert counted(data) == (24, 3, 3)
    assert sorted(data.test_set.second) == [0, 1, 1]
    paths = [set(found.paths) for found in (data.train_set, data.val_set, data.test_set)]
    assert len(set.union(*paths)) == 30
    again = ready(FolderData(str(tmp_path), seed=9))
    assert again.test_set.paths == data.test_set.paths


def test_folder_without_validation_cuts_one_from_train_and_leaves_the_test_alone(tmp_path):
    folder(tmp_path, {"train/cat": 10, "train/dog": 10, "test/cat": 2, "test/dog": 2})
    assert counted(ready(FolderData(str(tmp_path)))) == (18, 2, 4)
    assert counted(ready(FolderData(str(tmp_path), val_fraction=0.0))) == (20, 0, 4)


def test_folder_refuses_empty_and_unknown_classes(tmp_path):
    folder(tmp_path, {"cat": 2, "dog": 2})
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "notes.txt").write_text("none yet")
    with pytest.raises(DataError, match=r"without images.*cow"):
        FolderData(str(tmp_path)).setup("fit")
    folder(tmp_path / "b", {"train/cat": 2, "val/cta": 1})
    with pytest.raises(DataError, match="training images lack: cta"):
        FolderData(str(tmp_path / "b")).setup("fit")
    with pytest.raises(DataError, match="no folder"):
        FolderData(str(tmp_path / "none"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        FolderData(str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match="below 1"):
        FolderData(str(tmp_path), val_fraction=0.5, test_fraction=0.5)


def test_unreadable_images_are_named_or_skipped(tmp_path, caplog):
    folder(tmp_path, {"train/cat": 3, "train/dog": 3})
    (tmp_path / "train/cat/broken.jpg").write_bytes(b"\xff\xd8 no picture")
    whole = (tmp_path / "train/dog/0.png").read_bytes()
    (tmp_path / "train/dog/bits.png").write_bytes(whole[:60] + b"\x00\x01" + whole[62:])
    with pytest.raises(DataError, match=r"2 of 8.*broken\.jpg.*skip_unreadable"):
        FolderData(str(tmp_path)).setup("fit")
    with caplog.at_level(logging.WARNING):
        data = FolderData(str(tmp_path), skip_unreadable=True, val_fraction=0.0)
        data.setup("fit")
    assert "skipped 2 of 8" in caplog.text
    assert len(data.train_set) == 6
    for path in (tmp_path / "train/dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image can be read in the class folders dog"):
        FolderData(str(tmp_path), skip_unreadable=True).setup("fit")


def test_a_picture_cut_off_is_named_when_it_is_read(tmp_path):
    path = picture(tmp_path / "cat/0.jpg", 0, size=(200, 200))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cat/0\.jpg cannot be read.*truncated"):
        read(path)


def test_predict_takes_files_and_folders(tmp_path):
    folder(tmp_path, {"cat": 2, "dog": 2, "new": 3})
    single = str(tmp_path / "cat/0.png")
    data = FolderData(str(tmp_path), predict=[str(tmp_path / "new"), single])
    ready(data, "predict")
    images, names = first(data, "predict")
    assert images.shape == (4, 3, 32, 32)
    assert names == (*(str(tmp_path / f"new/{i}.png") for i in range(3)), single)
    with pytest.raises(DataError, match="does not exist"):
        FolderData(str(tmp_path), predict=str(tmp_path / "gone.png")).setup("predict")


# -- Hugging Face datasets ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The library, with its cache in a temporary folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return datasets


def encoded(seed: int) -> dict[str, object]:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def table(hub, labels, feature=None):
    features = {"img": hub.Image(), "label": feature or hub.Value("int64")}
    rows = {"img": [encoded(i) for i in range(len(labels))], "label": labels}
    return hub.Dataset.from_dict(rows, features=hub.Features(features))


def test_parquet_files(tmp_path, hub):
    table(hub, [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]).to_parquet(tmp_path / "d/train-00000-of-00001.parquet")
    table(hub, [2, 1]).to_parquet(tmp_path / "d/test.parquet")
    data = ready(HubData(str(tmp_path / "d"), batch_size=3, val_fraction=0.2))
    assert data.classes == ["0", "1", "2"]
    assert counted(data) == (8, 2, 2)
    images, labels = first(data, "test")
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [2, 1]
    assert first(data, "predict")[1] == ("row 0", "row 1")
    numbers = sorted(data.train_set.numbers + data.val_set.numbers)
    assert numbers == list(range(10))


def test_saved_folder_with_class_labels_and_text_labels(tmp_path, hub):
    named = hub.ClassLabel(names=["ant", "bee"])
    hub.DatasetDict({"train": table(hub, [0, 1, 1], named), "validation": table(hub, [1], named)}).save_to_disk(
        str(tmp_path / "named")
    )
    data = ready(HubData(str(tmp_path / "named")))
    assert data.classes == ["ant", "bee"]
    assert counted(data) == (3, 1, 0)
    text = hub.Value("string")
    hub.DatasetDict({"train": table(hub, ["b", "a"], text), "test": table(hub, ["a", "c"], text)}).save_to_disk(
        str(tmp_path / "text")
    )
    data = ready(HubData(str(tmp_path / "text"), val_fraction=0.0), "fit")
    assert data.classes == ["a", "b"]
    with pytest.raises(DataError, match="row 1: 'c'"):
        data.setup("test")


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, -1, 1], "row 1.*-1 is out of range"), ([0, 1, None], "row 2.*None"), ([0, 70, 1], "no class numbers")],
)
def test_wrong_labels_name_the_row(tmp_path, hub, labels, message):
    table(hub, labels).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=message):
        HubData(str(tmp_path / "d")).setup("fit")


def test_fractions_are_no_labels(tmp_path, hub):
    table(hub, [0.5, 1.0], hub.Value("float32")).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="whole numbers"):
        HubData(str(tmp_path / "d")).setup("fit")


def test_an_unlabelled_test_split_can_still_be_predicted(tmp_path, hub):
    found = hub.DatasetDict({"train": table(hub, [0, 1, 1]), "test": table(hub, [-1, -1])})
    found.save_to_disk(str(tmp_path / "d"))
    data = ready(HubData(str(tmp_path / "d"), val_fraction=0.0), "fit")
    data.setup("predict")
    assert len(data.predict_set) == 2
    with pytest.raises(DataError, match="row 0"):
        data.setup("test")


@pytest.mark.parametrize("kind", ["saved", "parquet", "text in test", "text in train"])
def test_labels_of_splits_whose_classes_stand_in_another_order(tmp_path, hub, kind):
    own, other = hub.ClassLabel(names=["ant", "bee", "cow"]), hub.ClassLabel(names=["cow", "ant", "bee"])
    train, test = table(hub, [0, 1, 2, 0], own), table(hub, [0, 1, 2, 2], other)
    if kind == "text in test":
        test = table(hub, ["cow", "ant", "bee", "bee"], hub.Value("string"))
    if kind == "text in train":
        train = table(hub, ["ant", "bee", "cow", "ant"], hub.Value("string"))
    if kind == "saved":
        found = hub.DatasetDict({"train": train, "test": test})
        found.save_to_disk(str(tmp_path / "d"))
    else:
        train.to_parquet(tmp_path / "d/train.parquet")
        test.to_parquet(tmp_path / "d/test.parquet")
    data = ready(HubData(str(tmp_path / "d"), val_fraction=0.0))
    assert data.classes == ["ant", "bee", "cow"]
    assert data.train_set.labels == [0, 1, 2, 0]
    assert data.test_set.labels == [2, 0, 1, 1]


def test_a_class_that_another_split_lacks_or_has_alone(tmp_path, hub, caplog):
    own, more = hub.ClassLabel(names=["ant", "bee", "cow"]), hub.ClassLabel(names=["dog", "cow", "bee"])
    table(hub, [0, 1, 1], own).to_parquet(tmp_path / "d/train.parquet")
    table(hub, [2, 0], more).to_parquet(tmp_path / "d/test.parquet")
    with pytest.raises(DataError, match="row 1: 'dog' is none of the 3 classes of train"):
        ready(HubData(str(tmp_path / "d"), val_fraction=0.0), "test")
    assert "has no training row of 1 of its classes: cow" in caplog.text
    table(hub, [0, 1], own).to_parquet(tmp_path / "e/train-00000-of-00002.parquet")
    table(hub, [0, 1], more).to_parquet(tmp_path / "e/train-00001-of-00002.parquet")
    with pytest.raises(DataError, match="list their classes in different orders"):
        ready(HubData(str(tmp_path / "e")), "fit")


def test_a_class_that_validation_takes_whole_is_named(tmp_path, hub):
    table(hub, [*([0] * 9), 1], None).to_parquet(tmp_path / "d/train.parquet")
    with pytest.raises(DataError, match="takes all training rows of 1: none is left to train on"):
        ready(HubData(str(tmp_path / "d"), val_fraction=0.9), "fit")


def test_missing_columns_splits_and_data_sets(tmp_path, hub):
    table(hub, [0, 1]).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"no column 'lable'; its columns: img, label\. Did you mean 'label'"):
        HubData(str(tmp_path / "d"), label_column="lable").setup("fit")
    with pytest.raises(DataError, match="no split 'tests'"):
        HubData(str(tmp_path / "d"), test_split="tests").setup("fit")
    table(hub, [0, 1]).rename_column("label", "kind").save_to_disk(str(tmp_path / "e"))
    with pytest.raises(DataError, match="give label_column"):
        HubData(str(tmp_path / "e")).setup("fit")
    with pytest.raises(DataError, match="cannot be loaded"):
        HubData("nobody/no-such-data-set").setup("fit")


# -- VTAB-1k ------------------------------------------------------------------------------------------------


def vtab(root: Path, name: str = "kitti", suffix: str = "png") -> Path:
    """Eight, two and four images; two of the test images are also in train800."""
    lists: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for split, seeds in (("train800", range(8)), ("val200", range(8, 10)), ("test", (0, 1, 20, 21))):
        for i, seed in enumerate(seeds):
            picture(root / name / f"images/{split}/{i:06d}.{suffix}", seed)
            lists[split].append(f"images/{split}/{i:06d}.{suffix} {seed % 4}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (root / name / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_vtab_subsets(tmp_path, caplog):
    vtab(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = ready(VTABData(str(tmp_path), "kitti"))
    assert counted(data) == (8, 2, 4)
    assert (data.group, data.num_classes, data.augment) == ("structured", 4, "none")
    assert "2 of 4 test images of kitti are also in train800" in caplog.text
    assert "JPEG" not in caplog.text
    assert first(data, "test")[1].tolist() == [0, 1, 0, 1]
    data = ready(VTABData(str(tmp_path), "kitti", subset="train800val200"))
    assert counted(data) == (10, 0, 4)


def test_vtab_names_and_jpeg_copies(tmp_path, caplog):
    vtab(tmp_path, "cifar100", "jpg")
    with caplog.at_level(logging.WARNING):
        data = ready(VTABData(str(tmp_path), "cifar"), "fit")
    assert "8 of 8 training images of cifar are JPEG" in caplog.text
    assert (data.task, data.num_classes) == ("cifar", 100)
    assert ready(VTABData(str(tmp_path / "cifar100"), "CIFAR-100"), "test").task == "cifar"
    assert vtab_task("pets") == vtab_task("oxford_pet") == "oxford_iiit_pet"
    with pytest.raises(ConfigError, match="Did you mean 'dsprites_loc'"):
        vtab_task("dsprite_loc")
    with pytest.raises(DataError, match="no folder of VTAB task 'svhn'"):
        VTABData(str(tmp_path), "svhn")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/train800/000000.png 4", r"train800\.txt:9: label 4 is out of range 0 … 3"),
        ("images/train800/000000.png -1", r"train800\.txt:9: label -1"),
        ("images/train800/000000.png 1.5", r"train800\.txt:9: expected an integer label"),
        ("images/train800/000000.png", r"train800\.txt:9: expected `<image> <label>`"),
        ("images/train800/000099.png 1", r"train800\.txt:9: 1 of 9 images are missing"),
    ],
)
def test_vtab_names_the_wrong_line(tmp_path, line, message):
    vtab(tmp_path)
    with (tmp_path / "kitti/train800.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        VTABData(str(tmp_path), "kitti").setup("fit")


def test_vtab_averages():
    groups = {
        group: [t for t, row in TASKS.items() if row[0] == group] for group in ("natural", "specialized", "structured")
    }
    assert [len(tasks) for tasks in groups.values()] == [7, 4, 8]
    results = dict.fromkeys(groups["natural"], 80.0) | dict.fromkeys(groups["specialized"], 84.0)
    results |= dict.fromkeys(groups["structured"], 61.0)
    found = vtab_averages(results)
    assert found["group"] == pytest.approx(75.0)  # (80 + 84 + 61) / 3
    assert found["mean19"] == pytest.approx(1384 / 19)  # (7·80 + 4·84 + 8·61) / 19 = 72.84
    assert {"natural", "specialized", "structured"} < found.keys()
    del results["kitti"]
    partial = vtab_averages(results)
    assert set(partial) == {"natural", "specialized", "mean18"}
    assert partial["mean18"] == pytest.approx(1323 / 18)
    for wrong, message in (
        ({}, "no VTAB results"),
        ({"cifar": 1.0, "cifar100": 1.0}, "twice"),
        ({"dtd": float("nan")}, "nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            vtab_averages(wrong)


# -- through Lightning --------------------------------------------------------------------------------------


def test_fit_test_and_predict_through_the_task(tmp_path):
    vtab(tmp_path / "data")
    data = VTABData(str(tmp_path / "data"), "kitti", subset="train800val200", batch_size=4)
    module, run = classifier(model_args=SMALL), trainer(tmp_path)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    names = [name for batch in run.predict(module, datamodule=data) for name in batch["id"]]
    assert [Path(name).name for name in names] == [f"{i:06d}.png" for i in range(4)]
