"""What is refused, mentioned and mended before a run on images with prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mmpeft.data.pictures import decoded
from mmpeft.diffusion.data import CaptionedImages
from mmpeft.errors import ConfigError, DataError
from tests.unit.captioned_pictures import (
    TEXTS,
    captioned,
    encoded,
    images,
    listed,
    metadata,
    noise,
    opened,
    parquet,
    refused,
    shard,
    table,
)


def test_folders_without_images_or_captions(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"empty holds no images; expected files \.jpg", empty)
    images(tmp_path / "bare")
    refused(
        r"bare holds 3 images and no captions; expected metadata\.jsonl .* or 0\.txt beside 0\.png", tmp_path / "bare"
    )
    images(tmp_path / "outer")
    listed(tmp_path / "outer" / "train")
    refused(r"outer/train/metadata\.jsonl is there: give .*outer/train", tmp_path / "outer")
    refused("datasets cannot load", tmp_path / "nowhere")
    refused("no tar file matches", tmp_path / "none-*.tar")


def test_captions_and_images_that_lack_each_other(tmp_path: Path) -> None:
    captioned(tmp_path / "a", [(80, 80)] * 6)
    for i in (0, 2, 3, 5):
        (tmp_path / "a" / f"{i}.txt").unlink()
    refused(r"no \.txt beside .*0\.png; .*2\.png; .*3\.png and 1 more; write", tmp_path / "a")
    captioned(tmp_path / "b")
    (tmp_path / "b" / "1.png").unlink()
    refused(r"no image beside .*1\.txt; restore", tmp_path / "b")
    captioned(tmp_path / "c")
    (tmp_path / "c" / "1.txt").write_text(" \n")
    refused(r"sample 1 has no text \(.*1\.png\)", tmp_path / "c")
    captioned(tmp_path / "d")
    noise(80, 80).save(tmp_path / "d" / "1.jpg")
    refused("several images share the text of .*d/1;", tmp_path / "d")
    captioned(tmp_path / "e")
    (tmp_path / "e" / "1.txt").write_bytes(b"caf\xe9")
    refused(r"1\.txt cannot be read: .*; save it as UTF-8", tmp_path / "e")


def test_metadata_that_does_not_fit(tmp_path: Path) -> None:
    lines = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(TEXTS)]
    images(tmp_path)
    refused(r"metadata\.jsonl has no line for .*2\.png; add", metadata(tmp_path, lines[:2]))
    refused(
        r"names .*9\.png, which does not exist", metadata(tmp_path, [*lines, {"file_name": "9.png", "text": "lost"}])
    )
    refused(
        r"entry 1 has no column 'text'; columns: file_name, txt", metadata(tmp_path, [{"file_name": "a", "txt": "b"}])
    )
    refused(r"entry 1: expected text in 'text', got \[1\]", metadata(tmp_path, [{"file_name": "0.png", "text": [1]}]))
    refused(r"0\.png is there twice with one text", metadata(tmp_path, [*lines, lines[0]]))
    metadata(tmp_path, [])
    refused("it is empty", tmp_path / "metadata.jsonl")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": \n')
    refused(r"metadata\.jsonl, line 2 is no JSON", tmp_path)
    (tmp_path / "metadata.jsonl").write_text('["0.png", "a"]\n')
    refused(r"line 1: expected an object", tmp_path)
    metadata(tmp_path, lines)
    (tmp_path / "1.txt").write_text("a red car")
    refused(r"1\.png: texts in .*metadata\.jsonl and in a \.txt", tmp_path)
    (tmp_path / "x.csv").write_text("image,text\n0.png,one, two\n")
    refused("entry 1 has more cells than columns", tmp_path / "x.csv")
    with pytest.raises(ConfigError, match=r"expected \.csv"):
        opened(tmp_path / "0.png")


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    picture = encoded(noise(80, 80))
    refused(r"expected pairs .*\['1'\]", shard(tmp_path / "a.tar", {"0.png": picture, "0.txt": b"a", "1.png": picture}))
    refused(
        r"field 'text'\), but \['0'\]", shard(tmp_path / "b.tar", {"0.png": picture, "0.json": b'{"caption": "a"}'})
    )
    refused("has the image 0 twice", shard(tmp_path / "c.tar", {"0.png": picture, "0.jpg": picture, "0.txt": b"a"}))
    assert opened(tmp_path / "b.tar", text_column="caption").prompts() == ["a"]
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:9000])
    refused("no whole tar file|cannot be read", tmp_path / "d.tar")


def test_data_sets_that_do_not_fit(tmp_path: Path) -> None:
    source = parquet(tmp_path)
    refused(r"has no column 'caption'; columns: \['image', 'text'\]", source, text_column="caption")
    rows = table(tmp_path / "images")
    rows.map(lambda row: {"text": {"said": row["text"]}}).to_parquet(tmp_path / "lists.parquet")
    refused("row 0: expected a string, or a list of them, got dict", tmp_path / "lists.parquet")
    rows.add_column("number", [1, 2, 3]).to_parquet(tmp_path / "numbers.parquet")
    refused("the column 'number' holds .*int64.*, not images", tmp_path / "numbers.parquet", image_column="number")
    none = datasets.Dataset.from_dict({"image": [None], "text": ["a"]}, rows.features)
    none.to_parquet(tmp_path / "none.parquet")
    refused("row 0 of .* has no image", tmp_path / "none.parquet")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"no picture", "1.png cannot be read as a picture"),
    "cut png": (lambda: encoded(noise(80, 80))[:9000], "1.png cannot be read as a picture.*truncated"),
    "cut jpeg": (lambda: encoded(noise(80, 80), "JPEG")[:2000], "1.png cannot be read as a picture.*truncated"),
    "cmyk": (lambda: encoded(noise(80, 80).convert("CMYK"), "JPEG"), "1.png has colours of mode CMYK.*sRGB.icc"),
    "gif": (
        lambda: encoded(noise(80, 80), "GIF", save_all=True, append_images=[noise(80, 80, 1)]),
        "1.png is animated: expected one frame, got 2",
    ),
    "transparent": (lambda: encoded(transparent()), "1.png has transparent pixels; set background: white"),
    "small": (lambda: encoded(noise(40, 60)), "1 of 3 images are smaller .*1.png: 40×60 for 48×80.*upscale: true"),
}


def transparent() -> Image.Image:
    image = noise(80, 80).convert("RGBA")
    image.putalpha(Image.fromarray(np.linspace(0, 255, 6400).reshape(80, 80).astype(np.uint8)))
    return image


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_used_are_refused(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    captioned(tmp_path)
    (tmp_path / "1.png").write_bytes(make())
    refused(message, tmp_path)


def test_all_unusable_images_are_counted(tmp_path: Path) -> None:
    captioned(tmp_path, [(80, 80)] * 6)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    refused(r"5 of 6 images cannot be used: .*0\.png .*2\.png .* and 2 more", tmp_path)


def test_grey_palette_opaque_alpha_and_turned_images_are_taken(tmp_path: Path) -> None:
    plain = noise(80, 64)
    opaque = plain.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    kinds = {
        "grey": encoded(plain.convert("L")),
        "palette": encoded(plain.convert("P")),
        "alpha": encoded(opaque),
        "turned": encoded(plain.transpose(Image.Transpose.ROTATE_90), exif=exif),
        "one bit": encoded(plain.convert("1")),
        "still gif": encoded(plain, "GIF"),
        "phone": encoded(plain, "MPO", save_all=True, append_images=[noise(80, 64, 1)]),
    }
    for name, data in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.png").write_bytes(data)
        (folder / "y.png").write_bytes(encoded(decoded(data, name) if name != "turned" else plain))
        data_module = opened(folder, prompt="x")
        one, other = data_module.train_set
        assert one["original_size"].tolist() == [80, 64]
        assert torch.equal(one["image"], other["image"]), name


def test_transparent_images_lie_on_the_background(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(transparent()))
    white = opened(tmp_path, prompt="x", background="white").train_set[0]
    black = opened(tmp_path, prompt="x", background="#000").train_set[0]
    assert white["key"] != black["key"]
    assert float(white["image"][:, 0].mean()) > 0.95
    assert float(black["image"][:, 0].mean()) < -0.95


def test_small_images_are_enlarged_on_request(tmp_path: Path) -> None:
    sample = opened(captioned(tmp_path, [(40, 40)]), upscale=True).train_set[0]
    assert sample["image"].shape == (3, 64, 64)
    assert sample["original_size"].tolist() == [40, 40]


def test_twins_and_what_loses_most_of_itself_are_mentioned(tmp_path: Path, caplog: Any) -> None:
    captioned(tmp_path, [(80, 80), (70, 400)])
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "2.txt").write_text("a cat")
    with caplog.at_level(logging.WARNING):
        opened(tmp_path)
    assert "content of another one, so that it counts more than once: " + str(tmp_path / "2.png") in caplog.text
    assert "more than half is cut off, so that captions may not fit: " + str(tmp_path / "1.png") in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_prompt": "a dog"}, "prior_prompt is said of the images in prior_root"),
        ({"crop": "centre"}, "crop is center or random, got 'centre'"),
        ({"background": "whit"}, "background is a colour such as white"),
        ({"repeats": 0}, "repeats is how often"),
        ({"resolution": 0}, "resolution is a number of pixels >= 1"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CaptionedImages("x", **options)


def test_resolution_is_the_users_then_the_pipelines(tmp_path: Path) -> None:
    captioned(tmp_path)
    assert opened(tmp_path, 32).train_set[0]["image"].shape[-1] == 32
    data = CaptionedImages(str(tmp_path), resolution=48)
    data.configure(64, 16)  # before setup
    data.setup("fit")
    assert data.train_set[0]["image"].shape[-1] == 48
    with pytest.raises(ConfigError, match="resolution is a multiple of 32, got 48; the next ones are 32 and 64"):
        data.configure(64, 32)
    bare = CaptionedImages(str(tmp_path))
    bare.setup("fit")
    with pytest.raises(ConfigError, match="knows no resolution"):
        bare.train_dataloader()
    alone = CaptionedImages(str(tmp_path), resolution=40)
    with pytest.raises(DataError, match="setup"):
        alone.train_dataloader()
    alone.setup("fit")
    assert next(iter(alone.train_dataloader()))["image"].shape == (1, 3, 40, 40)
    assert alone.val_dataloader() == []
    with pytest.raises(DataError, match="no test samples"):
        alone.test_dataloader()
    assert CaptionedImages(str(tmp_path)).prompts() == TEXTS  # before setup
