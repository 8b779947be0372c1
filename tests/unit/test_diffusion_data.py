"""Images with prompts: every source, no distortion, one order for any workers and after any kill, clear refusals."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpeft.diffusion.data import CaptionedImages, EmojiStyle
from mmpeft.diffusion.data.buckets import BucketSampler, bucket_sizes, crop, nearest_size
from mmpeft.diffusion.families import FACTS
from mmpeft.embedded import emoji
from mmpeft.errors import ConfigError, DataError
from mmpeft.training.data import EpochSampler, ResumableLoader
from mmpeft.training.pictures import flat

TEXTS = ["a cat", "a red car", "a tree"]


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def images(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 80),) * 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes)):
        noise(*size, seed=i).save(path)
    return paths


def captioned(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 80),) * 3) -> Path:
    for i, path in enumerate(images(folder, sizes)):
        path.with_suffix(".txt").write_text(TEXTS[i] if i < len(TEXTS) else f"picture {i}")
    return folder


def metadata(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def listed(folder: Path) -> Path:
    paths = images(folder)
    return metadata(folder, [{"file_name": path.name, "text": text} for path, text in zip(paths, TEXTS)])


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path) -> str:
    folder.mkdir()
    first = {"./v1.0/0.png": encoded(noise(80, 80, 0)), "./v1.0/0.txt": b"a cat\n"}
    second = {
        "1.png": encoded(noise(80, 80, 1)),
        "1.json": b'{"text": "a red car"}',
        "2.png": encoded(noise(80, 80, 2)),
        "2.txt": b"a tree",
        "2.json": b'{"text": "of less account"}',
        "stats.json": b"{}",
    }
    shard(folder / "a-0.tar", first)
    shard(folder / "a-1.tar", second)
    return str(folder / "a-*.tar")


def table(folder: Path) -> datasets.Dataset:
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in images(folder)], "text": TEXTS}
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), text=datasets.Value("string")))


def parquet(folder: Path) -> str:
    table(folder / "images").to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def parquet_folder(folder: Path) -> str:
    table(folder / "images").to_parquet(folder / "out" / "train-00000-of-00001.parquet")
    return str(folder / "out")


def saved(folder: Path) -> str:
    table(folder / "images").save_to_disk(folder / "saved")
    return str(folder / "saved")


def hub(folder: Path) -> str:
    return f"{listed(folder)}:train"  # `datasets` reads it


SOURCES: dict[str, Callable[[Path], Any]] = {
    "metadata": listed,
    "txt": captioned,
    "shards": shards,
    "parquet": parquet,
    "parquet-folder": parquet_folder,
    "save_to_disk": saved,
    "datasets": hub,
}


def opened(root: Any, resolution: int = 64, multiple: int = 8, **options: Any) -> CaptionedImages:
    data = CaptionedImages(str(root), **options)
    data.setup("fit")
    data.configure(resolution, multiple)
    return data


def of_rank(data: Any, rank: int, world: int) -> ResumableLoader:
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world, "rank": rank})
    return data.train_dataloader()


def epoch(loader: ResumableLoader, number: int) -> list[Any]:
    loader.sampler.set_epoch(number)
    return list(loader)


def same(left: list[Any], right: list[Any]) -> bool:
    def flat_of(batch: dict[str, Any]) -> list[Any]:
        return [x for v in batch.values() for x in (flat_of(v) if isinstance(v, dict) else [v])]

    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(flat_of(a), flat_of(b), strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


MIXED = [(80, 80)] * 5 + [(64, 100)] * 4 + [(100, 66)] * 3 + [(90, 70)]


# -- sources ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    data = opened(SOURCES[name](tmp_path / "data"))
    assert data.samples == 3
    assert data.prompts() == TEXTS
    found = [data.train_set[i] for i in range(3)]
    reference = opened(captioned(tmp_path / "reference")).train_set
    assert [sample["key"] for sample in found] == [reference[i]["key"] for i in range(3)]
    for i, sample in enumerate(found):
        assert torch.equal(sample["image"], reference[i]["image"])
        assert sample["image"].shape == (3, 64, 64)
        assert -1 <= sample["image"].min() < -0.5 < 0.5 < sample["image"].max() <= 1
    (batch,) = list(opened(tmp_path / "reference", batch_size=3).train_dataloader())
    assert set(batch["prompt"]) == set(TEXTS)
    assert {**batch, "image": 0, "prompt": 0, "key": 0}.keys() == {"image", "prompt", "key", *FACTS}
    assert batch["original_size"].tolist() == [[80, 80]] * 3
    assert batch["crop"].tolist() == [[0, 0]] * 3
    assert batch["target_size"].tolist() == [[64, 64]] * 3
    assert batch["target_size"].dtype == torch.int64


def test_one_prompt_for_a_folder_or_a_data_set_without_captions(tmp_path: Path) -> None:
    images(tmp_path / "dog")
    table(tmp_path / "images").remove_columns("text").to_parquet(tmp_path / "dog.parquet")
    for root in (tmp_path / "dog", tmp_path / "dog.parquet", captioned(tmp_path / "captioned")):
        data = opened(root, prompt="a photo of sks dog")
        assert data.prompts() == ["a photo of sks dog"]
        assert data.samples == 3


def test_a_table_gives_one_image_several_captions(tmp_path: Path) -> None:
    images(tmp_path)
    (tmp_path / "x.csv").write_text('image,text\n0.png,"one, two"\n0.png,three\n')
    data = opened(tmp_path / "x.csv")
    assert data.prompts() == ["one, two", "three"]
    assert data.train_set[0]["key"] == data.train_set[1]["key"]
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n" + "".join(f"{i}.png,{text}\n" for i, text in enumerate(TEXTS)))
    assert opened(tmp_path).prompts() == TEXTS


@pytest.mark.parametrize("buckets", [True, False])
def test_prior_images_come_with_each_sample_in_one_size_a_batch(tmp_path: Path, buckets: bool) -> None:
    captioned(tmp_path / "mine", [(64, 64)] * 3 + [(60, 100)] * 2)
    images(tmp_path / "class", [(64, 64)] * 4)
    data = opened(
        tmp_path / "mine",
        prior_root=str(tmp_path / "class"),
        prior_prompt="a photo of a dog",
        batch_size=2,
        buckets=buckets,
        upscale=True,
    )
    assert data.prompts()[-1] == "a photo of a dog"
    assert data.samples == 5
    seen = set()
    for number in range(6):
        for batch in epoch(data.train_dataloader(), number):
            assert batch["prior"]["image"].shape == (len(batch["image"]), 3, 64, 64)
            assert set(batch["prior"]["prompt"]) == {"a photo of a dog"}
            seen |= set(batch["prior"]["key"])
    assert len(seen) == 4
    assert same(epoch(data.train_dataloader(), 1), epoch(data.train_dataloader(), 1))


def test_prior_images_that_fit_no_bucket_are_mentioned(tmp_path: Path, caplog: Any) -> None:
    captioned(tmp_path / "mine", [(80, 80)])
    images(tmp_path / "class", [(80, 80), (80, 130)])
    opened(tmp_path / "mine", prior_root=str(tmp_path / "class"), prior_prompt="a dog")
    assert "1 of 2 prior images are never drawn" in caplog.text


# -- buckets ------------------------------------------------------------------------------------------------


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1024, 64)
    assert [size for size in sizes if size[0] <= size[1]] == [
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (960, 1088),
        (1024, 1024),
    ]
    assert {(width, height) for height, width in sizes} == set(sizes)


@given(st.integers(1, 64), st.sampled_from([1, 4, 8, 16, 64]))
def test_buckets_hold_no_more_pixels_than_the_square_and_are_multiples(times: int, multiple: int) -> None:
    resolution = times * multiple
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert all(h % multiple == 0 == w % multiple and 0 < h * w <= resolution**2 for h, w in sizes)
    assert len(sizes) < 16


@given(st.integers(8, 3000), st.integers(8, 3000), st.floats(0, 1))
def test_the_window_has_the_aspect_of_its_bucket_and_lies_in_the_image(height: int, width: int, place: float) -> None:
    sizes = bucket_sizes(512, 64)
    bucket = sizes[nearest_size((height, width), sizes)]
    found = crop((height, width), bucket, place)
    left, top, right, bottom = found.box
    assert (bottom - top) / (right - left) == pytest.approx(bucket[0] / bucket[1], rel=1e-9)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)  # as large as can be
    assert (bottom - top) * found.scale == pytest.approx(bucket[0])
    assert all(side >= 0 for side in found.corner)


def test_a_circle_stays_one(tmp_path: Path) -> None:
    """Moments of a disc in each direction, after a photo of an odd shape has gone into its bucket."""
    tmp_path.joinpath("x.txt").write_text("a disc")
    y, x = np.mgrid[:301, :487]
    disc = (((y - 150) ** 2 + (x - 243) ** 2) < 90**2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "x.png")
    image = opened(tmp_path, 128, 8).train_set[0]["image"]
    assert image.shape == (3, 96, 168)
    weight = (image[0] + 1) / 2
    rows, columns = torch.arange(96.0)[:, None], torch.arange(168.0)[None]
    spreads = [((a - (a * weight).sum() / weight.sum()) ** 2 * weight).sum() / weight.sum() for a in (rows, columns)]
    assert float(spreads[0] / spreads[1]) == pytest.approx(1, abs=2e-3)


def test_images_go_to_the_nearest_aspect_and_batches_hold_one_bucket(tmp_path: Path) -> None:
    data = opened(captioned(tmp_path / "mixed", MIXED), batch_size=2)
    batches = epoch(data.train_dataloader(), 0)
    shapes = [tuple(batch["image"].shape[-2:]) for batch in batches]
    assert set(shapes) == {(64, 64), (48, 80), (80, 48), (72, 56)}
    assert [len(batch["image"]) for batch in batches] == [2] * (3 + 2 + 2 + 1)
    for batch, (height, width) in zip(batches, shapes):
        assert batch["target_size"].tolist() == [[height, width]] * 2
    keys = {key for batch in batches for key in batch["key"]}
    assert len(keys) == len(MIXED)
    square = opened(tmp_path / "mixed", batch_size=2, buckets=False)
    assert {tuple(batch["image"].shape) for batch in square.train_dataloader()} == {(2, 3, 64, 64), (1, 3, 64, 64)}


def test_one_bucket_is_plain_batches() -> None:
    for world in (1, 3):
        for rank in range(world):
            plain = EpochSampler(23, shuffle=True, seed=4, num_replicas=world, rank=rank)
            found = BucketSampler([7] * 23, 4, seed=4, num_replicas=world, rank=rank)
            assert len(plain) == len(found)
            assert list(plain) == list(found)


def test_facts_of_a_crop(tmp_path: Path) -> None:
    """What SDXL is told: the upright size before, where the crop lies in the resized image, and its own size."""
    captioned(tmp_path, [(100, 300)])
    sample = opened(tmp_path, buckets=False).train_set[0]
    assert sample["original_size"].tolist() == [100, 300]
    assert sample["crop"].tolist() == [0, 64]  # 64 × 192, cut to the 64 in the middle
    assert sample["target_size"].tolist() == [64, 64]


def test_random_crops_and_mirrored_images(tmp_path: Path) -> None:
    captioned(tmp_path, [(100, 300)])
    random = opened(tmp_path, buckets=False, crop="random")
    found = [epoch(random.train_dataloader(), number)[0] for number in range(8)]
    assert "key" not in found[0]
    corners = [batch["crop"][0].tolist() for batch in found]
    assert len({left for _, left in corners}) > 4
    assert all(top == 0 and 0 <= left <= 128 for top, left in corners)
    assert same(found, [epoch(random.train_dataloader(), number)[0] for number in range(8)])

    plain = opened(tmp_path, buckets=False).train_set[0]
    mirrored = opened(tmp_path, buckets=False, mirror=True)
    found = [epoch(mirrored.train_dataloader(), number)[0] for number in range(8)]
    assert len({batch["key"][0] for batch in found}) == 2
    for batch in found:
        flipped = batch["key"][0] != plain["key"]
        assert torch.equal(batch["image"][0], plain["image"].flip(-1) if flipped else plain["image"])
        assert batch["crop"].tolist() == [[0, 64]]


def test_the_corner_of_a_mirrored_crop_is_that_in_the_mirrored_image(tmp_path: Path) -> None:
    """On a ramp from left to right the mean of a crop says where it was, and its slope whether it is mirrored."""
    Image.fromarray(np.tile(np.arange(192, dtype=np.uint8), (64, 1))).save(tmp_path / "ramp.png")
    data = opened(tmp_path, prompt="a ramp", buckets=False, mirror=True, crop="random")
    slopes = set()
    for number in range(12):
        (batch,) = epoch(data.train_dataloader(), number)
        values = (batch["image"][0, 0, 0] + 1) * 127.5
        mirrored = bool(values[0] > values[-1])
        start = float(values.mean()) - 31.5
        assert int(batch["crop"][0, 1]) == pytest.approx(128 - start if mirrored else start, abs=1)
        slopes.add(mirrored)
    assert slopes == {True, False}


# -- keys ---------------------------------------------------------------------------------------------------


def test_keys_name_content_and_transform(tmp_path: Path) -> None:
    captioned(tmp_path / "a", [(80, 80), (80, 80), (100, 300)])
    keys = [sample["key"] for sample in opened(tmp_path / "a").train_set]
    assert len(set(keys)) == 3
    assert keys == [sample["key"] for sample in opened(tmp_path / "a", seed=5, repeats=2).train_set][:3]
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "0.txt").write_text("another caption")
    assert keys == [sample["key"] for sample in opened(tmp_path / "b").train_set]  # pixels, not names or captions
    square = [sample["key"] for sample in opened(tmp_path / "b", buckets=False).train_set]
    assert square[:2] == keys[:2]
    assert square[2] != keys[2]
    other = [sample["key"] for sample in opened(tmp_path / "b", 32).train_set]
    assert set(other).isdisjoint(keys)
    noise(80, 80, 9).save(tmp_path / "b" / "0.png")
    changed = [sample["key"] for sample in opened(tmp_path / "b").train_set]
    assert changed[0] != keys[0]
    assert changed[1:] == keys[1:]


# -- order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(tmp_path: Path, workers: int) -> None:
    captioned(tmp_path, MIXED)
    options: dict[str, Any] = {"batch_size": 2, "crop": "random", "mirror": True}
    alone, several = opened(tmp_path, **options), opened(tmp_path, num_workers=workers, **options)
    loaders = alone.train_dataloader(), several.train_dataloader()
    for number in (0, 1):
        assert same(epoch(loaders[0], number), epoch(loaders[1], number))


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    captioned(tmp_path, MIXED)
    data, again = opened(tmp_path, batch_size=2), opened(tmp_path, batch_size=2)
    first = epoch(data.train_dataloader(), 0)
    torch.manual_seed(77)
    assert same(first, epoch(again.train_dataloader(), 0))
    prompts = [batch["prompt"] for batch in first]
    assert prompts != [batch["prompt"] for batch in epoch(data.train_dataloader(), 1)]
    assert prompts != [batch["prompt"] for batch in epoch(opened(tmp_path, batch_size=2, seed=1).train_dataloader(), 0)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", [1, 4, 7])
def test_a_resumed_run_gets_the_remaining_batches(tmp_path: Path, consumed: int, workers: int) -> None:
    captioned(tmp_path, MIXED)
    options: dict[str, Any] = {"batch_size": 2, "crop": "random", "mirror": True}
    whole = epoch(opened(tmp_path, **options).train_dataloader(), 3)
    assert len(whole) == 8
    first = opened(tmp_path, **options).train_dataloader()
    first.sampler.set_epoch(3)
    batches = iter(first)
    seen = [next(batches) for _ in range(consumed)]
    second = opened(tmp_path, num_workers=workers, **options).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert same(seen + list(second), whole)


def test_a_position_among_other_buckets_is_refused(tmp_path: Path) -> None:
    captioned(tmp_path, MIXED)
    loader = opened(tmp_path, batch_size=2).train_dataloader()
    next(iter(loader))
    with pytest.raises(DataError, match="buckets="):
        opened(tmp_path, batch_size=2, buckets=False).train_dataloader().load_state_dict(loader.state_dict())
    plain = EmojiStyle(images=13, batch_size=2, resolution=32)
    plain.setup()
    taken = plain.train_dataloader()
    next(iter(taken))
    with pytest.raises(DataError, match="buckets=None"):
        opened(tmp_path, batch_size=2).train_dataloader().load_state_dict(taken.state_dict())


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_global_batches_of_one(tmp_path: Path, world: int) -> None:
    captioned(tmp_path, MIXED)
    alone = epoch(opened(tmp_path, batch_size=2 * world).train_dataloader(), 1)
    ranks = [epoch(of_rank(opened(tmp_path, batch_size=2), rank, world), 1) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert len({tuple(share["image"].shape) for share in shares}) == 1
        assert sorted(whole["prompt"]) == sorted(prompt for share in shares for prompt in share["prompt"])


def test_repeats_lengthen_the_epoch(tmp_path: Path) -> None:
    data = opened(captioned(tmp_path), repeats=4, batch_size=3)
    prompts = [prompt for batch in data.train_dataloader() for prompt in batch["prompt"]]
    assert sorted(prompts) == sorted(TEXTS * 4)
    assert data.samples == 3


# -- what is checked before a run ---------------------------------------------------------------------------


def refused(message: str, root: Any, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        opened(root, **options)


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
    refused(
        r"entry 1: expected text in 'text', got \['a'\]", metadata(tmp_path, [{"file_name": "0.png", "text": ["a"]}])
    )
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
    rows.map(lambda row: {"text": [row["text"]]}).to_parquet(tmp_path / "lists.parquet")
    refused("row 0: expected a string, got list", tmp_path / "lists.parquet")
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
    "16 bits": (lambda: encoded(Image.fromarray(np.full((80, 80), 40000, np.uint16))), "mode I;16, expected"),
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
        (folder / "y.png").write_bytes(encoded(flat(Image.open(io.BytesIO(data))) if name != "turned" else plain))
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


# -- options ------------------------------------------------------------------------------------------------


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
    assert alone.val_dataloader() == alone.test_dataloader() == []
    assert CaptionedImages(str(tmp_path)).prompts() == TEXTS  # before setup


# -- emoji --------------------------------------------------------------------------------------------------


def style(resolution: int = 32, **options: Any) -> EmojiStyle:
    data = EmojiStyle(**options)
    data.setup("fit")
    data.configure(resolution, 4)
    return data


@pytest.mark.parametrize("size", [32, 64])
def test_drawings_on_white_with_their_names(size: int) -> None:
    data = style(size, images=8, batch_size=8)
    (batch,) = list(data.train_dataloader())
    assert batch["image"].shape == (8, 3, size, size)
    assert batch.keys() == {"image", "prompt", "key", *FACTS}
    assert batch["original_size"].tolist() == [[64, 64]] * 8
    assert batch["target_size"].tolist() == [[size, size]] * 8
    assert batch["crop"].tolist() == [[0, 0]] * 8
    assert float(batch["image"].max()) == 1.0
    known = emoji("openmoji", "train", size)
    row = data.rows[0]
    assert torch.equal(data.train_set[0]["image"], known.rgb()[row].float() / 127.5 - 1)
    assert data.train_set[0]["prompt"] == known.names[row].lower()


def test_training_drawings_are_of_all_categories_and_nested() -> None:
    labels = emoji("openmoji", "train").labels
    few, many = style(images=64), style(images=65)
    assert set(few.rows) < set(many.rows)
    counts = labels[few.rows].bincount(minlength=9)
    expected = labels.bincount(minlength=9) * 64 / len(labels)
    assert (counts - expected).abs().max() <= 1
    assert few.rows == style(images=64).rows != style(images=64, seed=1).rows
    assert len(style(images=None).rows) == len(labels) == style(images=None).samples
    assert len(few.train_set) == few.samples == 64
    assert len(style(images=64, repeats=3).train_set) == 192


def test_validation_is_of_other_identities() -> None:
    data = style()
    train = {sample["key"] for sample in data.train_set}
    for part, size in ((data.val_set, len(emoji("openmoji", "val"))), (data.test_set, data.test_images)):
        assert len(part) == size
        assert train.isdisjoint(sample["key"] for sample in part)
    assert len(data.val_prompts()) == len(set(data.val_prompts())) == 8
    assert data.val_prompts() == style(seed=3).val_prompts()
    assert data.val_prompts(4) == data.val_prompts()[:4]
    names = {name.lower() for name in emoji("openmoji", "train").names}
    assert names.isdisjoint(data.val_prompts())
    assert set(data.val_prompts()) <= {sample["prompt"] for sample in data.val_set} <= set(data.prompts())
    assert len(next(iter(data.val_dataloader()))["prompt"]) == 128


def test_captions_change_from_epoch_to_epoch_where_any_may_be_said() -> None:
    data = style(images=16, captions="any")
    epochs = [epoch(data.train_dataloader(), number)[0] for number in range(3)]
    said = [dict(zip(batch["key"], batch["prompt"])) for batch in epochs]
    assert said[0] != said[1] != said[2]
    assert same(epochs, [epoch(data.train_dataloader(), number)[0] for number in range(3)])
    assert {text for one in said for text in one.values()} <= set(data.prompts())
    fixed = style(images=16)
    names = [dict(zip(b["key"], b["prompt"])) for n in range(2) for b in epoch(fixed.train_dataloader(), n)]
    assert names[0] == names[1]


def test_a_resumed_run_on_emoji_gets_the_remaining_batches() -> None:
    whole = epoch(style(captions="any").train_dataloader(), 2)
    first = style(captions="any").train_dataloader()
    first.sampler.set_epoch(2)
    batches = iter(first)
    seen = [next(batches)]
    second = style(captions="any").train_dataloader()
    second.load_state_dict(first.state_dict())
    assert same(seen + list(second), whole)


def test_wrong_emoji_options() -> None:
    with pytest.raises(ConfigError, match=r"style.*'openmojy'.*Did you mean 'openmoji'"):
        EmojiStyle("openmojy")
    with pytest.raises(ConfigError, match="captions is name or any"):
        EmojiStyle(captions="all")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images is a number of training drawings in 1 … 1371, got 5000"):
        EmojiStyle(images=5000)
    with pytest.raises(ConfigError, match="resolution is 32 or 64, got 512"):
        style(512)
