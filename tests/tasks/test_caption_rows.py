"""Several captions of one image, however they come, and texts as other programs save them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data.texts import cleaned, unicode
from mmpeft.diffusion.data.images import CaptionedImages
from mmpeft.errors import DataError
from mmpeft.vision.data import VTABData
from mmpeft.vla.contrastive.data import CaptionData
from mmpeft.vla.contrastive.task import recall
from mmpeft.vla.segmentation.masks import FolderSegmentationData
from mmpeft.vla.vqa.data import items_of

IMAGES, SAID = 4, 5


def png(number: int, **options: object) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG", **options)
    return stream.getvalue()


def text(number: int, caption: int) -> str:
    return f"image {number} in words {caption}"


PAIRS = [(number, caption) for caption in range(SAID) for number in range(IMAGES)]
FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
LISTED = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})


def hub_rows(root: Path) -> str:
    rows = {"image": [{"bytes": png(n), "path": None} for n, _ in PAIRS], "text": [text(*pair) for pair in PAIRS]}
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(root / "rows.parquet")
    return str(root / "rows.parquet")


def hub_lists(root: Path) -> str:
    texts = [[text(n, c) for c in range(SAID)] for n in range(IMAGES)]
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(IMAGES)], "text": texts}
    datasets.Dataset.from_dict(rows, features=LISTED).to_parquet(root / "lists.parquet")
    return str(root / "lists.parquet")


def shard(root: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(root / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(root / "x.tar")


def tar_samples(root: Path) -> str:
    members = {}
    for i, (n, c) in enumerate(PAIRS):
        members |= {f"{i}.png": png(n), f"{i}.txt": text(n, c).encode()}
    return shard(root, members)


def tar_lists(root: Path) -> str:
    members = {}
    for n in range(IMAGES):
        said = json.dumps({"text": [text(n, c) for c in range(SAID)]}).encode()
        members |= {f"{n}.png": png(n), f"{n}.json": said}
    return shard(root, members)


def table(root: Path) -> str:
    lines = [f"{n}.png\t{text(n, c)}" for n, c in PAIRS]
    for n in range(IMAGES):
        (root / f"{n}.png").write_bytes(png(n))
    (root / "x.tsv").write_text("\n".join(["image\ttext", *lines]))
    return str(root / "x.tsv")


def lines(root: Path) -> str:
    table(root)
    said = [{"image": f"{n}.png", "text": [text(n, c) for c in range(SAID)]} for n in range(IMAGES)]
    (root / "x.jsonl").write_text("\n".join(map(json.dumps, said)))
    return str(root / "x.jsonl")


def copies(root: Path) -> str:
    """A file for each caption, as some tools write them; here with other metadata as well."""
    for i, (n, c) in enumerate(PAIRS):
        (root / f"{i}.png").write_bytes(png(n, dpi=(72 + i, 72)))
        (root / f"{i}.txt").write_text(text(n, c))
    return str(root)


def links(root: Path) -> str:
    (root / "in").mkdir()
    for i, (n, c) in enumerate(PAIRS):
        (root / f"{n}.png").write_bytes(png(n))
        (root / "in" / f"{i}.png").symlink_to(root / f"{n}.png")
        (root / "in" / f"{i}.txt").write_text(text(n, c))
    return str(root / "in")


SOURCES: dict[str, Callable[[Path], str]] = {
    own.__name__: own for own in (hub_rows, hub_lists, tar_samples, tar_lists, table, lines, copies, links)
}


@pytest.mark.parametrize("source", SOURCES)
def test_captions_of_one_image_belong_together(source: str, tmp_path: Path) -> None:
    """With perfect features every query finds its counterpart; each image is there once."""
    data = CaptionData("", val=SOURCES[source](tmp_path), image_size=8, augment="none", batch_size=7)
    data.sources["train"] = None
    data.setup("validate")
    rows, said = [], []
    for _, texts, own in data.val_dataloader():
        rows.append(own)
        said += texts
    row = torch.cat(rows)
    assert sorted(said) == sorted(text(*pair) for pair in PAIRS)
    assert len(row.unique()) == IMAGES
    numbers = torch.tensor([int(one.split()[1]) for one in said])
    assert all(len(row[numbers == n].unique()) == 1 for n in range(IMAGES))
    features = torch.eye(IMAGES)[numbers]
    found = recall(features, features, row)
    assert found["image_to_text@1"] == found["text_to_image@1"] == 1


def test_one_prompt_for_images_with_several_captions(tmp_path: Path) -> None:
    data = CaptionedImages(tar_lists(tmp_path), prompt="a photo of sks")
    data.setup("fit")
    assert data.albums["train"].prompts == ["a photo of sks"] * IMAGES


MESSY = "\ufeffa dog\r\nin the park \r\n"
CLEAN = "a dog\nin the park"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("source", ["tar txt", "tar json", "beside", "csv", "jsonl", "hub", "metadata"])
def test_texts_are_cleaned_wherever_they_are(source: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(0))
    name = str(tmp_path)
    if source == "tar txt":
        name = shard(tmp_path, {"x.png": png(0), "x.txt": MESSY.encode(encoding)})
    elif source == "tar json":
        name = shard(tmp_path, {"x.png": png(0), "x.json": json.dumps({"text": MESSY}).encode(encoding)})
    elif source == "beside":
        (tmp_path / "x.txt").write_bytes(MESSY.encode(encoding))
    elif source == "csv":
        (tmp_path / "x.csv").write_bytes(f'\ufeffimage,text\r\nx.png,"{MESSY}"\r\n'.encode(encoding))
        name = str(tmp_path / "x.csv")
    elif source in ("jsonl", "metadata"):
        column, file = ("image", "x.jsonl") if source == "jsonl" else ("file_name", "metadata.jsonl")
        line = json.dumps({column: "x.png", "text": MESSY}) + "\r\n"
        (tmp_path / file).write_bytes(f"\ufeff{line}".encode(encoding))
        name = str(tmp_path / file) if source == "jsonl" else name
    else:
        rows = {"image": [{"bytes": png(0), "path": None}], "text": [MESSY]}
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(tmp_path / "x.parquet")
        name = str(tmp_path / "x.parquet")
    data = CaptionData(name)
    data.setup("fit")
    assert data.train_set.texts == [CLEAN]


def test_names_and_lists_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("\ufeffred cat\r\nblue dog\r\n".encode())
    assert FolderSegmentationData(str(tmp_path)).classes == ["red cat", "blue dog"]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.png").write_bytes(png(0))
    for name, entry in (
        ("questions", {"question_id": 1, "image_id": 1, "question": MESSY}),
        ("annotations", {"question_id": 1, "answers": [{"answer": "Yes\r\n"}]}),
    ):
        (tmp_path / "train" / f"{name}.json").write_bytes(("\ufeff" + json.dumps({name: [entry]})).encode())
    (item,) = items_of(tmp_path, "train", "{split}/{image_id}.png")
    assert (item["question"], item["answers"]) == (CLEAN, ["yes"])
    kitti = tmp_path / "kitti"
    kitti.mkdir()
    (kitti / "1.png").write_bytes(png(0))
    (kitti / "test.txt").write_bytes("\ufeff1.png 3\r\n".encode())
    assert VTABData(str(tmp_path), "kitti").read("test").second == [3]


def test_the_cleaner() -> None:
    assert cleaned("a\rb\r\nc\n") == "a\nb\nc"
    assert cleaned("\ufeff \ufeffx") == "x"
    with pytest.raises(DataError, match=r"here cannot be read.*save it as UTF-8"):
        unicode(b"caf\xe9", "here")


def test_what_a_shard_has_beside_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"0.png": png(0), "0.txt": b"a", "0.cls": b"1", "0.seg.png": png(1), "0.json": b'{"other": 1}'}
    members |= {"._0.png": b"x", "__MACOSX/0.png": b"x"}
    data = CaptionData(shard(tmp_path, members))
    data.setup("fit")
    assert len(data.train_set) == 1
    assert "2 members left out of " in caplog.text
    assert "1 .cls" in caplog.text
    with pytest.raises(DataError, match="has 2000000 bytes, expected 1048576 of text at most"):
        CaptionData(shard(tmp_path, {"0.png": png(0), "0.txt": b"a" * 2_000_000})).setup("fit")
