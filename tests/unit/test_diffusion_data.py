"""Images with prompts: every source, keys, one order for any workers and after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmpeft.diffusion.data import EmojiStyle
from mmpeft.diffusion.family import FACTS
from mmpeft.errors import DataError
from tests.unit.captioned_pictures import (
    MIXED,
    SOURCES,
    TEXTS,
    captioned,
    epoch,
    images,
    noise,
    of_rank,
    opened,
    same,
    table,
)


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
